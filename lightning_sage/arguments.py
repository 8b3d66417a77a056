"""What a block is called with: which arguments run along the tokens, and how to pack their rows.

The token axis of an argument is known from its name and rank, never from "a dimension equal to T":
head widths, hidden widths and batches equal T often enough. What stays ambiguous is an error.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_sage.ops import Rows


class ReplayError(RuntimeError):
    """A block that cannot be replayed on some of its rows; the message names it and says why."""


# arguments of these names are keys and values from elsewhere
CROSS = ("encoder_hidden_states", "cross_attention_states")


class Axis(Enum):
    """Where the tokens of an argument are."""

    NONE = "none"  # not along the tokens: passed on as it is
    FIRST = "first"  # [T, ...]
    BATCHED = "batched"  # [B | 1, T, ...]
    SECOND = "second"  # [H, B | 1, T] or [B | 1, H | 1, T, D]: tokens on axis 2
    PAIRS = "pairs"  # [..., T, T]: a mask, whose rows and columns attention gathers by itself


def _axis(name: str, x: Tensor, B: int, T: int) -> Axis:
    """The rule, by name and rank.

    Raises:
        ReplayError: The axis cannot be told.
    """
    shape, batched = tuple(x.shape), x.dim() > 0 and x.shape[0] in (B, 1)
    if x.dim() == 0 or T not in shape or "cu_seq" in name:
        return Axis.NONE
    if x.dim() == 1 and T != B:
        return Axis.FIRST
    if x.dim() == 2 and batched and shape[1] == T:
        return Axis.BATCHED
    if x.dim() == 2 and shape[0] == T and shape[1] != T:
        return Axis.FIRST
    if x.dim() == 3 and batched and shape[1] == T:
        pairs = shape[2] == T and ("mask" in name or not x.is_floating_point())
        return Axis.PAIRS if pairs else Axis.BATCHED
    if x.dim() == 3 and not x.is_floating_point() and shape[1] in (B, 1) and shape[2] == T:
        return Axis.SECOND
    if x.dim() in (3, 4) and shape[-2:] == (T, T):
        return Axis.PAIRS
    if x.dim() == 4 and batched and shape[3] == T and ("mask" in name or shape[2] == 1):
        return Axis.PAIRS
    if x.dim() == 4 and batched and shape[2] == T:
        return Axis.SECOND
    raise ReplayError(
        f"argument '{name}' of shape {list(shape)} has an axis of the length of the sequence "
        f"({T}, batch {B}), but which axis holds the tokens cannot be told: leave this block dense "
        "(SagePolicy(dense_blocks=...)) or change the batch size or length so that they differ"
    )


def _packed(x: Tensor, axis: Axis, rows: Rows) -> Tensor:
    """`x` for the packed rows: a batch of one, N long."""
    n, T, sample, token = len(rows), rows.T, rows.sample, rows.token
    match axis:
        case Axis.FIRST:
            return x.index_select(0, token)
        case Axis.BATCHED if x.shape[0] == 1:
            return x.index_select(1, token)
        case Axis.BATCHED:
            return x.flatten(0, 1).index_select(0, rows.index).unsqueeze(0)
        case Axis.SECOND if x.dim() == 3:
            return x[:, sample if x.shape[1] > 1 else 0, token].unsqueeze(1)
        case Axis.SECOND:
            picked = x[0][:, token] if x.shape[0] == 1 else x[sample, :, token].movedim(0, 1)
            return picked.unsqueeze(0)
        case Axis.PAIRS:
            # attention ignores it; its shape keeps the block on the same branch
            size = [1 if d == 0 else m for d, m in enumerate(x.shape)]
            size[-2:] = [n if m == T else m for m in size[-2:]]
            return x.new_full((), x.dtype == torch.bool).expand(size)
    return x


def _without_cache(name: str, value: Any, layer: int) -> Any:
    """Transformers hands its blocks an empty KV cache in training; a replay would append to it."""
    if name == "use_cache" and value is True:
        return False
    length = getattr(value, "get_seq_length", None)
    if length is None:
        return value
    try:
        # of this layer: blocks left dense fill theirs in the same forward
        filled = length(layer)
    except (ValueError, IndexError, KeyError) as error:
        raise ReplayError(
            f"argument '{name}' holds no keys and values of this layer (it shares another's?): "
            "leave the layers that share dense with dense_blocks"
        ) from error
    if filled > 0:
        raise ReplayError(
            f"argument '{name}' is a filled KV cache of {filled} tokens (prefix tuning?), which "
            "cannot be replayed: train without it, or without SAGE"
        )
    return None


@dataclass
class Arguments:
    """Arguments of one call of a block, taken apart.

    Attributes:
        leaves: All leaves, tensors and others, in pytree order.
        axes: By index of the leaf, for tensors only.
        names: By index of the leaf.
        spec: Puts leaves together again.
        hidden: Index of the hidden states ``[B, T, C]``.
    """

    leaves: list[Any]
    axes: dict[int, Axis]
    names: list[str]
    spec: pytree.TreeSpec
    hidden: int

    @classmethod
    def of(cls, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Take a call apart.

        Raises:
            ReplayError: No hidden states, a filled cache, or an axis that cannot be told.
        """
        named = _parameter_names(block, len(args))
        numbers = (getattr(module, "layer_idx", None) for module in block.modules())
        layer = next((n for n in numbers if isinstance(n, int)), 0)
        args = tuple(_without_cache(name, x, layer) for name, x in zip(named, args, strict=True))
        kwargs = {name: _without_cache(name, x, layer) for name, x in kwargs.items()}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        names = [
            n for n, x in (*zip(named, args, strict=True), *kwargs.items()) for _ in _leaves(x)
        ]
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        by_name = [i for i in tensors if names[i] == "hidden_states"]
        hidden = next(iter(by_name + tensors), None)
        if hidden is None or leaves[hidden].dim() != 3 or not leaves[hidden].is_floating_point():
            shown = None if hidden is None else list(leaves[hidden].shape)
            raise ReplayError(
                f"its first tensor is not hidden states [B, T, C] but {shown}: leave it dense with "
                "dense_blocks, or name other blocks with blocks"
            )
        cross = [names[i] for i in tensors if names[i].startswith(CROSS)]
        if cross:
            raise ReplayError(
                f"argument '{cross[0]}' is for cross-attention, which is not replayed yet: leave "
                "the decoder's blocks dense with dense_blocks"
            )
        B, T, _ = leaves[hidden].shape
        axes = {i: _axis(names[i], x, B, T) for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        axes[hidden] = Axis.BATCHED
        for i, axis in axes.items():
            if axis is Axis.PAIRS and leaves[i].requires_grad:
                raise ReplayError(
                    f"argument '{names[i]}' is a mask or bias that requires grad, which a "
                    "replay of some rows cannot give: freeze it"
                )
        return cls(leaves, axes, names, spec, hidden)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What decides how the call is replayed; equal calls are checked once."""
        tensors = ((self.names[i], axis, self.leaves[i].dim()) for i, axis in self.axes.items())
        switches = (x for x in self.leaves if isinstance(x, str | bool))
        # longer by a power of two: positions may start to matter
        hidden = self.leaves[self.hidden]
        return (*tensors, *switches, hidden.dtype, hidden.shape[1].bit_length())

    def mask(self) -> Tensor | None:
        """The argument that masks pairs of tokens, ``[B | 1, H | 1, T | 1, T]``."""
        pairs = (i for i, axis in self.axes.items() if axis is Axis.PAIRS)
        masks: list[Tensor] = [self.leaves[i] for i in pairs]
        if not masks:
            return None
        shape = tuple(masks[0].shape)
        return masks[0].reshape((1,) * (4 - len(shape)) + shape)

    def differentiable(self) -> list[int]:
        """Indices of the tensors, besides the hidden states, that want a gradient."""
        return [i for i in self.axes if i != self.hidden and self.leaves[i].requires_grad]

    def shared(self) -> list[int]:
        """Indices of the tensors, besides the hidden states, that a replay has to see."""
        return [i for i in self.axes if i != self.hidden]

    def call(
        self, replaced: dict[int, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords, with some leaves replaced."""
        leaves = list(self.leaves)
        for i, x in (replaced or {}).items():
            leaves[i] = x
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def packed(self, i: int, x: Tensor, rows: Rows) -> Tensor:
        """Leaf i, given as `x`, for the packed rows."""
        return _packed(x, self.axes[i], rows)


def _leaves(x: Any) -> Any:
    # most arguments are leaves: a tree is not walked for these
    return (x,) if x is None or isinstance(x, Tensor | bool) else pytree.tree_leaves(x)


def _parameter_names(block: nn.Module, count: int) -> list[str]:
    """Names of the first positional parameters, so that rules by name hold for them too."""
    names = _positional(type(block).forward)[:count]
    return [*names, *(f"args[{i}]" for i in range(len(names), count))]


@cache
def _positional(forward: Any) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)
