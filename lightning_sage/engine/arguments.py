"""What a block is called with, taken apart: its hidden states, and what runs along their tokens."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_sage.engine.axes import (
    OTHERS,
    Axis,
    axis_of,
    axis_of_other,
    packed_argument,
)
from lightning_sage.engine.streams import Streams
from lightning_sage.errors import ReplayError
from lightning_sage.ops import Rows


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
        others: Tokens of the other sequence that the block attends to, or 0.
        real: Indices of masks and biases whose entries a replay has to see.
        streams: How the block takes its hidden states, where not in one row a token.
    """

    leaves: list[Any]
    axes: dict[int, Axis]
    names: list[str]
    spec: pytree.TreeSpec
    hidden: int
    others: int = 0
    real: set[int] = field(default_factory=set)
    streams: Streams | None = None

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
        streams = None
        if hidden is not None and leaves[hidden].dim() == 4:
            streams = Streams.of(leaves[hidden], (leaves[i] for i in tensors if i != hidden))
            if streams is not None:
                leaves[hidden] = streams.joined(leaves[hidden])
        if hidden is None or leaves[hidden].dim() != 3 or not leaves[hidden].is_floating_point():
            shown = None if hidden is None else list(leaves[hidden].shape)
            raise ReplayError(
                f"its first tensor is not hidden states [B, T, C] but {shown}: leave it dense with "
                "dense_blocks, or name other blocks with blocks"
            )
        B, T, _ = leaves[hidden].shape
        others = [leaves[i].shape[1] for i in tensors if _is_states(names[i], leaves[i])]
        S = others[0] if others else 0
        axes = {
            i: axis_of_other(names[i], leaves[i], B, S)
            if S and names[i].startswith(("encoder", "cross", "memory"))
            else axis_of(names[i], leaves[i], B, T)
            for i in tensors
        }
        axes[hidden] = Axis.BATCHED
        real = {i for i, axis in axes.items() if axis.of_pairs and leaves[i].requires_grad}
        return cls(leaves, axes, names, spec, hidden, S, real, streams)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What decides how the call is replayed; equal calls are checked once."""
        tensors = (
            (self.names[i], axis, self.leaves[i].dim(), self.leaves[i].requires_grad)
            for i, axis in self.axes.items()
        )
        switches = (x for x in self.leaves if isinstance(x, str | bool))
        # longer by a power of two: positions may start to matter
        hidden = self.leaves[self.hidden]
        lengths = hidden.shape[1].bit_length(), self.others == hidden.shape[1], len(hidden) > 1
        return (*tensors, *switches, hidden.dtype, *lengths)

    def need_pairs(self) -> None:
        """From now on a replay sees the entries of masks and biases, and not their shape alone."""
        self.real.update(i for i, axis in self.axes.items() if axis.of_pairs)

    def held(self) -> list[tuple[Any, int]]:
        """What mutable arguments hold now, to see whether a block writes into one."""
        mappings = (x for x in self.leaves if isinstance(x, MutableMapping))
        return [(key, id(x)) for mapping in mappings for key, x in mapping.items()]

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
        if self.streams is not None:
            leaves[self.hidden] = self.streams.apart(leaves[self.hidden])
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def packed(self, i: int, x: Tensor, rows: Rows) -> Tensor:
        """Leaf i, given as `x`, for the packed rows."""
        return packed_argument(x, self.axes[i], rows, i in self.real)


def _is_states(name: str, x: Tensor) -> bool:
    return name.startswith(OTHERS) and x.dim() == 3


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
