"""What a block did with the latest batch, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class BlockRecord:
    """What one block did with the latest batch.

    Attributes:
        name: Name of the block in the model.
        valid: ``[B, T]`` bool, False on padding.
        kept: ``[B, T]`` bool.
        cached_bytes: Bytes held between forward and backward for this block alone.
        seed: Of the block's dropout and draws; None where nothing was random.
        rows: ``[R]`` int64, the replayed rows, or None before a backward pass.
        factors: ``[R]``, what their branch gradient was multiplied by; None for 1.
        keys: ``[M]`` int64, kept rows that were not replayed and learned as keys and values of
            those that were; None where there are none.
    """

    name: str
    valid: Tensor
    kept: Tensor
    cached_bytes: int = 0
    seed: int | None = None
    rows: Tensor | None = None
    factors: Tensor | None = None
    keys: Tensor | None = None

    @property
    def replayed(self) -> Tensor | None:
        """``[B, T]`` bool, or None before a backward pass."""
        weights = self.weights
        return None if weights is None else weights > 0

    @property
    def weights(self) -> Tensor | None:
        """``[B, T]`` float64, the factor of each replayed row's branch gradient, 0 elsewhere.

        1/p, or 1 where nothing was drawn; None before a backward pass.
        """
        if self.rows is None:
            return None
        weights = torch.zeros(self.kept.numel(), dtype=torch.float64, device=self.kept.device)
        weights[self.rows] = 1.0 if self.factors is None else self.factors.double()
        return weights.view(self.kept.shape)
