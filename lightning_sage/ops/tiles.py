"""What the attention kernels share: loads, logits, searches, and how large a tile is."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

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


def padded(width: int) -> int:
    """The width of a tile that holds `width` numbers a row."""
    return int(max(16, triton.next_power_of_2(width)))
