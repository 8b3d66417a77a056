"""What SAGE would hold of a call of a block, found by its own parts on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sage.engine.arguments import Arguments
from lightning_sage.engine.attention_call import AttentionCall
from lightning_sage.engine.cache import SparseCache
from lightning_sage.engine.drops import Seed
from lightning_sage.engine.flash import FlashMask
from lightning_sage.engine.intercept import Tap
from lightning_sage.engine.job import Surroundings
from lightning_sage.engine.keys import UpToAttention, can_be_made, key_rows
from lightning_sage.engine.masks import visibility
from lightning_sage.engine.packing import store
from lightning_sage.engine.replay import Crossing, Recorder, Replayer
from lightning_sage.engine.seen import Seen, Written
from lightning_sage.engine.session import Session
from lightning_sage.estimate.fakes import Known
from lightning_sage.estimate.ledger import Ledger
from lightning_sage.ops import Rows, Visibility, wide
from lightning_sage.policy import SagePolicy
from lightning_sage.selections import share


class _Watcher(Recorder):
    """A dense forward of which the shapes are wanted alone."""

    def attention(self, call: AttentionCall) -> Tensor:
        """Nothing, of the right shape."""
        crosses = self.crosses(call.k.shape[2])
        visible = self.see(call.flash or call.mask, call.causal, crosses)
        keys = self.key_rows(visible, call.k.shape[2] if crosses else None)
        out = call.q.new_empty(*call.q.shape[:3], call.v.shape[3])
        lse = call.q.new_empty(call.q.shape[:3], dtype=wide(call.q.dtype))
        self.seen.append(Seen(call, out, lse, visible, keys, crosses))
        return out

    def ordered(self, logarithms: Tensor) -> bool:
        """Not to be seen."""
        return False

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Nothing, of the right shape."""
        return torch.empty_like(x)


class _Replay(Replayer):
    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Its mask is drawn again."""
        return x


class _Keys(UpToAttention):
    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Its mask is drawn again."""
        return x


def _makes_keys(policy: SagePolicy, seen: list[Seen | Written]) -> bool:
    """Whether the kept rows that are not replayed are run up to attention."""
    return policy.attention == "kept" and can_be_made(seen)


class Rehearsal:
    """One forward pass, seen block by block.

    Args:
        session: Hears of labels and padding.
        known: Knows their values, and those of masks.
        there: Tensors that are there anyway.
        kept: Share of each sample's tokens that is kept; None asks the policy.

    Attributes:
        counts: By policy and causality, rows kept, and whether they were drawn.
        tokens: Of the batch.
    """

    def __init__(
        self, session: Session, known: Known, there: list[Tensor], kept: float | None
    ) -> None:
        self.session, self.known, self.kept = session, known, kept
        self._there = there
        self.counts: dict[tuple[str, bool], tuple[int, bool]] = {}
        self.tokens = 1
        self._sights: dict[int, tuple[Tensor, Visibility]] = {}

    def seen(
        self, forward: Callable[..., Any], arguments: Arguments, surroundings: Surroundings
    ) -> list[Seen | Written]:
        """Attention calls of a dense forward."""
        hidden = arguments.leaves[arguments.hidden]
        facts = self.session.facts(hidden)

        def see(mask: Tensor | FlashMask | None, causal: bool, crosses: bool) -> Visibility:
            if isinstance(mask, FlashMask):
                return Visibility(mask.causal)
            if mask is None:
                return visibility(None, causal and not crosses, facts.valid)
            if crosses:
                return Visibility(False, mask=mask if mask.shape[1] > 1 else None)
            key = mask.untyped_storage()._cdata
            if key not in self._sights:
                self._sights[key] = mask, self._look(mask, causal, facts.valid)
            return self._sights[key][1]

        crossing = Crossing(arguments.others)
        watcher = _Watcher(Seed(0), facts.every, facts.valid, see, facts.key_rows, crossing)
        args, kwargs = arguments.call()
        with torch.no_grad(), surroundings.restored(), Tap(watcher):
            forward(*args, **kwargs)
        if any(isinstance(one, Written) for one in watcher.seen):
            arguments.need_pairs()
        return watcher.seen

    def _look(self, mask: Tensor, causal: bool, valid: Tensor) -> Visibility:
        if self.known.value(mask) is not None or mask.shape[1] > 1:
            return visibility(mask, causal, valid)
        # too large to be looked at: such masks are sliding windows, intervals of keys
        first, stop = torch.zeros(2, *valid.shape, dtype=torch.int64)
        return Visibility(True, first, stop)

    def cache(
        self, name: str, policy: SagePolicy, seen: list[Seen | Written], arguments: Arguments
    ) -> SparseCache:
        """What the block would hold, as :mod:`lightning_sage.engine.block` makes it."""
        hidden = arguments.leaves[arguments.hidden]
        B, T, _ = hidden.shape
        count, drawn = self._count(name, policy, seen, hidden)
        rows = Rows(torch.empty(count, dtype=torch.int64), B, T)
        full = policy.attention == "full"
        kept = [one.keep(rows, full, policy.cache_dtype) for one in seen]
        cache = SparseCache(rows.index, store(hidden, rows, policy.cache_dtype), kept)
        replayer = policy.replayer
        ranks = not _makes_keys(policy, seen)
        if seen and ranks and replayer is not None and replayer.saliency_in_replay:
            cache.saliency = torch.empty(count, dtype=torch.float64)
        if drawn:
            cache.probability = torch.empty(count, dtype=torch.float64)
        return cache

    def _count(
        self, name: str, policy: SagePolicy, seen: list[Seen | Written], hidden: Tensor
    ) -> tuple[int, bool]:
        """How many rows are kept, and whether they were drawn."""
        causal = any(one.causal for one in seen if not one.crosses)
        if (name, causal) not in self.counts:
            facts = self.session.facts(hidden)
            valid, self.tokens = facts.valid, facts.valid.numel()
            _, loss_rows = self.session.loss_rows(valid, causal)
            priority = policy.priority(valid, loss_rows)
            alike = valid.double() / valid.sum(-1, keepdim=True)
            chosen = policy.keeper.keep(alike, valid, priority, torch.zeros_like(alike))
            count = int(chosen.rows.sum())
            if self.kept is not None:
                count = valid.shape[0] * share(self.kept, valid.shape[1])
            drew = loss_rows is not valid or not policy.keeper.draws_loss_rows
            p = policy.keeper.probability(chosen.rows, valid, priority) if drew else None
            self.counts[name, causal] = count, p is not None
        return self.counts[name, causal]

    def replayed(
        self,
        forward: Callable[..., Any],
        arguments: Arguments,
        cache: SparseCache,
        policy: SagePolicy,
        seen: list[Seen | Written],
    ) -> int:
        """Bytes that the replay of the rows saves besides the cache.

        Args:
            forward: The block's.
            arguments: Of its call.
            cache: What it would hold.
            policy: Says how many rows are replayed.
            seen: Its attention calls.
        """
        B, T, _ = arguments.leaves[arguments.hidden].shape
        count, wanted = len(cache.index), None
        if policy.replayer is not None:
            wanted = policy.replayer.replay_count(count, B * T)
        picked = None
        if wanted is not None and wanted < count:
            picked = torch.empty(wanted, dtype=torch.int64)
        rows = Rows(cache.index if picked is None else picked, B, T)
        ledger = Ledger(self._there)
        ledger.exclude(x for x in cache.taken_apart()[0] if x is not None)
        saved: set[int] = set()
        with torch.enable_grad(), ledger.saves(lambda: saved):
            handler = _Replay(Seed(0), rows, cache.attention, picked)
            if picked is not None and _makes_keys(policy, seen):
                others = torch.empty(count - len(picked), dtype=torch.int64)
                kept, left = Rows(cache.index, B, T), Rows(others, B, T)
                first = _Keys(Seed(0), left, (1, len(left)))
                run = partial(self._run, forward, arguments, cache, first, others)
                handler.key_rows = key_rows(run, first, kept, (picked, others))
            self._run(forward, arguments, cache, handler, picked)
        return ledger.total(saved)

    def _run(
        self,
        forward: Callable[..., Any],
        arguments: Arguments,
        cache: SparseCache,
        handler: _Keys | _Replay,
        picked: Tensor | None,
    ) -> None:
        """Run the block on some of the kept rows."""
        hidden = arguments.leaves[arguments.hidden]
        start = cache.hidden.some(picked, hidden.shape[2:], hidden.dtype).detach().requires_grad_()
        replaced: dict[int, Any] = {
            i: arguments.packed(i, arguments.leaves[i], handler.rows) for i in arguments.shared()
        }
        replaced[arguments.hidden] = start.unsqueeze(0)
        args, kwargs = arguments.call(replaced)
        with Tap(handler):
            forward(*args, **kwargs)
