"""What ranks agree on once a batch: how many rows each of them replays, whose loss counts how much.

Ranks wait for the slowest at every bucket of gradients, and adaptive selections make them keep
different numbers of tokens. One small all-reduce a batch tells every rank what all would replay;
its result is waited for where it is first needed, inside the first block.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sage.resume import place
from lightning_sage.selections import Chosen, Selection, gradient_scores, ranked, share, top
from lightning_sage.tokens import Window

Mode = Literal["none", "mean", "max"]


class Budget(NamedTuple):
    """Rows that a block is to replay of a call.

    Attributes:
        rows: How many.
        tokens: Valid tokens of the call.
    """

    rows: int
    tokens: int

    @property
    def fraction(self) -> float:
        """Rows by tokens."""
        return self.rows / self.tokens


class Agreement:
    """One batch's numbers of every rank, and what follows from them.

    A rank's demand is estimated: the share of its valid tokens that its blocks, on average, would
    have replayed in the batch before, times the valid tokens of this one. In the first batch
    nothing is known, and every rank goes its own way.

    Args:
        mode: Every block of every rank replays as many rows as the ranks want on average (`mean`),
            or as the one that wants most (`max`); `none` leaves each rank to itself.
        device: Where numbers are exchanged.

    Attributes:
        window: Weights of the batches since gradients were last zeroed.
    """

    def __init__(self, mode: Mode, device: torch.device) -> None:
        self.mode, self.device = mode, device
        self.window = Window()
        self._demand: Tensor | None = None
        self._wanted: list[Tensor | int] = []
        self._valid = 0
        self._table: Tensor | None = None
        self._work: Any = None
        self._rows: list[list[float]] = []

    def start(self, tokens: Tensor | int, loss_tokens: Tensor | int) -> None:
        """Tell the other ranks of a batch; every rank has to.

        Args:
            tokens: Valid tokens of this rank's batch; 0-dim where it is a tensor.
            loss_tokens: Those among them that bear loss.
        """
        self._demand, self._wanted, self._valid = self._latest(), [], 0
        wanted = 0 if self._demand is None else tokens * self._demand
        rank, world = place()
        # filled on the device: nothing here waits for it
        self._table = torch.zeros(world, 3, dtype=torch.float64, device=self.device)
        for cell, value in zip(self._table[rank], (tokens, wanted, loss_tokens), strict=True):
            cell.copy_(value) if isinstance(value, Tensor) else cell.fill_(value)
        self._work, self._rows = dist.all_reduce(self._table, async_op=True), []

    def _latest(self) -> Tensor | None:
        """Share of the valid tokens that blocks would have replayed in the latest batch."""
        if not self._valid:
            return self._demand
        tensors = [x.to(self.device) for x in self._wanted if isinstance(x, Tensor)]
        known = sum(x for x in self._wanted if not isinstance(x, Tensor))
        total = torch.stack(tensors).sum() if tensors else torch.zeros((), device=self.device)
        return (total.double() + known) / self._valid

    def demand(self) -> float | None:
        """What the next batch's demand will be estimated from; None where there was no batch."""
        latest = self._latest()
        return None if latest is None else float(latest)

    def resume(self, demand: float | None) -> None:
        """Go on from what :meth:`demand` gave."""
        if demand is not None:
            self._demand = torch.tensor(demand, dtype=torch.float64, device=self.device)

    def note(self, wanted: Tensor | int, valid: int) -> None:
        """Remember how many rows, of `valid` tokens, a block would have replayed by itself."""
        if self.mode != "none":
            self._wanted.append(wanted)
            self._valid += valid

    def budget(self, valid: int) -> Budget | None:
        """Rows that a block replays of a call with `valid` tokens; None: as many as it wants."""
        if self.mode == "none" or self._table is None or not valid:
            return None
        asked = [wanted for _, wanted, _ in self._everyone() if wanted > 0]
        tokens = self._everyone()[place()[0]][0]
        if not asked or not tokens:
            return None
        rows = fmean(asked) if self.mode == "mean" else max(asked)
        return Budget(share(min(1.0, rows / tokens), valid), valid)

    def loss_tokens(self) -> tuple[float, float]:
        """Loss-bearing tokens of the batch: this rank's, and those of all ranks."""
        counts = [count for _, _, count in self._everyone()]
        return counts[place()[0]], sum(counts)

    def _everyone(self) -> Sequence[Sequence[float]]:
        if not self._rows:
            assert self._table is not None
            self._work.wait()
            self._rows = self._table.tolist()
        return self._rows


def fit_kept(
    keeper: Selection, own: Chosen, budget: Budget, exactly: bool, given: Sequence[Tensor]
) -> Chosen:
    """Rows to keep where a budget of them is to be replayed.

    Args:
        keeper: The selection.
        own: What it chose by itself, ``[B, T]``.
        budget: Rows to replay.
        exactly: Whether all that is kept is replayed; else the budget is the least that is kept.
        given: What the selection chose from, as for :func:`Selection.keep`.
    """
    scores, valid, priority, noise = given
    other = keeper.at(budget.fraction)
    if other is keeper or (other is not None and not exactly):
        return own
    if other is not None:
        return other.keep(scores, valid, priority, noise)
    # always-kept rows first, then those that bear loss, as the selection itself would
    order = ranked(keeper.key(scores, priority, noise), priority, valid)
    rows = _cut_or_filled(own, order, budget.rows) & valid
    return Chosen(rows if exactly else rows | own.rows)


def fit_replayed(
    replayer: Selection,
    own: Chosen | None,
    budget: Budget,
    given: tuple[Tensor, Tensor | None, int, Tensor],
) -> Chosen:
    """Rows to replay within a budget that is less than what is kept.

    Args:
        replayer: The selection.
        own: What it chose by itself, ``[N]``, where that was asked for already.
        budget: Rows to replay.
        given: What the selection chose from, as for :func:`Selection.replay`.
    """
    other = replayer.at(budget.fraction)
    if other is not None:
        return other.replay(*given)
    own = replayer.replay(*given) if own is None else own
    norms, saliency, *_ = given
    return Chosen(_cut_or_filled(own, gradient_scores(norms, saliency), budget.rows))


def least(a: Tensor | int, b: Tensor | int) -> Tensor | int:
    """The smaller of two numbers, without waiting for a device."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def _cut_or_filled(own: Chosen, order: Tensor, count: int) -> Tensor:
    """The `count` first of the chosen rows by `order`, then of the others; of the whole batch."""
    finite = order.isfinite()
    lift = order.where(finite, 0.0).max() + 1
    # rows whose gradient is not finite stay first
    return top((order + own.rows * lift).flatten(), count).view_as(own.rows)
