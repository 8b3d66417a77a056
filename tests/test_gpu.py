"""The engine on a CUDA device: gradients, waits for the device, memory as the allocator sees it.

The kernels' own tests (test_kernels.py) run on the device that there is.
"""

import itertools

import pytest
import torch

import zoo
from accuracy import assert_as_accurate, loss_and_gradients, one_vector, scales
from lightning_sage import AllTokens, GradientMass, ImportanceSampling, SagePolicy, TopMass, install
from lightning_sage.ops import stock
from steps import told_blocks

pytestmark = pytest.mark.gpu

MODELS = ["llama", "mistral", "gemma2", "gemma3", "gpt2", "bert", "modernbert", "plain"]


def on_gpu(name, dtype, **options):
    padding = "right" if "right" in zoo.MODELS[name].paddings else None
    batch = {key: value.cuda() for key, value in zoo.make_batch(name, padding).items()}
    return zoo.build(name, dtype=dtype, **options).cuda(), batch


@pytest.fixture(params=["auto", "triton", "reference"])
def _kernels(request, monkeypatch):
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", request.param)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("attention", ["salient", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_all_tokens_are_as_accurate_as_dense(name, dtype, attention):
    model, batch = on_gpu(name, dtype)
    exact_model, _ = on_gpu(name, torch.float64)
    _, exact = loss_and_gradients(exact_model, batch)
    _, dense = loss_and_gradients(model, batch)
    policy = SagePolicy(keep=AllTokens(), replay=None, attention=attention)
    with install(model, told_blocks(name, policy)):
        _, sage = loss_and_gradients(model, batch)
    scale = scales(exact)
    vectors = (one_vector(gradients, scale) for gradients in (sage, dense, exact))
    assert_as_accurate(*vectors)


@pytest.mark.parametrize("mode", ["salient", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_agree_with_the_reference_on_the_same_rows(name, mode, monkeypatch):
    """Attention dropout too: the mask is the same whoever draws it."""
    model, batch = on_gpu(name, torch.float32, attention_dropout=0.2)
    policy = told_blocks(name, SagePolicy(keep=0.4, replay=None, attention=mode))
    found = []
    for kernels in ("reference", "auto"):
        monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", kernels)
        torch.manual_seed(1)
        with install(model, policy) as installed:
            _, gradients = loss_and_gradients(model, batch)
            found.append((gradients, [record.kept for record in installed.records]))
    (expected, rows), (gradients, same_rows) = found
    assert all(torch.equal(a, b) for a, b in zip(rows, same_rows, strict=True))
    scale = scales(expected)
    error = one_vector(gradients, scale) - one_vector(expected, scale)
    assert error.abs().max() < 1e-3


@pytest.mark.parametrize(
    "policy",
    [
        SagePolicy(),
        SagePolicy(keep=0.3, attention="full", cache_dtype="int8"),
        SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.3), cache_dtype="fp8"),
    ],
    ids=["default", "full-int8", "drawn-fp8"],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_step_runs_and_is_finite(name, policy):
    model, batch = on_gpu(name, torch.float32)
    with install(model, told_blocks(name, policy)):
        loss, gradients = loss_and_gradients(model, batch)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_fused_backward_serves_on_this_device(dtype):
    assert stock._agrees("cuda", dtype)


@pytest.mark.parametrize(
    ("policy", "waits"),
    [
        (SagePolicy(keep=0.25, replay=None), 0),
        (SagePolicy(keep=AllTokens(), replay=0.25), 0),
        (SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.3)), 0),
        (SagePolicy(keep=0.25, replay=None, cache_dtype="int8", attention="full"), 0),
        (SagePolicy(keep=TopMass(0.7), replay=None), 1),
        (SagePolicy(keep=0.6, replay=GradientMass(0.7)), 1),
    ],
    ids=["keep", "replay", "drawn", "packed", "mass", "gradient-mass"],
)
def test_how_often_a_block_waits_for_the_device(policy, waits, recwarn):
    counts = []
    for layers in (2, 6):
        model = llama(layers)
        ids = torch.randint(0, 256, (2, 64), device="cuda")
        with install(model, policy):
            # the first step checks, compiles and looks at the batch
            for _ in range(2):
                model(input_ids=ids).last_hidden_state.sum().backward()
            recwarn.clear()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model(input_ids=ids).last_hidden_state.sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(w.message) for w in recwarn))
    assert (counts[1] - counts[0]) / 4 <= waits


def llama(layers, width=256, **fields):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        use_cache=False,
        **fields,
    )
    return transformers.LlamaModel(config).cuda().bfloat16().train()


def test_memory_between_forward_and_backward_falls():
    model = llama(8, 1024)
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


def test_each_block_frees_its_dense_tensors():
    """The allocator's count grows from block to block by what is cached, and nothing else."""
    model = llama(6, 1024)
    ids = torch.randint(0, 256, (4, 1024), device="cuda")
    with install(model, SagePolicy(keep=0.25, queries="last")) as installed:
        model(input_ids=ids).last_hidden_state.sum().backward()
        model.zero_grad(set_to_none=True)
        at = []
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda *_: at.append(torch.cuda.memory_allocated()))
        hidden = model(input_ids=ids).last_hidden_state  # noqa: F841 - holds the graph
        cached = [record.cached_bytes for record in installed.records]
    # the first block's facts are shared by all
    grown = [b - a for a, b in itertools.pairwise(at[1:])]
    record = 3 * ids.numel() + 64 * 512  # marks of rows, and the allocator's granularity
    assert all(g <= c + record for g, c in zip(grown, cached[1:], strict=False)), grown


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("attention", ["salient", "full"])
def test_a_step_of_32768_tokens(attention, padded):
    T = 32768
    model = llama(2, 1024, max_position_embeddings=T)
    ids = torch.randint(0, 256, (1, T), device="cuda")
    mask = torch.ones_like(ids)
    if padded:
        mask[:, :1000] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    policy = SagePolicy(keep=0.25, queries="last", attention=attention)
    with install(model, policy) as installed:
        for _ in range(2):
            model(**batch).last_hidden_state[:, -1].sum().backward()
            model.zero_grad(set_to_none=True)
        assert installed.records[0].replayed.any()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**batch).last_hidden_state[:, -1].sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
    # the model's own mask, and the bias that PyTorch's attention makes of it
    own = 4 * T * T if padded else 0
    assert peak < own + 40 * T * 1024 * 2
