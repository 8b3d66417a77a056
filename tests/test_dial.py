"""A policy moved along one scale, and the controller that holds a cosine on it."""

import math

import pytest
import torch

from lightning_sage import (
    AllTokens,
    GradientMass,
    ImportanceSampling,
    RandomTokens,
    SagePolicy,
    TopFraction,
)
from lightning_sage.watch.dial import Dial, FidelityControl


def settings(policy):
    return [
        next(iter(v for k, v in vars(s).items() if k in ("fraction", "mass")), None)
        for s in (policy.keeper, policy.replayer)
        if s is not None
    ]


@pytest.mark.parametrize(
    "policy",
    [
        SagePolicy(),
        SagePolicy(keep=0.25, replay=None),
        SagePolicy(keep=RandomTokens(0.5), replay=GradientMass(0.9, max_fraction=0.5)),
        SagePolicy.preset("memory"),
        SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.3)),
    ],
    ids=repr,
)
def test_a_policy_moves_up_and_down_and_back(policy):
    dial = Dial(policy)
    assert dial.at(0.0) is policy
    less, more = dial.at(-0.5), dial.at(0.5)
    for below, own, above in zip(settings(less), settings(policy), settings(more), strict=True):
        assert own is None or below < own < above
    down, up = dial.ends()
    lowest = [x for x in settings(dial.at(down)) if x is not None]
    assert min(lowest) == pytest.approx(0.05)
    assert lowest == pytest.approx([x for x in settings(dial.at(down - 5)) if x is not None])
    assert set(settings(dial.at(up))) <= {1.0, None}
    # what is no fraction or mass stays
    for moved in (less, more):
        assert type(moved.keeper) is type(policy.keeper)
        assert getattr(moved.replayer, "max_fraction", 0) == getattr(
            policy.replayer, "max_fraction", 0
        )
        assert getattr(moved.replayer, "uniform", 0) == getattr(policy.replayer, "uniform", 0)


def test_a_step_of_log_odds():
    policy = Dial(SagePolicy(keep=0.2, replay=None)).at(math.log(4))
    # odds of 1 : 4, times 4
    assert policy.keep == TopFraction(0.5)


def test_bounds_hold():
    dial = Dial(SagePolicy(keep=0.25, replay=None), bounds=(0.2, 0.4))
    assert dial.at(-9).keep == TopFraction(0.2)
    assert dial.at(9).keep == TopFraction(0.4)


def test_what_is_below_the_bounds_does_not_go_up_when_turned_down():
    dial = Dial(SagePolicy(keep=0.03, replay=None))
    assert dial.at(-1).keep == TopFraction(0.03)
    assert dial.at(1).keep.fraction > 0.05


@pytest.mark.parametrize("bounds", [(0, 1), (0.5, 0.5), (0.1, 1.1)])
def test_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="0 < least < most <= 1"):
        Dial(SagePolicy(), bounds)


def test_a_policy_with_nothing_to_move_is_refused():
    with pytest.raises(ValueError, match="neither keep=AllTokens"):
        Dial(SagePolicy(keep=AllTokens(), replay=None))


@pytest.mark.parametrize("target", [0, 1, 1.2])
def test_targets_are_refused(target):
    with pytest.raises(ValueError, match="fidelity_target must lie in"):
        FidelityControl(Dial(SagePolicy()), target)


class Plant:
    """A made-up task whose cosine grows with what is kept, with batches that differ."""

    def __init__(self, noise=0.0, drift=0.0):
        self.noise, self.drift, self.steps = noise, drift, 0
        self.draw = torch.Generator().manual_seed(0)

    def cosine(self, policy, batch):
        error = 0.02 / policy.keeper.fraction + self.drift * self.steps
        return 1 - max(error * math.exp(self.noise * batch), 0)

    def run(self, control, steps):
        seen = []
        for _ in range(steps):
            batch = torch.randn((), generator=self.draw).item()
            seen.append(self.cosine(control.policy, batch))
            control.update(seen[-1], lambda policy, batch=batch: self.cosine(policy, batch))
            self.steps += 1
        return seen


@pytest.mark.parametrize("start", [0.06, 0.3, 0.9])
def test_the_first_reading_finds_the_target(start):
    control = FidelityControl(Dial(SagePolicy(keep=start, replay=None)), 0.95)
    Plant().run(control, 1)
    # 1 - 0.02 / 0.4
    assert control.policy.keep.fraction == pytest.approx(0.4, abs=0.06)


def test_the_target_is_held_on_average_over_unlike_batches():
    control = FidelityControl(Dial(SagePolicy(keep=0.1, replay=None)), 0.95)
    seen = Plant(noise=0.7).run(control, 220)[20:]
    assert sum(seen) / len(seen) == pytest.approx(0.95, abs=0.01)


def test_the_target_is_followed_when_the_task_drifts():
    control = FidelityControl(Dial(SagePolicy(keep=0.4, replay=None)), 0.95)
    seen = Plant(drift=1e-4).run(control, 200)
    assert sum(seen[-20:]) / 20 == pytest.approx(0.95, abs=0.005)
    assert control.policy.keep.fraction > 0.5


def test_a_target_out_of_reach_ends_at_the_bound():
    control = FidelityControl(Dial(SagePolicy(keep=0.4, replay=None), (0.1, 0.5)), 0.99)
    Plant().run(control, 40)
    assert control.policy.keep == TopFraction(0.5)
    assert control.at_its_end


def test_a_search_that_cannot_measure_leaves_the_policy():
    control = FidelityControl(Dial(SagePolicy(keep=0.4, replay=None)), 0.95)
    control.update(0.5, lambda _: None)
    assert control.shift == 0


def test_a_resumed_control_does_not_search_again():
    control = FidelityControl(Dial(SagePolicy(keep=0.2, replay=None)), 0.95)
    control.resume(1.0)
    asked = []
    control.update(0.95, asked.append)
    assert not asked
    assert control.shift == pytest.approx(1.0)
