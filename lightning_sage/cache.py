"""What a block holds between forward and backward; knows its bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.masks import Visibility
from lightning_sage.replay import Kept, Rows, Seen


@dataclass
class SparseCache:
    """Rows of one block that wait for the backward pass.

    Attributes:
        index: ``[N]`` int64, the kept rows.
        hidden: ``[N, C]``, the block's input at these rows.
        attention: What each attention call leaves.
        visible: What the mask of each attention call means; masks are shared by the blocks.
        saliency: ``[N]`` float64 where `replay` looks at it.
        probability: ``[N]`` float64, inclusion probability, where rows were drawn.
    """

    index: Tensor
    hidden: Tensor
    attention: list[Kept]
    visible: list[Visibility]
    saliency: Tensor | None = None
    probability: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held for this block alone; masks and other shared arguments are not counted."""
        own = [self.index, self.hidden, self.saliency, self.probability]
        own += [x for kept in self.attention for x in kept]
        return sum(x.numel() * x.element_size() for x in own if x is not None)

    def tensors(self) -> list[Tensor | None]:
        """Everything held, for `save_for_backward`; :func:`restored` takes it back."""
        held = [self.index, self.hidden, self.saliency, self.probability]
        for kept, sight in zip(self.attention, self.visible, strict=True):
            held += [*kept, sight.mask, sight.keys]
        return held

    def order(self) -> list[bool]:
        """Causality of each attention call: all of the cache that is not a tensor."""
        return [sight.causal for sight in self.visible]


def restored(tensors: tuple[Tensor | None, ...], causal: list[bool]) -> SparseCache:
    """The cache whose :func:`SparseCache.tensors` and :func:`SparseCache.order` these are."""
    index, hidden, saliency, probability = tensors[:4]
    assert index is not None
    assert hidden is not None
    attention, visible = [], []
    for i, ordered in enumerate(causal):
        out, lse, k, v, mask, keys = tensors[4 + 6 * i : 10 + 6 * i]
        assert out is not None
        assert lse is not None
        attention.append(Kept(out, lse, k, v))
        visible.append(Visibility(ordered, mask, keys))
    return SparseCache(index, hidden, attention, visible, saliency, probability)


def keep_attention(seen: Seen, rows: Rows, full: bool) -> Kept:
    """What a dense attention call leaves: output and log-sum-exp at the rows, or all keys too."""
    B, _, T, _ = seen.out.shape
    if len(rows.index) == B * T:
        out, lse = seen.out.transpose(1, 2).flatten(0, 1), seen.lse.transpose(1, 2).flatten(0, 1)
        # a view of more than it shows would keep the whole alive
        out, lse = out.contiguous(), lse.contiguous()
    else:
        sample, token = rows.index // T, rows.index % T
        out, lse = seen.out[sample, :, token], seen.lse[sample, :, token]
    k, v = (_own(seen.call.k), _own(seen.call.v)) if full else (None, None)
    return Kept(out, lse, k, v)


def _own(x: Tensor) -> Tensor:
    """`x` without the rest of a fused projection that it may be a view of."""
    whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def sub_cache(cache: SparseCache, chosen: Tensor) -> SparseCache:
    """The cache of some of its rows.

    Args:
        cache: All kept rows.
        chosen: ``[R]`` int64 in ``[0, N)``, sorted.
    """
    attention = [
        Kept(kept.out.index_select(0, chosen), kept.lse.index_select(0, chosen), kept.k, kept.v)
        for kept in cache.attention
    ]
    return SparseCache(
        cache.index.index_select(0, chosen),
        cache.hidden.index_select(0, chosen),
        attention,
        cache.visible,
    )


def keep_hidden(hidden: Tensor, rows: Rows) -> Tensor:
    """Packed rows of the block's input."""
    return ops.gather_rows(hidden, rows.index)
