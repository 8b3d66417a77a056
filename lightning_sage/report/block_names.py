"""How blocks are called where there is little room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# characters that fit beside an axis
LONG = 8


@dataclass(frozen=True)
class Ticks:
    """Where an axis of blocks is labelled.

    Attributes:
        at: Indices of blocks.
        labels: What stands there.
        title: What the labels leave out.
    """

    at: list[int]
    labels: list[str]
    title: str


def block_ticks(blocks: Sequence[str], most: int = 12) -> Ticks:
    """Labels without what all names share: `0`, `1`, ... and `model.layers.*` for a decoder's.

    Args:
        blocks: Names of blocks, in order.
        most: Labels at most; with more blocks every second, fifth, tenth is labelled. Names
            that stay long are replaced by their places, from 0.
    """
    labels, pattern = short_names(blocks)
    title = f"block ({pattern})"
    if max(map(len, labels)) > LONG:
        labels, title = [str(index) for index in range(len(blocks))], "block, counted in order"
    every = next(n for n in (1, 2, 5, 10, 20, 50, 10**9) if len(blocks) <= most * n)
    at = list(range(0, len(blocks), every))
    return Ticks(at, [labels[index] for index in at], title)


def short_names(blocks: Sequence[str]) -> tuple[list[str], str]:
    """Each name without the parts that all of them share, and those parts with a `*` between."""
    parts = [name.split(".") for name in blocks]
    shortest = min(len(part) for part in parts)
    ahead = 0
    while ahead < shortest - 1 and len({part[ahead] for part in parts}) == 1:
        ahead += 1
    behind = 0
    while behind < shortest - ahead - 1 and len({part[-1 - behind] for part in parts}) == 1:
        behind += 1
    names = [".".join(part[ahead : len(part) - behind]) for part in parts]
    shared = [*parts[0][:ahead], "*", *parts[0][len(parts[0]) - behind :]]
    return names, _clipped(".".join(shared), 40)


def _clipped(text: str, most: int = 14) -> str:
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
