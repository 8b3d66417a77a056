"""What the attention kernels share: loads, logits, searches, and how large a tile is."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_sage.ops.dropout import kept

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def count_below(values, n, bound):
    """How many of `n` rising numbers are less than `bound`."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        if tl.load(values + middle) < bound:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def segment(ends, b):
    """Where the packed rows of sample b begin, and how many they are."""
    start = tl.load(ends + b)
    return start, tl.load(ends + b + 1) - start


@triton.jit
def tile_rows(begin, end, start, g, first, stop, R: tl.constexpr, BLOCK: tl.constexpr):
    """Query row and head of the flat rows from `begin` on, whether they exist, what they see."""
    m = begin + tl.arange(0, BLOCK)
    inside = m < end
    row, head = start + m // R, g * R + m % R
    low = tl.load(first + row, mask=inside, other=2147483647)
    high = tl.load(stop + row, mask=inside, other=0)
    return row, head, inside, low, high


@triton.jit
def rows_that_see(first, stop, n, start, BLOCK: tl.constexpr):
    """Which of a sample's rows see any key of a tile: neighbours, as intervals never fall."""
    return count_below(stop, n, start + 1), count_below(first, n, start + BLOCK)


@triton.jit
def load_norm(lse, at, inside):
    """Log-sum-exp in powers of two; a row that sees nothing has no key in its interval anyway."""
    norm = tl.load(lse + at, mask=inside, other=0.0)
    return tl.where(norm == float("-inf"), 0.0, norm) * LOG2E


@triton.jit
def load_rows(x, row, head, x_row, x_head, D, inside, BLOCK: tl.constexpr):
    """Rows of one head each, ``[rows, BLOCK]``, zero where not inside."""
    d = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * x_row + head[:, None] * x_head + d[None, :]
    return tl.load(x + at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def capped(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits, and the slope of the cap."""
    logits = products * scale
    if SOFTCAP:
        # tanh, from the sigmoid that every backend has
        bent = 2 * tl.sigmoid(2 * logits / softcap) - 1
        return softcap * bent, 1 - bent * bent
    return logits, logits


@triton.jit
def keep_weights(base, head, T, columns, key, threshold):
    """Which attention weights a dropout keeps: see `Dropout` of the reference."""
    return kept((base + head * T)[:, None], columns[None, :], key, threshold)


class Tiles(NamedTuple):
    """Rows and keys of a tile, and how a program works on it."""

    q: int
    k: int
    warps: int
    stages: int


def tiles(width: int, size: int, backward: bool) -> Tiles:
    """Tiles whose operands and sums fit the registers and 99 KiB of shared memory.

    Args:
        width: The larger of the padded head and value width.
        size: Bytes of an element.
        backward: Whether three operands, not two, wait in shared memory.
    """
    if size > 2:
        return Tiles(32, 32, 4, 1) if width <= 64 else Tiles(16, 16, 4, 1)
    if width <= 64:
        return Tiles(64, 64, 4, 2) if backward else Tiles(128, 64, 4, 3)
    if width <= 128:
        return Tiles(64, 64, 8, 1) if backward else Tiles(64, 64, 4, 2)
    return Tiles(32, 32, 8, 1) if backward else Tiles(64, 32, 8, 2)


def precision(dtype: torch.dtype) -> str:
    """Float32 products are exact unless the user has allowed otherwise for all of PyTorch."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def last_contiguous(*tensors: Tensor) -> list[Tensor]:
    """Packed rows ``[N, H, D]`` whose heads a kernel can read."""
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


def padded(width: int) -> int:
    """The width of a tile that holds `width` numbers a row."""
    return int(max(16, triton.next_power_of_2(width)))
