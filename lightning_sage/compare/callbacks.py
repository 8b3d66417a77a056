"""Callbacks of a comparison: one takes turns with other processes, one measures steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import chain
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torchmetrics import Metric

from lightning_sage.callback import SageCallback
from lightning_sage.compare.checkpointing import switch_off, switch_on
from lightning_sage.compare.turns import Parent
from lightning_sage.memory import MIB, in_use, reset_peak, saved_bytes, tensors_in
from lightning_sage.metrics import CachedBytes, KeptTokens, ReplayedTokens
from lightning_sage.policy import SagePolicy
from lightning_sage.tokens import count_tokens
from lightning_sage.watch.watch import batch_loss


def warm_up(steps: int) -> int:
    """How many of the first steps the clock leaves out."""
    return max(1, min(3, steps // 2))


def spread(values: list[float]) -> dict[str, float] | None:
    """Median, and the edges of the lowest and the highest fifth; None of nothing."""
    if not values:
        return None
    fifths = quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": median(values), "p20": fifths[0], "p80": fifths[3]}


class Turns(Callback):
    """Comes first: takes turns, and keeps checkpointing that is not asked for switched off.

    Args:
        parent: Who gives turns.
        meter: Who counts steps.
        every: Steps of a turn.
    """

    def __init__(self, parent: Parent, meter: ContestMeter, every: int) -> None:
        self._parent, self._meter, self._every, self._next = parent, meter, every, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What is built already may checkpoint."""
        switch_off(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """And so may what `configure_model` has built."""
        switch_off(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Wait, before a turn's first batch."""
        if self._meter.steps >= self._next:
            self._next = self._meter.steps + self._every
            self._parent.wait_for_turn(self._meter.steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last turn is over."""
        self._parent.end_turn()


class ContestMeter(Callback):
    """Comes last: what other callbacks do before a step, such as a look at its gradient, is free.

    The first step includes SAGE's self-check. In the rest of the warm-up the bytes that a batch's
    graph saves are counted, and after it the clock counts.

    Args:
        steps: Optimizer steps of the fit.
        seed: Every epoch begins with it, so that its order does not depend on what a method drew.
        sage: The method's callback; None in dense training and checkpointing.
        checkpoint: Switch gradient checkpointing on, for the blocks of this policy.

    Attributes:
        steps: Optimizer steps done.
    """

    def __init__(
        self,
        steps: int,
        seed: int,
        sage: SageCallback | None = None,
        checkpoint: SagePolicy | None = None,
    ) -> None:
        self.steps = 0
        self._warmup, self._seed = warm_up(steps), seed
        self._sage, self._checkpoint = sage, checkpoint
        self._checkpointing: str | None = None
        self._batches = hashlib.sha256()
        self._counting = ExitStack()
        self._held: Callable[[], int] | None = None
        self._saved: list[int] = []
        self._peak, self._reset = 0, False
        # of the running optimizer step
        self._seconds, self._tokens, self._losses = 0.0, 0, list[float]()
        self._step_seconds: list[float] = []
        self._step_tokens: list[int] = []
        self._step_losses: list[float] = []
        self._cosines: list[float] = []
        self._norm_ratios: list[float] = []
        self._began, self._global_step = 0.0, 0
        self._usage: dict[str, Metric] = {
            "kept_fraction": KeptTokens(),
            "replayed_fraction": ReplayedTokens(),
            "cached_mib": CachedBytes(),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Metrics stand where the records are."""
        for metric in self._usage.values():
            metric.to(pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the batch, off the clock, and start it."""
        if self._checkpoint is not None and self._checkpointing is None:
            # not before: a module may say in on_train_start in which mode it trains
            self._checkpointing = switch_on(pl_module, self._checkpoint)
        tensors = list(tensors_in(batch))
        for tensor in tensors:
            data = tensor.detach().cpu().contiguous().reshape(-1)
            self._batches.update(data.view(torch.uint8).numpy().tobytes())
        with suppress(ValueError):
            self._tokens += int(count_tokens(batch))
        if min(1, self._warmup - 1) <= self.steps < self._warmup:
            there = chain(pl_module.parameters(), pl_module.buffers(), tensors)
            self._held = self._counting.enter_context(saved_bytes(there))
        self._reset = reset_peak(pl_module.device)
        self._began = _now(pl_module.device)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """The graph is complete."""
        if self._held is not None:
            self._saved.append(self._held())
        self._stop_counting()

    def _stop_counting(self) -> None:
        self._held = None
        self._counting.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, and count."""
        self._seconds += _now(pl_module.device) - self._began
        self._stop_counting()
        if self.steps >= self._warmup:
            self._peak = max(self._peak, in_use(pl_module.device).peak)
        loss = batch_loss(outputs, trainer)
        if loss is not None and loss.numel() == 1:
            self._losses.append(loss.item())
        if self._sage is not None and self._sage.installation is not None:
            for metric in self._usage.values():
                metric.update(self._sage.installation.records)
        if trainer.global_step > self._global_step:
            self._global_step = trainer.global_step
            self._end_step(trainer)

    def _end_step(self, trainer: Trainer) -> None:
        if self.steps >= self._warmup:
            self._step_seconds.append(self._seconds)
            self._step_tokens.append(self._tokens)
        if self._losses:
            self._step_losses.append(sum(self._losses) / len(self._losses))
        for name, found in (("cosine", self._cosines), ("norm_ratio", self._norm_ratios)):
            value = trainer.callback_metrics.get(f"sage/fidelity_{name}")
            # a look stays there until the next one
            if value is not None and float(value) not in found[-1:]:
                found.append(float(value))
        self.steps += 1
        self._seconds, self._tokens, self._losses = 0.0, 0, []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the next epoch's order from the seed."""
        seed_everything(self._seed + trainer.current_epoch + 1, workers=True, verbose=False)

    def result(self, device: torch.device) -> dict[str, Any]:
        """The numbers, for the record."""
        seconds, tokens = self._step_seconds, self._step_tokens
        rates = [t / s for t, s in zip(tokens, seconds, strict=True) if t]
        losses = self._step_losses
        last = losses[-max(1, len(losses) // 4) :]
        values: dict[str, Any] = {
            "checkpointing": self._checkpointing,
            "measured_steps": len(seconds),
            "steps_done": self.steps,
            "saved_mib": _mean([x / MIB for x in self._saved]),
            "peak_mib": self._peak / MIB if self._peak else None,
            # else it is of the whole process's life
            "peak_of_steps": self._reset,
            "step_s": spread(seconds),
            "step_seconds": seconds,
            "tokens_per_step": _mean([float(t) for t in tokens if t]),
            "tokens_per_s": spread(rates),
            "loss": _mean(last),
            "loss_over_steps": len(last),
            "losses": losses,
            "fidelity_cosine": _mean(self._cosines),
            "fidelity_cosines": self._cosines,
            "fidelity_norm_ratio": _mean(self._norm_ratios),
            "batches": self._batches.hexdigest(),
        }
        if self._sage is not None:
            values |= {name: float(metric.compute()) for name, metric in self._usage.items()}
            values["cached_mib"] /= MIB
        return values


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _now(device: torch.device) -> float:
    """Seconds, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
