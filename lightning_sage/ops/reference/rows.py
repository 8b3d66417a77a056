"""What the ops on token rows mean: gather, scatter, packing in eight bits, dropout by row."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and scores are held in: float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accurate(x: Tensor) -> Tensor:
    """`x` in float32 or better."""
    return x.to(wide(x.dtype))


def gather_rows(x: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Rows of `x`, packed: ``out[i] = x.flatten(0, 1)[rows[i]] * weights[i]``, rounded once.

    Args:
        x: ``[B, T, ...]``.
        rows: ``[N]`` int64 in ``[0, B * T)``; row ``b * T + t`` is token t of sample b.
        weights: ``[N]``; None for 1.

    Returns:
        ``[N, ...]``, contiguous, in the dtype of `x`.
    """
    if rows.numel() == 0:
        return x.new_empty(0, *x.shape[2:])
    if x.stride(0) == x.shape[1] * x.stride(1):
        out = x.flatten(0, 1).index_select(0, rows)
    else:
        # flattening would copy all of it
        out = x[rows // x.shape[1], rows % x.shape[1]].contiguous()
    return out if weights is None else (accurate(out) * _column(weights, out)).to(x.dtype)


def scatter_rows(values: Tensor, rows: Tensor, base: Tensor) -> Tensor:
    """A copy of `base` with some rows replaced; the inverse of :func:`gather_rows`.

    ``out.flatten(0, 1)[rows[i]] = values[i]``.

    Args:
        values: ``[N, ...]``.
        rows: ``[N]`` int64, rising.
        base: ``[B, T, ...]``, left as it is.

    Returns:
        ``[B, T, ...]`` in the dtype of `base`.
    """
    out = base.clone(memory_format=torch.contiguous_format)
    out.flatten(0, 1).index_copy_(0, rows, values.to(base.dtype))
    return out


def row_norms(x: Tensor, rows: Tensor) -> Tensor:
    """Euclidean norm of each row, ``[N]`` in float32 or better.

    Args:
        x: ``[B, T, C]``.
        rows: ``[N]`` int64, see :func:`gather_rows`.
    """
    norms: Tensor = accurate(gather_rows(x, rows)).norm(dim=-1)
    return norms


def _column(weights: Tensor, x: Tensor) -> Tensor:
    return weights.to(wide(x.dtype)).view(-1, *(1,) * (x.dim() - 1))


# largest number of a packed dtype: the largest entry of a group is brought to it
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def pack_rows(x: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of `x` in eight bits, each group of the last axis with a scale of its own.

    ``scale = max |x| / LARGEST[dtype]`` over the group, ``values = round(x / scale)``, to the
    nearest, ties to even. A group of zeros has scale 0, and one that is not finite a NaN scale.

    Args:
        x: ``[B, T, K, D]``: K groups of D numbers.
        rows: ``[N]`` int64, see :func:`gather_rows`.
        dtype: int8 or float8_e4m3fn.

    Returns:
        ``[N, K, D]`` in `dtype`, and the scales ``[N, K]`` in float32.
    """
    own = gather_rows(x, rows).float()
    scale = own.abs().amax(-1) / LARGEST[dtype]
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    shrunk = (own * _inverse(scale)[..., None]).nan_to_num_(0.0)
    return (shrunk.round() if dtype == torch.int8 else shrunk).to(dtype), scale


def _inverse(scale: Tensor) -> Tensor:
    # of a denormal scale the inverse would overflow: its rows are zeros then
    return torch.where(scale > 1e-37, 1 / scale, 0.0)


def unpack_rows(values: Tensor, scale: Tensor, chosen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What :func:`pack_rows` packed, or some of its rows.

    Args:
        values: ``[N, K, D]``.
        scale: ``[N, K]`` float32.
        chosen: ``[R]`` int64 in ``[0, N)``; None for all.
        dtype: Of the result.

    Returns:
        ``[R, K, D]``.
    """
    if chosen is not None:
        values, scale = values[chosen], scale[chosen]
    return (values.float() * scale[..., None]).to(dtype)


def _mix(x: Tensor) -> Tensor:
    """Permute int32 by a 32-bit integer hash (Wellons' lowbias32), wrapping as unsigned would."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B
    return x ^ ((x >> 16) & 0xFFFF)


def uniform(seed: int, stream: int, rows: Tensor) -> Tensor:
    """A random number per row that depends on nothing but its arguments.

    Args:
        seed: Of a step and block, 31 bits.
        stream: Tells draws of the same seed apart.
        rows: int64, any shape.

    Returns:
        float64 in [0, 1), the shape of `rows`.
    """
    bits = row_bits(seed, stream, rows) >> 1 & 0x7FFFFFFF
    return bits.double() / 0x80000000


def stream_key(seed: int, stream: int) -> int:
    """The 32 bits, signed, that a seed and a stream come down to, by the same hash."""
    x = (seed + 0x9E3779B9 * (stream + 1)) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    # as the same bits of an int32
    return ((x ^ x >> 16) + 0x80000000) % 0x100000000 - 0x80000000


def row_bits(seed: int, stream: int, rows: Tensor) -> Tensor:
    """32 bits, signed, that tell a row of a stream from all others."""
    return _mix(_mix(rows.to(torch.int32)) ^ stream_key(seed, stream))


def dropout_threshold(p: float) -> int:
    """An element is kept where its 24 bits are at least this."""
    return round(p * 0x1000000)


def kept(row_bits: Tensor, columns: Tensor, p: float) -> Tensor:
    """Which elements dropout keeps, from bits of their rows and int32 columns, broadcast."""
    bits = _mix(row_bits + _mix(columns * -0x61C88647))
    return ((bits >> 8) & 0xFFFFFF) >= dropout_threshold(p)


def dropout_mask(seed: int, call: int, rows: Tensor, width: int, p: float) -> Tensor:
    """Dropout by row: any subset of rows sees the very mask that the whole tensor saw.

    An element is a hash of (seed, call, row, column), so the mask is never stored.

    Args:
        seed: Of a step and block, 31 bits.
        call: Which dropout of the block, counted from 0 in the order of its forward.
        rows: ``[N]`` int64, row ``b * T + t`` is token t of sample b.
        width: Elements of a row.
        p: Probability of dropping an element.

    Returns:
        ``[N, width]`` bool, True where the element is kept.
    """
    columns = torch.arange(width, dtype=torch.int32, device=rows.device)
    return kept(row_bits(seed, call, rows).unsqueeze(1), columns, p)


def row_dropout(x: Tensor, rows: Tensor, seed: int, call: int, p: float) -> Tensor:
    """`x` where :func:`dropout_mask` keeps it, divided by 1 - p, and 0 elsewhere.

    Args:
        x: ``[N, C]``.
        rows: ``[N]`` int64.
        seed: See :func:`dropout_mask`.
        call: See :func:`dropout_mask`.
        p: Probability of dropping an element.

    Returns:
        ``[N, C]``, contiguous.
    """
    mask = dropout_mask(seed, call, rows, x.shape[1], p)
    wide = accurate(x)
    return (wide * mask.to(wide.dtype).mul_(1 / max(1 - p, 1e-30))).to(x.dtype)
