"""Packed rows of a batch, and which of them see one another: what every attention op is told.

Packed rows lie in one axis: samples one after the other, the tokens of each in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


def positions(flags: Tensor, count: int | None = None) -> Tensor:
    """Where `flags`, ``[N]`` bool, is True: ``[count]`` int64.

    Args:
        flags: The choice.
        count: How many there are, where that is known: then the device is not waited for.
    """
    if count is None:
        return flags.nonzero().squeeze(1)
    # each goes to its place, those that are not chosen to one behind the last
    place = torch.where(flags, flags.cumsum(0) - 1, count).clamp(max=count)
    found = torch.zeros(count + 1, dtype=torch.int64, device=flags.device)
    found.scatter_(0, place, torch.arange(len(flags), device=flags.device))
    # a view would keep the place behind the last
    return found[:count].clone()


@dataclass(frozen=True)
class Rows:
    """Chosen tokens of a batch, packed.

    Attributes:
        index: ``[N]`` int64, sorted; row ``b * T + t`` is token t of sample b.
        B: Samples.
        T: Tokens of a sample, chosen or not.
    """

    index: Tensor
    B: int
    T: int

    @classmethod
    def of(cls, chosen: Tensor, count: int | None = None) -> Rows:
        """The rows where `chosen`, ``[B, T]`` bool, is True.

        Args:
            chosen: The choice.
            count: See :func:`positions`.
        """
        B, T = chosen.shape
        if count == B * T:
            return cls.every(B, T, chosen.device)
        return cls(positions(chosen.flatten(), count), B, T)

    @classmethod
    def every(cls, B: int, T: int, device: torch.device) -> Rows:
        """All tokens."""
        return cls(torch.arange(B * T, device=device), B, T)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def whole(self) -> bool:
        """Whether these are all tokens."""
        return len(self.index) == self.B * self.T

    @property
    def most(self) -> int:
        """No sample has more rows; a bound, so that the device is not waited for."""
        return min(self.T, len(self.index))

    @cached_property
    def sample(self) -> Tensor:
        """``[N]`` int64."""
        return self.index // self.T

    @cached_property
    def token(self) -> Tensor:
        """``[N]`` int64, position in the sample."""
        return self.index % self.T

    @cached_property
    def ends(self) -> Tensor:
        """``[B + 1]`` int32: rows of the samples before each, and of all."""
        bounds = torch.arange(0, self.B * self.T + 1, self.T, device=self.index.device)
        return torch.searchsorted(self.index, bounds, out_int32=True)

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each sample; waits for the device."""
        counts: list[int] = self.ends.diff().tolist()
        return counts


@dataclass(frozen=True)
class Visibility:
    """Which keys a valid query sees, by token.

    Attributes:
        causal: No query sees a later key.
        first: ``[B | 1, T]`` int64, the first token that each query sees; None for 0.
        stop: ``[B | 1, T]`` int64, one past the last; None for all, or up to itself where `causal`.
            Neither ever falls from one query to the next.
        keys: ``[B, T]`` bool, False on tokens that no valid query sees; None where there are none.
        mask: ``[B | 1, H | 1, T | 1, T]``, bool (True attends) or additive, where intervals cannot
            say it; then it says everything but `keys`.
    """

    causal: bool
    first: Tensor | None = None
    stop: Tensor | None = None
    keys: Tensor | None = None
    mask: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether valid tokens see all valid ones, up to themselves where `causal`."""
        return self.first is None and self.stop is None and self.mask is None


class Group(NamedTuple):
    """Samples that a batched op can take at once.

    Attributes:
        queries: Their packed query rows.
        keys: Their packed key rows.
        samples: Which samples.
    """

    queries: slice
    keys: slice
    samples: slice

    def batched(self, x: Tensor, part: slice) -> Tensor:
        """Packed ``[N, H, ...]`` to ``[B', H, Q, ...]``."""
        samples = self.samples.stop - self.samples.start
        rows: Tensor = x[part].unflatten(0, (samples, -1))
        return rows.transpose(1, 2)


def packed(x: Tensor) -> Tensor:
    """``[B', H, Q, ...]`` to packed ``[B' * Q, H, ...]``."""
    return x.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Sight:
    """Which packed query rows see which packed key rows.

    Attributes:
        rows: The query rows, ``[N]``.
        keys: The key rows, ``[M]``, of the same batch, or of another sequence of each sample; the
            same object where rows see themselves.
        visible: What the tokens see.
    """

    rows: Rows
    keys: Rows
    visible: Visibility

    @property
    def own(self) -> bool:
        """Whether row i of a sample sees all its rows, up to row i where causal."""
        return self.keys is self.rows and self.visible.plain

    @cached_property
    def spans(self) -> tuple[Tensor, Tensor]:
        """``first[i] <= j < stop[i]``: numbers of the keys, within its sample, that row i sees.

        Both ``[N]`` int32; only where the visibility has no mask.
        """
        rows, visible = self.rows, self.visible
        assert visible.mask is None
        if self.own:
            return self._own_spans()
        first = torch.zeros_like(rows.token) if visible.first is None else self._at(visible.first)
        if visible.stop is not None:
            stop = self._at(visible.stop)
        else:
            stop = rows.token + 1 if visible.causal else torch.full_like(rows.token, self.keys.T)
        if not self.keys.whole:
            # how many keys come before each token of a sample
            keys, T = self.keys, self.keys.T
            before = torch.zeros(rows.B, T + 1, dtype=torch.int64, device=first.device)
            ones = torch.ones_like(keys.index)
            before.view(-1).scatter_(0, keys.sample * (T + 1) + keys.token + 1, ones)
            before = before.cumsum(1)
            first, stop = before[rows.sample, first], before[rows.sample, stop]
        return first.int(), stop.int()

    def _own_spans(self) -> tuple[Tensor, Tensor]:
        """Rows that see themselves: all of their sample, or those up to themselves."""
        ends, sample = self.rows.ends, self.rows.sample
        if self.visible.causal:
            number = torch.arange(1, len(self.rows) + 1, dtype=torch.int32, device=ends.device)
            stop = number - ends[sample]
        else:
            stop = ends.diff()[sample]
        return torch.zeros_like(stop), stop

    def _at(self, x: Tensor) -> Tensor:
        return x[self.rows.sample if x.shape[0] > 1 else 0, self.rows.token]

    def groups(self) -> Iterator[Group]:
        """Samples with equal counts together, else one by one; only those with queries and keys."""
        queries, keys = self.rows.counts, self.keys.counts
        B = self.rows.B
        if len(set(queries)) == 1 and len(set(keys)) == 1:
            if queries[0] and keys[0]:
                yield Group(slice(0, len(self.rows)), slice(0, len(self.keys)), slice(0, B))
            return
        start, key_start = 0, 0
        for b, (count, key_count) in enumerate(zip(queries, keys, strict=True)):
            if count and key_count:
                part, key_part = (
                    slice(start, start + count),
                    slice(key_start, key_start + key_count),
                )
                yield Group(part, key_part, slice(b, b + 1))
            start, key_start = start + count, key_start + key_count
