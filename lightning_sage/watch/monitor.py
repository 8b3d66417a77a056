"""FidelityMonitor: on some steps of a fit, how far the sparse gradient is from the dense one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_sage.install import Installation
from lightning_sage.memory import free_unused, tensors_in
from lightning_sage.metrics import GradientFidelity
from lightning_sage.policy import SagePolicy, named
from lightning_sage.records import BlockRecord
from lightning_sage.support import is_tested
from lightning_sage.watch.dial import FidelityControl, advice
from lightning_sage.watch.memory_budget import MemoryBudget
from lightning_sage.watch.probe import Gradients, block_gradients, undisturbed

# optimizer steps before the look of a fit that has asked for none: adapters begin at zero, where
# half of them have no gradient
FIRST_STEPS = 10
# of a sparse gradient's norm over the dense one: beyond, it is not the gradient of this loss
NORMS = (0.5, 1.5)


@dataclass(frozen=True)
class Step:
    """A training step that is about to be taken.

    Attributes:
        trainer: The trainer.
        module: Its module.
        installation: SAGE on the module.
        batch: The batch, where the module is.
        batch_idx: Its number in the epoch.
    """

    trainer: Trainer
    module: LightningModule
    installation: Installation
    batch: Any
    batch_idx: int

    def gradients(
        self, policy: SagePolicy | None = None, dense: bool = False
    ) -> tuple[Gradients, list[BlockRecord]]:
        """See :func:`lightning_sage.watch.probe.block_gradients`; nothing shows afterwards."""
        observed = self.batch if isinstance(self.batch, Mapping) else None
        self.installation.observe(observed)
        parameters = list(self.module.parameters())
        versions = [parameter._version for parameter in parameters]
        with undisturbed(self.module, self.module.device), _unlogged(self.module):
            found = block_gradients(self.installation, self._loss, policy, dense)
        if [parameter._version for parameter in parameters] != versions:
            raise ValueError(
                "training_step changes parameters in place, and did so for this look as well"
            )
        return found

    def _loss(self) -> Tensor:
        """What the module's `training_step` returns, in the trainer's precision."""
        precision, step = self.trainer.precision_plugin, self.module.training_step
        indexed = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        # a copy: the step itself gets the batch as it came, whatever is done to this one
        batch = apply_to_collection(self.batch, Tensor, Tensor.clone)
        with precision.train_step_context():
            out = step(batch, self.batch_idx) if indexed else step(batch)
        loss = out["loss"] if isinstance(out, Mapping) else out
        if not isinstance(loss, Tensor):
            raise ValueError("training_step returned no loss for this batch")
        # in float16 small gradients are there only when scaled
        scaler = getattr(precision, "scaler", None)
        return loss if scaler is None else loss * scaler.get_scale()

    def samples(self) -> int:
        """Samples of the batch: the first axis of its first tensor."""
        return next((len(x) for x in tensors_in(self.batch) if x.dim()), 1)

    def first(self, count: int) -> Step:
        """The step with the first samples of its batch only."""
        whole = self.samples()
        if count == whole:
            return self

        def cut(x: Tensor) -> Tensor:
            return x[:count] if x.shape[:1] == (whole,) else x

        return replace(self, batch=apply_to_collection(self.batch, Tensor, cut))


@contextmanager
def _unlogged(module: LightningModule) -> Iterator[None]:
    """What the module logs goes nowhere: it will log it again in the step itself."""
    names = ("log", "log_dict")
    own = {name: vars(module)[name] for name in names if name in vars(module)}
    vars(module).update(dict.fromkeys(names, lambda *_, **__: None))
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]
        vars(module).update(own)


@dataclass(frozen=True)
class Reading:
    """What a look at one step has shown.

    Attributes:
        values: What `GradientFidelity` gives: `cosine` and `norm_ratio`, alone and by block.
        samples: How many of the batch this rank looked at.
    """

    values: dict[str, float]
    samples: int


class FidelityMonitor:
    """Runs a batch twice before its step, densely and sparsely, and compares the gradients.

    Gradients, optimizer, random generators, buffers and metrics of the module are as if nothing
    had happened, and what `training_step` logs meanwhile is dropped. Whatever else it does (its
    own counters and generators, hooks on modules) it does once more in each pass. What is kept is
    what the policy chooses by itself, whatever ranks level by `balance`.

    A batch that does not fit is looked at in part, and a module that cannot be looked at is
    trained without, after one warning. (Sharded by FSDP2 ranks depend on one another, so only one
    sample of each is looked at.)

    Args:
        every: Optimizer steps between two looks; None looks once, after :data:`FIRST_STEPS`, and
            only says in the log why it cannot.
        floor: A cosine below it is warned of, once until it has been above again, and so is a norm
            out of :data:`NORMS`; 0 warns of neither.
        control: What moves the policy by what is seen, if anything.

    Attributes:
        working: Whether this rank still looks.
        budget: What limits the policy, if anything.
    """

    def __init__(
        self, every: int | None, floor: float, control: FidelityControl | None = None
    ) -> None:
        self.every, self.floor, self.control = every, floor, control
        self.working, self._low, self._at_its_end = True, False, False
        self.budget: MemoryBudget | None = None
        self._samples: int | None = None
        self._due, self._due_at = False, -1

    def is_due(self, step: int, ready: bool = True) -> bool:
        """Whether the batches of this optimizer step are to be looked at; true once a step.

        Args:
            step: Its number.
            ready: Whether it is a step like others; if not, a later one is looked at.
        """
        if self.every is None:
            begins = self._due_at < 0 and step >= FIRST_STEPS
        else:
            begins = step % self.every == 0 and step != self._due_at
        if begins:
            self._due_at, self._due = step, True
        due = self._due and ready
        self._due = self._due and not ready
        return due

    def look(self, step: Step) -> Reading | None:
        """Compare the gradients of a batch, and steer by it; every rank has to.

        Returns:
            What was seen, over all ranks; None where no rank could look.
        """
        dense: Gradients | None = None
        sparse: Gradients | None = None
        records: list[BlockRecord] = []
        if self.working:
            with self._or_stop():
                self._refuse(step)
                step, dense, sparse, records = self._passes(step)
        values = _compared(step, sparse, dense)
        if not values:
            return None
        if self.control is not None:
            self._steer(step, dense, values["cosine"])
        self._warn(step, values, records)
        return Reading(values, step.samples() if dense else 0)

    def _passes(self, step: Step) -> tuple[Step, Gradients, Gradients, list[BlockRecord]]:
        """The step with as many samples as fit, its dense and its sparse gradient, and records."""
        whole = step.samples()
        if isinstance(step.trainer.strategy, ModelParallelStrategy):
            self._samples = 1
        count = min(self._samples or whole, whole)
        while True:
            part = step.first(count)
            try:
                dense, _ = part.gradients(dense=True)
                return part, dense, *part.gradients()
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
            # outside of the handler, whose traceback holds what did not fit
            count = self._samples = count // 2
            free_unused()

    def _refuse(self, step: Step) -> None:
        strategy = type(step.trainer.strategy)
        if not step.module.automatic_optimization:
            raise ValueError("manual optimization steps within training_step, which looks twice")
        if not is_tested(step.trainer.strategy):
            raise ValueError(f"nobody has tried that with {strategy.__name__}")
        if is_param_in_hook_signature(step.module.training_step, "dataloader_iter", explicit=True):
            raise ValueError("training_step takes dataloader_iter, which gives a batch once only")

    @contextmanager
    def _or_stop(self) -> Iterator[None]:
        """Training goes on without what fails inside."""
        try:
            yield
        except Exception as error:
            self.working = False
            small = isinstance(error, torch.OutOfMemoryError)
            reason = "no part of the batch fits in memory" if small else str(error)
            text = f"({type(error).__name__}: {reason}); training goes on"
            if self.every is None:
                # nobody asked for it
                rank_zero_info(f"SAGE: how true the gradient is was not measured {text}")
            else:
                warnings.warn(f"gradient fidelity is not measured any more {text}", stacklevel=2)

    def _steer(self, step: Step, dense: Gradients | None, cosine: float) -> None:
        control = self.control
        assert control is not None

        def measure(policy: SagePolicy) -> float | None:
            sparse = None
            if self.working and dense is not None:
                with self._or_stop():
                    allowed = policy if self.budget is None else self.budget.of(policy)
                    sparse, _ = step.gradients(allowed)
            return _compared(step, sparse, dense).get("cosine")

        control.update(cosine, measure)
        if control.at_its_end and cosine < control.target and not self._at_its_end:
            self._at_its_end = True
            rank_zero_warn(
                f"fidelity_target={control.target} is out of reach: the cosine is {cosine:.3f} "
                f"with all that can be moved at its upper bound, {step.installation.policy}"
            )

    def _warn(self, step: Step, values: dict[str, float], records: list[BlockRecord]) -> None:
        cosine, norm = values["cosine"], values["norm_ratio"]
        least, most = NORMS
        found = []
        if cosine < self.floor:
            found.append(
                f"the gradient's cosine with the dense one is {cosine:.3f}, below "
                f"fidelity_floor={self.floor}"
            )
        if self.floor and not least <= norm <= most:
            found.append(
                f"the gradient's norm is {norm:.3g} of the dense one, not {least} to {most}"
            )
        if found and not self._low and self.control is None:
            policy = step.installation.policy
            if self.budget is not None and self.budget.rung != self.budget.rungs[0]:
                way_out = f"memory_budget allows {self.budget.rung}, so raise it"
            else:
                way_out = advice(policy, records)
            rank_zero_warn(
                f"at step {step.trainer.global_step} with {named(policy)} {' and '.join(found)}: "
                f"{way_out}; fidelity_every_n_steps=0 does not look"
            )
        self._low = bool(found)


def _compared(step: Step, sparse: Gradients | None, dense: Gradients | None) -> dict[str, float]:
    """Cosines and norm ratios over all ranks; empty where no rank has any that is finite."""
    metric = GradientFidelity(list(step.installation.blocks)).to(step.module.device)
    # a rank that could not look counts nothing, but has to ask with the others
    if sparse is None or dense is None:
        sparse = dense = {}
    metric.update(sparse, dense)
    values = {name: float(value) for name, value in metric.compute().items()}
    # a block without trainable parameters has none
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    return values if "cosine" in values else {}
