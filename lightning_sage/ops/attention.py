"""Triton: attention of packed rows to packed keys, and its gradient from the dense log-sum-exp.

Each query row sees an interval of its sample's keys. Query heads that share a key head lie in one
tile, so that keys and values are read once for all of them: flat row m of a sample is query row
m // R in head g * R + m % R, with R heads to a key head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_sage.ops.reference import How, dropout_threshold, stream_key, wide
from lightning_sage.ops.sight import Sight
from lightning_sage.ops.tiles import (
    LN2,
    LOG2E,
    capped,
    keep_weights,
    last_contiguous,
    load_norm,
    load_rows,
    padded,
    precision,
    rows_that_see,
    segment,
    tile_rows,
    tiles,
)


@triton.jit(do_not_specialize=["key", "threshold"])
def _forward_kernel(
    q, k, v, out, lse, first, stop, q_ends, k_ends, drop_rows, drop_columns,
    scale, softcap, key, threshold, factor,
    q_row, q_head, k_row, k_head, v_row, v_head, T, D, E,
    G: tl.constexpr, R: tl.constexpr, VALUES: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    q_start, n = segment(q_ends, b)
    k_start = tl.load(k_ends + b)
    # late rows of a causal sample have the most keys: they start first
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    if begin < n * R:
        row, head, inside, low, high = tile_rows(begin, n * R, q_start, g, first, stop, R, BLOCK_Q)
        queries = load_rows(q, row, head, q_row, q_head, D, inside, BLOCK_D)
        sums: tl.constexpr = lse.dtype.element_ty
        top = tl.full([BLOCK_Q], float("-inf"), dtype=sums)
        total = tl.zeros([BLOCK_Q], dtype=sums)
        acc = tl.zeros([BLOCK_Q, BLOCK_E], dtype=sums)
        if DROPOUT:
            base = tl.load(drop_rows + row, mask=inside, other=0)
        for start in range(tl.min(low, axis=0) // BLOCK_K * BLOCK_K, tl.max(high, axis=0), BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            seen = (low[:, None] <= j[None, :]) & (j[None, :] < high[:, None])
            there = j < tl.max(high, axis=0)
            keys = load_rows(k, k_start + j, g + j * 0, k_row, k_head, D, there, BLOCK_D)
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            logits, _ = capped(products, scale, softcap, SOFTCAP)
            logits = tl.where(seen, logits * LOG2E, float("-inf"))
            new = tl.maximum(top, tl.max(logits, axis=1))
            # a row that has seen nothing yet: -inf less -inf would be NaN
            floor = tl.where(new == float("-inf"), 0.0, new)
            weights = tl.exp2(logits - floor[:, None])
            shrink = tl.exp2(top - floor)
            total = total * shrink + tl.sum(weights, axis=1)
            top = new
            if VALUES:
                values = load_rows(v, k_start + j, g + j * 0, v_row, v_head, E, there, BLOCK_E)
                if DROPOUT:
                    columns = tl.load(drop_columns + k_start + j, mask=there, other=0)
                    keep = keep_weights(base, head, T, columns, key, threshold)
                    weights = tl.where(keep, weights * factor, 0.0)
                part = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
                acc = acc * shrink[:, None] + part
        # a row that sees nothing has a top of -inf
        total = tl.where(total == 0, 1.0, total)
        found = (top + tl.log2(total)) * LN2
        at = row.to(tl.int64) * (G * R) + head
        tl.store(lse + at, found, mask=inside)
        if VALUES:
            e = tl.arange(0, BLOCK_E)
            acc = acc / total[:, None]
            target = out + at[:, None] * E + e[None, :]
            tl.store(target, acc.to(out.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["key", "threshold"])
def _queries_kernel(
    q, k, v, out, lse, grad, dq, delta, first, stop, q_ends, k_ends, drop_rows, drop_columns,
    scale, softcap, key, threshold, factor,
    q_row, q_head, k_row, k_head, v_row, v_head, T, D, E,
    G: tl.constexpr, R: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    q_start, n = segment(q_ends, b)
    k_start = tl.load(k_ends + b)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    if begin < n * R:
        row, head, inside, low, high = tile_rows(begin, n * R, q_start, g, first, stop, R, BLOCK_Q)
        queries = load_rows(q, row, head, q_row, q_head, D, inside, BLOCK_D)
        # out and grad are contiguous
        incoming = load_rows(grad, row, head, G * R * E, E, E, inside, BLOCK_E)
        outgoing = load_rows(out, row, head, G * R * E, E, E, inside, BLOCK_E)
        sums: tl.constexpr = delta.dtype.element_ty
        mean = tl.sum(incoming.to(sums) * outgoing.to(sums), axis=1)
        at = row.to(tl.int64) * (G * R) + head
        tl.store(delta + at, mean, mask=inside)
        norm = load_norm(lse, at, inside)
        acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=sums)
        if DROPOUT:
            base = tl.load(drop_rows + row, mask=inside, other=0)
        for start in range(tl.min(low, axis=0) // BLOCK_K * BLOCK_K, tl.max(high, axis=0), BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            seen = (low[:, None] <= j[None, :]) & (j[None, :] < high[:, None])
            there = j < tl.max(high, axis=0)
            keys = load_rows(k, k_start + j, g + j * 0, k_row, k_head, D, there, BLOCK_D)
            values = load_rows(v, k_start + j, g + j * 0, v_row, v_head, E, there, BLOCK_E)
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            logits, slope = capped(products, scale, softcap, SOFTCAP)
            weights = tl.where(seen, tl.exp2(logits * LOG2E - norm[:, None]), 0.0)
            change = tl.dot(incoming, tl.trans(values), input_precision=PRECISION)
            if DROPOUT:
                columns = tl.load(drop_columns + k_start + j, mask=there, other=0)
                keep = keep_weights(base, head, T, columns, key, threshold)
                change = tl.where(keep, change * factor, 0.0)
            change = weights * (change - mean[:, None])
            if SOFTCAP:
                change = change * slope
            acc += tl.dot(change.to(keys.dtype), keys, input_precision=PRECISION)
        d = tl.arange(0, BLOCK_D)
        target = dq + at[:, None] * D + d[None, :]
        acc = (acc * scale).to(dq.dtype.element_ty)
        tl.store(target, acc, mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["key", "threshold"])
def _keys_kernel(
    q, k, v, lse, grad, dk, dv, delta, first, stop, q_ends, k_ends, drop_rows, drop_columns,
    scale, softcap, key, threshold, factor,
    q_row, q_head, k_row, k_head, v_row, v_head, T, D, E,
    G: tl.constexpr, R: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    q_start, n = segment(q_ends, b)
    k_start, count = segment(k_ends, b)
    start = tl.program_id(0) * BLOCK_K
    if start < count:
        j = start + tl.arange(0, BLOCK_K)
        there = j < count
        keys = load_rows(k, k_start + j, g + j * 0, k_row, k_head, D, there, BLOCK_D)
        values = load_rows(v, k_start + j, g + j * 0, v_row, v_head, E, there, BLOCK_E)
        sums: tl.constexpr = delta.dtype.element_ty
        acc_k = tl.zeros([BLOCK_K, BLOCK_D], dtype=sums)
        acc_v = tl.zeros([BLOCK_K, BLOCK_E], dtype=sums)
        if DROPOUT:
            columns = tl.load(drop_columns + k_start + j, mask=there, other=0)
        begin, end = rows_that_see(first + q_start, stop + q_start, n, start, BLOCK_K)
        for flat in range(begin * R, end * R, BLOCK_Q):
            row, head, inside, low, high = tile_rows(
                flat, end * R, q_start, g, first, stop, R, BLOCK_Q
            )
            queries = load_rows(q, row, head, q_row, q_head, D, inside, BLOCK_D)
            incoming = load_rows(grad, row, head, G * R * E, E, E, inside, BLOCK_E)
            at = row.to(tl.int64) * (G * R) + head
            mean = tl.load(delta + at, mask=inside, other=0.0)
            norm = load_norm(lse, at, inside)
            # keys by queries: what is summed over the queries is a product already
            seen = (low[None, :] <= j[:, None]) & (j[:, None] < high[None, :])
            products = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            logits, slope = capped(products, scale, softcap, SOFTCAP)
            weights = tl.where(seen, tl.exp2(logits * LOG2E - norm[None, :]), 0.0)
            change = tl.dot(values, tl.trans(incoming), input_precision=PRECISION)
            dropped = weights
            if DROPOUT:
                base = tl.load(drop_rows + row, mask=inside, other=0)
                keep = tl.trans(keep_weights(base, head, T, columns, key, threshold))
                dropped = tl.where(keep, weights * factor, 0.0)
                change = tl.where(keep, change * factor, 0.0)
            acc_v += tl.dot(dropped.to(incoming.dtype), incoming, input_precision=PRECISION)
            change = weights * (change - mean[None, :])
            if SOFTCAP:
                change = change * slope
            acc_k += tl.dot(change.to(queries.dtype), queries, input_precision=PRECISION)
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
        at = ((k_start + j).to(tl.int64) * G + g)[:, None]
        acc_k = (acc_k * scale).to(dk.dtype.element_ty)
        tl.store(dk + at * D + d[None, :], acc_k, mask=there[:, None] & (d < D)[None, :])
        acc_v = acc_v.to(dv.dtype.element_ty)
        tl.store(dv + at * E + e[None, :], acc_v, mask=there[:, None] & (e < E)[None, :])


class _Launch(NamedTuple):
    """Arguments that all of these kernels share."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, sight: Sight, how: How) -> _Launch:
        H, G = q.shape[1], k.shape[1]
        rows, keys = sight.rows, sight.keys
        first, stop = sight.spans
        key = threshold = 0
        factor, places = 1.0, (first, first)
        if how.dropout is not None:
            p, seed, call = how.dropout
            key, threshold = stream_key(seed, call), dropout_threshold(p)
            factor = 1 / max(1 - p, 1e-30)
            base = rows.sample * H * rows.T + rows.token
            places = base.to(torch.int32), keys.token.to(torch.int32)
        where = first, stop, rows.ends, keys.ends, *places
        settings = how.scale, how.softcap or 1.0, key, threshold, factor
        strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
        options = {
            "G": G,
            "R": H // G,
            "SOFTCAP": how.softcap is not None,
            "DROPOUT": how.dropout is not None,
            "PRECISION": precision(q.dtype),
            "BLOCK_D": padded(q.shape[2]),
            "BLOCK_E": padded(v.shape[2]),
        }
        arguments = *where, *settings, *strides, rows.T, q.shape[2], v.shape[2]
        return cls(arguments, options)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, sight: Sight, how: How, values: bool
) -> Tensor:
    N, H, _ = q.shape
    lse = torch.full((N, H), -math.inf, dtype=wide(q.dtype), device=q.device)
    if not N or not len(k):
        return lse
    launch = _Launch.of(q, k, v, sight, how)
    width = max(launch.options["BLOCK_D"], launch.options["BLOCK_E"])
    size = tiles(width, q.element_size(), backward=False)
    grid = triton.cdiv(sight.rows.most * launch.options["R"], size.q), sight.rows.B * k.shape[1]
    _forward_kernel[grid](
        q, k, v, out, lse, *launch.arguments, **launch.options,
        VALUES=values, BLOCK_Q=size.q, BLOCK_K=size.k, num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return lse


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, how: How
) -> tuple[Tensor, Tensor]:
    """See :func:`lightning_sage.ops.reference.attention_forward`."""
    q, k, v = last_contiguous(q, k, v)
    out = q.new_empty(*q.shape[:2], v.shape[2]) if len(k) else q.new_zeros(*q.shape[:2], v.shape[2])
    return out, _run_forward(q, k, v, out, sight, how, values=True)


def attention_lse(q: Tensor, k: Tensor, sight: Sight, how: How) -> Tensor:
    """See :func:`lightning_sage.ops.reference.attention_lse`."""
    q, k = last_contiguous(q, k)
    return _run_forward(q, k, k, q, sight, how._replace(dropout=None), values=False)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sight: Sight,
    how: How,
    all_keys: tuple[Tensor, Tensor, Sight] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`lightning_sage.ops.attention_backward`."""
    q, k, v = last_contiguous(q, k, v)
    every_k, every_v, over_all = all_keys or (k, v, sight)
    every_k, every_v = last_contiguous(every_k, every_v)
    grad, out = grad.to(q.dtype).contiguous(), out.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not len(q) or not len(k):
        return dq.zero_(), dk.zero_(), dv.zero_()
    lse = lse.to(wide(q.dtype)).contiguous()
    delta = torch.empty_like(lse)
    size = tiles(max(padded(q.shape[2]), padded(v.shape[2])), q.element_size(), backward=True)
    shape = {
        "BLOCK_Q": size.q, "BLOCK_K": size.k, "num_warps": size.warps, "num_stages": size.stages
    }  # fmt: skip
    launch = _Launch.of(q, every_k, every_v, over_all, how)
    heads = sight.rows.B * k.shape[1]
    flat = sight.rows.most * (q.shape[1] // k.shape[1])
    _queries_kernel[triton.cdiv(flat, size.q), heads](
        q, every_k, every_v, out, lse, grad, dq, delta, *launch.arguments, **launch.options, **shape
    )
    if all_keys is not None:
        launch = _Launch.of(q, k, v, sight, how)
    _keys_kernel[triton.cdiv(sight.keys.most, size.k), heads](
        q, k, v, lse, grad, dk, dv, delta, *launch.arguments, **launch.options, **shape
    )
    return dq, dk, dv
