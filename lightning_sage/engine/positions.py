"""Where tokens stand, for blocks that count them by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# how blocks find out where their tokens stand, if they are not told
COUNTING = {torch.arange, Tensor.__getitem__}


def counted(positions: Tensor, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Positions of tokens that a block counts by itself: those of the packed rows.

    It counts them with `arange`, or cuts as many from a table of all positions.
    """
    N = len(positions)
    if func is torch.arange:
        whole = args in ((N,), (0, N))
        return positions.to(kwargs.get("dtype") or torch.int64) if whole else func(*args, **kwargs)
    table, index = args
    cuts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(cut, slice) for cut in cuts):
        return func(table, index)
    for axis, cut in enumerate(cuts):
        if cut.stop == N < table.shape[axis] and cut.start in (None, 0):
            table = table.index_select(axis, positions)
        else:
            table = table.narrow(axis, *_span(cut, table.shape[axis]))
    return table


def _span(cut: slice, length: int) -> tuple[int, int]:
    """Start and length of a slice with a step of one."""
    start, stop, _ = cut.indices(length)
    return start, max(stop - start, 0)
