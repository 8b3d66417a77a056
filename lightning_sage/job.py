"""One call of one block: what it was called with, and how to run the block again on some rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_sage.arguments import Arguments, Axis, ReplayError
from lightning_sage.balance import Budget
from lightning_sage.intercept import Handler, Tap
from lightning_sage.ops import Rows
from lightning_sage.records import BlockRecord
from lightning_sage.replay import Seed
from lightning_sage.wrapped import Parts, Wrapped


class Surroundings:
    """Autocast and default dtype of a forward pass, to be found again in its replay.

    Weight casts are not cached: one made without grad would take the weight's gradient with it.
    """

    def __init__(self, device: torch.device) -> None:
        self.casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in {"cpu", device.type}
            if torch.amp.is_autocast_available(kind)
        ]
        self.dtype = torch.get_default_dtype()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The surroundings again, and whatever there is now afterwards."""
        before = torch.get_default_dtype()
        with ExitStack() as stack:
            for kind, dtype, enabled in self.casts:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                    )
            torch.set_default_dtype(self.dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(before)


class Job:
    """One call of one block, from its forward to its backward.

    After the forward it holds parameters, and the record's marks of rows, but no activation.
    """

    def __init__(
        self,
        block: nn.Module,
        wrapped: Wrapped,
        arguments: Arguments,
        parts: Parts,
        surroundings: Surroundings,
    ) -> None:
        self.block, self.wrapped, self.session = block, wrapped, wrapped.session
        self.arguments, self.parts, self.surroundings = arguments, parts, surroundings
        self.seed = Seed()
        hidden = arguments.leaves[arguments.hidden]
        self.B, self.T, self.C = hidden.shape
        self.dtype = hidden.dtype
        self.extra, self.shared = arguments.differentiable(), arguments.shared()
        self.modes = [_mode(module) for module in parts.modules]
        self.hooks = _call_hooks(parts.modules)
        self.parameters = parts.trainable()
        self.versions = wrapped.versions(parts.parameters)
        self.causal: list[bool] = []
        self.valid_count = 0
        # rows that the policy would keep by itself, and what ranks agreed on
        self.wanted: Tensor | int = 0
        self.budget: Budget | None = None
        self.record: BlockRecord | None = None
        self._pairs: dict[int, Tensor] = {}
        self._outputs: tuple[list[Any], pytree.TreeSpec | None, int] | None = None

    @property
    def hidden(self) -> Tensor:
        """The block's input ``[B, T, C]``, until it is released."""
        hidden: Tensor = self.arguments.leaves[self.arguments.hidden]
        return hidden

    def run(
        self,
        handler: Handler,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tap: type[Tap] = Tap,
    ) -> Tensor:
        """Hidden states after the block; its other outputs are remembered.

        Raises:
            ReplayError: The block does not return hidden states, or other tensors with a gradient.
        """
        noting = self.wrapped.noting_touches(self.parts.parameters)
        with self.surroundings.restored(), tap(handler), noting:
            output = self.wrapped.run(self.block, *args, **kwargs)
        # most return hidden states alone
        alone = isinstance(output, Tensor)
        leaves, spec = ([output], None) if alone else pytree.tree_flatten(output)
        place = next((i for i, x in enumerate(leaves) if isinstance(x, Tensor)), None)
        given = kwargs.get("hidden_states", next(iter(args), None))
        if not isinstance(given, Tensor):
            given = pytree.tree_leaves((args, kwargs))[self.arguments.hidden]
        if place is None or leaves[place].shape != given.shape:
            raise ReplayError("its first output is not hidden states of the shape of its input")
        if len(leaves) > 1:
            _refuse_others(leaves, place, pytree.tree_leaves((args, kwargs)))
        self._outputs = leaves, spec, place
        out: Tensor = leaves[place]
        return out

    def trained(self) -> list[Tensor]:
        """The parameters whose gradients are returned, as they are now.

        Raises:
            RuntimeError: A parameter is not what the forward used, or a hook inside the block.
        """
        if _call_hooks(self.parts.modules) != self.hooks:
            raise ReplayError(
                f"forward pre-hooks inside block '{self.wrapped.name}' came or went between its "
                "forward and its backward pass, which then would not be of the same function. PEFT "
                "puts such hooks on for one forward with adapter_names or task_ids: use "
                "set_adapter, or leave the hooks where they are until the backward pass is over"
            )
        now = self.parts.trainable()
        for x, y in zip(now, self.parameters, strict=True):
            # views that a sharding strategy lays anew are no parameters
            if x is not y and (isinstance(x, nn.Parameter) or isinstance(y, nn.Parameter)):
                raise RuntimeError(
                    f"a parameter of block '{self.wrapped.name}' was replaced after the forward "
                    "pass whose backward pass needs it"
                )
        if self.wrapped.versions(self.parts.parameters) != self.versions:
            raise RuntimeError(
                f"a parameter of block '{self.wrapped.name}' was modified in place after the "
                "forward pass whose backward pass needs it"
            )
        return now

    @contextmanager
    def modes_restored(self) -> Iterator[None]:
        """Modes and adapters of the forward, and whatever there is now afterwards."""
        changed = [
            (module, mode, now)
            for module, mode in zip(self.parts.modules, self.modes, strict=True)
            if (now := _mode(module)) != mode
        ]
        # PEFT freezes the adapters that it switches off
        frozen = [x for x in self.parameters if not x.requires_grad]
        try:
            for module, mode, _ in changed:
                _set_mode(module, mode)
            for x in frozen:
                x.requires_grad_(True)
            yield
        finally:
            for module, _, now in changed:
                _set_mode(module, now)
            for x in frozen:
                x.requires_grad_(False)

    def output(self, hidden: Tensor) -> Any:
        """What the block returned, with `hidden` in the place of its hidden states."""
        assert self._outputs is not None
        leaves, spec, place = self._outputs
        self._outputs = None
        if spec is None:
            return hidden
        leaves[place] = hidden
        return pytree.tree_unflatten(leaves, spec)

    def forget_output(self) -> None:
        """Drop what :func:`Job.run` remembered."""
        self._outputs = None

    def packed_call(
        self, rows: Rows, hidden: Tensor, leaves: dict[int, Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for packed rows.

        Args:
            rows: The rows.
            hidden: ``[N, C]``.
            leaves: The other tensors, whole, by index.
        """
        replaced: dict[int, Any] = {i: self.arguments.packed(i, x, rows) for i, x in leaves.items()}
        replaced[self.arguments.hidden] = hidden.unsqueeze(0)
        return self.arguments.call(replaced)

    def leaves(self) -> dict[int, Tensor]:
        """The tensors besides the hidden states."""
        return {i: self.arguments.leaves[i] for i in self.shared}

    def release(self) -> list[Tensor | None]:
        """Forget the tensors of the forward; returns those that the replay has to see.

        Attention has taken what it needs of masks: of them only the shape is remembered.
        """
        held: list[Tensor | None] = []
        for i, x in self.leaves().items():
            pairs = self.arguments.axes[i] is Axis.PAIRS
            held.append(None if pairs else x)
            if pairs:
                self._pairs[i] = x.new_empty(()).expand(x.shape)
        for i in self.arguments.axes:
            self.arguments.leaves[i] = None
        return held

    def restored(self, held: tuple[Tensor | None, ...]) -> dict[int, Tensor]:
        """What :func:`Job.leaves` was, from what `release` returned."""
        found = zip(self.shared, held, strict=True)
        return {i: x for i, x in found if x is not None} | self._pairs


# what PEFT's layers ask besides: which adapters are active, and whether any is
_SWITCHES = ("_active_adapter", "_disable_adapters")


def _mode(module: nn.Module) -> tuple[Any, ...]:
    """What decides, besides weights and arguments, how a module computes."""
    own = module.__dict__
    active, disabled = (own.get(name) for name in _SWITCHES)
    return module.training, tuple(active) if isinstance(active, list) else active, disabled


def _set_mode(module: nn.Module, mode: tuple[Any, ...]) -> None:
    module.training, active, disabled = mode
    values = list(active) if isinstance(active, tuple) else active, disabled
    for name, value in zip(_SWITCHES, values, strict=True):
        if value is not None:
            module.__dict__[name] = value


def _call_hooks(modules: list[nn.Module]) -> list[tuple[int, ...]]:
    """The forward pre-hooks inside a block, by number; its own are called before SAGE is."""
    return [tuple(module._forward_pre_hooks) for module in modules[1:] if module._forward_pre_hooks]


def _refuse_others(leaves: list[Any], place: int, inputs: list[Any]) -> None:
    """Refuse outputs besides hidden states that may want a gradient.

    Raises:
        ReplayError: Names the shape of one.
    """
    known = {id(x) for x in inputs}
    for i, x in enumerate(leaves):
        if i != place and isinstance(x, Tensor) and id(x) not in known:
            weights = x.dim() == 4 and x.shape[-1] == x.shape[-2] == leaves[place].shape[1]
            if x.is_floating_point() and not weights:
                raise ReplayError(
                    f"it returns a second tensor of shape {list(x.shape)}, whose gradient a "
                    "replay of some rows cannot give"
                )
