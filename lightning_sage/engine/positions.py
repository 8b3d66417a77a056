"""Where tokens stand, for blocks that count them by themselves: in a replay, the packed rows do.

They count with `arange`, or cut as many from a table of all positions. How often they do is the
same in every replay: where it is not, something else happened to be as long as the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_sage.ops import Rows

# how blocks find out where their tokens stand, if they are not told
COUNTING = {torch.arange, Tensor.__getitem__}


class Counter:
    """Answers a replay that counts its tokens.

    Args:
        rows: The rows, where they stand is the answer.
        tables: Buffers and parameters of the block, from which it may cut.

    Attributes:
        answered: How often.
    """

    def __init__(self, rows: Rows, tables: Iterable[Tensor]) -> None:
        self.rows, self.answered = rows, 0
        self._tables = {id(x) for x in tables}

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `arange` or a cut is in a replay."""
        N, where = len(self.rows), self.rows.token
        if func is torch.arange:
            if args not in ((N,), (0, N)):
                return func(*args, **kwargs)
            self.answered += 1
            return where.to(kwargs.get("dtype") or torch.int64)
        table, index = args
        cuts = index if isinstance(index, tuple) else (index,)
        if id(table) not in self._tables or not all(isinstance(cut, slice) for cut in cuts):
            return func(table, index)
        for axis, cut in enumerate(cuts):
            if cut.stop == N and cut.start in (None, 0) and table.shape[axis] >= self.rows.T:
                self.answered += 1
                table = table.index_select(axis, where)
            else:
                table = table.narrow(axis, *_span(cut, table.shape[axis]))
        return table


def _span(cut: slice, length: int) -> tuple[int, int]:
    """Start and length of a slice with a step of one."""
    start, stop, _ = cut.indices(length)
    return start, max(stop - start, 0)
