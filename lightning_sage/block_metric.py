"""What the metrics share: integer states, a place for every block, and adding without a wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class SageMetric(Metric):
    """What the metrics share. Their states are integers: sums and maxima that nothing rounds.

    A metric inside a module is cast with it, and in bfloat16 a count would end at 256.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    plot_lower_bound: float | None = 0.0

    def _add(self, name: str, size: tuple[int, ...] = (), reduce: str = "sum") -> None:
        self.add_state(name, torch.zeros(size, dtype=torch.long), dist_reduce_fx=reduce)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        moved: nn.Module = super()._apply(*args, **kwargs)
        # a value that was computed before was cast with the module
        self._computed = None
        return moved

    def _ratio(self, part: Tensor, whole: Tensor) -> Tensor:
        """Part / whole; of nothing it is 0."""
        dtype = exact(part.device)
        return part.to(dtype) / whole.clamp(min=1).to(dtype)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values with matplotlib.

        Args:
            val: What `compute` or `forward` gave, or a list of it over time; None computes it.
            ax: The axes to draw on; None makes new ones.

        Returns:
            Figure and axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``lightning-sage[plots]``).
        """
        return self._plot(val, ax)


class BlockMetric(SageMetric):
    """A metric of blocks, over all of them or each by itself as well.

    Args:
        blocks: Names of the blocks (`Installation.blocks`), whose own values :func:`compute` then
            gives as well; None counts whatever blocks there are, all together.
        kwargs: Settings of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: A name stands twice; in `update`, a block is none of `blocks`.
    """

    def __init__(self, blocks: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.blocks = None if blocks is None else list(blocks)
        self._places = {name: i for i, name in enumerate(self.blocks or ())}
        if len(self._places) < len(self.blocks or ()):
            raise ValueError(f"blocks={self.blocks}: a name stands twice, and each counts alone")

    def _slots(self, names: Sequence[str]) -> list[int]:
        """Where blocks stand among those that are counted alone."""
        if self.blocks is None:
            return []
        unknown = [name for name in names if name not in self._places]
        if unknown:
            raise ValueError(
                f"block '{unknown[0]}' is none of blocks={self.blocks}: make the metric with the "
                "names of the installation's blocks, or with blocks=None"
            )
        return [self._places[name] for name in names]

    def _count(self, state: Tensor, slots: list[int], amounts: Tensor) -> None:
        """Add to a state what each of some blocks has, ``[n]`` int64."""
        if self.blocks is None:
            state += amounts.sum()
        elif slots == list(range(len(self.blocks))):
            state += amounts
        else:
            state.index_add_(0, sent(slots, self.device), amounts)

    def _told(self, overall: Tensor, own: Tensor) -> Tensor | dict[str, Tensor]:
        if self.blocks is None:
            return overall
        return {"overall": overall, **dict(zip(self.blocks, own, strict=True))}


def true_counts(masks: Sequence[Tensor], device: torch.device) -> Tensor:
    """How much of each mask is True: ``[n]`` int64, in few kernels however many blocks there are.

    Args:
        masks: At least one, bool; often one object for all, and else mostly of one shape.
        device: Where the counts go.
    """
    first = masks[0]
    if all(mask is first for mask in masks):
        return first.sum().to(device).expand(len(masks))
    if all(mask.shape == first.shape and mask.device == first.device for mask in masks):
        return torch.stack(list(masks)).flatten(1).sum(1).to(device)
    return torch.stack([mask.sum().to(device) for mask in masks])


def sent(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers as an int64 tensor on `device`; CUDA is not waited for."""
    # out of memory that is not pinned the copy would wait for all that was launched before
    pinned = torch.tensor(numbers, dtype=torch.long, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def exact(device: torch.device) -> torch.dtype:
    """The widest floating dtype there is on a device."""
    return torch.float32 if device.type == "mps" else torch.float64
