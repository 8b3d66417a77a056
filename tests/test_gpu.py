"""The engine on a CUDA device: gradients, the fused backward, memory as the allocator sees it."""

import pytest
import torch

import zoo
from accuracy import assert_as_accurate, loss_and_gradients, one_vector, scales
from lightning_sage import AllTokens, SagePolicy, install
from lightning_sage.ops import stock

pytestmark = pytest.mark.gpu

MODELS = ["llama", "mistral", "gemma3", "gpt2", "bert", "plain"]


def on_gpu(name, dtype):
    padding = "right" if "right" in zoo.MODELS[name].paddings else None
    batch = {key: value.cuda() for key, value in zoo.make_batch(name, padding).items()}
    return zoo.build(name, dtype=dtype).cuda(), batch


def named(name):
    return ["blocks.*"] if name == "plain" else None


@pytest.mark.parametrize("attention", ["salient", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_all_tokens_are_as_accurate_as_dense(name, dtype, attention):
    model, batch = on_gpu(name, dtype)
    exact_model, _ = on_gpu(name, torch.float64)
    _, exact = loss_and_gradients(exact_model, batch)
    _, dense = loss_and_gradients(model, batch)
    policy = SagePolicy(keep=AllTokens(), replay=None, attention=attention, blocks=named(name))
    with install(model, policy):
        _, sage = loss_and_gradients(model, batch)
    scale = scales(exact)
    vectors = (one_vector(gradients, scale) for gradients in (sage, dense, exact))
    assert_as_accurate(*vectors)


@pytest.mark.parametrize("policy", [SagePolicy(), SagePolicy(keep=0.3, attention="full")], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_step_runs_and_is_finite(name, policy):
    model, batch = on_gpu(name, torch.float32)
    fields = {**vars(policy), "blocks": named(name)}
    with install(model, SagePolicy(**fields)):
        loss, gradients = loss_and_gradients(model, batch)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_fused_backward_serves_on_this_device(dtype):
    assert stock._agrees("cuda", dtype)


def test_memory_between_forward_and_backward_falls():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        use_cache=False,
    )
    model = transformers.LlamaModel(config).cuda().bfloat16().train()
    ids = torch.randint(0, 256, (4, 1024), device="cuda")

    def held():
        before = torch.cuda.memory_allocated()
        hidden = model(input_ids=ids).last_hidden_state
        used = torch.cuda.memory_allocated() - before
        hidden.sum().backward()
        model.zero_grad(set_to_none=True)
        return used

    dense = held()
    with install(model, SagePolicy(keep=0.25, queries="last")) as installed:
        held()  # the first step checks, too
        sage = held()
        cached = sum(record.cached_bytes for record in installed.records)
    outside = 6 * 4 * 1024 * 1024 * 2  # embedding, output and final norm, twice for good measure
    assert sage <= cached + outside
    assert sage < 0.15 * dense
