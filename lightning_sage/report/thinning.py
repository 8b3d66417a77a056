"""Many lines of a history -> few points, with means that weigh every step alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_sage.watch.history import Line


@dataclass(frozen=True)
class Group:
    """Neighbouring lines, drawn as one point.

    Attributes:
        lines: At least one.
    """

    lines: Sequence[Line]

    @property
    def step(self) -> int:
        """The last step."""
        return int(self.lines[-1]["step"])

    def values(self, key: Callable[[Line], float]) -> list[float]:
        """What `key` gives of each line, NaN left out."""
        return [value for line in self.lines if not math.isnan(value := key(line))]

    def mean(self, key: Callable[[Line], float]) -> float:
        """Over the steps that the lines stand for; NaN where no line has a value."""
        pairs = [(key(line), line.get("steps") or 1) for line in self.lines]
        pairs = [(value, steps) for value, steps in pairs if not math.isnan(value)]
        steps = sum(steps for _, steps in pairs)
        return sum(value * steps for value, steps in pairs) / steps if steps else math.nan


def thinned(lines: Sequence[Line], most: int) -> list[Group]:
    """At most `most` groups of neighbours, of equal size but for one line."""
    count = min(most, len(lines))
    cuts = [len(lines) * index // count for index in range(count + 1)] if count else []
    return [Group(lines[start:end]) for start, end in pairwise(cuts)]


def block_means(group: Group, key: str) -> list[float]:
    """One number a block, over the steps of a group: its `kept`, `replayed` or `cached`."""
    blocks = len(group.lines[0][key])
    sums, steps = [0.0] * blocks, [0] * blocks
    for line in group.lines:
        weight = line.get("steps") or 1
        for block, value in enumerate(line[key]):
            if value is not None:
                sums[block] += value * weight
                steps[block] += weight
    return [s / n if n else math.nan for s, n in zip(sums, steps, strict=True)]


def number(value: float | None) -> float:
    """NaN for what was written as null."""
    return math.nan if value is None else float(value)


def mean(values: Iterable[float | None]) -> float:
    """Of what is there; NaN where nothing is."""
    there = [value for value in map(number, values) if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def total(values: Iterable[float | None]) -> float:
    """Of what is there."""
    return sum(value for value in map(number, values) if not math.isnan(value))
