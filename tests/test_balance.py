"""Budgets of rows: every selection fits them, gradients stay what is promised, ranks stay level."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist

import zoo
from accuracy import assert_gradients_close
from lightning_sage import (
    AllTokens,
    GradientMass,
    ImportanceSampling,
    LossFirst,
    RandomTokens,
    TopFraction,
    TopMass,
    install,
)
from lightning_sage.balance import Agreement, Budget, fit_kept, fit_replayed
from lightning_sage.selections import share
from oracle import replayed
from processes import ranks
from steps import oracle_step, policy_of, run


class Fixed(Agreement):
    """A budget that nobody had to be asked for."""

    def __init__(self, fraction):
        super().__init__("mean", torch.device("cpu"))
        self.fraction = fraction

    def budget(self, valid):
        return None if self.fraction is None else Budget(share(self.fraction, valid), valid)


POLICIES = {
    "all": {"keep": AllTokens()},
    "mass": {"keep": TopMass(0.6)},
    "fraction": {"keep": 0.4},
    "random": {"keep": RandomTokens(0.4)},
    "loss first": {"keep": LossFirst(0.4)},
    "mass then gradient": {"keep": TopMass(0.6), "replay": GradientMass(0.7)},
    "all then gradient": {"keep": AllTokens(), "replay": 0.4},
    "all then drawn": {"keep": AllTokens(), "replay": ImportanceSampling(0.4)},
    "mass then drawn": {"keep": TopMass(0.6), "replay": ImportanceSampling(0.4)},
}


@pytest.mark.parametrize("mode", ["salient", "full"])
@pytest.mark.parametrize("fraction", [0.15, 0.45, 0.8, 1.0])
@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_is_kept_to_a_row(name, fraction, mode):
    policy = policy_of(**POLICIES[name], attention=mode)
    model, batch = zoo.build("llama"), zoo.make_batch("llama")
    valid = int(batch["attention_mask"].sum())
    with install(model, policy) as installed:
        installed.agreement = Fixed(fraction)
        _, sparse = run("llama", model, batch)
        rows = replayed(installed.records)
        for record in installed.records:
            # all means all
            expected = valid if name == "all" else share(fraction, valid)
            assert int(record.replayed.sum()) == expected
            assert not (record.replayed & ~record.kept).any()
            assert not (record.kept & ~record.valid).any()
    _, exact = oracle_step("llama", model, batch, rows, mode)
    assert_gradients_close(sparse, exact, 1e-10)


@pytest.mark.parametrize("replay", [None, ImportanceSampling(0.4)])
@pytest.mark.parametrize("fraction", [0.3, 0.8])
def test_blocks_that_skip_keep_to_the_budget_too(fraction, replay):
    """The chooser keeps it, or its own rows where they are more and some of them are replayed."""
    policy = policy_of(keep=TopMass(0.6), replay=replay, unselected="skip", keep_loss_rows=False)
    model, batch = zoo.build("llama"), zoo.make_batch("llama")
    valid = int(batch["attention_mask"].sum())
    with install(model, policy) as installed:
        installed.agreement = Fixed(fraction)
        model(**batch).loss.backward()
        assert [int(r.replayed.sum()) for r in installed.records] == [share(fraction, valid)] * 2


@pytest.mark.parametrize("name", POLICIES)
def test_what_would_be_replayed_is_what_is_replayed_without_a_budget(name):
    model, batch = zoo.build("llama"), zoo.make_batch("llama")
    policy = policy_of(**POLICIES[name])
    found = {}
    for fraction in (None, 0.9):
        with install(model, policy) as installed:
            installed.agreement = agreement = Fixed(fraction)
            run("llama", model, batch)
            found[fraction] = agreement.demand()
            free = sum(int(r.replayed.sum()) for r in installed.records)
        if fraction is None:
            valid = sum(int(r.valid.sum()) for r in installed.records)
            assert found[None] == pytest.approx(free / valid)
    assert found[None] == (1 if name == "all" else found[None])
    if "gradient" not in name or name == "all then gradient":
        # among more kept rows, and other gradients behind them, a mass is held by other rows
        assert found[0.9] == pytest.approx(found[None], abs=0.05)


def test_the_best_rows_go_first():
    """Less than it would keep are the best of these; more are these and the best of the others."""
    model, batch = zoo.build("llama"), zoo.make_batch("llama", length=40)
    policy = policy_of(keep=TopMass(0.5), keep_loss_rows=False)
    kept = []
    for fraction in (0.2, None, 0.95):
        with install(model, policy) as installed:
            installed.agreement = Fixed(fraction)
            run("llama", model, batch)
            # the first block alone has the same input each time
            kept.append(installed.records[0].kept)
            priority = policy.priority(installed.records[0].valid, torch.zeros_like(kept[0]))
    less, own, more = kept
    assert less.sum() < own.sum() < more.sum()
    assert not (less & ~own).any()
    assert not (own & ~more).any()
    assert less[priority >= 2].all()


def test_a_row_without_finite_gradient_is_replayed_whatever_the_budget():
    model, batch = zoo.build("llama"), zoo.make_batch("llama")
    for replay in (0.5, GradientMass(0.9), ImportanceSampling(0.5)):
        with install(model, policy_of(keep=AllTokens(), replay=replay)) as installed:
            installed.agreement = Fixed(0.1)
            last = model.model.layers[-1]
            handle = last.register_full_backward_pre_hook(poisoned)
            model(**batch).loss.backward()
            handle.remove()
            assert installed.records[-1].replayed.flatten()[7]
            assert last.mlp.down_proj.weight.grad.isnan().any()


def poisoned(_module, gradients):
    first = gradients[0].clone()
    first.flatten(0, 1)[7] = torch.nan
    return (first, *gradients[1:])


def test_gradients_are_ranked_as_the_selection_ranks_them():
    """By incoming gradient and saliency, whatever the budget."""
    norms = torch.tensor([5.0, 4, 3, 2], dtype=torch.float64)
    saliency = torch.tensor([0, 0.1, 0.1, 0.8], dtype=torch.float64)
    for replayer in (TopFraction(0.5), GradientMass(0.6)):
        given = norms, saliency, 4, norms
        for count in (1, 2, 3):
            found = fit_replayed(replayer, replayer.replay(*given), Budget(count, 4), given)
            assert found.rows[[3, 1, 0, 2][:count]].all()
            assert found.rows.sum() == count


def test_copies_are_alone():
    model = zoo.build("llama")
    with install(model, policy_of(keep=0.5)) as installed:
        installed.agreement = Fixed(0.5)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            session = other.model.layers[0].__dict__["_sage"].session
            assert session.agreement is None
        assert installed.agreement is not None


def agreed(rank, mode, tokens, wanted):
    agreement = Agreement(mode, torch.device("cpu"))
    agreement.start(torch.tensor(tokens[rank]), 3 + rank)
    first = agreement.budget(tokens[rank])
    agreement.note(torch.tensor(wanted[rank]), tokens[rank])
    agreement.note(wanted[rank], tokens[rank])
    agreement.start(tokens[rank] * 2, 5)
    return first, agreement.budget(tokens[rank] * 2), agreement.loss_tokens(), agreement.demand()


@pytest.mark.parametrize(("mode", "rows"), [("mean", [34, 34, 34]), ("max", [60, 60, 60])])
def test_ranks_agree(mode, rows):
    tokens, wanted = [40, 50, 60], [10, 11, 30]
    found = ranks(3, agreed, mode, tokens, wanted)
    for rank, (first, budget, counts, demand) in enumerate(found):
        # nothing is known before a first batch
        assert first is None
        assert tuple(budget) == (rows[rank], tokens[rank] * 2)
        assert counts == (5, 15)
        assert demand == pytest.approx(wanted[rank] / tokens[rank])


def test_a_rank_with_few_tokens_replays_all_of_them():
    found = ranks(2, agreed, "max", [8, 50], [4, 40])
    assert [tuple(budget) for _, budget, _, _ in found] == [(16, 16), (80, 100)]


def test_one_exchange_a_batch_however_many_blocks():
    calls = []

    def count(rank):
        reduce = dist.all_reduce
        dist.all_reduce = lambda *args, **kwargs: calls.append(1) or reduce(*args, **kwargs)
        model = zoo.build("llama")
        policy = policy_of(keep=TopMass(0.3, min_tokens=1), keep_loss_rows=False)
        with install(model, policy) as installed:
            installed.agreement = agreement = Agreement("mean", torch.device("cpu"))
            spread = []
            for step in range(3):
                batch = zoo.make_batch("llama", length=24 + 6 * rank, seed=step)
                agreement.start(batch["attention_mask"].sum(), 0)
                model(**batch).loss.backward()
                spread.append([int(r.replayed.sum()) for r in installed.records])
        return len(calls), spread

    (first, one), (second, other) = ranks(2, count)
    assert first == second == 3
    assert one[0] != other[0]
    assert one[1:] == other[1:]


def test_a_budget_cuts_loss_rows_by_the_draw_and_fills_by_score():
    torch.manual_seed(0)
    scores, noise = torch.rand(2, 1, 10, dtype=torch.float64)
    valid, priority = torch.ones(1, 10, dtype=torch.bool), torch.zeros(1, 10, dtype=torch.long)
    priority[0, :4] = 1
    given, keeper = (scores, valid, priority, noise), LossFirst(0.4)
    own = keeper.keep(*given)
    less = fit_kept(keeper, own, Budget(2, 10), True, given).rows[0]
    assert less.nonzero().flatten().tolist() == sorted(noise[0, :4].topk(2).indices.tolist())
    more = fit_kept(keeper, own, Budget(6, 10), True, given).rows[0]
    assert more[:4].all()
    filled = sorted((4 + scores[0, 4:].topk(2).indices).tolist())
    assert more[4:].nonzero().flatten().add(4).tolist() == filled
