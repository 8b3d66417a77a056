"""What one forward knows of its batch, looked at once and the same for every block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_sage.ops import Rows, Sight, Visibility


class Judged:
    """What saliency and selections start from.

    Attributes:
        queries: Query rows whose attention counts.
        priority: ``[B, T]`` int64, see :func:`SagePolicy.priority`.
        ones: ``[N]`` float32, a weight for each query row.
        noise: ``[B, T]`` float64, for selections that are not random.
        told: Whether something tells rows that bear loss from others.
        count: How many rows a selection keeps whose count depends on nothing else; None until
            a block has counted them.
    """

    def __init__(self, queries: Rows, priority: Tensor, told: bool = True) -> None:
        self.queries, self.priority, self.told = queries, priority, told
        self.ones = torch.ones(len(queries), device=priority.device)
        self.noise = torch.zeros(priority.shape, dtype=torch.float64, device=priority.device)
        self.count: int | None = None
        self._sights: list[Sight] = []

    def sight(self, keys: Rows, visible: Visibility) -> Sight:
        """What the query rows see; the same for all blocks that share a mask."""
        for known in self._sights:
            if known.keys is keys and known.visible is visible:
                return known
        self._sights.append(Sight(self.queries, keys, visible))
        return self._sights[-1]


@dataclass
class Facts:
    """What a forward knows of its batch; the same for every block, so looked at once.

    Attributes:
        heard: The tensors that this was learned from.
        valid: ``[B, T]`` bool, False on padding.
        count: Valid tokens.
        every: All tokens.
        keys: By the tokens that a mask lets anyone see, these tokens as rows.
        judged: By causality, what saliency and selections start from.
        latest: Causality and saliency of the latest block with attention.
    """

    heard: tuple[Any, ...]
    valid: Tensor
    count: int
    every: Rows
    keys: list[tuple[Tensor, Rows]] = field(default_factory=list)
    judged: dict[bool, Judged] = field(default_factory=dict)
    latest: tuple[bool, Tensor | None] = False, None

    @property
    def padded(self) -> bool:
        """Whether any token is padding."""
        return self.count < len(self.every)

    def key_rows(self, visible: Visibility, others: int | None = None) -> Rows:
        """The tokens that are seen at all, of a sequence that has `others` if it is another one."""
        if visible.keys is None:
            every = self.every
            return every if others is None else Rows.every(every.B, others, every.index.device)
        for known, rows in self.keys:
            if known is visible.keys:
                return rows
        rows = Rows.of(visible.keys, self.count if visible.keys is self.valid else None)
        self.keys.append((visible.keys, rows))
        return rows

    @classmethod
    def of(cls, heard: tuple[Any, ...], mask: Any, hidden: Tensor) -> Facts:
        """Look at a batch; waits for the device where there is padding.

        Args:
            heard: What tells one batch from another.
            mask: Its `attention_mask`, if it is a tensor.
            hidden: Hidden states ``[B, T, C]``.
        """
        B, T, _ = hidden.shape
        valid = _valid(mask, hidden)
        count = int(valid.sum()) if isinstance(mask, Tensor) else B * T
        return cls(heard, valid, count, Rows.every(B, T, hidden.device))

    def about(self, heard: tuple[Any, ...]) -> bool:
        """Whether these are the facts of what was heard: the same tensors, not equal ones."""
        return all(
            x is y or (not isinstance(x, Tensor) and x == y)
            for x, y in zip(self.heard, heard, strict=True)
        )


def _valid(mask: Any, hidden: Tensor) -> Tensor:
    """``[B, T]`` bool, False on padding, as far as the batch tells."""
    if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
        mask = mask.to(hidden.device)
        # additive: 0 where a token is, far below where none is
        additive = mask.is_floating_point() and not bool((mask > 0).any())
        valid: Tensor = mask == 0 if additive else mask != 0
        return valid
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
