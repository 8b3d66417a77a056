"""Meters: what the steps of a fit kept, held and took, since they were last read and in all."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sage.memory import MIB
from lightning_sage.metrics import (
    CachedBytes,
    KeptTokens,
    PeakMemory,
    ReplayedTokens,
    SavedBytes,
)
from lightning_sage.records import BlockRecord

# steps whose saved bytes are counted: hooks see every tensor that a graph saves
COUNTED_STEPS = 3


class Gauges:
    """One set of the metrics.

    Args:
        blocks: Names of the wrapped blocks.
        device: Where their records are.
    """

    def __init__(self, blocks: Sequence[str], device: torch.device) -> None:
        self.kept, self.replayed = KeptTokens(blocks), ReplayedTokens(blocks)
        self.cached, self.saved = CachedBytes(blocks), SavedBytes()
        self.peak = PeakMemory()
        counted = (self.kept, self.replayed, self.cached)
        self.all: tuple[Metric, ...] = (*counted, self.saved, self.peak)
        for metric in self.all:
            metric.to(device)

    def add(self, other: Gauges) -> None:
        """Take in what another set has counted, of this rank."""
        for mine, theirs in zip(self.all, other.all, strict=True):
            for name, reduce in mine._reductions.items():
                a, b = getattr(mine, name), getattr(theirs, name)
                largest = getattr(reduce, "__name__", "") == "dim_zero_max"
                setattr(mine, name, torch.maximum(a, b) if largest else a + b)
            mine._update_count += theirs._update_count
            mine._computed = None

    def reset(self) -> None:
        """Start anew."""
        for metric in self.all:
            metric.reset()


@dataclass
class Readings:
    """Means over some steps and all ranks; for every block, in order, where there is a list.

    Attributes:
        kept: Share of the valid tokens: of all blocks, and of each.
        replayed: Likewise.
        cached: Bytes a step: of all blocks, and of each.
        valid: Valid tokens of a batch.
        saved: All bytes that a step saved for backward; None where they were not counted.
        peak: Bytes by phase, the most of any step.
        seconds: Median of a step, of this rank.
        loss: Mean of this rank's batches; None where there was none.
    """

    kept: tuple[float, list[float]]
    replayed: tuple[float, list[float]]
    cached: tuple[float, list[float]]
    valid: float
    saved: float | None
    peak: dict[str, int]
    seconds: float
    loss: float | None

    def to_log(self) -> dict[str, float]:
        """Numbers for a logger, by name."""
        values = {
            "kept_fraction": self.kept[0],
            "replayed_fraction": self.replayed[0],
            "cached_mib": self.cached[0] / MIB,
            "peak_mib": self.peak["step"] / MIB,
        }
        return values if self.saved is None else values | {"saved_mib": self.saved / MIB}


class Meters:
    """Metrics of one fit.

    Args:
        module: Whose saved bytes are counted.
        blocks: Names of the wrapped blocks.
        device: Where it computes.
        reset_peak: Whether the device's peak may be reset at every phase.
        count_saved: Whether to count the bytes that the first steps save for backward.

    Attributes:
        total: Of the whole fit.
        steps: Batches since the last reading.
        peak: Of the latest step, of this rank: bytes, 0-dim.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[str],
        device: torch.device,
        reset_peak: bool = False,
        count_saved: bool = True,
    ) -> None:
        self._module = module
        self.total = Gauges(blocks, device)
        self._recent = Gauges(blocks, device)
        self._step_peak = PeakMemory(reset=reset_peak).to(device)
        self.peak = torch.zeros((), dtype=torch.long, device=device)
        self.steps, self._count_saved = 0, count_saved
        # steps whose saved bytes are still to be counted, and how many there were at a reading
        self._to_count = self._told = COUNTED_STEPS if count_saved else 0
        self._seconds: list[float] = []
        # the first step includes the self-check and the dense count
        self._all_seconds: deque[float] = deque(maxlen=1000)
        self._loss: Tensor | None = None
        self._counting = ExitStack()

    def batch_start(self, batch: Any) -> None:
        """Begin a batch, and count what it saves for backward if it is one of the first."""
        self.discard()
        # what came in between (a validation, a look at the gradient) is not the step's
        self._step_peak.skip()
        if self._to_count:
            self._to_count -= 1
            self._counting.enter_context(self._recent.saved.counting(self._module, batch))

    def before_backward(self) -> None:
        """The forward is done, and holds what it holds."""
        self._counting.close()
        self._step_peak.update("forward")

    def after_backward(self) -> None:
        """The backward is done."""
        self._step_peak.update("backward")

    def batch_end(self, records: Sequence[BlockRecord], seconds: float, loss: Any) -> None:
        """Count a batch.

        Args:
            records: What the blocks did.
            seconds: What it took.
            loss: Its loss, if it is a tensor.
        """
        # a step without backward holds nothing for it
        self.discard()
        recent = self._recent
        self._step_peak.update("optimizer")
        recent.peak.peaks = torch.maximum(recent.peak.peaks, self._step_peak.peaks)
        recent.peak._update_count += 1
        self.peak = self._step_peak.peaks.max()
        self._step_peak.reset()
        for metric in (recent.kept, recent.replayed, recent.cached):
            metric.update(records)
        self.steps += 1
        self._seconds.append(seconds)
        if isinstance(loss, Tensor):
            self._loss = loss.detach() + (0.0 if self._loss is None else self._loss)

    def restart(self) -> None:
        """Forget all that has been counted, and count saved bytes anew."""
        self.total.reset()
        self._recent.reset()
        self._all_seconds.clear()
        self._seconds, self._loss, self.steps = [], None, 0
        self._to_count = self._told = COUNTED_STEPS if self._count_saved else 0

    def discard(self) -> None:
        """Stop counting saved bytes, and forget the count; after an exception as well."""
        error = RuntimeError("not counted")
        self._counting.__exit__(RuntimeError, error, None)

    def read(self) -> Readings:
        """What there is since the last reading, over all ranks: every rank has to ask."""
        readings = self._readings(self._recent, self._seconds, self._to_count < self._told)
        self._told = self._to_count
        self._all_seconds += self._seconds
        self.total.add(self._recent)
        self._recent.reset()
        self._seconds, self._loss, self.steps = [], None, 0
        return readings

    def in_all(self) -> Readings:
        """The same of the whole fit, up to the last reading; its loss is not known."""
        seconds = list(self._all_seconds)
        return self._readings(self.total, seconds[1:] or seconds, self._count_saved)

    def _readings(self, gauges: Gauges, seconds: Sequence[float], counted: bool) -> Readings:
        # whether bytes were counted is the same on all ranks, which ask together
        def whole(metric: Metric) -> tuple[float, list[float]]:
            # one transfer, not one for each block
            overall, *each = torch.stack(list(metric.compute().values())).tolist()
            return overall, each

        return Readings(
            whole(gauges.kept),
            whole(gauges.replayed),
            whole(gauges.cached),
            self._valid(gauges),
            float(gauges.saved.compute()) or None if counted else None,
            {name: int(value) for name, value in gauges.peak.compute().items()},
            median(seconds) if seconds else 0.0,
            None if self._loss is None else float(self._loss) / max(self.steps, 1),
        )

    def _valid(self, gauges: Gauges) -> float:
        """Of this rank: the most that any block saw, as one may not run in every step."""
        return float(gauges.kept.valid.max()) / max(gauges.kept.update_count, 1)
