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
    top,
)


class RandomTokens(PerSample):
    """A uniformly random `fraction` of each sample's valid tokens (TokenTune, 2024).

    The same ones in all blocks of a forward; loss-bearing ones first, where the policy says so. The
    gradient of those that were drawn is weighted by one over their share, where the backward pass
    begins.
    """

    needs_scores = False
    random = True

    def probability(self, rows: Tensor, valid: Tensor, priority: Tensor) -> Tensor:
        """See :func:`Selection.probability`."""
        return _share(rows, valid & (priority == 1)) * _share(rows, valid & (priority == 0))


class LossFirst(PerSample):
    """A `fraction` of each sample's valid tokens: loss-bearing ones, then the highest-scored.

    Where the loss-bearing rows alone exceed the fraction, those that are kept are drawn, each as
    likely as another and the same in all blocks, and their gradient is weighted by one over their
    share where the backward pass begins: the dense gradient on average, where the highest-scored of
    them, which :class:`TopFraction` keeps, are a bias. It keeps what `TopFraction` does where they
    fit, where nothing tells which rows bear loss, and under a policy without `keep_loss_rows`. Not
    for `replay`.
    """

    random = True
    draws_loss_rows = True

    def probability(self, rows: Tensor, valid: Tensor, priority: Tensor) -> Tensor:
        """See :func:`Selection.probability`."""
        return _share(rows, priority == 1)

    def key(self, scores: Tensor, priority: Tensor, noise: Tensor) -> Tensor:
        """See :func:`Selection.key`: scores choose only among rows without loss."""
        return torch.where(priority == 1, noise, scores)


class ImportanceSampling(Selection):
    """The rows of largest gradient, of those that were drawn where the backward pass began.

    For `replay` only. Rows are drawn once in a backward pass, at the first block that it reaches: a
    row with a gradient of norm w is in with probability ``p = min(1, c w)``, c such that p sums to
    the rows to be replayed. The gradient of a drawn row is multiplied by 1/p, that of the others
    set to zero: what the blocks are given is the dense gradient on average, and is the dense
    gradient where no more rows have one. Each block then replays the rows with the largest
    gradients, without weights.

    Weights in every block, as drawing anew in each would need, multiply along the depth: after 30
    blocks the gradient is noise. A choice of the largest gradients alone leaves the same tokens out
    in every step, those that the model predicts well, and does not learn to keep them.

    Args:
        fraction: Share of the batch's valid tokens to replay in each block, in (0, 1].
    """

    draws = True

    def __init__(self, fraction: float) -> None:
        self.fraction = checked_fraction("fraction", fraction)

    def draw(self, norms: Tensor, count: int, noise: Tensor) -> Tensor:
        """See :func:`Selection.draw`."""
        # filled on the device: a copy to it would be waited for
        budget = norms.new_full((), count)
        return _drawn(_inclusion(norms.where(norms.isfinite(), 1e30), budget), noise, budget)

    def replay(self, norms: Tensor, saliency: Tensor | None, valid: int, noise: Tensor) -> Chosen:
        """See :func:`Selection.replay`."""
        return Chosen(top(norms, share(self.fraction, valid)))

    def replay_count(self, kept: int, valid: int) -> int:
        """See :func:`Selection.replay_count`."""
        return min(kept, share(self.fraction, valid))


def _share(rows: Tensor, group: Tensor) -> Tensor:
    """``[B, T]`` float64: of a sample's rows in `group` the share in `rows`; 1 for other rows."""
    share = (rows & group).sum(-1, keepdim=True) / group.sum(-1, keepdim=True).clamp(min=1)
    # of a sample that has room for none of them, no row is one of them
    return torch.where(rows & group, share.double(), 1.0)


def _drawn(probability: Tensor, noise: Tensor, budget: Tensor) -> Tensor:
    """Weights by systematic sampling: 1/p of exactly `budget` rows, or of all with a probability.

    Points at distance 1 along the summed probabilities choose the rows they fall on. Certain rows
    come first, where sums are exact; of the others none is long enough for two points.

    Args:
        probability: ``[N]``, summing to `budget`, or all ones and zeros where that is more.
        noise: ``[N]``; its first number is used.
        budget: Whole number, on the device.
    """
    p = torch.where(probability >= 1 - 1e-9, 1.0, probability)
    order = ((p > 0).long() + (p < 1).long() * (p > 0)).argsort(stable=True)
    ends = running_sum(p[order])
    point = torch.arange(len(p), device=p.device)
    # rounding may leave the last point behind the last end
    at = torch.searchsorted(ends, point + noise[:1], right=True).clamp(max=len(p) - 1)
    # points beyond the budget choose a row behind the last
    rows = torch.where(point < budget, order[at], len(p))
    chosen = p.new_zeros(len(p) + 1, dtype=torch.bool).index_fill(0, rows, True)[:-1]
    return torch.where(chosen & (p > 0), 1 / p.clamp(min=1e-300), 0.0)


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
