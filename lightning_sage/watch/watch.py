"""Watch: one fit's meters, reports and steering, in the order of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sage.install import Installation
from lightning_sage.memory import MIB
from lightning_sage.policy import SagePolicy
from lightning_sage.watch.meters import Meters
from lightning_sage.watch.monitor import Step
from lightning_sage.watch.reporter import Reporter, plain
from lightning_sage.watch.steering import Steering


@dataclass(frozen=True)
class Watching:
    """What of a fit is measured, told and steered: see :class:`lightning_sage.SageCallback`.

    Raises:
        ValueError: A number is out of range.
    """

    policy: SagePolicy
    log_every_n_steps: int | None = None
    fidelity_every_n_steps: int | None = None
    fidelity_floor: float = 0.7
    fidelity_target: float | None = None
    memory_budget: str | float | None = None
    measure_dense: bool = True
    print_summary: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, before any model is touched."""
        if self.log_every_n_steps is not None and self.log_every_n_steps < 0:
            raise ValueError(
                f"log_every_n_steps must be a number of steps, got {self.log_every_n_steps}; "
                "0 logs nothing"
            )
        self.steering()

    @property
    def moving(self) -> list[str]:
        """Arguments by which the policy is moved during a fit."""
        names = ("memory_budget", "fidelity_target")
        return [name for name in names if getattr(self, name) is not None]

    def steering(self) -> Steering:
        """What moves the policy of a new fit."""
        return Steering(
            self.policy,
            self.fidelity_every_n_steps,
            self.fidelity_floor,
            self.fidelity_target,
            self.memory_budget,
        )


class Watch:
    """Follows one fit.

    Args:
        settings: What is asked for.

    Attributes:
        steering: What moves the policy.
        meters: The metrics, from :meth:`start` on; None where nobody asks for them.
        summary: Numbers of the whole fit, from :meth:`end` on.
    """

    def __init__(self, settings: Watching) -> None:
        self._settings, self.steering = settings, settings.steering()
        self.meters: Meters | None = None
        self.summary: dict[str, float] = {}
        self._reporter: Reporter | None = None
        self._every, self._logged_step = 0, 0
        self._readings: list[dict[str, float]] = []
        self._first_cached_bytes, self._started = 0, 0.0

    def __getstate__(self) -> dict[str, Any]:
        """All but what leads to trainer and module."""
        return {**vars(self), "meters": None, "_reporter": None}

    def start(self, trainer: Trainer, module: LightningModule, installation: Installation) -> None:
        """Begin to measure, from where a resumed fit continues; every rank has to."""
        settings, budget = self._settings, self.steering.budget
        quiet = is_quiet(trainer)
        # set by a part of the Trainer that its type does not show
        default: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        own = settings.log_every_n_steps
        self._every = 0 if quiet else default if own is None else own
        self._logged_step = trainer.global_step
        if budget is not None or self._every or (settings.print_summary and not quiet):
            self.meters = Meters(
                module,
                list(installation.blocks),
                trainer.strategy.root_device,
                reset_peak=budget is not None and budget.on_device,
                count_saved=settings.measure_dense and not quiet,
            )
        if self._every:
            told = {
                "policy": plain(settings.policy),
                "memory_budget": settings.memory_budget,
                "fidelity_floor": settings.fidelity_floor,
                "fidelity_target": settings.fidelity_target,
            }
            self._reporter = Reporter(trainer, module, installation, told)

    def before_step(self, step: Step) -> None:
        """Look at the gradient where that is due, then begin to measure the step."""
        # nobody would hear of it, unless the policy is steered by it
        silent = is_quiet(step.trainer) and self.steering.control is None
        reading = None if silent else self.steering.before_step(step)
        if reading is not None:
            self._readings.append(reading.values)
            if self._reporter is not None:
                self._reporter.fidelity(reading)
        # a block that will not run has done nothing
        step.installation.session.records = {}
        if self.meters is not None:
            self.meters.batch_start(step.batch)
        self._started = perf_counter()

    def after_step(self, step: Step, outputs: Any) -> None:
        """Count the step, and log where it is due.

        Args:
            step: The step.
            outputs: What Lightning gives at the end of a batch.
        """
        if self.meters is None:
            return
        trainer, installation = step.trainer, step.installation
        records, seconds = installation.records, perf_counter() - self._started
        self.meters.batch_end(records, seconds, batch_loss(outputs, trainer))
        if self.steering.after_step(trainer, installation, records, self.meters.peak):
            # short steps that were to find a budget's rung are not what the fit is like
            self.meters.restart()
        first = not self._first_cached_bytes
        if first:
            self._first_cached_bytes = sum(record.cached_bytes for record in records)
        if self._reporter is None:
            return
        if first:
            self._reporter.dense(installation.session.dense_bytes)
        for text in self.steering.events():
            self._reporter.event(text)
        if trainer.global_step // self._every > self._logged_step // self._every:
            self._logged_step = trainer.global_step
            if not self.meters.steps:
                return
            self._reporter.tokens(step.batch, records)
            self._reporter.readings(self.meters)

    def epoch_end(self) -> None:
        """Log the steps that no interval covered."""
        if self._reporter is not None and self.meters is not None and self.meters.steps:
            self._reporter.readings(self.meters, on_step=False)

    def end(self, installation: Installation) -> None:
        """Sum up, on every rank, while the ranks can still talk to each other."""
        self.stop()
        if self.meters is None or not (self.meters.steps or self.meters.total.kept.update_called):
            return
        if self.meters.steps:
            self.meters.read()
        readings = self.meters.in_all()
        self.summary = readings.to_log()
        if dense := installation.dense_saved_bytes:
            self.summary["dense_mib"] = dense / MIB
            # with a budget the first step was a trial
            if self.steering.budget is None:
                self.summary["ratio"] = self._first_cached_bytes / dense
        for name in ("cosine", "norm_ratio") if self._readings else ():
            self.summary[f"fidelity_{name}"] = fmean(one[name] for one in self._readings)
        self.summary["seconds"] = readings.seconds
        if self._reporter is not None:
            self._reporter.end(self.summary)

    def stop(self) -> None:
        """Let go of everything; after an exception as well, and again is no error."""
        self.steering.stop()
        if self.meters is not None:
            self.meters.discard()


def is_quiet(trainer: Trainer) -> bool:
    """Whether a fit is one that nobody wants to hear of."""
    # set by a part of the Trainer that its type does not show
    trial: Any = trainer.fast_dev_run  # type: ignore[attr-defined]
    return bool(trainer.barebones or trial)


def batch_loss(outputs: Any, trainer: Trainer) -> Tensor | None:
    """The loss of a batch, as the module returned it."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    # Lightning has divided it
    return loss * trainer.accumulate_grad_batches if isinstance(loss, Tensor) else None
