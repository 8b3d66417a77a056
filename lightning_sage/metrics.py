"""What SAGE keeps, replays and holds, what a step saves and peaks at, how true its gradient is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from lightning_sage.block_metric import BlockMetric, SageMetric, sent, true_counts
from lightning_sage.fidelity import GradientFidelity as GradientFidelity
from lightning_sage.memory import in_use, reset_peak, saved_bytes, tensors_in


class Record(Protocol):
    """What the metrics read of a block's record (`BlockRecord`)."""

    name: str
    valid: Tensor
    kept: Tensor
    cached_bytes: int
    rows: Tensor | None


class KeptTokens(BlockMetric):
    """Share of the valid tokens whose rows blocks keep between forward and backward.

    One update takes the records of one training step (`Installation.records`). Nothing in it
    waits for the device: only reading the values of :func:`compute` does.
    :func:`compute` gives one value, over all steps, blocks and ranks, or with `blocks` a dict of
    `overall` and each block's own; 0 where there was no token. For `blocks`, see `BlockMetric`.

    Example:
        >>> import torch
        >>> from lightning_sage import BlockRecord, KeptTokens
        >>> valid = torch.tensor([[True, True, True, True, False]])
        >>> kept = torch.tensor([[True, False, True, True, False]])
        >>> metric = KeptTokens(["layers.0", "layers.1"])
        >>> records = [BlockRecord("layers.0", valid, kept), BlockRecord("layers.1", valid, valid)]
        >>> metric.update(records)
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'overall': 0.875, 'layers.0': 0.75, 'layers.1': 1.0}
    """

    valid: Tensor
    kept: Tensor

    def __init__(self, blocks: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(blocks, **kwargs)
        for name in ("valid", "kept"):
            self._add(name, (1 if blocks is None else len(blocks),))

    def update(self, records: Sequence[Record]) -> None:
        """Count one step; a block that has no record did not run and counts nothing."""
        slots = self._slots([record.name for record in records])
        if records:
            self._count(self.valid, slots, true_counts([r.valid for r in records], self.device))
            self._count(self.kept, slots, true_counts([r.kept for r in records], self.device))

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Fractions, 0-dim each."""
        overall = self._ratio(self.kept.sum(), self.valid.sum())
        return self._told(overall, self._ratio(self.kept, self.valid))


class ReplayedTokens(BlockMetric):
    """Share of the valid tokens whose rows blocks replay in the backward pass.

    As :class:`KeptTokens`, with records of after the backward pass: a block that none has reached
    replayed nothing.

    Example:
        >>> import torch
        >>> from lightning_sage import BlockRecord, ReplayedTokens
        >>> mask = torch.ones(1, 4, dtype=torch.bool)
        >>> metric = ReplayedTokens()
        >>> metric.update([BlockRecord("layers.0", mask, mask, rows=torch.tensor([2]))])
        >>> metric.compute().item()
        0.25
    """

    valid: Tensor
    replayed: Tensor

    def __init__(self, blocks: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(blocks, **kwargs)
        for name in ("valid", "replayed"):
            self._add(name, (1 if blocks is None else len(blocks),))

    def update(self, records: Sequence[Record]) -> None:
        """Count one step; a block that has no record did not run and counts nothing."""
        slots = self._slots([record.name for record in records])
        if records:
            self._count(self.valid, slots, true_counts([r.valid for r in records], self.device))
            # how many there are is known without asking the device
            replayed = [0 if r.rows is None else r.rows.numel() for r in records]
            self._count(self.replayed, slots, sent(replayed, self.device))

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Fractions, 0-dim each."""
        overall = self._ratio(self.replayed.sum(), self.valid.sum())
        return self._told(overall, self._ratio(self.replayed, self.valid))


class CachedBytes(BlockMetric):
    """Bytes that blocks hold between forward and backward, a step: a mean over steps and ranks.

    Takes what :class:`KeptTokens` takes. A step in which a block did not run counts as one in which
    it held nothing.

    Example:
        >>> import torch
        >>> from lightning_sage import BlockRecord, CachedBytes
        >>> mask = torch.ones(1, 4, dtype=torch.bool)
        >>> metric = CachedBytes()
        >>> for held in (1000, 3000):
        ...     metric.update([BlockRecord("layers.0", mask, mask, cached_bytes=held)])
        >>> metric.compute().item()
        2000.0
    """

    cached: Tensor
    steps: Tensor

    def __init__(self, blocks: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(blocks, **kwargs)
        self._add("cached", (1 if blocks is None else len(blocks),))
        self._add("steps")

    def update(self, records: Sequence[Record]) -> None:
        """Count one step."""
        slots = self._slots([record.name for record in records])
        if records:
            held = [record.cached_bytes for record in records]
            self._count(self.cached, slots, sent(held, self.device))
        self.steps += 1

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Bytes a step, 0-dim each."""
        overall = self._ratio(self.cached.sum(), self.steps)
        return self._told(overall, self._ratio(self.cached, self.steps))


class SavedBytes(SageMetric):
    """Bytes that a step saves for its backward pass, by anyone: a mean over steps and ranks.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_sage import SavedBytes
        >>> module, x = nn.Linear(4, 8), torch.ones(2, 4)
        >>> metric = SavedBytes()
        >>> with metric.counting(module, {"x": x}) as count:
        ...     loss = module(x).exp().sum()
        ...     count()
        64
        >>> metric.compute().item()
        64.0
    """

    saved: Tensor
    steps: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add("saved")
        self._add("steps")

    @contextmanager
    def counting(self, module: nn.Module, batch: object = None) -> Iterator[Callable[[], int]]:
        """Count what the graph built inside holds at the end, before its backward pass begins.

        If the end is an exception, no step is counted. To open it in one hook of a Trainer and
        close it in another, put it on an :class:`contextlib.ExitStack`. Every tensor that is saved
        costs a Python call: meant for some steps, not for all.

        Args:
            module: Its parameters and buffers are there anyway.
            batch: Its tensors are as well; any nesting of mappings, lists and dataclasses.

        Yields:
            A function that gives the bytes held at the time of the call; whole storages, each once.
        """
        with saved_bytes(chain(module.parameters(), module.buffers(), tensors_in(batch))) as count:
            yield count
        self.update(count())

    def update(self, bytes: int) -> None:
        """Count one step that saved so many bytes."""
        self.saved += bytes
        self.steps += 1

    def compute(self) -> Tensor:
        """Bytes a step, 0-dim."""
        return self._ratio(self.saved, self.steps)


class _Mark(NamedTuple):
    """Where a phase began: bytes in use, their peak so far, and whether that began anew here."""

    current: int
    peak: int
    fresh: bool


class PeakMemory(SageMetric):
    """The most memory in use in each phase of a step: a maximum over steps and ranks, in bytes.

    Of the device that the metric is on: what torch's allocator has handed out there, or where torch
    has no account, the resident memory of this process (:func:`lightning_sage.memory.in_use`).

    A phase begins where the one before ended: at the last `update` or `skip`, or where the metric
    was made or moved. The device is not waited for; allocators count when a kernel is launched.

    Args:
        reset: Let the peak begin anew with every phase, which makes each exact, and falsifies
            whatever else in the process reads the peak. Else nothing is reset, and a phase is
            exact if it went higher than all that was before it (the first steps of a fit), or else
            taken for the larger of what was in use at its two ends: a lower bound.
        phases: Their names.
        kwargs: Settings of :class:`torchmetrics.Metric`.

    Example:
        >>> from lightning_sage import PeakMemory
        >>> metric = PeakMemory()
        >>> for phase in ("forward", "backward", "optimizer"):
        ...     metric.update(phase)
        >>> peaks = metric.compute()
        >>> list(peaks)
        ['forward', 'backward', 'optimizer', 'step']
        >>> peaks["step"].item() == max(peak.item() for peak in peaks.values()) > 0
        True
    """

    peaks: Tensor

    def __init__(
        self,
        reset: bool = False,
        phases: Sequence[str] = ("forward", "backward", "optimizer"),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.reset_peak = reset
        self.phases = list(phases)
        self._add("peaks", (len(self.phases),), "max")
        self.skip()

    def skip(self) -> None:
        """Forget what has been since the last update: the next phase begins here."""
        current, peak = in_use(self.device)
        self._mark = _Mark(current, peak, self.reset_peak and reset_peak(self.device))

    def update(self, phase: str) -> None:
        """Note the peak of a phase that ends here.

        Raises:
            ValueError: It is none of `phases`.
        """
        if phase not in self.phases:
            raise ValueError(f"phase={phase!r} is none of {self.phases}: PeakMemory(phases=...)")
        before, now = self._mark, in_use(self.device)
        most = max(before.current, now.current)
        # a counter that moved was raised in this phase, or reset in it by somebody else
        if before.fresh or now.peak != before.peak:
            most = max(most, now.peak)
        self.peaks[self.phases.index(phase)].clamp_(min=most)
        self._mark = _Mark(*now, self.reset_peak and reset_peak(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Bytes by phase, 0 for one that never was, and the most of all as `step`; int64, 0-dim."""
        return {**dict(zip(self.phases, self.peaks, strict=True)), "step": self.peaks.max()}

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        device = self.device
        moved = super()._apply(*args, **kwargs)
        if self.device != device:
            self.skip()
        return moved

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # perhaps in another process
        self.skip()
