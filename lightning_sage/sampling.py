"""Selections that draw: by importance, which weights undo, or each row as likely as another."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sage.selections import (
    Chosen,
    PerSample,
    Selection,
    checked_fraction,
    running_sum,
    share,
)


class RandomTokens(PerSample):
    """A uniformly random `fraction` of each sample's valid tokens (TokenTune, 2024).

    Biased like any plain choice: nothing is reweighted.
    """

    needs_scores = False
    random = True


class LossFirst(PerSample):
    """A `fraction` of each sample's valid tokens: loss-bearing ones, then the highest-scored.

    Where the loss-bearing rows alone exceed the fraction, those that are kept are drawn, by every
    block anew, each as likely as another: training with them ends better than with the
    highest-scored of them, which :class:`TopFraction` keeps (examples/evidence.md). It keeps what
    `TopFraction` does where they fit, where nothing tells which rows bear loss, and under a policy
    without `keep_loss_rows`. Not for `replay`.
    """

    random = True
    draws_loss_rows = True

    def key(self, scores: Tensor, priority: Tensor, noise: Tensor) -> Tensor:
        """See :func:`Selection.key`: scores choose only among rows without loss."""
        return torch.where(priority == 1, noise, scores)


class ImportanceSampling(Selection):
    """Rows drawn with known probability and reweighted by its inverse: unbiased, where Top* is not.

    With w the score (saliency for `keep`, incoming gradient norm for `replay`) over its mean plus
    `uniform`, a row is in with probability ``p = min(1, c w)``, c such that p sums to `fraction` of
    the batch's valid tokens. Sampling is systematic: heavy rows are certain, light ones share the
    rest.
    The branch gradient of a drawn row is multiplied by 1/p.

    Args:
        fraction: Share of the batch's valid tokens to draw, in (0, 1].
        uniform: Floor of the weights, in units of their mean; bounds 1/p for rows of no weight.
    """

    random = True
    fixed = True

    def __init__(self, fraction: float, uniform: float = 0.1) -> None:
        self.fraction = checked_fraction("fraction", fraction)
        if not uniform > 0:
            raise ValueError(f"uniform must be positive, got {uniform}: rows of no weight need it")
        self.uniform = float(uniform)

    def keep(self, scores: Tensor, valid: Tensor, priority: Tensor, noise: Tensor) -> Chosen:
        """See :func:`Selection.keep`; the budget is the batch's, not each sample's.

        Rows of a priority are certain, so far as they leave half of the budget to be drawn: else
        the other rows would never be in, or with a weight beyond all bounds.
        """
        budget = (valid.sum().double() * self.fraction - 5e-7).ceil()
        certain = torch.zeros_like(valid)
        for rows in (priority >= 2, priority > 0):
            certain = torch.where(rows.sum() <= budget / 2, rows, certain)
        mean = scores.sum() / valid.sum().clamp(min=1)
        weights = scores / mean.clamp(min=1e-300) + self.uniform
        weights = weights.masked_fill(~valid | certain, 0.0)
        probability = _inclusion(weights.flatten(), budget - certain.sum()).view_as(weights)
        probability = torch.where(certain, 1.0, probability)
        return _draw(probability, noise, budget)

    def replay(self, norms: Tensor, saliency: Tensor | None, valid: int, noise: Tensor) -> Chosen:
        """See :func:`Selection.replay`."""
        finite = norms.isfinite()
        own = norms.where(finite, 0.0)
        weights = own / own.mean().clamp(min=1e-300) + self.uniform
        # filled on the device: a copy to it would be waited for
        budget = own.new_full((), share(self.fraction, valid))
        return _draw(_inclusion(weights.where(finite, 1e30), budget), noise, budget)

    def replay_count(self, kept: int, valid: int) -> int:
        """See :func:`Selection.replay_count`."""
        return min(kept, share(self.fraction, valid))

    def at(self, fraction: float) -> ImportanceSampling:
        """See :func:`Selection.at`."""
        return ImportanceSampling(fraction, self.uniform)


def _draw(probability: Tensor, noise: Tensor, budget: Tensor) -> Chosen:
    """Systematic sampling: exactly `budget` rows, or all of those that have a probability.

    Points at distance 1 along the summed probabilities choose the rows they fall on. Certain rows
    come first, where sums are exact; of the others none is long enough for two points.

    Args:
        probability: Any shape, summing to `budget`, or all ones and zeros where that is more.
        noise: The shape of `probability`; its first number is used.
        budget: Whole number, on the device.
    """
    flat = torch.where(probability >= 1 - 1e-9, 1.0, probability).flatten()
    order = ((flat > 0).long() + (flat < 1).long() * (flat > 0)).argsort(stable=True)
    ends = running_sum(flat[order])
    point = torch.arange(len(flat), device=flat.device)
    # rounding may leave the last point behind the last end
    at = torch.searchsorted(ends, point + noise.flatten()[:1], right=True).clamp(max=len(flat) - 1)
    # points beyond the budget choose a row behind the last
    rows = torch.where(point < budget, order[at], len(flat))
    chosen = flat.new_zeros(len(flat) + 1, dtype=torch.bool).index_fill(0, rows, True)[:-1]
    chosen = (chosen & (flat > 0)).view_as(probability)
    return Chosen(chosen, flat.view_as(probability))


def _inclusion(weights: Tensor, budget: Tensor) -> Tensor:
    """``min(1, c * weights)`` summing to `budget`: tries every number of certain rows at once."""
    ordered = weights.sort(descending=True).values
    rest = running_sum(ordered.flip(0)).flip(0)
    certain = torch.arange(len(weights), device=weights.device)
    scale = (budget - certain).clamp(min=0) / rest.clamp(min=1e-300)
    # the first count at which the largest remaining row need not be certain
    fits = scale * ordered <= 1
    # gathered: indexing by a number would wait for it
    scale = scale.gather(0, fits.long().argmax(0, keepdim=True)) if len(weights) else scale
    probability = (weights * scale).clamp(max=1)
    return torch.where(budget >= (weights > 0).sum(), (weights > 0).to(weights), probability)
