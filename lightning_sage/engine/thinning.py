"""Where a backward pass begins: the gradient of drawn rows, weighted, in place of all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.engine.cache import SparseCache
from lightning_sage.engine.job import Job
from lightning_sage.engine.session import DRAW_STREAM


def thinned(job: Job, cache: SparseCache, grad: Tensor) -> Tensor:
    """The gradient that the block is given, of drawn rows only where the backward pass begins."""
    replayer, kept, record = job.session.policy.replayer, len(cache.index), job.record
    if not job.chain.enter() or not kept:
        return grad
    assert record is not None
    drawn = None
    if cache.probability is not None:
        drawn = _by_token(grad, cache.index, 1 / cache.probability)
        # what was left out is made up for by the rows that were drawn in its place
        short = (drawn > 1).any(-1, keepdim=True)
        drawn = drawn.masked_fill(short & ~record.kept, 0.0)
        grad = _weighted(grad, drawn)
    if replayer is not None and replayer.draws:
        count = replayer.replay_count(kept, job.valid_count)
        if job.budget is not None or count is None:
            count = kept if job.budget is None else job.budget.rows
        noise = ops.uniform(int(job.seed), DRAW_STREAM, cache.index)
        weights = replayer.draw(kept_norms(cache, grad), count, noise)
        weights = _by_token(grad, cache.index, weights)
        grad = _weighted(grad, weights)
        drawn = weights if drawn is None else drawn * weights
    record.drawn = drawn
    return grad


def _by_token(grad: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``[B, T]`` float64: `values` at some rows, 1 at the others."""
    spread = torch.ones(grad.shape[:2], dtype=torch.float64, device=grad.device)
    spread.view(-1).index_copy_(0, rows, values)
    return spread


def _weighted(grad: Tensor, weights: Tensor) -> Tensor:
    every = torch.arange(weights.numel(), device=grad.device)
    factors = weights.flatten().to(ops.wide(grad.dtype))
    return ops.gather_rows(grad, every, factors).view(grad.shape)


def kept_norms(cache: SparseCache, grad: Tensor) -> Tensor:
    """Of the gradient of kept rows, ``[N]`` float64."""
    norms = ops.row_norms(grad, cache.index).double()
    # rows whose gradient is not finite come first, so that a NaN surfaces as in a dense step
    return norms.where(norms.isfinite(), float("inf"))
