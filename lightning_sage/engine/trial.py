"""Which rows the self-check replays: such that whatever is special of a place or a number shows."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.ops import Rows

# rows of a sample that are compared
ROWS = 16


def half(valid: Tensor, ends: bool = False) -> Tensor:
    """A fixed random half of each sample's valid tokens, and at most `ROWS` of them.

    What is special of first and last tokens must show: the first and the last sample go without
    them, so that others stand in their places, and the samples between have them; with `ends` it
    is the other way round.
    """
    index = torch.arange(valid.numel(), device=valid.device).view_as(valid)
    order = valid.long().cumsum(1)
    outermost = (order == 1) | (order == order[:, -1:])
    between = torch.full_like(valid[:, :1], not ends, dtype=torch.float64)
    between[0] = between[-1] = float(ends)
    drawn = ops.uniform(1, int(ends), index)
    key = torch.where(outermost, 1 - 2 * between, drawn).masked_fill(~valid, 2.0)
    count = ((valid.sum(1, keepdim=True) + 1) // 2).clamp(max=ROWS)
    chosen: Tensor = valid.logical_and(key.argsort(1).argsort(1) < count)
    return chosen


def few(rows: Rows) -> Rows:
    """Three rows, far apart in the sample that has the most: what depends on their number shows."""
    most = int(rows.ends.diff().argmax())
    start, stop = (int(rows.ends[most + i]) for i in (0, 1))
    some = sorted({start, (start + stop) // 2, stop - 1})
    return Rows(rows.index[torch.tensor(some, device=rows.index.device)], rows.B, rows.T)
