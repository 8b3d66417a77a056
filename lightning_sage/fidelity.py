"""How near a sparse gradient is to the dense one of the same batch, as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sage.block_metric import BlockMetric, exact, sent

Gradient = Sequence[Tensor | None]

# Cosines and ratios are kept in units of this: a sum of integers is the same in whatever order
# ranks come, and stays what it is when a module is cast. Rounding is 1e-10; room for 2**21 updates.
_UNIT = 2**32
_MOST = 2.0**10

# elements that are float64 at a time
_CHUNK = 2**20


class GradientFidelity(BlockMetric):
    """Cosine and norm ratio, |sparse| / |dense|, of two gradients: means over updates and ranks.

    A gradient is a mapping from names of blocks to tensors, one a parameter; None is zero. Those of
    a block, and of all blocks, are taken for one long vector. Two zeros are alike: cosine 1, ratio
    1. If one is zero the cosine is 0. Ratios count up to 1024, as which those to a dense gradient
    of zero count. A gradient with an infinity or NaN, as loss scaling makes them, is not counted.

    Dot products are in float64 (float32 on MPS), a part of a tensor at a time. What is summed over
    updates are integers, in units of 2**-32: one process gives the very values of several.

    Args:
        blocks: Names of blocks whose own values :func:`compute` gives too; None is all together.
        kwargs: Settings of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: In `update`: the two differ in blocks, in how many tensors or in shapes, or a
            block is none of `blocks`.

    Example:
        >>> import torch
        >>> from lightning_sage import GradientFidelity
        >>> metric = GradientFidelity(["layers.0"])
        >>> sparse, dense = torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])
        >>> metric.update({"layers.0": [sparse]}, {"layers.0": [dense]})
        >>> {name: round(value.item(), 6) for name, value in metric.compute().items()}
        {'cosine': 0.6, 'norm_ratio': 0.6, 'cosine/layers.0': 0.6, 'norm_ratio/layers.0': 0.6}
    """

    higher_is_better = True
    plot_lower_bound = None
    cosines: Tensor
    norm_ratios: Tensor
    seen: Tensor

    def __init__(self, blocks: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(blocks, **kwargs)
        # the first is overall
        for name in ("cosines", "norm_ratios", "seen"):
            self._add(name, (1 + len(self.blocks or ()),))

    def update(self, sparse: Mapping[str, Gradient], dense: Mapping[str, Gradient]) -> None:
        """Compare the gradients of one batch.

        Args:
            sparse: By block, of any shapes, dtypes and devices; whole tensors, not shards.
            dense: The same blocks, in the same shapes. A block that is in neither counts nothing,
                nor does an update without blocks.
        """
        if sparse.keys() != dense.keys():
            odd = sorted(sparse.keys() ^ dense.keys())[0]
            raise ValueError(f"block '{odd}' has one of the gradients: give both, or neither")
        slots = [0, *(1 + slot for slot in self._slots(list(sparse)))]
        if not sparse:
            return
        own = [_products(name, sparse[name], dense[name]).to(self.device) for name in sparse]
        products = torch.stack([sum(own[1:], own[0]), *own])[: len(slots)]
        dot, norms = products[:, 0], products[:, 1:].sqrt()
        cosine, ratio = _compared(dot, *norms.unbind(1))
        counts = cosine.isfinite()
        index = sent(slots, self.device)
        for state, value in ((self.cosines, cosine), (self.norm_ratios, ratio)):
            units = torch.where(counts, value * _UNIT, 0).round().long()
            state.index_add_(0, index, units)
        self.seen.index_add_(0, index, counts.long())

    def compute(self) -> dict[str, Tensor]:
        """`cosine` and `norm_ratio`, and with `blocks` `cosine/NAME` and `norm_ratio/NAME`, 0-dim.

        NaN where nothing was counted.
        """
        dtype = exact(self.seen.device)
        places = ["", *(f"/{name}" for name in self.blocks or ())]
        result = {}
        for place, values in enumerate(zip(self.cosines, self.norm_ratios, self.seen, strict=True)):
            cosine, ratio, seen = (value.to(dtype) for value in values)
            result[f"cosine{places[place]}"] = cosine / _UNIT / seen
            result[f"norm_ratio{places[place]}"] = ratio / _UNIT / seen
        return result


def _compared(dot: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and norm ratio from a dot product and two norms; the cosine NaN if one is not finite.

    An infinity or NaN in either gradient makes the dot product NaN, or infinite as the norm is.
    """
    one, zero, most = (torch.full_like(dot, value) for value in (1.0, 0.0, _MOST))
    both = (sparse == 0) & (dense == 0)
    cosine = torch.where(both, one, (dot / (sparse * dense)).clamp(-1, 1))
    ratio = torch.where(both, one, (sparse / dense).clamp(max=_MOST))
    cosine = torch.where(~both & (sparse * dense == 0), zero, cosine)
    return cosine, torch.where(~both & (dense == 0), most, ratio)


def _products(name: str, sparse: Gradient, dense: Gradient) -> Tensor:
    """``[3]``: sparse . dense, sparse . sparse, dense . dense, over all tensors of a block."""
    if len(sparse) != len(dense):
        raise ValueError(
            f"block '{name}' has {len(sparse)} sparse gradients and {len(dense)} dense ones: give "
            "one of each for every parameter, None where there is none"
        )
    total: Tensor | None = None
    for one, other in zip(sparse, dense, strict=True):
        if one is not None and other is not None and one.shape != other.shape:
            raise ValueError(
                f"block '{name}': gradients of shapes {list(one.shape)} and {list(other.shape)} "
                "cannot be of one parameter"
            )
        for a, b in _chunks(one, other):
            products = torch.stack([a.dot(b), a.dot(a), b.dot(b)])
            total = products if total is None else total + products.to(total.device)
    return torch.zeros(3, dtype=torch.float64) if total is None else total


def _chunks(one: Tensor | None, other: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Both, flat and in the widest dtype, a part at a time; nothing where both are None."""
    there = one if one is not None else other
    if there is None:
        return
    # takes no memory, and its parts are zeros
    nothing = there.new_zeros(1).expand(there.numel())
    dtype = exact(there.device)
    flat = [(nothing if x is None else x.detach().reshape(-1)).split(_CHUNK) for x in (one, other)]
    for a, b in zip(*flat, strict=True):
        yield a.to(dtype), b.to(a.device, dtype)
