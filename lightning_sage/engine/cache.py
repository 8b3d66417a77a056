"""What a block holds between forward and backward; knows its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_sage.engine.packing import Stored
from lightning_sage.engine.seen import Kept
from lightning_sage.ops import Visibility

_NOTHING = (None, None)


@dataclass
class SparseCache:
    """Rows of one block that wait for the backward pass.

    Attributes:
        index: ``[N]`` int64, the kept rows.
        hidden: ``[N, C]``, the block's input at these rows.
        attention: What each attention call leaves; masks are shared by the blocks.
        saliency: ``[N]`` float64 where `replay` looks at it.
        probability: ``[N]`` float64, of a row's being kept, where that was drawn.
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

    def taken_apart(self) -> tuple[list[Tensor | None], list[tuple[bool, int, int]]]:
        """Everything held, for `save_for_backward`, and what else tells attention calls apart."""
        tensors = [self.index, *self.hidden, self.saliency, self.probability]
        for kept in self.attention:
            k, v, sight = kept.k or _NOTHING, kept.v or _NOTHING, kept.visible
            tensors += [*kept.out, kept.lse, *k, *v, kept.keys]
            tensors += [sight.first, sight.stop, sight.keys, sight.mask]
        return tensors, [(x.visible.causal, x.others, x.number) for x in self.attention]

    @classmethod
    def put_together(
        cls, tensors: Sequence[Any], known: Sequence[tuple[bool, int, int]]
    ) -> SparseCache:
        """The cache that was :meth:`taken_apart`."""
        index, values, scale, saliency, probability, *rest = tensors
        attention = []
        for i, (causal, others, number) in enumerate(known):
            out, out_scale, lse, k, k_scale, v, v_scale, keys, *sight = rest[12 * i : 12 * i + 12]
            found = Kept(Stored(out, out_scale), lse, Visibility(causal, *sight), keys=keys)
            found = found._replace(others=others, number=number)
            if k is not None:
                found = found._replace(k=Stored(k, k_scale), v=Stored(v, v_scale))
            attention.append(found)
        return cls(index, Stored(values, scale), attention, saliency, probability)
