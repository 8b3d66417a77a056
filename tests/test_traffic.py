"""What a step costs besides the model: waits for the device, lingering tensors, room for pairs."""

import cProfile
import gc
import pstats
import warnings
import weakref

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from lightning_sage import (
    AllTokens,
    GradientMass,
    ImportanceSampling,
    LossFirst,
    RandomTokens,
    SagePolicy,
    TopMass,
    install,
    ops,
)
from lightning_sage.engine import masks
from lightning_sage.engine.drops import Seed
from lightning_sage.ops.reference import attention
from syncs import syncs

FIXED = {
    "keep0.25": SagePolicy(keep=0.25, replay=None),
    "random": SagePolicy(keep=RandomTokens(0.3), replay=None),
    "all-replay0.25": SagePolicy(keep=AllTokens(), replay=0.25),
    "keep0.5-replay0.25": SagePolicy(keep=0.5, replay=0.25),
    "keep0.25-idle-draw": SagePolicy(keep=0.25, replay=ImportanceSampling(0.9)),
    "drawn": SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.3)),
    "keep-drawn": SagePolicy(keep=LossFirst(0.4), replay=None),
    "skip": SagePolicy(keep=0.25, replay=None, unselected="skip"),
    "int8": SagePolicy(keep=0.25, replay=0.1, cache_dtype="int8"),
    "full": SagePolicy(keep=0.25, replay=None, attention="full"),
}
ADAPTIVE = {
    "default": SagePolicy(),
    "mass": SagePolicy(keep=TopMass(0.6), replay=None),
    "gradient-mass": SagePolicy(keep=0.6, replay=GradientMass(0.7)),
}


@pytest.fixture
def _on_kernels(monkeypatch):
    # the way a GPU goes: PyTorch's fused attention on a CPU is told counts by the host
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", "triton")
    # a draw from the CPU's generator is no wait for a GPU
    monkeypatch.setattr(Seed, "__int__", lambda seed: 5)


def waits(name, policy, layers, padding):
    """What asked in forward and backward, after a first step that checks more."""
    transformers = pytest.importorskip("transformers")
    case = zoo.MODELS[name]
    fields = case.config | {"num_hidden_layers": layers, "layer_types": None}
    config = transformers.AutoConfig.for_model(case.model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    batch = zoo.make_batch(name, padding, size=2, length=8)
    with install(model, policy):
        model(**batch).loss.backward()
        with syncs() as forward:
            loss = model(**batch).loss
        with syncs() as backward:
            loss.backward()
    return len(forward), len(backward)


def a_block_waits(name, policy, padding):
    few, many = (waits(name, policy, layers, padding) for layers in (1, 2))
    return many[0] - few[0], many[1] - few[1]


@pytest.mark.usefixtures("_on_kernels")
@pytest.mark.parametrize("padding", ["left", None])
@pytest.mark.parametrize("policy", FIXED.values(), ids=FIXED)
def test_no_block_waits_where_counts_are_fixed(policy, padding):
    assert a_block_waits("llama", policy, padding) == (0, 0)


@pytest.mark.usefixtures("_on_kernels")
@pytest.mark.parametrize("policy", ADAPTIVE.values(), ids=ADAPTIVE)
def test_a_block_waits_once_where_counts_are_not(policy):
    forward, backward = a_block_waits("llama", policy, "right")
    assert 0 < forward + backward <= 1


@pytest.mark.usefixtures("_on_kernels")
def test_masks_are_looked_at_once_a_forward():
    assert a_block_waits("mistral", FIXED["keep0.25"], "left") == (0, 0)


def test_the_judge_of_waits_can_tell():
    x = torch.tensor([0.0, 1.0, 2.0])
    with syncs() as found:
        x[x > 1]
        x.nonzero()
        bool((x > 1).any())
        x.tolist()
        torch.equal(x, x)
        x[torch.ones(1, dtype=torch.int64)]
        x.masked_fill(x > 1, 0.0)
    assert sorted(found) == ["equal", "index", "local_scalar_dense", "nonzero", "tolist"]


def calls(model, batch):
    """Calls of Python functions in one step: what keeps a GPU fed, or does not."""
    for _ in range(2):
        model(**batch).loss.backward()
    profile = cProfile.Profile()
    profile.enable()
    model(**batch).loss.backward()
    profile.disable()
    return pstats.Stats(profile).total_calls


def test_a_step_makes_fewer_python_calls_than_gradient_checkpointing():
    model, batch = zoo.build("llama", lora=True), zoo.make_batch("llama", None)
    with install(model, SagePolicy(keep=0.25, replay=None)):
        sparse = calls(model, batch)
    dense = calls(model, batch)
    with warnings.catch_warnings():
        # transformers 5.2x renamed it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = calls(model, batch)
    assert dense < sparse < checkpointed


class Made(TorchDispatchMode):
    """Every storage made inside, its bytes by a weak reference, and the op that made the largest.

    A view of what was there before makes none.
    """

    def __init__(self):
        super().__init__()
        self.made, self.largest, self.op = [], 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            storage = x.untyped_storage()
            if storage.data_ptr() not in given:
                self.made.append(weakref.ref(x))
                if storage.nbytes() > self.largest:
                    self.largest, self.op = storage.nbytes(), func.__name__
        return out

    def alive(self):
        """Bytes of what was made and is still there."""
        storages = [x.untyped_storage() for x in (ref() for ref in self.made) if x is not None]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _tensors(tree):
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("mode", ["salient", "full"])
@pytest.mark.parametrize(
    ("name", "kernels"),
    [("llama", "auto"), ("llama", "triton"), ("gemma2", "auto"), ("gpt2", "auto")],
)
def test_dense_tensors_are_gone_before_the_next_block(name, kernels, mode, monkeypatch):
    """Freed by their last reference, not by the collector: the next block may need the room."""
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", kernels)
    model, batch = zoo.build(name, dtype=torch.float32), zoo.make_batch(name, size=3, length=64)
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    policy = SagePolicy(keep=0.1, sinks=1, keep_loss_rows=False, replay=None, attention=mode)
    left = []
    with install(model, policy) as installed:
        # the first step checks, too
        model(**batch).loss.backward()
        watch = Made()

        def begin(*_):
            watch.__enter__()

        def end(*_):
            watch.__exit__(None, None, None)
            left.append(watch.alive())

        handles = [
            blocks[0].register_forward_pre_hook(begin),
            blocks[1].register_forward_pre_hook(end),
        ]
        gc.disable()
        try:
            loss = model(**batch).loss
        finally:
            gc.enable()
            for handle in handles:
                handle.remove()
        record = installed.records[0]
    del loss
    hidden = 3 * 64 * 32 * 4
    assert len(left) == 1
    # besides: a byte or eight for each token and fact, and the masks that the forward shares
    assert 0 < left[0] < record.cached_bytes + 1.8 * hidden


def long_llama(T):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=T,
        use_cache=False,
    )
    ids = torch.randint(3, 64, (1, T))
    labels = torch.where(torch.arange(T) < T - T // 8, -100, ids)
    model = transformers.LlamaForCausalLM(config).train()
    return model, {"input_ids": ids, "labels": labels}


def test_a_step_of_32768_tokens_holds_no_pairs():
    T = 32768
    model, batch = long_llama(T)
    with install(model, SagePolicy(keep=0.1)) as installed, Made() as made:
        model(**batch).loss.backward()
    assert installed.records[0].replayed.any()
    # the logits of the vocabulary are the largest: 64 numbers a token
    assert made.largest <= 64 * T * 4 < T * T / 64, made.op


@pytest.mark.parametrize("mode", ["salient", "full"])
def test_padding_makes_no_room_for_pairs(mode, monkeypatch):
    """Besides the mask that the model makes, and what PyTorch's attention makes of it."""
    T = 2048
    monkeypatch.setattr(attention, "CHUNK", 2**14)
    monkeypatch.setattr(masks, "ROWS", 8)
    model, batch = long_llama(T)
    valid = torch.ones(1, T, dtype=torch.long)
    valid[:, :100] = 0
    made, fused = Made(), ops.fused_attention

    def uncounted(*args):
        with torch.utils._python_dispatch._disable_current_modes():
            return fused(*args)

    monkeypatch.setattr(ops, "fused_attention", uncounted)
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", "reference")
    model.model.layers[0].register_forward_pre_hook(lambda *_: made.__enter__() and None)
    model.model.layers[0].register_forward_hook(
        lambda *_: made.__exit__(None, None, None), always_call=True
    )
    with install(model, SagePolicy(keep=0.1, replay=None, attention=mode)) as installed:
        loss = model(**batch, attention_mask=valid).loss
        with made:
            loss.backward()
    assert installed.records[0].replayed.any()
    assert 0 < made.largest <= 64 * T * 8 < T * T / 2, made.op
