"""Triton: dropout by row, its mask a hash of (seed, call, row, column) and nowhere in memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_sage.ops.reference import dropout_threshold, stream_key


@triton.jit
def mix(x):
    """See `_mix` of the reference: the same 32 bits."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def kept(rows, columns, key, threshold):
    """Which elements a dropout keeps: int32 rows and columns, broadcast against each other."""
    bits = mix(mix(mix(rows) ^ key) + mix(columns * -0x61C88647))
    return ((bits >> 8) & 0xFFFFFF) >= threshold


@triton.jit(do_not_specialize=["key", "threshold"])
def _dropout_kernel(
    x, rows, out, key, threshold, factor, x_row, C, N,
    WIDE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < N)[:, None] & (c < C)[None, :]
    row = tl.load(rows + i, mask=i < N, other=0).to(tl.int32)
    wide = i.to(tl.int64)[:, None]
    value = tl.load(x + wide * x_row + c[None, :], mask=inside, other=0.0).to(WIDE)
    keep = kept(row[:, None], c[None, :], key, threshold)
    # multiplied, not selected: a dropped infinity is a NaN in eager PyTorch too
    value = (value * factor * keep.to(WIDE)).to(out.dtype.element_ty)
    tl.store(out + wide * C + c[None, :], value, mask=inside)


def wide_type(dtype: torch.dtype) -> Any:
    """What a kernel computes in: float32 or better."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def row_dropout(x: Tensor, rows: Tensor, seed: int, call: int, p: float) -> Tensor:
    """See :func:`lightning_sage.ops.reference.row_dropout`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    N, C = x.shape
    out = x.new_empty(N, C)
    if out.numel() == 0:
        return out
    block = min(1024, triton.next_power_of_2(C))
    together = max(1, 2048 // block)
    _dropout_kernel[triton.cdiv(N, together), triton.cdiv(C, block)](
        x,
        rows.contiguous(),
        out,
        stream_key(seed, call),
        dropout_threshold(p),
        1 / max(1 - p, 1e-30),
        x.stride(0),
        C,
        N,
        WIDE=wide_type(x.dtype),
        R=together,
        BLOCK=block,
    )
    return out
