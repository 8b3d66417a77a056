"""The whole engine with the Triton kernels forced on, without a GPU in Triton's interpreter.

In float64, which the interpreter knows, against the same oracle and by the same tolerance as
without. `LIGHTNING_SAGE_KERNELS=triton pytest tests/test_models.py` runs every case this way.
"""

import pytest
import torch

import zoo
from accuracy import assert_gradients_close, relative_error
from lightning_sage import AllTokens, GradientMass, ImportanceSampling, SagePolicy, TopMass
from lightning_sage.ops import attention, dropout, rows, saliency
from steps import oracle_step, policy_of, run, sage_step

KERNELS = {
    "gather": rows._gather_kernel,
    "scatter": rows._scatter_kernel,
    "norms": rows._norms_kernel,
    "pack": rows._pack_kernel,
    "unpack": rows._unpack_kernel,
    "dropout": dropout._dropout_kernel,
    "forward": attention._forward_kernel,
    "queries": attention._queries_kernel,
    "keys": attention._keys_kernel,
    "received": saliency._received_kernel,
}

# every model; padding, attention mode, policy and adaptation take turns
CASES = [
    ("llama", "left", "full", {"keep": 0.3}, {}),
    ("qwen3", None, "salient", {"keep": 0.4, "replay": ImportanceSampling(0.2)}, {}),
    ("mistral", "right", "full", {"keep": TopMass(0.6, min_tokens=2)}, {"lora": True}),
    ("gemma2", "left", "salient", {"keep": 0.3}, {}),
    ("gemma3", "right", "salient", {"keep": AllTokens(), "replay": GradientMass(0.6)}, {}),
    ("gemma3", "left", "kept", {"keep": AllTokens(), "replay": ImportanceSampling(0.3)}, {}),
    ("gpt2", "right", "kept", {"keep": 0.6, "replay": 0.3}, {"attention_dropout": 0.2}),
    ("gpt2", "left", "salient", {"keep": 0.3}, {"dropout": 0.1, "attention_dropout": 0.2}),
    ("gpt_neox", "right", "full", {"keep": 0.3}, {"lora": True, "lora_dropout": 0.05}),
    ("opt", "left", "full", {"keep": AllTokens(), "replay": 0.3}, {}),
    ("bert", "right", "full", {"keep": 0.3}, {"attention_dropout": 0.2}),
    ("modernbert", "left", "full", {"keep": 0.3}, {"lora": True}),
    ("llama-classes", "left", "salient", {"keep": 0.3}, {}),
    ("plain", None, "full", {"keep": 0.3}, {"attention_dropout": 0.2}),
]


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", "triton")


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched."""
    found = set()
    for name, kernel in KERNELS.items():
        run = type(kernel).run

        def counted(self, *args, _run=run, **kwargs):
            found.update(name for name, kernel in KERNELS.items() if kernel is self)
            return _run(self, *args, **kwargs)

        monkeypatch.setattr(kernel, "run", counted.__get__(kernel))
    return found


@pytest.mark.parametrize(
    ("name", "padding", "mode", "fields", "options"), CASES, ids=[case[0] for case in CASES]
)
def test_kernels_match_the_oracle(name, padding, mode, fields, options):
    batch = zoo.make_batch(name, padding, size=3, length=9)
    model = zoo.build(name, **options)
    loss, gradients, kept = sage_step(name, model, batch, policy_of(attention=mode, **fields))
    expected_loss, expected = oracle_step(name, model, batch, kept, mode)
    assert relative_error(loss, expected_loss) <= 1e-12
    assert_gradients_close(gradients, expected, 1e-8)


@pytest.mark.parametrize("mode", ["salient", "full"])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "bert"])
def test_all_tokens_is_dense(name, mode):
    batch, model = zoo.make_batch(name, size=3, length=9), zoo.build(name)
    dense_loss, dense = run(name, model, batch)
    loss, gradients, _ = sage_step(name, model, batch, policy_of(keep=AllTokens(), attention=mode))
    assert loss == dense_loss
    assert_gradients_close(gradients, dense, 1e-10)


def test_every_kernel_is_launched(launched):
    """Else the tests here would test nothing."""
    model = zoo.build("gpt2", dropout=0.1, attention_dropout=0.1, dtype=torch.float32)
    policy = SagePolicy(
        keep=0.5, replay=ImportanceSampling(0.2), attention="full", cache_dtype="int8"
    )
    sage_step("gpt2", model, zoo.make_batch("gpt2", size=2, length=9), policy)
    assert launched == set(KERNELS)


def test_none_is_launched_by_the_reference(launched, monkeypatch):
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", "reference")
    sage_step("gpt2", zoo.build("gpt2"), zoo.make_batch("gpt2"), policy_of(keep=0.3))
    assert not launched
