"""Triton: the attention that each key receives from weighted query rows; no matrix of pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_sage.ops.reference import How, wide
from lightning_sage.ops.sight import Sight
from lightning_sage.ops.tiles import (
    LOG2E,
    capped,
    last_contiguous,
    load_norm,
    load_rows,
    padded,
    precision,
    rows_that_see,
    segment,
    tile_rows,
)


@triton.jit
def _received_kernel(
    q, k, lse, weights, out, first, stop, q_ends, k_ends, scale, softcap,
    q_row, q_head, k_row, k_head, D,
    G: tl.constexpr, R: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    q_start, n = segment(q_ends, b)
    k_start, count = segment(k_ends, b)
    start = tl.program_id(0) * BLOCK_K
    if start < count:
        j = start + tl.arange(0, BLOCK_K)
        there = j < count
        keys = load_rows(k, k_start + j, g + j * 0, k_row, k_head, D, there, BLOCK_D)
        total = tl.zeros([BLOCK_K], dtype=out.dtype.element_ty)
        begin, end = rows_that_see(first + q_start, stop + q_start, n, start, BLOCK_K)
        for flat in range(begin * R, end * R, BLOCK_Q):
            row, head, inside, low, high = tile_rows(
                flat, end * R, q_start, g, first, stop, R, BLOCK_Q
            )
            queries = load_rows(q, row, head, q_row, q_head, D, inside, BLOCK_D)
            norm = load_norm(lse, row.to(tl.int64) * (G * R) + head, inside)
            share = tl.load(weights + row, mask=inside, other=0.0).to(total.dtype)
            seen = (low[None, :] <= j[:, None]) & (j[:, None] < high[None, :])
            products = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            logits, _ = capped(products, scale, softcap, SOFTCAP)
            part = tl.where(seen, tl.exp2(logits * LOG2E - norm[None, :]), 0.0)
            total += tl.sum(part * share[None, :], axis=1)
        tl.store(out + (k_start + j).to(tl.int64) * G + g, total, mask=there)


def attention_received(
    q: Tensor, k: Tensor, lse: Tensor, weights: Tensor, sight: Sight, how: How
) -> Tensor:
    """See :func:`lightning_sage.ops.reference.attention_received`."""
    q, k = last_contiguous(q, k)
    (N, H, D), (M, G) = q.shape, k.shape[:2]
    out = torch.empty(M, G, dtype=wide(q.dtype), device=q.device)
    if not N or not M:
        return out.zero_()
    small = q.element_size() <= 2 and padded(D) <= 128
    first, stop = sight.spans
    # few rows, the last token's alone say, need no tile for many
    rows = min(64, max(16, triton.next_power_of_2(sight.rows.most * (H // G))))
    _received_kernel[triton.cdiv(sight.keys.most, 64 if small else 32), sight.rows.B * G](
        q,
        k,
        lse.contiguous(),
        weights.contiguous(),
        out,
        first,
        stop,
        sight.rows.ends,
        sight.keys.ends,
        how.scale,
        how.softcap or 1.0,
        *q.stride()[:2],
        *k.stride()[:2],
        D,
        G=G,
        R=H // G,
        SOFTCAP=how.softcap is not None,
        PRECISION=precision(q.dtype),
        BLOCK_Q=rows if small else min(rows, 32),
        BLOCK_K=64 if small else 32,
        BLOCK_D=padded(D),
        num_warps=4,
        num_stages=3 if small else 1,
    )
    return out
