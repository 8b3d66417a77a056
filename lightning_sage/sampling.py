"""Importance sampling: rows drawn with known probability, which weights can undo."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sage.selections import Chosen, Selection, checked_fraction, share


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
        budget = (valid.sum() * self.fraction).ceil()
        certain = torch.zeros_like(valid)
        for rows in (priority >= 2, priority > 0):
            certain = torch.where(rows.sum() <= budget / 2, rows, certain)
        mean = scores.sum() / valid.sum().clamp(min=1)
        weights = scores / mean.clamp(min=1e-300) + self.uniform
        weights = weights.masked_fill(~valid | certain, 0.0)
        probability = _inclusion(weights.flatten(), budget - certain.sum()).view_as(weights)
        probability = torch.where(certain, 1.0, probability)
        return self._draw(probability, noise)

    def replay(self, norms: Tensor, saliency: Tensor | None, valid: int, noise: Tensor) -> Chosen:
        """See :func:`Selection.replay`."""
        finite = norms.isfinite()
        own = norms.where(finite, 0.0)
        weights = own / own.mean().clamp(min=1e-300) + self.uniform
        # filled on the device: a copy to it would be waited for
        budget = own.new_full((), share(self.fraction, valid))
        probability = _inclusion(weights, budget)
        return self._draw(probability.where(finite, 1.0), noise)

    def replay_count(self, kept: int, valid: int) -> int | None:
        """See :func:`Selection.replay_count`."""
        return kept if kept <= share(self.fraction, valid) else None

    def _draw(self, probability: Tensor, noise: Tensor) -> Chosen:
        ends = probability.flatten().cumsum(0) + noise.flatten()[:1]
        starts = ends - probability.flatten()
        # rounding may hide the step of a certain row
        drawn = (ends.floor() > starts.floor()).view_as(probability) | (probability >= 1)
        return Chosen(drawn & (probability > 0), probability)


def _inclusion(weights: Tensor, budget: Tensor) -> Tensor:
    """``min(1, c * weights)`` summing to `budget`: tries every number of certain rows at once."""
    ordered = weights.sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)
    certain = torch.arange(len(weights), device=weights.device)
    scale = (budget - certain).clamp(min=0) / rest.clamp(min=1e-300)
    # the first count at which the largest remaining row need not be certain
    fits = scale * ordered <= 1
    scale = scale[fits.long().argmax()] if len(weights) else scale.sum()
    probability = (weights * scale).clamp(max=1)
    return torch.where(budget >= (weights > 0).sum(), (weights > 0).to(weights), probability)
