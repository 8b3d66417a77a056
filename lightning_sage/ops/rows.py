"""Triton: token rows gathered, packed to eight bits, unpacked and scattered, each in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_sage.ops.dropout import wide_type
from lightning_sage.ops.reference import LARGEST, wide
from lightning_sage.ops.tiles import count_below


@triton.jit
def _gather_kernel(
    x, rows, weights, out, T, x_b, x_t, x_k, C, D: tl.constexpr, WIDE: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + i)
    start = (row // T) * x_b + (row % T) * x_t
    value = tl.load(x + start + (c // D) * x_k + c % D, mask=c < C)
    if WEIGHTED:
        value = value.to(WIDE) * tl.load(weights + i).to(WIDE)
    tl.store(out + i * C + c, value.to(out.dtype.element_ty), mask=c < C)


def gather_rows(x: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """See :func:`lightning_sage.ops.reference.gather_rows`."""
    source, width = _as_four(x)
    out = x.new_empty(len(rows), *x.shape[2:])
    C = width * source.shape[2]
    if out.numel() == 0:
        return out
    block = _block(C)
    strides = source.stride()
    _gather_kernel[len(rows), triton.cdiv(C, block)](
        source,
        rows.contiguous(),
        rows if weights is None else weights.contiguous(),
        out,
        x.shape[1],
        *strides[:3],
        C,
        D=width,
        WIDE=wide_type(x.dtype),
        WEIGHTED=weights is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return out


def _as_four(x: Tensor) -> tuple[Tensor, int]:
    """`x` as ``[B, T, K, D]`` whose last axis is contiguous, and D; copied only where it must."""
    if x.dim() == 4:
        four = x
    elif x.dim() == 3:
        four = x.unsqueeze(2)
    else:
        four = x.reshape(*x.shape[:2], 1, -1)
    if four.stride(3) != 1 and four.shape[3] > 1:
        # [B, T, K] seen through a transposition: groups of one number
        four = four.transpose(2, 3) if four.shape[2] == 1 else four.contiguous()
    if four.stride(2) == four.shape[3] and four.stride(3) == 1:
        four = four.flatten(2).unsqueeze(2)
    return four, four.shape[3]


def _block(C: int) -> int:
    return int(min(8192, triton.next_power_of_2(C)))


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


@triton.jit
def _compact_kernel(flags, index, ends, T, N, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    before = 0
    for start in range(0, b * T, BLOCK):
        i = start + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(flags + i, mask=i < b * T, other=0).to(tl.int32), axis=0)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        chosen = tl.load(flags + b * T + t, mask=t < T, other=0).to(tl.int32)
        place = before + tl.cumsum(chosen, axis=0) - 1
        # not beyond the room that there is, should the count be wrong
        tl.store(index + place, (b * T + t).to(tl.int64), mask=(chosen > 0) & (place < N))
        before += tl.sum(chosen, axis=0)
    tl.store(ends + b + 1, before)
    tl.store(ends, 0, mask=b == 0)


def rows_of(chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where `chosen` is True, and how many rows come before each sample.

    Args:
        chosen: ``[B, T]`` bool.
        count: How many there are.

    Returns:
        ``[count]`` int64, and ``[B + 1]`` int32.
    """
    B, T = chosen.shape
    # zeros: rows that exist, should the count be wrong
    index = torch.zeros(count, dtype=torch.int64, device=chosen.device)
    ends = torch.empty(B + 1, dtype=torch.int32, device=chosen.device)
    block = min(4096, triton.next_power_of_2(max(T, 16)))
    flags = chosen.contiguous().view(torch.uint8)
    _compact_kernel[(B,)](flags, index, ends, T, count, BLOCK=block, num_warps=_warps(block))
    return index, ends


@triton.jit
def _scatter_kernel(
    values, rows, base, out, N, T, base_b, base_t, C, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # rows are sorted: found in a dozen steps, where a table of places would take three launches
    i = tl.minimum(count_below(rows, N, row), N - 1).to(tl.int64)
    own = base + (row // T) * base_b + (row % T) * base_t + c
    target = out + row * C + c
    if tl.load(rows + i) != row:
        tl.store(target, tl.load(own, mask=c < C), mask=c < C)
    else:
        value = tl.load(values + i * C + c, mask=c < C)
        tl.store(target, value.to(out.dtype.element_ty), mask=c < C)


def scatter_rows(values: Tensor, rows: Tensor, base: Tensor) -> Tensor:
    """See :func:`lightning_sage.ops.reference.scatter_rows`."""
    B, T = base.shape[:2]
    flat = base.flatten(2) if base.dim() > 3 else base.reshape(B, T, -1)
    flat = flat if flat.stride(2) == 1 else flat.contiguous()
    values = values.reshape(len(rows), flat.shape[2]).contiguous()
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if out.numel() == 0 or not len(rows):
        return out.copy_(base)
    C = flat.shape[2]
    block = _block(C)
    _scatter_kernel[B * T, triton.cdiv(C, block)](
        values,
        rows.contiguous(),
        flat,
        out,
        len(rows),
        T,
        *flat.stride()[:2],
        C,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return out


@triton.jit
def _norms_kernel(x, rows, out, T, x_b, x_t, C, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    start = x + (row // T) * x_b + (row % T) * x_t
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        value = tl.load(start + c, mask=c < C, other=0.0).to(total.dtype)
        total += value * value
    tl.store(out + i, tl.sqrt(tl.sum(total, axis=0)))


def row_norms(x: Tensor, rows: Tensor) -> Tensor:
    """See :func:`lightning_sage.ops.reference.row_norms`."""
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(len(rows), dtype=wide(x.dtype), device=x.device)
    if len(rows):
        block = min(4096, triton.next_power_of_2(x.shape[2]))
        _norms_kernel[(len(rows),)](
            x, rows.contiguous(), out, x.shape[1], *x.stride()[:2], x.shape[2], BLOCK=block,
            num_warps=_warps(block),
        )  # fmt: skip
    return out


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _pack_kernel(
    x, rows, values, scale, T, x_b, x_t, x_k, K, D, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    inside = (k < K)[:, None] & (d < D)[None, :]
    row = tl.load(rows + i)
    start = x + (row // T) * x_b + (row % T) * x_t
    own = tl.load(start + k[:, None] * x_k + d[None, :], mask=inside, other=0.0).to(tl.float32)
    # the maximum does not hand on a NaN; the difference is one for infinities too
    broken = tl.max(tl.where(own - own == 0, 0, 1), axis=1)
    largest = tl.max(tl.abs(own), axis=1)
    step = tl.where(broken > 0, float("nan"), tl.div_rn(largest, LARGEST))
    # of a denormal the inverse would overflow: such a group is zeros
    usable = step > 1e-37
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, step, 1.0)), 0.0)
    shrunk = tl.where((broken > 0)[:, None], 0.0, own * inverse[:, None])
    if INTEGER:
        shrunk = _round(shrunk)
    at = values + (i * K + k[:, None]) * D + d[None, :]
    tl.store(at, shrunk.to(values.dtype.element_ty), mask=inside)
    tl.store(scale + i * K + k, step, mask=k < K)


def pack_rows(x: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`lightning_sage.ops.reference.pack_rows`."""
    x = x if x.stride(3) == 1 else x.contiguous()
    K, D = x.shape[2:]
    values = torch.empty(len(rows), K, D, dtype=dtype, device=x.device)
    scale = torch.empty(len(rows), K, dtype=torch.float32, device=x.device)
    if len(rows) == 0:
        return values, scale
    block = triton.next_power_of_2(D)
    groups = max(1, min(triton.next_power_of_2(K), 8192 // block))
    _pack_kernel[len(rows), triton.cdiv(K, groups)](
        x,
        rows.contiguous(),
        values,
        scale,
        x.shape[1],
        *x.stride()[:3],
        K,
        D,
        LARGEST=LARGEST[dtype],
        INTEGER=dtype == torch.int8,
        BLOCK_K=groups,
        BLOCK_D=block,
        num_warps=_warps(groups * block),
        # the quotient is rounded before it is brought to an integer
        enable_fp_fusion=False,
    )
    return values, scale


@triton.jit
def _unpack_kernel(
    values, scale, chosen, out, K, C, D: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(chosen + i) if SOME else i
    step = tl.load(scale + row * K + c // D, mask=c < C, other=0.0)
    value = tl.load(values + row * C + c, mask=c < C).to(tl.float32) * step
    tl.store(out + i * C + c, value.to(out.dtype.element_ty), mask=c < C)


def unpack_rows(values: Tensor, scale: Tensor, chosen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See :func:`lightning_sage.ops.reference.unpack_rows`."""
    _, K, D = values.shape
    count = len(values) if chosen is None else len(chosen)
    out = torch.empty(count, K, D, dtype=dtype, device=values.device)
    if out.numel() == 0:
        return out
    block = _block(K * D)
    _unpack_kernel[count, triton.cdiv(K * D, block)](
        values.contiguous(),
        scale.contiguous(),
        scale if chosen is None else chosen.contiguous(),
        out,
        K,
        K * D,
        D=D,
        SOME=chosen is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return out
