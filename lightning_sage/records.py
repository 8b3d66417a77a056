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
        keys: ``[M]`` int64, kept rows that were not replayed and learned as keys and values of
            those that were; None where there are none.
        drawn: ``[B, T]``, what the gradient of the block's output was multiplied by before anything
            else, where the backward pass entered its chain of blocks here and rows were drawn:
            1/p of a row that was drawn, 0 of one that was not. None elsewhere.
    """

    name: str
    valid: Tensor
    kept: Tensor
    cached_bytes: int = 0
    seed: int | None = None
    rows: Tensor | None = None
    keys: Tensor | None = None
    drawn: Tensor | None = None

    @property
    def replayed(self) -> Tensor | None:
        """``[B, T]`` bool, or None before a backward pass."""
        if self.rows is None:
            return None
        replayed = torch.zeros(self.kept.numel(), dtype=torch.bool, device=self.kept.device)
        return replayed.index_fill(0, self.rows, True).view(self.kept.shape)
