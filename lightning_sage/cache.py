"""What a block holds between forward and backward; knows its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_sage.ops import Visibility
from lightning_sage.packing import Stored
from lightning_sage.replay import Kept

# stands where a cache is taken apart
_NO_VISIBILITY = Visibility(False)


@dataclass
class SparseCache:
    """Rows of one block that wait for the backward pass.

    Attributes:
        index: ``[N]`` int64, the kept rows.
        hidden: ``[N, C]``, the block's input at these rows.
        attention: What each attention call leaves; masks are shared by the blocks.
        saliency: ``[N]`` float64 where `replay` looks at it.
        probability: ``[N]`` float64, inclusion probability, where rows were drawn.
    """

    index: Tensor
    hidden: Stored
    attention: list[Kept]
    saliency: Tensor | None = None
    probability: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held for this block alone; masks and other shared arguments are not counted."""
        own = [self.index, self.saliency, self.probability, *(kept.lse for kept in self.attention)]
        stored = [self.hidden]
        stored += [
            x for kept in self.attention for x in (kept.out, kept.k, kept.v) if x is not None
        ]
        plain = sum(x.numel() * x.element_size() for x in own if x is not None)
        return plain + sum(x.nbytes for x in stored)

    def taken_apart(self) -> tuple[list[Tensor | None], list[Any]]:
        """Everything held, for `save_for_backward`, and all that is not a tensor."""
        calls = [
            (kept._replace(visible=_NO_VISIBILITY), vars(kept.visible).copy())
            for kept in self.attention
        ]
        state = (self.index, self.hidden, calls, self.saliency, self.probability)
        leaves, spec = pytree.tree_flatten(state)
        tensors = [x if isinstance(x, Tensor) else None for x in leaves]
        return tensors, [[None if isinstance(x, Tensor) else x for x in leaves], spec]

    @classmethod
    def put_together(cls, tensors: tuple[Tensor | None, ...], rest: list[Any]) -> SparseCache:
        """The cache that was :meth:`taken_apart`."""
        others, spec = rest
        leaves = [x if x is not None else y for x, y in zip(tensors, others, strict=True)]
        index, hidden, calls, saliency, probability = pytree.tree_unflatten(leaves, spec)
        attention = [kept._replace(visible=Visibility(**fields)) for kept, fields in calls]
        return cls(index, hidden, attention, saliency, probability)
