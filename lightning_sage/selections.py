"""Selections: what turns scores into kept rows, and incoming gradients into replayed ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Chosen(NamedTuple):
    """Rows chosen by a selection: bool, the shape of the scores."""

    rows: Tensor


def checked_fraction(name: str, value: float) -> float:
    """`value`, if it is a share of the tokens; else a ValueError."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value}; 1 means every valid token")
    return float(value)


class Selection:
    """Turns scores into rows; the base of everything `keep` and `replay` accept.

    Attributes:
        needs_scores: Whether `keep` looks at the saliency.
        random: Whether `keep` or `replay` looks at the noise.
        draws: Whether it has :func:`Selection.draw`.
        draws_loss_rows: Whether it does so for loss-bearing rows alone. Where nothing tells which
            they are (no labels, `queries="all"`, a tower, an encoder in front of a decoder), the
            noise that it is given are the scores, and no probability is asked for.
        saliency_in_replay: Whether `replay` looks at the saliency; where rows that are not replayed
            learn as keys (`attention="kept"` of a policy), it is given None.
        fixed: A promise that the number of rows that `keep` chooses follows from padding and
            priorities alone, so that a GPU need not be asked for it in every block. It does not
            pass to a subclass with a `keep` of its own, nor :func:`Selection.replay_count` with a
            `replay`, nor :func:`Selection.at` with either.
    """

    needs_scores = True
    random = False
    draws = False
    draws_loss_rows = False
    saliency_in_replay = False
    fixed = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "keep" in vars(cls) and "fixed" not in vars(cls):
            cls.fixed = False
        if "replay" in vars(cls) and "replay_count" not in vars(cls):
            setattr(cls, "replay_count", Selection.replay_count)  # noqa: B010 - a method
        if vars(cls).keys() & {"keep", "replay"} and "at" not in vars(cls):
            setattr(cls, "at", Selection.at)  # noqa: B010

    def keep(self, scores: Tensor, valid: Tensor, priority: Tensor, noise: Tensor) -> Chosen:
        """Choose the rows to keep, per sample.

        Args:
            scores: ``[B, T]`` float64, non-negative, summing to 1 per sample.
            valid: ``[B, T]`` bool, False on padding; never chosen there.
            priority: ``[B, T]`` int64, see :func:`SagePolicy.priority`: rows of 2 and 3 are always
                in, rows of 1 and 3 bear loss.
            noise: ``[B, T]`` float64, uniform in [0, 1), the same in all blocks of a forward.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be used as keep")

    def probability(self, rows: Tensor, valid: Tensor, priority: Tensor) -> Tensor | None:
        """``[B, T]`` float64: the chance that each of the chosen `rows` had; None: no weights.

        Where a backward pass begins, the gradient of a kept row is multiplied by 1/p, and that of
        the other rows of a sample in which any p is below 1 is set to zero.
        """
        return None

    def key(self, scores: Tensor, priority: Tensor, noise: Tensor) -> Tensor:
        """``[B, T]`` in [0, 1], by what `keep` ranks rows of one priority; arguments as there."""
        return noise if self.random else scores

    def replay(self, norms: Tensor, saliency: Tensor | None, valid: int, noise: Tensor) -> Chosen:
        """Choose among the kept rows of a whole batch.

        Args:
            norms: ``[N]`` float64, norm of the incoming gradient of each kept row; infinite where
                it is not finite, and then the row must be chosen, so that a NaN surfaces.
            saliency: ``[N]`` float64, the scores of the forward pass, where they were computed.
            valid: Number of valid tokens in the batch; fractions refer to it.
            noise: ``[N]`` float64, uniform in [0, 1).
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be used as replay")

    def draw(self, norms: Tensor, count: int, noise: Tensor) -> Tensor:
        """``[N]`` float64, of mean 1: weights of the gradient where a backward pass begins.

        Asked for once, as weights in every block would multiply along the depth: for kept rows of
        these norms, of which every block is to replay `count`. 1 where a norm is infinite.
        """
        raise NotImplementedError(f"{type(self).__name__} does not draw")

    def replay_count(self, kept: int, valid: int) -> int | None:
        """How many of `kept` rows :func:`Selection.replay` chooses; None where that depends."""
        return None

    def at(self, fraction: float) -> Selection | None:
        """The same for another share of the batch; None where rows can be cut or added by score."""
        return None

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).items()))


def share(fraction: float, tokens: int) -> int:
    """`fraction` of the tokens, rounded up; 0.1 of 30 is 3, whatever a float makes of it."""
    return math.ceil(round(fraction * tokens, 6))


def top(key: Tensor, count: Tensor | int) -> Tensor:
    """True at the `count` largest entries of each row of `key`; ties go to the earlier one."""
    order = key.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    positions = torch.arange(key.shape[-1], device=key.device)
    rank.scatter_(-1, order, positions.expand_as(order))
    return rank < (count if isinstance(count, int) else count.unsqueeze(-1))


def ranked(scores: Tensor, priority: Tensor, eligible: Tensor) -> Tensor:
    """Scores in [0, 1] lifted by 2 a step of priority; ineligible rows last."""
    return (scores + 2 * priority).masked_fill(~eligible, -1.0)


def _budget(fraction: float, valid: Tensor, priority: Tensor) -> Tensor:
    """Rows a sample may keep: its fraction, rounded up; rows always in take none from loss rows."""
    # rounded down by a hair, as `share` does: 0.15 of 100 is 15
    share = (valid.sum(-1).double() * fraction - 5e-7).ceil().long()
    loss_rows = (priority % 2 == 1).sum(-1).minimum(share)
    needed = loss_rows + (priority == 2).sum(-1)
    return share.maximum(needed).maximum((priority >= 2).sum(-1))


# by priorities, which all blocks of a forward share: what else of a choice they share
_plans = WeakTensorKeyDictionary()


def _plan(fraction: float, valid: Tensor, priority: Tensor) -> tuple[Tensor, Tensor]:
    """What lifts scores by their priority, and which ranks are in: ``[B, T]`` each."""
    plans = _plans.setdefault(priority, {})
    if fraction not in plans or plans[fraction][0] is not valid:
        lift = (2.0 * priority).double().masked_fill(~valid, float("-inf"))
        ranks = torch.arange(valid.shape[1], device=valid.device)
        plans[fraction] = valid, lift, ranks < _budget(fraction, valid, priority).unsqueeze(-1)
    _, lift, ranks = plans[fraction]
    return lift, ranks


class PerSample(Selection):
    """A `fraction` of each sample's valid tokens, rounded up: by priority, then the largest keys.

    Args:
        fraction: In (0, 1].
    """

    fixed = True

    def __init__(self, fraction: float) -> None:
        self.fraction = checked_fraction("fraction", fraction)

    def keep(self, scores: Tensor, valid: Tensor, priority: Tensor, noise: Tensor) -> Chosen:
        """See :func:`Selection.keep`."""
        lift, ranks = _plan(self.fraction, valid, priority)
        key = self.key(scores, priority, noise) + lift
        order = key.argsort(dim=-1, descending=True, stable=True)
        return Chosen(torch.zeros_like(valid).scatter_(-1, order, ranks))


class TopFraction(PerSample):
    """The highest-scored `fraction` of each sample's valid tokens, rounded up.

    As `replay`: of the batch's valid tokens, by incoming gradient norm plus, if given, saliency.
    """

    saliency_in_replay = True

    def replay(self, norms: Tensor, saliency: Tensor | None, valid: int, noise: Tensor) -> Chosen:
        """See :func:`Selection.replay`."""
        count = self.replay_count(len(norms), valid)
        return Chosen(top(gradient_scores(norms, saliency), count))

    def replay_count(self, kept: int, valid: int) -> int:
        """See :func:`Selection.replay_count`."""
        return min(kept, share(self.fraction, valid))


class TopMass(Selection):
    """The fewest tokens that together hold `mass` of a sample's saliency (Kim & Lee, section 3).

    Args:
        mass: Share of the saliency to keep, in (0, 1].
        min_tokens: At least so many valid tokens of each sample.
        max_fraction: At most so much of each sample's valid tokens; None for no limit.
    """

    def __init__(
        self, mass: float = 0.8, min_tokens: int = 8, max_fraction: float | None = None
    ) -> None:
        self.mass = checked_fraction("mass", mass)
        if min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, got {min_tokens}")
        self.min_tokens = min_tokens
        self.max_fraction = (
            None if max_fraction is None else checked_fraction("max_fraction", max_fraction)
        )

    def keep(self, scores: Tensor, valid: Tensor, priority: Tensor, noise: Tensor) -> Chosen:
        """See :func:`Selection.keep`."""
        count = _mass_count(scores, self.mass).clamp(min=self.min_tokens)
        kept = (top(scores.masked_fill(~valid, -1.0), count) | (priority > 0)) & valid
        if self.max_fraction is not None:
            budget = _budget(self.max_fraction, valid, priority)
            kept = kept & top(ranked(scores, priority, kept), budget)
        return Chosen(kept)


class AllTokens(Selection):
    """Every valid token: the dense gradient, unless `replay` leaves some out."""

    needs_scores = False
    fixed = True

    def keep(self, scores: Tensor, valid: Tensor, priority: Tensor, noise: Tensor) -> Chosen:
        """See :func:`Selection.keep`."""
        return Chosen(valid)

    def at(self, fraction: float) -> AllTokens:
        """See :func:`Selection.at`: all are all."""
        return self


class GradientMass(Selection):
    """The fewest kept rows that together hold `mass` of the score; for `replay` only.

    The score of a row is its share of the incoming gradient norms plus, if given, of the saliency.

    Args:
        mass: Share of the score to replay, in (0, 1].
        max_fraction: At most so much of the batch's valid tokens; None for no limit.
    """

    saliency_in_replay = True

    def __init__(self, mass: float = 0.95, max_fraction: float | None = None) -> None:
        self.mass = checked_fraction("mass", mass)
        self.max_fraction = (
            None if max_fraction is None else checked_fraction("max_fraction", max_fraction)
        )

    def replay(self, norms: Tensor, saliency: Tensor | None, valid: int, noise: Tensor) -> Chosen:
        """See :func:`Selection.replay`."""
        scores = gradient_scores(norms, saliency)
        finite = scores.isfinite()
        count = _mass_count(scores.where(finite, 0.0), self.mass) + (~finite).sum()
        if self.max_fraction is not None:
            count = count.clamp(max=share(self.max_fraction, valid))
        return Chosen(top(scores, count))


def running_sum(x: Tensor) -> Tensor:
    """`x` summed along its last axis up to each entry.

    CUDA sums floats in no fixed order, which `torch.use_deterministic_algorithms` refuses: then it
    is done on the host.
    """
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return x.cpu().cumsum(-1).to(x.device)
    return x.cumsum(-1)


def _mass_count(scores: Tensor, mass: float) -> Tensor:
    """How many of the largest scores, along the last axis, hold `mass` of the sum."""
    total = running_sum(scores.sort(dim=-1, descending=True).values)
    # a hair less than the share, so that rounding never asks for one token more
    return (total < mass * (1 - 1e-12) * total[..., -1:]).sum(-1) + 1


def gradient_scores(norms: Tensor, saliency: Tensor | None) -> Tensor:
    """Shares of gradient and saliency; infinite where the norm is."""
    finite = norms.isfinite()
    scores = norms / norms.where(finite, 0.0).sum().clamp(min=1e-300)
    scores = scores.where(finite, float("inf"))
    return scores if saliency is None else scores + saliency / saliency.sum().clamp(min=1e-300)
