"""Rows as they wait between forward and backward: as they are, or in fewer bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sage import ops

DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
# numbers that share a scale: an outlier costs the precision of its neighbours only
GROUP = 128


class Stored(NamedTuple):
    """Token rows, stored.

    Attributes:
        values: ``[N, ...]``; in eight bits, ``[N, K, D]`` with K groups of D numbers.
        scale: ``[N, K]`` float32, of values in eight bits; else None.
    """

    values: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.values, self.scale)
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def some(self, chosen: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rows as they were, or nearly so.

        Args:
            chosen: ``[R]`` int64 in ``[0, N)``; None for all.
            shape: Of a row.
            dtype: Of the result.

        Returns:
            ``[R, *shape]``.
        """
        if self.scale is not None:
            rows = ops.unpack_rows(self.values, self.scale, chosen, dtype)
            return rows.reshape(len(rows), *shape)
        values = self.values
        if chosen is not None:
            values = ops.gather_rows(values.unsqueeze(0), chosen)
        return values.to(dtype)


def store(x: Tensor, rows: ops.Rows, cache_dtype: str | None) -> Stored:
    """Rows of `x`, to be held.

    Args:
        x: ``[B, T, C]`` or ``[B, T, H, D]``.
        rows: Which.
        cache_dtype: `int8` or `fp8`, with a scale for each head or group of numbers; `bf16`, where
            that is shorter; None keeps every bit.
    """
    dtype = DTYPES.get(cache_dtype or "")
    if dtype is None or (dtype == torch.bfloat16 and x.element_size() <= 2):
        return Stored(ops.gather_rows(x, rows.index))
    if dtype == torch.bfloat16:
        return Stored(ops.gather_rows(x, rows.index).to(dtype))
    width = x.shape[-1]
    if x.dim() == 3:
        x = x.unflatten(2, (-1, GROUP if width % GROUP == 0 else width))
    return Stored(*ops.pack_rows(x, rows.index, dtype))
