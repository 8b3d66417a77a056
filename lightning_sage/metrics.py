"""What SAGE keeps, replays and holds in memory, as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sage.memory import MIB


class Usage(Protocol):
    """What the metric reads of a block's record."""

    valid: Tensor
    kept: Tensor
    cached_bytes: int

    @property
    def replayed(self) -> Tensor | None:
        """``[B, T]`` bool, or None before a backward pass."""


class SageUsage(Metric):
    """Share of the valid tokens that blocks kept and replayed, and the MiB they cached per step.

    One update takes the records of one training step (`Installation.records` after its backward),
    all blocks together. Tokens are counted where the records live, without waiting for the device:
    only reading the values of :func:`compute` does. A block no backward has reached replayed none.

    Args:
        kwargs: Settings of :class:`torchmetrics.Metric`.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> record = SimpleNamespace(
        ...     valid=torch.tensor([[True, True, True, True, False]]),
        ...     kept=torch.tensor([[True, False, True, True, False]]),
        ...     replayed=torch.tensor([[True, False, False, False, False]]),
        ...     cached_bytes=2**19,
        ... )
        >>> usage = SageUsage()
        >>> usage.update([record, record])
        >>> {name: value.item() for name, value in usage.compute().items()}
        {'kept_fraction': 0.75, 'replayed_fraction': 0.25, 'cached_mib': 1.0}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    # integers: a metric inside a module is cast with it, and bfloat16 counts to 256 only
    _states: ClassVar = ("valid", "kept", "replayed", "cached_bytes", "steps")
    valid: Tensor
    kept: Tensor
    replayed: Tensor
    cached_bytes: Tensor
    steps: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        for name in self._states:
            self.add_state(name, torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, records: Sequence[Usage]) -> None:
        """Count one step.

        Args:
            records: One entry per wrapped block; empty for a step in which none ran.
        """
        self.valid += self._count([record.valid for record in records])
        self.kept += self._count([record.kept for record in records])
        self.replayed += self._count([r.replayed for r in records if r.replayed is not None])
        self.cached_bytes += sum(record.cached_bytes for record in records)
        self.steps += 1

    def _count(self, masks: list[Tensor]) -> Tensor | int:
        # one concatenation, not one addition a block; blocks may live on several devices
        flat = [mask.flatten().to(self.device) for mask in masks]
        return torch.cat(flat).sum() if flat else 0

    def compute(self) -> dict[str, Tensor]:
        """Fractions of the valid tokens (0 where there were none) and MiB cached per step."""
        valid = self.valid.clamp(min=1)
        return {
            "kept_fraction": self.kept / valid,
            "replayed_fraction": self.replayed / valid,
            "cached_mib": self.cached_bytes / self.steps.clamp(min=1) / MIB,
        }
