"""Steps unlike the one that was checked: other lengths, batches, trained parts, checkpoints."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tiny
import zoo
from accuracy import assert_gradients_close, parameter_gradients
from lightning_sage import AllTokens, RandomTokens, ReplayError, install
from oracle import oracle, replayed
from steps import policy_of

ALL = policy_of(keep=AllTokens())
PARTS = policy_of(keep=AllTokens(), blocks=["blocks.*"])


class Rotary(nn.Module):
    """Causal attention that cuts its own table of positions to the length of what it is given."""

    def __init__(self, positions=64, grows=False):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.grows = grows
        self._fill(positions)

    def _fill(self, positions):
        angles = torch.outer(torch.arange(positions).double(), 0.5 ** torch.arange(4).double())
        self.register_buffer("angles", angles.repeat(1, 2), persistent=False)

    def turned(self, x):
        if self.grows and x.shape[2] > len(self.angles):
            self._fill(x.shape[2])
        angles = self.angles[: x.shape[2]]
        # as wide as some counts of rows
        a, b = x[:, :, :, :4], x[:, :, :, 4:]
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class HeadsFirst(nn.Module):
    """Attention by hand with the heads in front of the samples, which one sample does not show."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (torch.cat(y.split(8, -1), 0) for y in self.qkv(x).split(32, -1))
        y = (q @ k.mT / 3).softmax(-1) @ v
        return x + self.out(torch.cat(y.split(len(x), 0), -1))


class Gated(nn.Module):
    """A softmax over 12 experts in front of attention by hand."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.gate, self.experts = nn.Linear(32, 12), nn.Linear(12, 32)

    def forward(self, x):
        x = x + self.experts(self.gate(x).softmax(-1))
        q, k, v = self.qkv(x).split(32, -1)
        return x + self.out((q @ k.mT / 6).softmax(-1) @ v)


class Leaves(HeadsFirst):
    def forward(self, x):
        self.penalty = self.out(x).square().mean()
        return x + self.out(x)


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def step(model, x):
    model.zero_grad()
    out = model(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).tanh().sum().backward()
    return parameter_gradients(model)


def rows(batch, length):
    return torch.randn(batch, length, 32, dtype=torch.float64)


# fewer rows than positions, as many, and more; as many as half a head is wide
@pytest.mark.parametrize(
    ("batch", "length", "kept"), [(2, 60, 22), (2, 60, 32), (3, 60, 24), (2, 8, 2)]
)
@pytest.mark.parametrize("mode", ["salient", "full"])
def test_positions_are_those_of_the_rows_however_many(batch, length, kept, mode):
    model, x = Stack(Rotary(), Rotary()), rows(batch, length)
    policy = policy_of(
        keep=RandomTokens(kept / length), attention=mode, blocks=["blocks.*"], keep_last=False,
        sinks=0, keep_loss_rows=False,
    )  # fmt: skip
    with install(model, policy) as installed:
        sparse = step(model, x)
        replays = replayed(installed.records)
    assert all((r.weights > 0).sum() == batch * kept for r in replays)
    with oracle(model, replays, mode):
        assert_gradients_close(sparse, step(model, x), 1e-8)


def test_a_table_that_would_grow_in_a_replay_is_refused_and_left_alone():
    model, x = Stack(Rotary(grows=True)), rows(2, 60)
    with torch.no_grad():
        before = model(x)
    with install(model, PARTS), pytest.raises(ReplayError, match=r"block 'blocks.0' .*dense"):
        step(model, x)
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_skipping_blocks_are_told_positions_too():
    model, x = Stack(*(Rotary() for _ in range(3))), rows(2, 40)
    policy = policy_of(keep=RandomTokens(0.4), unselected="skip", blocks=["blocks.*"])
    weight = model.blocks[2].qkv.weight

    def loss():
        torch.manual_seed(2)
        return model(x).tanh().sum()

    with install(model, policy):
        loss().backward()
        gradient, moved = weight.grad[40, 3].item(), []
        for h in (1e-5, -1e-5):
            weight.data[40, 3] += h
            moved.append(loss().item())
            weight.data[40, 3] -= h
    assert abs((moved[0] - moved[1]) / 2e-5 - gradient) < 1e-6 * max(1, abs(gradient))


def test_what_is_thawed_later_is_checked_anew():
    """T5's table of biases, which needs the entries of masks once it is trained."""
    model, make_batch = tiny.build("seq2seq", "t5")
    batch = make_batch()

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return parameter_gradients(model)

    tables = [p for n, p in model.named_parameters() if "relative_attention_bias" in n]
    dense = gradients()
    with install(model, ALL):
        for table in tables:
            table.requires_grad_(False)
        gradients()
        for table in tables:
            table.requires_grad_(True)
        assert_gradients_close(gradients(), dense, 1e-6)


@pytest.mark.parametrize("first", [1, 3])
def test_one_sample_vouches_for_no_more(first):
    model = Stack(HeadsFirst())
    with install(model, PARTS):
        if first == 1:
            step(model, rows(1, 9))
        with pytest.raises(ReplayError, match=r"block 'blocks.0' \(HeadsFirst\)"):
            step(model, rows(3, 9))


def test_a_replay_that_misses_an_attention_is_refused():
    """At 12 tokens the softmax over experts could be of attention, and their numbers shift."""
    model = Stack(Gated())
    policy = policy_of(keep=RandomTokens(0.4), blocks=["blocks.*"])
    with install(model, policy):
        step(model, rows(2, 9))
        with pytest.raises(ReplayError, match=r"block 'blocks.0' .*attention calls.*dense_blocks"):
            step(model, rows(2, 12))


def test_what_a_block_leaves_on_itself_is_warned_of():
    with (
        install(model := Stack(Leaves()), PARTS),
        pytest.warns(UserWarning, match=r"Leaves.penalty"),
    ):
        step(model, rows(2, 9))


@pytest.mark.parametrize("around", ["blocks", "model"])
def test_checkpoints_around_blocks_hear_what_the_model_was_told(around):
    """Labels and padding choose the rows that a checkpoint computes again."""
    batch, policy, found = zoo.make_batch("llama"), policy_of(keep=0.5), []
    for checkpoints in (False, True):
        model = zoo.build("llama")
        with install(model, policy) as installed:
            inner = model.model.layers if around == "blocks" else [model.model]
            for module in inner if checkpoints else ():
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
            model(**batch, use_cache=False).loss.backward()
            found.append((parameter_gradients(model), replayed(installed.records)))
    (expected, kept), (gradients, again) = found
    assert_gradients_close(gradients, expected, 1e-12)
    assert [r.name for r in kept] == [r.name for r in again]
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(kept, again, strict=True))
