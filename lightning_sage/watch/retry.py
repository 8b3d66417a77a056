"""A training step that ran out of memory is taken once more, with less kept; nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_sage.memory import free_unused
from lightning_sage.resume import random_states, restore_random_states
from lightning_sage.watch.probe import undoing


class StepRetry:
    """Wraps the closures (forward, zero_grad, backward) of one Trainer's automatic optimization.

    A closure that raises `torch.OutOfMemoryError` is run again for the same batch, with the random
    states, buffers, metrics and accumulated gradients (copied to the host before every batch but
    the first of a window) that it began with; what `training_step` had logged is logged again. An
    optimizer that runs out of memory itself is not: it may have changed some of the weights.

    Several ranks depend on one another's collectives, so there the error is passed on with a note.

    Args:
        trainer: The trainer, with automatic optimization.
        lower: Called after a failure; whether there is any use in another try.
    """

    def __init__(self, trainer: Trainer, lower: Callable[[], bool]) -> None:
        self._trainer, self._lower = trainer, lower
        self._loop: Any = trainer.fit_loop.epoch_loop.automatic_optimization
        # below the class, on this one loop; taken out by :meth:`remove`
        vars(self._loop)["_make_closure"] = self._make_closure

    def remove(self) -> None:
        """Leave the loop as it was; again is no error."""
        vars(self._loop).pop("_make_closure", None)

    def _make_closure(self, *args: Any, **kwargs: Any) -> Any:
        closure = type(self._loop)._make_closure(self._loop, *args, **kwargs)
        # without zero_grad, gradients of earlier batches are there, to which this one adds
        adds, run, there = closure._zero_grad_fn is None, type(closure).closure, ref(closure)
        # without a cycle, in which the batch would stay until the collector comes
        closure.closure = self._repeated(lambda *a, **k: run(there(), *a, **k), adds)
        return closure

    def _repeated(self, run: Callable[..., Any], adds: bool) -> Callable[..., Any]:
        def closure(*args: Any, **kwargs: Any) -> Any:
            module, device = self._trainer.lightning_module, self._trainer.strategy.root_device
            alone = isinstance(self._trainer.strategy, SingleDeviceStrategy)
            states = random_states(device)
            gradients = _gradients_on_host(module) if adds and alone else None
            undo = undoing(module) if alone else None
            while True:
                try:
                    return run(*args, **kwargs)
                except torch.OutOfMemoryError as error:
                    if not alone:
                        error.add_note(
                            "SAGE: a step is taken again, with less kept, on one device only: "
                            "start again from the last checkpoint with a smaller memory_budget"
                        )
                        raise
                    if not self._lower():
                        raise
                # outside of the handler, whose traceback holds what did not fit
                free_unused()
                restore_random_states(states, device)
                if undo is not None:
                    undo()
                if gradients is not None:
                    _put_back(module, gradients)

        return closure


def _gradients_on_host(module: nn.Module) -> dict[str, Tensor | None]:
    # a copy, for backward adds in place; on the host, as memory is what there is too little of
    return {
        name: None if p.grad is None else p.grad.detach().to("cpu", copy=True)
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def _put_back(module: nn.Module, gradients: dict[str, Tensor | None]) -> None:
    for name, parameter in module.named_parameters():
        if name in gradients:
            kept = gradients[name]
            if kept is None or parameter.grad is None:
                parameter.grad = None if kept is None else kept.to(parameter.device)
            else:
                parameter.grad.copy_(kept)
