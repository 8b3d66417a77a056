"""What other kinds of models need on a CUDA device, whose backward pass has a thread of its own."""

import copy

import pytest
import torch

import tiny
from accuracy import assert_as_accurate, one_vector, parameter_gradients, scales
from lightning_sage import AllTokens, SagePolicy, install

pytestmark = [
    pytest.mark.gpu,
    # of hybrids
    pytest.mark.filterwarnings("ignore:.*are left dense"),
]

# sinks, attention by hand, a table of biases, an encoder's states, streams, counted positions
ENTRIES = [
    "causal-lm:gpt_oss", "causal-lm:bloom", "causal-lm:mpt", "masked-lm:deberta-v2", "seq2seq:t5",
    "seq2seq:bart", "causal-lm:gemma3n_text", "causal-lm:llama4_text", "causal-lm:qwen3_next",
]  # fmt: skip


def on_gpu(entry):
    model, make_batch = tiny.build(*entry.split(":"))
    batch = {key: value.cuda() for key, value in make_batch().items()}
    return model.cuda(), batch


def gradients_of(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return parameter_gradients(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entry", ENTRIES)
def test_all_tokens_are_as_accurate_as_dense(entry, dtype):
    exact_model, batch = on_gpu(entry)
    model = copy.deepcopy(exact_model).to(dtype)
    exact = gradients_of(exact_model, batch)
    dense = gradients_of(model, batch)
    with install(model, SagePolicy(keep=AllTokens(), replay=None)):
        sage = gradients_of(model, batch)
    scale = scales(exact)
    vectors = (one_vector(gradients, scale) for gradients in (sage, dense, exact))
    assert_as_accurate(*vectors)


def test_router_logits_are_collected_on_the_thread_of_the_backward_pass():
    model, batch = on_gpu("causal-lm:mixtral")
    model = model.float()
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    dense = gradients_of(model, batch)
    with install(model, SagePolicy(keep=AllTokens(), replay=None)):
        sage = gradients_of(model, batch)
    scale = scales(dense)
    assert (one_vector(sage, scale) - one_vector(dense, scale)).abs().max() < 1e-3
