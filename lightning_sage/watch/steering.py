"""Steering: what moves a policy during a fit, by the gradient's fidelity and by memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sage.install import Installation
from lightning_sage.policy import SagePolicy
from lightning_sage.records import BlockRecord
from lightning_sage.watch.dial import Dial, FidelityControl
from lightning_sage.watch.memory_budget import MemoryBudget, Use
from lightning_sage.watch.monitor import FidelityMonitor, Reading, Step
from lightning_sage.watch.retry import StepRetry

# steps after which the most that any of them took is compared with the budget
_STEPS_BETWEEN = 10


class Steering:
    """Looks at gradients and memory, and says which policy holds.

    Args:
        policy: What the fit starts from.
        every: Optimizer steps between two looks at the gradient; None looks once, early; 0 never.
        floor: A cosine below it is warned of.
        target: A cosine to hold by moving the policy; None leaves it.
        memory: A size, or a share of the device's memory, to fit into; None is no limit.

    Raises:
        ValueError: One of them is out of range, or the policy cannot be moved.
    """

    def __init__(
        self,
        policy: SagePolicy,
        every: int | None,
        floor: float,
        target: float | None,
        memory: str | float | None,
    ) -> None:
        if every is not None and every < 0:
            raise ValueError(f"fidelity_every_n_steps must be a number of steps, got {every}")
        if not 0 <= floor <= 1:
            raise ValueError(f"fidelity_floor must be a cosine in [0, 1], got {floor}")
        if target is not None and not every:
            raise ValueError(
                f"fidelity_target={target} is held by looking at the gradient: set "
                "fidelity_every_n_steps too, such as 20"
            )
        self._policy = policy
        self.control = None if target is None else FidelityControl(Dial(policy), target)
        self.monitor = None if every == 0 else FidelityMonitor(every, floor, self.control)
        self.budget = None if memory is None else MemoryBudget(memory, policy)
        if self.monitor is not None:
            self.monitor.budget = self.budget
        self._retry: StepRetry | None = None
        self._worst: Tensor | None = None
        self._unseen = self._step = 0
        self._retaken = False
        self._events: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        """All but what leads to the trainer."""
        return {**vars(self), "_retry": None}

    @property
    def policy(self) -> SagePolicy:
        """What holds now."""
        policy = self._policy if self.control is None else self.control.policy
        return policy if self.budget is None else self.budget.of(policy)

    def start(self, trainer: Trainer, module: LightningModule, installation: Installation) -> None:
        """Begin a fit, and watch its steps run out of memory.

        Raises:
            ValueError: The budget is below what the weights need.
        """
        self._step = trainer.global_step
        if self.budget is None:
            return
        # a sharded parameter has its rank's part
        local = [(getattr(p, "_local_tensor", p), p.requires_grad) for p in module.parameters()]
        resident = sum(x.nbytes * (2 if trained else 1) for x, trained in local)
        self.budget.start(trainer.strategy.root_device, resident)
        installation.policy = self.policy
        if module.automatic_optimization:
            self._retry = StepRetry(trainer, lambda: self._lower(installation))

    def stop(self) -> None:
        """Let go of the trainer; again is no error."""
        if self._retry is not None:
            self._retry.remove()
            self._retry = None

    def before_step(self, step: Step) -> Reading | None:
        """Look at the gradient, where that is due; every rank has to ask."""
        # while a budget tries short steps, their gradient says nothing of those to come
        ready = self.budget is None or not self.budget.trying
        if self.monitor is None or not self.monitor.is_due(step.trainer.global_step, ready):
            return None
        reading = self.monitor.look(step)
        step.installation.policy = self.policy
        return reading

    def after_step(
        self,
        trainer: Trainer,
        installation: Installation,
        records: Sequence[BlockRecord],
        peak: Tensor,
    ) -> bool:
        """See whether the step fitted; every rank has to ask.

        Args:
            trainer: The trainer.
            installation: SAGE on its module.
            records: What the blocks did.
            peak: The device's peak in this step, in bytes; 0-dim.

        Returns:
            Whether this was the last of the steps in which a budget tries what fits.
        """
        budget = self.budget
        if budget is None:
            return False
        if self._retaken:
            # the peak is that of the try that failed, for which the budget was lowered
            self._retaken, self._worst, self._unseen = False, None, 0
            return False
        cached = sum(record.cached_bytes for record in records)
        own = peak if budget.on_device else torch.tensor(cached)
        self._worst = own if self._worst is None else torch.maximum(self._worst, own)
        self._unseen += 1
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        # without a step of the optimizer its state may not be there yet
        if budget.trying and not stepped:
            return False
        # neither the device nor the other ranks are asked in every step
        if not budget.trying and self._unseen < _STEPS_BETWEEN:
            return False
        taken = [int(self._worst), cached, *(_rows(records) if budget.trying else (0, 0, 0))]
        self._worst, self._unseen = None, 0
        if trainer.world_size > 1:
            taken = [_largest(trainer, value) for value in taken]
        tried = budget.trying
        self._tell(budget.note(Use(*taken)), installation)
        return tried and not budget.trying

    def _lower(self, installation: Installation) -> bool:
        """Keep less from now on, if that is possible."""
        assert self.budget is not None
        decided = self.budget.lower()
        if decided is None:
            return False
        self._retaken = True
        self._tell(f"a step ran out of memory and is taken again; {decided}", installation)
        return True

    def _tell(self, decided: str | None, installation: Installation) -> None:
        installation.policy = self.policy
        if decided is not None:
            self._events.append(decided)
            rank_zero_info(f"SAGE: {decided}")

    def events(self) -> list[str]:
        """What has been decided since this was last asked, in words."""
        events, self._events = self._events, []
        return events

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        state: dict[str, Any] = {}
        if self.control is not None:
            state["shift"] = self.control.shift
        if self.budget is not None and not self.budget.trying:
            state["budget"] = self.budget.state()
        return state

    def resume(self, state: dict[str, Any], installation: Installation) -> None:
        """Go on from what :meth:`state` gave."""
        if self.control is not None and "shift" in state:
            self.control.resume(state["shift"])
        if self.budget is not None and "budget" in state:
            self.budget.resume(state["budget"])
        installation.policy = self.policy


def _rows(records: Sequence[BlockRecord]) -> list[int]:
    """Valid, kept and replayed rows of all blocks."""
    return [
        sum(int(r.valid.sum()) for r in records),
        sum(int(r.kept.sum()) for r in records),
        sum(len(r.rows) for r in records if r.rows is not None),
    ]


def _largest(trainer: Trainer, value: int) -> int:
    """Over all ranks; every rank has to ask."""
    device = trainer.strategy.root_device
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    return int(trainer.strategy.reduce(tensor, reduce_op="max"))
