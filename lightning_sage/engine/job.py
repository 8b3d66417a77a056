"""One call of one block: what it was called with, and how to run the block again on some rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_sage.balance import Budget
from lightning_sage.buffers import random_state_kept
from lightning_sage.engine.arguments import Arguments
from lightning_sage.engine.chain import chain_of
from lightning_sage.engine.drops import Seed
from lightning_sage.engine.intercept import Handler, Tap
from lightning_sage.engine.modes import Modes, attributes_kept
from lightning_sage.engine.positions import Counter
from lightning_sage.engine.replay import Crossing
from lightning_sage.engine.sides import Sides, unheard
from lightning_sage.engine.wrapped import Learned, Parts, Wrapped
from lightning_sage.errors import ReplayError
from lightning_sage.ops import Rows
from lightning_sage.records import BlockRecord


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
        self.chain = chain_of(hidden, self._seed_of_chain())
        self.extra, self.shared = arguments.differentiable(), arguments.shared()
        self.modes = Modes(parts.modules)
        self.parameters = parts.trainable()
        self.versions = wrapped.versions(parts.parameters)
        trained = [x.requires_grad for x in parts.parameters]
        self.kind = self.modes.values, tuple(trained), arguments.signature
        self.learned = Learned()
        # shapes of what the forward drew for no token in particular
        self.drawn: list[torch.Size] = []
        self.attentions: list[tuple[bool, int, int]] = []
        self.valid_count = 0
        # rows that the policy would keep by itself, and what ranks agreed on
        self.wanted: Tensor | int = 0
        self.budget: Budget | None = None
        self.record: BlockRecord | None = None
        # outputs besides hidden states that carry a gradient, as far as the latest run tells
        self.outlets: dict[int, Tensor] = {}
        self.sides = Sides()
        self._pairs: dict[int, Tensor] = {}
        self._outputs: tuple[list[Any], pytree.TreeSpec | None, int] | None = None

    def _seed_of_chain(self) -> Seed:
        # a checkpoint computes the block again without the ones before it, and has to draw the same
        recalled = self.session.seeds.get(self.wrapped.index) if self.session.recalls else None
        return self.seed if recalled is None else recalled

    @property
    def hidden(self) -> Tensor:
        """The block's input ``[B, T, C]``, until it is released."""
        hidden: Tensor = self.arguments.leaves[self.arguments.hidden]
        return hidden

    @property
    def crossing(self) -> Crossing:
        """The other sequence that the block attends to."""
        return Crossing(self.arguments.others, self.learned.crossing)

    @property
    def makes_keys(self) -> bool:
        """Whether kept rows that are not replayed learn as keys and values."""
        return self.learned.keys and self.session.policy.attention == "kept"

    def learn(self, learned: Learned) -> None:
        """Go by what the self-check has found out."""
        self.learned = learned
        if learned.pairs:
            self.arguments.need_pairs()

    def counter(self, rows: Rows) -> Counter | None:
        """What tells a replay of these rows where they stand, if the block asks."""
        if not self.learned.positional:
            return None
        buffers = (x for m in self.parts.modules for x in m._buffers.values() if x is not None)
        return Counter(rows, (*self.parts.parameters, *buffers))

    def tables_kept(self) -> AbstractContextManager[None]:
        """What a block that counts its tokens has cached is afterwards what it was."""
        return attributes_kept(self.parts.modules) if self.learned.positional else nullcontext()

    def own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block's own forward returns."""
        with self.wrapped.noting_touches(self.parts.parameters):
            return self.wrapped.run(self.block, *args, **kwargs)

    def run(
        self,
        handler: Handler,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tap: type[Tap] = Tap,
    ) -> Tensor:
        """Hidden states after the block; its other outputs are remembered.

        Raises:
            ReplayError: The block does not return hidden states, or other tensors than of pairs.
        """
        # compiled parts of a block run eagerly: Dynamo does not keep a function mode's place
        eagerly = torch.compiler.set_stance("force_eager")
        with self.surroundings.restored(), eagerly, tap(handler):
            output = self.own(args, kwargs)
        # most return hidden states alone
        alone = isinstance(output, Tensor)
        leaves, spec = ([output], None) if alone else pytree.tree_flatten(output)
        place = next((i for i, x in enumerate(leaves) if isinstance(x, Tensor)), None)
        given = kwargs.get("hidden_states", next(iter(args), None))
        if not isinstance(given, Tensor):
            given = pytree.tree_leaves((args, kwargs))[self.arguments.hidden]
        if place is None or leaves[place].shape != given.shape:
            raise ReplayError("its first output is not hidden states of the shape of its input")
        out: Tensor = leaves[place]
        if self.arguments.streams is not None:
            out = self.arguments.streams.joined(out)
        self.outlets = {}
        if len(leaves) > 1:
            inputs = {id(x) for x in pytree.tree_leaves((args, kwargs))}
            self.outlets = self._others(leaves, place, inputs, out.shape[1])
        self._outputs = leaves, spec, place
        return out

    def _others(self, leaves: list[Any], place: int, inputs: set[int], T: int) -> dict[int, Tensor]:
        """Outputs of pairs of tokens that carry a gradient; others are refused.

        Raises:
            ReplayError: Names the shape of one.
        """
        found = {}
        keys = self.arguments.others
        for i, x in enumerate(leaves):
            if i == place or not isinstance(x, Tensor) or id(x) in inputs:
                continue
            pairs = x.dim() == 4 and x.shape[-2] == T and x.shape[-1] in (T, keys, self.B * keys)
            if x.is_floating_point() and not pairs:
                raise ReplayError(
                    f"it returns a second tensor of shape {list(x.shape)}, whose gradient a "
                    "replay of some rows cannot give"
                )
            if pairs and x.requires_grad:
                found[i] = x
        return found

    def with_outlets(self) -> dict[int, Tensor]:
        """The outputs besides hidden states whose graph leads to parameters, with that graph.

        They depend on where tokens stand and not on what they are (a relative position bias that
        one block makes for all): the graph of all else is dropped at once.
        """
        if not self.learned.outlets:
            return {}
        hidden = {self.arguments.hidden: self.hidden.detach()}
        kept = random_state_kept(self.hidden.device)
        with torch.enable_grad(), self.surroundings.restored(), kept, unheard():
            args, kwargs = self.arguments.call(hidden)
            leaves = pytree.tree_leaves(self.own(args, kwargs))
        return {i: leaves[i] for i in self.learned.outlets}

    def trained(self) -> list[Tensor]:
        """The parameters whose gradients are returned, as they are now.

        Raises:
            RuntimeError: A parameter is not what the forward used, or a hook inside the block.
        """
        if self.modes.hooks_changed:
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

    def output(self, hidden: Tensor, outlets: dict[int, Tensor]) -> Any:
        """What the block returned, with `hidden` and outlets in their places."""
        assert self._outputs is not None
        leaves, spec, place = self._outputs
        if self.arguments.streams is not None:
            hidden = self.arguments.streams.apart(hidden)
        self._outputs = None
        if spec is None:
            return hidden
        leaves[place] = hidden
        for i, x in outlets.items():
            leaves[i] = x
        return pytree.tree_unflatten(leaves, spec)

    def forget_output(self) -> None:
        """Drop what :func:`Job.run` remembered."""
        self._outputs, self.outlets = None, {}

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

        Attention has mostly taken what it needs of masks: then only their shape is remembered.
        """
        held: list[Tensor | None] = []
        for i, x in self.leaves().items():
            pairs = self.arguments.axes[i].of_pairs and i not in self.arguments.real
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
