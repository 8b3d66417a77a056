"""What of a Trainer goes with SAGE, what does not, and what nobody has tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import TransformerEnginePrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

_TESTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's own list."""
    # set by a part of the Trainer that its type does not show
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def refuse_other_package(*objects: object) -> None:
    """Refuse trainers and modules of the other of Lightning's two packages.

    Raises:
        TypeError: One is of `pytorch_lightning`.
    """
    for item in objects:
        if any(base.__module__.split(".")[0] == "pytorch_lightning" for base in type(item).__mro__):
            raise TypeError(
                f"SageCallback belongs to lightning.pytorch, but {type(item).__name__} comes from "
                "pytorch_lightning; import the Trainer and the module from lightning.pytorch"
            )


def check_trainer(trainer: Trainer, allow_untested: bool) -> None:
    """Refuse what is known not to go with SAGE, and warn of what has not been tried.

    Args:
        trainer: The trainer, with its strategy and plugins.
        allow_untested: Only warn of what would be refused.

    Raises:
        ValueError: Something does not go with SAGE; all reasons at once.
    """
    reasons = list(_conflicts(trainer))
    if reasons and not allow_untested:
        raise ValueError(
            f"{'; '.join(reasons)}. allow_untested=True tries it nevertheless, with no promise"
        )
    if reasons:
        rank_zero_warn(f"SAGE goes on because of allow_untested=True: {'; '.join(reasons)}")
    elif not is_tested(trainer.strategy):
        rank_zero_warn(
            f"{type(trainer.strategy).__name__} has not been tested with SAGE; whether gradients "
            "arrive is checked at the first step"
        )


def is_tested(strategy: Strategy) -> bool:
    """Whether the tests of this package train with such a strategy."""
    return isinstance(strategy, _TESTED) and not isinstance(strategy, DeepSpeedStrategy)


def _conflicts(trainer: Trainer) -> Iterator[str]:
    strategy, precision = trainer.strategy, trainer.precision_plugin
    name = type(strategy).__name__
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        yield (
            f"{name} with ZeRO stage 3 takes a block's parameters away before its replay: use "
            "stage 1 or 2, or FSDP (strategy='sage_fsdp')"
        )
    if _is_xla(strategy, trainer.accelerator):
        yield (
            f"{name} compiles a step for fixed shapes, and SAGE's depend on the data: use a GPU "
            "or the CPU"
        )
    if isinstance(precision, TransformerEnginePrecision):
        yield (
            f"precision {precision.precision!r} keeps fp8 scales that hold in a forward pass "
            "alone, and the replay runs in the backward pass: use bf16-mixed or bf16-true"
        )
    if _ddp_settings(strategy).get("static_graph") and (most := _accumulates(trainer)) > 1:
        yield (
            f"static_graph=True with gradients accumulated over {most} batches ends in an "
            "assertion of DistributedDataParallel (pytorch issue 143580): use one of the two"
        )


def _is_xla(*parts: object) -> bool:
    # by name: their classes need torch_xla, and single devices and hosts have several
    return any("XLA" in base.__name__ for part in parts for base in type(part).__mro__)


def _ddp_settings(strategy: Strategy) -> dict[str, Any]:
    settings: dict[str, Any] = getattr(strategy, "_ddp_kwargs", {})
    return settings


def _accumulates(trainer: Trainer) -> int:
    """The most batches whose gradients are accumulated in any epoch."""
    found = (c for c in callbacks_of(trainer) if isinstance(c, GradientAccumulationScheduler))
    schedules = [c.scheduling for c in found]
    return max([trainer.accumulate_grad_batches, *(n for s in schedules for n in s.values())])


@contextmanager
def configured(module: LightningModule) -> Iterator[None]:
    """Let Lightning find a `configure_model`, which it wants for sharding that is done already."""
    if is_overridden("configure_model", module):
        yield
        return
    vars(module)["configure_model"] = lambda: None
    try:
        yield
    finally:
        del vars(module)["configure_model"]
