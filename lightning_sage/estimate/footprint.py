"""What one training step would hold for its backward pass, by method, seen on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sage.discovery import find_blocks
from lightning_sage.engine.arguments import Arguments
from lightning_sage.engine.job import Surroundings
from lightning_sage.engine.session import Session
from lightning_sage.estimate.fakes import Known
from lightning_sage.estimate.ledger import Ledger
from lightning_sage.estimate.rehearsal import Rehearsal
from lightning_sage.policy import SagePolicy

DENSE, CHECKPOINTING = "dense", "checkpointing"


@dataclass(frozen=True)
class Activations:
    """What one method holds for one batch.

    Attributes:
        saved: Bytes held when the forward pass is over.
        replay: Bytes that running one block again adds in the backward pass, at most.
        kept: Share of the tokens kept; None where there is no such choice.
    """

    saved: int
    replay: int = 0
    kept: float | None = None


@dataclass
class _Call:
    """What one call of a block would hold: storages, and by policy bytes of its own.

    Attributes:
        index: Of the block.
        frozen_input: Whether it is trained and its hidden states require no grad.
        dense: What a dense step saves.
        inputs: What a checkpoint holds: hidden states and all other tensors it is called with.
        shared: What a replay needs besides the rows, shared by the blocks.
        own: By policy, bytes cached for this call alone.
        replay: By policy, bytes that its replay adds.
    """

    index: int
    frozen_input: bool = False
    dense: set[int] = field(default_factory=set)
    inputs: set[int] = field(default_factory=set)
    shared: set[int] = field(default_factory=set)
    own: dict[str, int] = field(default_factory=dict)
    replay: dict[str, int] = field(default_factory=dict)


class Watch:
    """Counts what a model of fake tensors would hold.

    Args:
        model: Of fake tensors; its blocks are watched from now on.
        policies: By name; they have the same `blocks`.
        known: What knows the values of masks and labels.
        kept: Share of each sample's tokens that is kept, whatever the policy; None asks it, with
            every token seen alike.

    Raises:
        ValueError: There are no blocks, or a policy leaves none of them to wrap.
    """

    def __init__(
        self,
        model: nn.Module,
        policies: Mapping[str, SagePolicy],
        known: Known,
        kept: float | None = None,
    ) -> None:
        self.policies, self._known, self._kept = dict(policies), known, kept
        first = next(iter(self.policies.values()), SagePolicy())
        blocks = find_blocks(model, first)
        self._model = model
        self._left = {name: p.left_dense(len(blocks)) for name, p in self.policies.items()}
        self._session = Session(first)
        self._there = [*model.parameters(), *model.buffers()]
        self._ledger: Ledger | None = None
        self._session.listen(model, set(blocks.values()))
        for i, block in enumerate(blocks.values()):
            # of the block, not of its class: adapters may have put it there
            block.forward = partial(self._forward, i, block, block.forward)

    def step(self, loss: Callable[[], Tensor], batch: Mapping[str, Any]) -> dict[str, Activations]:
        """What each method would hold after a forward pass, by name.

        Args:
            loss: The forward pass of `batch`.
            batch: Keywords.
        """
        tensors = [x for x in batch.values() if isinstance(x, Tensor)]
        self._ledger = ledger = Ledger([*self._there, *tensors])
        self._session.batch = batch
        self._rehearsal = Rehearsal(self._session, self._known, self._there, self._kept)
        self._known_calls: dict[Any, tuple[dict[str, int], dict[str, int], set[int]]] = {}
        self._sparse = True
        try:
            outside = self._pass(loss, ledger)
            found = self._sum(ledger, outside)
            if any(call.frozen_input for call in self._calls[:1]):
                # adapters on a frozen model: checkpoints make the embeddings require grad
                self._sparse = False
                with _requiring_grad(self._model):
                    outside = self._pass(loss, ledger)
                found[CHECKPOINTING] = self._checkpointed(ledger, outside)
        finally:
            self._ledger = None
        return found

    def _pass(self, loss: Callable[[], Tensor], ledger: Ledger) -> set[int]:
        """One forward pass; returns what is saved outside of the blocks."""
        self._calls: list[_Call] = []
        self._target = outside = set[int]()
        with torch.enable_grad(), ledger.saves(lambda: self._target):
            loss()
        return outside

    def _checkpointed(self, ledger: Ledger, outside: set[int]) -> Activations:
        again = [ledger.total(call.dense - call.inputs) for call in self._calls]
        saved = ledger.total(outside, *(call.inputs for call in self._calls))
        return Activations(saved, max(again, default=0))

    def _sum(self, ledger: Ledger, outside: set[int]) -> dict[str, Activations]:
        calls = self._calls
        found = {
            DENSE: Activations(ledger.total(outside, *(call.dense for call in calls))),
            CHECKPOINTING: self._checkpointed(ledger, outside),
        }
        for name in self.policies:
            sparse = [call for call in calls if call.index not in self._left[name] and call.own]
            others = [call.dense for call in calls if call.index in self._left[name]]
            saved = ledger.total(outside, *others, *(call.shared for call in sparse))
            saved += sum(call.own[name] for call in sparse)
            replay = max((call.replay[name] for call in sparse), default=0)
            counts = self._rehearsal.counts.items()
            kept = max((count for (policy, _), (count, _) in counts if policy == name), default=0)
            found[name] = Activations(saved, replay, kept / self._rehearsal.tokens)
        return found

    def _forward(
        self, index: int, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        ledger = self._ledger
        if ledger is None or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        call = _Call(index)
        self._calls.append(call)
        arguments = Arguments.of(block, args, kwargs)
        hidden = arguments.leaves[arguments.hidden]
        trained = any(p.requires_grad for p in block.parameters())
        call.frozen_input = trained and not hidden.requires_grad
        if trained or hidden.requires_grad or arguments.differentiable():
            for i, axis in arguments.axes.items():
                held = ledger.add(arguments.leaves[i])
                call.inputs |= held
                # attention takes what it needs of masks
                if i != arguments.hidden and not axis.of_pairs:
                    call.shared |= held
            if self._sparse:
                self._cached(call, block, forward, arguments, ledger)
        before, self._target = self._target, call.dense
        try:
            return forward(*args, **kwargs)
        finally:
            self._target = before

    def _cached(
        self,
        call: _Call,
        block: nn.Module,
        forward: Callable[..., Any],
        arguments: Arguments,
        ledger: Ledger,
    ) -> None:
        """What SAGE would hold of this call; looked at once for all calls of a kind."""
        tensors = [(i, arguments.leaves[i]) for i in arguments.axes]
        masks = [x.untyped_storage()._cdata for i, x in tensors if arguments.axes[i].of_pairs]
        parameters = ((p.shape, p.dtype, p.requires_grad) for p in block.parameters())
        shapes = ((x.shape, x.dtype, x.requires_grad) for _, x in tensors)
        kind = (type(block), arguments.signature, *parameters, *shapes, *masks)
        if kind not in self._known_calls:
            sights: set[int] = set()
            surroundings = Surroundings(torch.device("cpu"))
            seen = self._rehearsal.seen(forward, arguments, surroundings)
            for name, policy in self.policies.items():
                self._session.policy = policy
                with torch.no_grad():
                    cache = self._rehearsal.cache(name, policy, seen, arguments)
                call.own[name] = cache.nbytes
                for kept in cache.attention:
                    sight = kept.visible
                    own = (kept.keys, sight.first, sight.stop, sight.keys, sight.mask)
                    sights.update(*(ledger.add(x) for x in own if x is not None))
                with surroundings.restored():
                    call.replay[name] = self._rehearsal.replayed(
                        forward, arguments, cache, policy, seen
                    )
            self._known_calls[kind] = call.own, call.replay, sights
        call.own, call.replay, sights = self._known_calls[kind]
        call.shared |= sights


@contextmanager
def _requiring_grad(model: nn.Module) -> Iterator[None]:
    """The embeddings require grad, as transformers and PEFT arrange it for checkpointing."""

    def require(module: nn.Module, args: Any, output: Tensor) -> None:
        output.requires_grad_()

    find = getattr(model, "get_input_embeddings", None)
    embeddings = None if find is None else find()
    if not isinstance(embeddings, nn.Module):
        yield
        return
    handle = embeddings.register_forward_hook(require)
    try:
        yield
    finally:
        handle.remove()
