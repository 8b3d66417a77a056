"""What a dense forward saw of an attention, and what of it waits for the replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.engine.attention_call import AttentionCall
from lightning_sage.engine.follow import Weights
from lightning_sage.engine.packing import Stored, store
from lightning_sage.errors import ReplayError
from lightning_sage.ops import How, Rows, Sight, Visibility, packed

BY_HAND = (
    "it writes its attention out by hand (softmax of a product), where the keys of other tokens "
    "cannot be told: use SagePolicy(attention='salient')"
)


def rows_at(x: Tensor, rows: Rows) -> Tensor:
    """Packed rows ``[N, H, D]`` of ``[B, H, T, D]``; all of them without a copy where possible."""
    return packed(x) if rows.whole else ops.gather_rows(x.transpose(1, 2), rows.index)


def own(x: Tensor) -> Tensor:
    """`x` without the rest of a fused projection that it may be a view of."""
    whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if whole else x.clone(memory_format=torch.contiguous_format)


class Kept(NamedTuple):
    """What an attention call leaves for the replay.

    Attributes:
        out: Its output at the kept rows, ``[N, H, E]``.
        lse: ``[N, H]``.
        visible: What its mask meant.
        k: ``[M, G, D]`` of every token that is seen, with `attention="full"`, else None.
        v: ``[M, G, E]``, likewise.
        keys: ``[M]`` int64, which tokens these are; None for all.
        others: Of attention to another sequence, the tokens of a sample there; else 0.
        number: Of weights made by hand, which softmax of the block makes them; else -1.
    """

    out: Stored
    lse: Tensor
    visible: Visibility
    k: Stored | None = None
    v: Stored | None = None
    keys: Tensor | None = None
    others: int = 0
    number: int = -1


@dataclass
class Seen:
    """An attention of a dense forward.

    Attributes:
        call: What went in.
        out: ``[B, H, T, E]``.
        lse: ``[B, H, T]``, or None where the fused kernel did not give it.
        visible: What the mask means.
        keys: The tokens that are seen at all.
        crosses: Whether these are tokens of another sequence.
    """

    call: AttentionCall
    out: Tensor
    lse: Tensor | None
    visible: Visibility
    keys: Rows
    crosses: bool = False
    _key_rows: Tensor | None = None

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return self.visible.causal

    @property
    def how(self) -> How:
        """How logits are made."""
        return How(self.call.scale, self.call.softcap)

    def key_rows(self) -> Tensor:
        """Keys of the tokens that are seen, ``[M, G, D]``."""
        if self._key_rows is None:
            self._key_rows = rows_at(self.call.k, self.keys)
        return self._key_rows

    def lse_at(self, rows: Rows) -> Tensor:
        """Log-sum-exp at some rows, ``[N, H]``; computed for these alone where it is not known."""
        if self.lse is not None:
            return ops.gather_rows(self.lse.transpose(1, 2), rows.index)
        q = rows_at(self.call.q, rows)
        sight = Sight(rows, self.keys, self.visible)
        lse = ops.attention_lse(q, self.key_rows(), sight, self.how)
        return with_sinks(lse, self.call.sinks)

    def received(self, queries: Rows, weights: Tensor, sight: Sight | None) -> Tensor:
        """Attention that each key receives, ``[M, G]``: see :func:`ops.attention_received`."""
        sight = sight or Sight(queries, self.keys, self.visible)
        q, lse = rows_at(self.call.q, queries), self.lse_at(queries)
        return ops.attention_received(q, self.key_rows(), lse, weights, sight, self.how)

    def value_norms(self) -> Tensor:
        """``[M, G]``."""
        norms: Tensor = rows_at(self.call.v, self.keys).float().norm(dim=-1)
        return norms

    def keep(self, rows: Rows, full: bool, cache_dtype: str | None) -> Kept:
        """Output and log-sum-exp at the rows; with `full` the keys and values that are seen too."""
        kept = Kept(_stored(self.out, rows, cache_dtype), self.lse_at(rows), self.visible)
        seen = None if self.keys.whole else self.keys.index
        if self.crosses:
            # the replay makes all of these anew, and all get a gradient
            return kept._replace(keys=seen, others=self.keys.T)
        if not full:
            return kept
        if cache_dtype is None:
            k, v = (Stored(own(x)) for x in (self.key_rows(), rows_at(self.call.v, self.keys)))
        else:
            k, v = (
                store(x.transpose(1, 2), self.keys, cache_dtype) for x in (self.call.k, self.call.v)
            )
        return kept._replace(k=k, v=v, keys=seen)


@dataclass
class Written:
    """An attention that the block wrote out by hand.

    Attributes:
        weights: Its logits ``[B, H, T, S]``.
        out: ``[B, H, T, E]``.
        lse: ``[B, H, T]``.
        values: ``[B, H, S, E]``.
        keys: All tokens that it could see.
        causal: Whether no token sees a later one.
        crosses: Whether these are tokens of another sequence.
    """

    weights: Weights
    out: Tensor
    lse: Tensor
    values: Tensor
    keys: Rows
    causal: bool
    crosses: bool = False

    @property
    def visible(self) -> Visibility:
        """What is known of who sees whom without its logits."""
        return Visibility(self.causal)

    def probabilities(self, rows: Rows, head: int) -> Tensor:
        """Attention of some rows in one head, ``[N, S]``; before dropout."""
        logits = self.weights.logits[rows.sample, head, rows.token].to(self.lse.dtype)
        return (logits - self.lse[rows.sample, head, rows.token, None]).exp_()

    def received(self, queries: Rows, weights: Tensor, sight: Sight | None) -> Tensor:
        """Attention that each token receives, ``[B * S, 1]``."""
        total = self.lse.new_zeros(queries.B, self.keys.T)
        for head in range(self.lse.shape[1]):
            part = self.probabilities(queries, head) * weights[:, None].to(total)
            total.index_add_(0, queries.sample, part)
        return total.flatten()[:, None]

    def value_norms(self) -> Tensor:
        """``[B * S, H]``."""
        return packed(self.values.float().norm(dim=-1, keepdim=True)).squeeze(-1)

    def keep(self, rows: Rows, full: bool, cache_dtype: str | None) -> Kept:
        """Output and log-sum-exp at the rows.

        Raises:
            ReplayError: Keys and values of all tokens are asked for.
        """
        if full:
            raise ReplayError(BY_HAND)
        lse = ops.gather_rows(self.lse.transpose(1, 2), rows.index)
        kept = Kept(_stored(self.out, rows, cache_dtype), lse, self.visible)
        others = self.keys.T if self.crosses else 0
        return kept._replace(others=others, number=self.weights.number)


def _stored(out: Tensor, rows: Rows, cache_dtype: str | None) -> Stored:
    if rows.whole and cache_dtype is None:
        return Stored(own(packed(out)))
    return store(out.transpose(1, 2), rows, cache_dtype)


def sunk(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention ``[N, H, E]`` and its log-sum-exp, of which sinks have their share."""
    if sinks is None:
        return out, lse
    total = with_sinks(lse, sinks)
    return out * (lse - total).exp()[..., None].to(out.dtype), total


def with_sinks(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Log-sum-exp ``[N, H]`` with one more logit in each head, ``[H]``."""
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype))
