"""What the blocks of one forward share, and nothing beyond: facts, masks, plans, counts."""

import weakref

import pytest
import torch
from torch import nn

import zoo
from accuracy import assert_gradients_close, parameter_gradients
from lightning_sage import AllTokens, SagePolicy, TopFraction, install
from lightning_sage.selections import Selection
from steps import policy_of

ALL = policy_of(keep=AllTokens())


class Towers(nn.Module):
    """Calls its model twice in one forward, as two-tower and contrastive models do."""

    def __init__(self, calls):
        super().__init__()
        self.lm, self.calls = zoo.build("llama"), calls

    def forward(self, ids):
        return sum(self.calls(self.lm, ids))


def gradients(model, ids):
    model.zero_grad()
    model(ids).backward()
    return parameter_gradients(model)


def first_padded(lm, ids):
    mask = torch.ones_like(ids)
    mask[:, ids.shape[1] // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    yield lm(input_ids=ids, attention_mask=mask, labels=labels).loss
    yield lm(input_ids=ids).logits.square().mean()


def one_mask_for_both(lm, ids):
    mask = torch.ones_like(ids)
    mask[:, ids.shape[1] // 2 :] = 0
    # padding learns nothing, and has no loss here
    valid = mask.bool().clone()
    yield lm(input_ids=ids, attention_mask=mask).logits[valid].square().mean()
    mask.fill_(1)
    yield lm(input_ids=ids, attention_mask=mask).logits.square().mean()


@pytest.mark.parametrize("calls", [first_padded, one_mask_for_both])
def test_a_second_call_is_not_told_what_the_first_was(calls):
    model, ids = Towers(calls), torch.randint(3, 60, (3, 8))
    dense = gradients(model, ids)
    with install(model, ALL) as installed:
        gradients(model, ids)
        sparse = gradients(model, ids)
        first, second = installed.records[::2], installed.records[1::2]
        assert all(torch.equal(record.kept, record.valid) for record in first)
        assert not any(record.kept.all() for record in first)
        assert all(record.kept.all() for record in second)
    assert_gradients_close(sparse, dense, 1e-10)


def test_labels_of_one_call_make_no_loss_rows_of_another():
    model, ids = Towers(first_padded), torch.randint(3, 60, (3, 8))
    policy = policy_of(keep=0.25, sinks=0, keep_last=False)
    alone = zoo.build("llama")
    with install(model, policy) as installed:
        model(ids)
        beside = [record.kept for record in installed.records[1::2]]
    with install(alone, policy) as installed:
        alone(input_ids=ids)
        assert all(
            torch.equal(a, record.kept) for a, record in zip(beside, installed.records, strict=True)
        )


class MaskInEachBlock(nn.Module):
    """Four blocks, each of which makes the mask anew."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(zoo.PlainBlock() for _ in range(4))
        self.made = []

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_masks_are_not_held_for_blocks_that_have_their_own(monkeypatch):
    model, made, alive = MaskInEachBlock().double(), [], []

    def attend(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        made.append(weakref.ref(mask))
        alive.append(sum(ref() is not None for ref in made))
        y = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask
        )
        return x + self.out(y.transpose(1, 2).flatten(2))

    monkeypatch.setattr(zoo.PlainBlock, "forward", attend)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    with install(model, policy_of(keep=0.3, blocks=["blocks.*"])):
        model(x)
        made.clear(), alive.clear()
        model(x)
    assert alive == [1] * 4


class Adaptive(TopFraction):
    """More rows in each block than in the one before."""

    calls = 0

    def keep(self, scores, valid, priority, noise):
        Adaptive.calls += 1
        return TopFraction(min(1.0, 0.2 * Adaptive.calls)).keep(scores, valid, priority, noise)

    def replay(self, norms, saliency, valid, noise):
        return TopFraction(0.1).replay(norms, saliency, valid, noise)


def test_a_subclass_makes_no_promise_that_it_did_not_write():
    assert TopFraction.fixed
    assert not Adaptive.fixed
    assert Adaptive(0.5).replay_count(100, 100) is None
    assert Selection.replay_count(Adaptive(0.5), 3, 3) is None
    model, batch = zoo.build("llama"), zoo.make_batch("llama", None)
    Adaptive.calls = 0
    policy = SagePolicy(keep=Adaptive(0.5), replay=None, sinks=0, keep_loss_rows=False)
    with install(model, policy) as installed:
        model(**batch).loss.backward()
        counts = [int(record.kept.sum()) for record in installed.records]
        cached = [record.replayed.sum() for record in installed.records]
    assert counts[0] < counts[1]
    assert counts == cached


@pytest.mark.parametrize("mode", ["salient", "full"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_eager_attention_under_autocast(name, mode):
    """Queries and keys leave rotary embeddings wider than the values."""
    model, batch = zoo.build(name, dtype=torch.float32), zoo.make_batch(name)
    model.set_attn_implementation("eager")
    found = []
    for policy in (None, policy_of(keep=AllTokens(), attention=mode)):
        installed = install(model, policy) if policy is not None else None
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        found.append(parameter_gradients(model))
        if installed is not None:
            installed.remove()
    assert_gradients_close(found[1], found[0], 0.1)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_nan_query_surfaces(kernels, monkeypatch):
    """Through attention that is ours, which it is where its weights are dropped."""
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", kernels)
    model = zoo.build("llama", attention_dropout=0.1, dtype=torch.float32)
    batch = zoo.make_batch("llama", size=2, length=7)
    with install(model, ALL):
        model(**batch).loss.backward()
        model.model.layers[0].self_attn.q_proj.weight.data.fill_(torch.nan)
        assert model(**batch).loss.isnan()


@pytest.mark.parametrize(
    ("fraction", "length", "rows"), [(0.6, 25, 15), (0.15, 100, 15), (0.3, 50, 15), (0.31, 50, 16)]
)
def test_a_fraction_is_what_it_says(fraction, length, rows):
    valid = torch.ones(2, length, dtype=torch.bool)
    scores = torch.rand(2, length, dtype=torch.float64)
    chosen = TopFraction(fraction).keep(scores, valid, valid.long() * 0, scores)
    assert chosen.rows.sum(1).tolist() == [rows, rows]
