"""Selections keep what they promise; a policy that cannot be meant is refused."""

import itertools

import pytest
import torch

from lightning_sage import (
    AllTokens,
    GradientMass,
    ImportanceSampling,
    LossFirst,
    RandomTokens,
    SagePolicy,
    TopFraction,
    TopMass,
)
from lightning_sage.policy import as_policy
from lightning_sage.sampling import _inclusion

B, T = 3, 20


@pytest.fixture
def batch():
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, 13:] = False
    valid[2] = False
    scores = torch.rand(B, T, dtype=torch.float64).masked_fill(~valid, 0.0)
    scores /= scores.sum(-1, keepdim=True).clamp(min=1e-9)
    return scores, valid


def keep(selection, scores, valid, priority=None, u=0.37):
    priority = torch.zeros_like(valid, dtype=torch.long) if priority is None else priority
    noise = torch.rand(valid.shape, dtype=torch.float64)
    noise[0, 0] = u
    return selection.keep(scores, valid, priority, noise)


@pytest.mark.parametrize(
    "selection",
    [
        TopFraction(0.3),
        TopMass(0.5),
        TopMass(0.9, max_fraction=0.2),
        RandomTokens(0.3),
        LossFirst(0.3),
        AllTokens(),
    ],
    ids=repr,
)
def test_padding_is_never_kept_and_priority_always(selection, batch):
    scores, valid = batch
    policy = SagePolicy(sinks=2)
    priority = policy.priority(valid, torch.zeros_like(valid))
    rows = keep(selection, scores, valid, priority).rows
    assert not rows[~valid].any()
    assert rows[0, [0, 1, 19]].all()
    assert rows[1, [0, 1, 12]].all()
    assert not rows[2].any()


def test_top_fraction_keeps_the_highest_scored(batch):
    scores, valid = batch
    rows = keep(TopFraction(0.25), scores, valid).rows
    assert rows.sum(1).tolist() == [5, 4, 0]  # rounded up
    assert scores[0][rows[0]].min() > scores[0][~rows[0]].max()


def test_loss_rows_come_first_and_share_the_budget_by_score(batch):
    scores, valid = batch
    loss_rows = torch.zeros_like(valid)
    loss_rows[0, 5:15] = True
    priority = SagePolicy(sinks=0, keep_last=False).priority(valid, loss_rows)
    rows = keep(TopFraction(0.25), scores, valid, priority).rows[0]
    assert rows[5:15].sum() == 5
    assert scores[0][rows].min() > scores[0, 5:15][~rows[5:15]].max()
    rows = keep(TopFraction(0.6), scores, valid, priority).rows[0]
    assert rows[5:15].all()
    assert rows.sum() == 12


def test_loss_first_is_top_fraction_where_loss_rows_fit(batch):
    scores, valid = batch
    loss_rows = torch.zeros_like(valid)
    loss_rows[0, 12:15] = True
    for settings in ({}, {"keep_loss_rows": False}):
        priority = SagePolicy(**settings).priority(valid, loss_rows)
        alike = [keep(kind(0.4), scores, valid, priority).rows for kind in (LossFirst, TopFraction)]
        assert torch.equal(*alike)


def test_loss_first_draws_each_loss_row_as_often_where_they_do_not_fit(batch):
    scores, valid = batch
    loss_rows = torch.zeros_like(valid)
    loss_rows[0, 5:15] = True
    priority = SagePolicy(sinks=0).priority(valid, loss_rows)
    torch.manual_seed(0)
    draws = 2000
    counts = sum(keep(LossFirst(0.2), scores, valid, priority).rows[0].int() for _ in range(draws))
    # a fifth of 20 is four of the ten, and the last token on top
    assert counts[~loss_rows[0]].tolist() == [0] * 9 + [draws]
    assert (counts[loss_rows[0]] / draws - 0.4).abs().max() < 0.05


def test_top_mass_keeps_the_fewest_that_hold_the_mass(batch):
    scores, valid = batch
    rows = keep(TopMass(0.6, min_tokens=1), scores, valid).rows
    for b in range(2):
        kept = scores[b][rows[b]]
        assert kept.sum() >= 0.6
        assert kept.sum() - kept.min() < 0.6
    assert keep(TopMass(1e-9, min_tokens=6), scores, valid).rows.sum(1).tolist() == [6, 6, 0]
    assert keep(TopMass(1.0), scores, valid).rows.equal(valid)
    assert keep(TopMass(0.8, min_tokens=99), scores, valid).rows.equal(valid)


@pytest.mark.parametrize("budget", [0, 1, 7, 30, 49, 50, 80])
def test_inclusion_probabilities_sum_to_the_budget(budget):
    weights = torch.rand(50, dtype=torch.float64) ** 6 + 0.01
    p = _inclusion(weights, torch.tensor(float(budget)))
    assert p.sum().item() == pytest.approx(min(budget, 50))
    assert ((p >= 0) & (p <= 1)).all()
    light = p < 1
    ratio = (p / weights)[light]
    assert light.sum() < 2 or ratio.max() - ratio.min() <= 1e-9 * ratio.max()


def test_inclusion_with_no_rows():
    assert _inclusion(torch.zeros(0, dtype=torch.float64), torch.tensor(3.0)).shape == (0,)


def every_draw(selection, norms, count):
    """Weights by every draw, with the draw's share of the numbers that systematic sampling uses."""
    drawn = [selection.draw(norms, count, torch.full_like(norms, u / 997)) for u in range(997)]
    p = torch.stack(drawn).amax(0).reciprocal()
    # certain rows come first
    ends = p[(p < 1).long().argsort(stable=True)].cumsum(0)
    cuts = torch.cat([ends % 1, torch.tensor([0.0, 1.0])]).sort()[0]
    for low, high in itertools.pairwise(cuts):
        if high - low > 1e-12:
            yield (
                float(high - low),
                selection.draw(norms, count, (low + high) / 2 * torch.ones_like(norms)),
            )


def test_a_draw_is_the_gradient_on_average_with_the_variance_of_its_probabilities():
    """Exactly: over every interval of the one random number that systematic sampling uses."""
    norms = torch.rand(20, dtype=torch.float64) ** 3 + 0.01
    draws = list(every_draw(ImportanceSampling(0.4), norms, 8))
    assert all((weights > 0).sum() == 8 for _, weights in draws)
    mean = sum(share * weights for share, weights in draws)
    torch.testing.assert_close(mean, torch.ones_like(norms))
    p = 1 / torch.stack([weights for _, weights in draws]).amax(0)
    light = p < 1 - 1e-9
    ratio = (p / norms)[light]
    assert light.any()
    assert ratio.max() - ratio.min() < 1e-9 * ratio.max()
    squared = sum(share * (weights * norms).square().sum() for share, weights in draws)
    torch.testing.assert_close(squared, (norms.square() / p).sum())
    # no more than a fraction of rows can have: equal chances have the most
    assert squared < norms.square().sum() * 20 / 8


def test_nothing_is_drawn_where_no_more_rows_have_a_gradient():
    norms = torch.tensor([0.0, 2.0, 0.0, 1e-30, 3.0], dtype=torch.float64)
    weights = ImportanceSampling(0.5).draw(norms, 3, torch.full_like(norms, 0.5))
    assert weights.tolist() == [0, 1, 0, 1, 1]
    infinite = torch.tensor([float("inf"), *[1.0] * 9], dtype=torch.float64)
    for u in (0.0, 0.3, 0.99):
        weights = ImportanceSampling(0.2).draw(infinite, 2, torch.full_like(infinite, u))
        assert weights[0] == 1


def test_replay_by_gradient():
    norms = torch.tensor([5.0, 1, 1, 3, 0, 0], dtype=torch.float64)
    noise = torch.full((6,), 0.5, dtype=torch.float64)
    assert TopFraction(0.25).replay(norms, None, 8, noise).rows.tolist() == [1, 0, 0, 1, 0, 0]
    assert GradientMass(0.8).replay(norms, None, 8, noise).rows.tolist() == [1, 0, 0, 1, 0, 0]
    capped = GradientMass(1.0, max_fraction=0.25).replay(norms, None, 8, noise)
    assert capped.rows.tolist() == [1, 0, 0, 1, 0, 0]
    saliency = torch.tensor([0, 0, 0, 0, 1.0, 0], dtype=torch.float64)
    assert TopFraction(0.25).replay(norms, saliency, 8, noise).rows.tolist() == [1, 0, 0, 0, 1, 0]
    drawn = ImportanceSampling(0.25).replay(norms, None, 8, noise)
    assert drawn.rows.tolist() == [1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "fraction must lie in"),
        ({"keep": 1.5}, "1 means every valid token"),
        ({"keep": float("nan")}, "fraction must lie in"),
        ({"replay": -1.0}, "fraction must lie in"),
        ({"keep": GradientMass()}, "use it as replay"),
        ({"replay": TopMass()}, "use it as keep"),
        ({"replay": AllTokens()}, "use it as keep"),
        ({"saliency": "entropy"}, "saliency must be one of attention"),
        ({"queries": "first"}, "queries must be one of auto"),
        ({"attention": "none"}, "attention must be one of kept"),
        ({"unselected": "drop"}, "unselected must be one of identity"),
        ({"sinks": -1}, "sinks must be a number of tokens, got -1"),
        ({"unselected": "skip", "attention": "full"}, "use attention='salient'"),
        ({"keep": ImportanceSampling(0.5)}, "use it as replay, not as keep"),
    ],
    ids=str,
)
def test_a_policy_that_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SagePolicy(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopMass(0), "mass must lie in"),
        (lambda: TopMass(0.5, min_tokens=0), "min_tokens must be at least 1"),
        (lambda: TopMass(max_fraction=2), "max_fraction must lie in"),
        (lambda: GradientMass(1.1), "mass must lie in"),
    ],
)
def test_a_selection_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dense_blocks():
    assert SagePolicy(dense_blocks=2).left_dense(5) == {0, 1}
    assert SagePolicy(dense_blocks=-2).left_dense(5) == {3, 4}
    assert SagePolicy(dense_blocks=(0, -1)).left_dense(5) == {0, 4}
    assert SagePolicy().left_dense(5) == set()
    with pytest.raises(ValueError, match="the model has 5 blocks"):
        SagePolicy(dense_blocks=(5,)).left_dense(5)
    with pytest.raises(ValueError, match="leaves none"):
        SagePolicy(dense_blocks=5).left_dense(5)


def test_presets_have_names():
    assert as_policy(None) == as_policy("balanced") == SagePolicy.preset("balanced")
    assert as_policy(SagePolicy()) == SagePolicy()
    for name in ("balanced, safe", "Memory", ""):
        with pytest.raises(ValueError, match="choose among memory, balanced, speed, paper"):
            as_policy(name)


def test_policies_compare_and_print_by_value():
    assert SagePolicy(keep=TopMass(0.5)) == SagePolicy(keep=TopMass(0.5))
    assert SagePolicy(keep=TopMass(0.5)) != SagePolicy(keep=TopFraction(0.5))
    assert len({SagePolicy(), SagePolicy()}) == 1
    assert "TopMass(mass=0.8, min_tokens=8, max_fraction=None)" in repr(SagePolicy())


def test_rows_always_in_take_no_place_from_loss_rows():
    valid = torch.ones(1, 20, dtype=torch.bool)
    scores = torch.full((1, 20), 0.05, dtype=torch.float64)
    loss_rows = torch.arange(20)[None] >= 15
    priority = SagePolicy(sinks=2).priority(valid, loss_rows)
    assert priority[0].tolist() == [2, 2, *[0] * 13, 1, 1, 1, 1, 3]
    rows = keep(TopFraction(0.25), scores, valid, priority).rows[0]
    assert rows.nonzero().flatten().tolist() == [0, 1, 15, 16, 17, 18, 19]
    everywhere = SagePolicy(sinks=2).priority(valid, valid)
    assert keep(TopFraction(0.25), scores, valid, everywhere).rows.sum() == 5
