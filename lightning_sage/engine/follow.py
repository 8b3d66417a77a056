"""Follows attention weights that a block makes by hand, from their softmax to their product.

BLOOM, GPT-J, MPT, DeBERTa and many remote models call no attention function: they take the softmax
of their logits and multiply it with the values. What lies between, casts and views and dropout,
leaves the weights the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sage.errors import ReplayError

SOFTMAX = {torch.softmax, Tensor.softmax, torch.special.softmax}
_PRODUCT = {
    torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__,
}  # fmt: skip
# the result is the weights again, in another dtype or shape, or with zeros where they are none
_SAME = {
    Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type,
    Tensor.type_as, Tensor.view, Tensor.reshape, torch.reshape, Tensor.contiguous,
    Tensor.masked_fill, torch.masked_fill,
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Attention weights on their way.

    Attributes:
        logits: ``[B, H, T, S]``, masked.
        number: Which softmax of the block, of those that could be of attention.
        dropout: Probability of dropping a weight.
    """

    logits: Tensor
    number: int
    dropout: float = 0.0


class Weigher(Protocol):
    """What happens to weights made by hand."""

    def could_be_weights(self, leading: int, queries: int, keys: int) -> bool:
        """Whether logits ``[leading, ..., queries, keys]`` may be of this block's tokens."""

    def softmax(self, weights: Weights, given: Callable[[], Tensor]) -> Tensor:
        """The weights, in the shape of the logits; `given` computes them."""

    def product(
        self, weights: Weights, x: Tensor, values: Tensor, given: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """What `given` makes of `x`, the weights as they arrived, and `values`."""


class Follower:
    """Sees the functions that a block calls; lives for one forward or replay.

    Args:
        weigher: What happens at a softmax and at a product.
    """

    def __init__(self, weigher: Weigher) -> None:
        self.weigher = weigher
        self.count = 0
        # tensors are held, so that their numbers are not given to others
        self.known: dict[int, tuple[Tensor, Weights]] = {}

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Result of a function that concerns weights, else NotImplemented."""
        # the name looked up, as in torch itself: others replace it
        if func is F.softmax or func in SOFTMAX:
            return self._softmax(func, args, kwargs)
        if not self.known or not args or not isinstance(args[0], Tensor):
            return NotImplemented
        _, weights = self.known.get(id(args[0]), (None, None))
        if weights is None:
            return NotImplemented
        if func is F.dropout:
            return self._dropout(weights, *args, **kwargs)
        if func in _PRODUCT:
            return self._product(weights, func, *args, **kwargs)
        if func not in _SAME:
            return NotImplemented
        result: Tensor = func(*args, **kwargs)
        self.known[id(result)] = result, weights
        return result

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(x, Tensor) or x.dim() not in (3, 4) or dim not in (-1, x.dim() - 1):
            return NotImplemented
        if not self.weigher.could_be_weights(x.shape[0], *x.shape[-2:]):
            return NotImplemented
        weights = Weights(x, self.count)
        self.count += 1
        found = self.weigher.softmax(weights, lambda: func(*args, **kwargs))
        self.known[id(found)] = found, weights
        return found

    def _dropout(
        self,
        weights: Weights,
        x: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        # drawn where the product is: only there is it known whether these are attention's
        if not training or p == 0:
            return x
        same = x.view_as(x)
        self.known[id(same)] = same, replace(weights, dropout=p)
        return same

    def _product(self, weights: Weights, func: Any, x: Tensor, values: Tensor) -> Any:
        if values.dim() != x.dim() or values.shape[-2] != x.shape[-1]:
            return NotImplemented
        self.known = {i: y for i, y in self.known.items() if y[1].number != weights.number}
        return self.weigher.product(weights, x, values, lambda y: func(y, values))

    def finish(self) -> None:
        """Refuse weights whose dropout was put off until a product that never came.

        Raises:
            ReplayError: There are some.
        """
        if any(weights.dropout for _, weights in self.known.values()):
            raise ReplayError(
                "it drops out of a softmax over its tokens that is not multiplied with values in a "
                "way that can be followed: set that probability to 0"
            )
