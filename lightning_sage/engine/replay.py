"""What attention and dropout do in a dense forward, in a packed forward and in a replay.

Packed rows are a batch of one: ``[1, N, C]``, samples one after the other, tokens in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.engine.attention_call import AttentionCall
from lightning_sage.engine.drops import Drops, Seed
from lightning_sage.engine.flash import FlashMask
from lightning_sage.engine.follow import Weights
from lightning_sage.engine.keys import KeyRows
from lightning_sage.engine.seen import Kept, Seen, Written, rows_at, sunk
from lightning_sage.engine.sparse import (
    LogitsAttention,
    SparseAttention,
    from_rows,
    key_rows,
    logits_of,
)
from lightning_sage.errors import ReplayError
from lightning_sage.ops import Rows, Sight, Visibility, packed

# what a mask and a flag for causal order mean for the batch under way, of pairs with its own tokens
# or with those of another sequence
See = Callable[[Tensor | FlashMask | None, bool, bool], Visibility]


class Crossing(NamedTuple):
    """The other sequence that a block attends to.

    Attributes:
        others: Tokens of a sample there; 0 for none.
        calls: Which attention calls are to it, where it is as long as the block's own.
    """

    others: int = 0
    calls: frozenset[int] = frozenset()


ALONE = Crossing()
TRAINED_BIAS = (
    "its attention has a bias that is trained, of which attention='full' would need the entries at "
    "all keys: use attention='salient', or freeze it"
)


class Recorder(Drops):
    """Dense forward: runs attention as the model would and remembers it.

    Args:
        seed: Of the block's dropout.
        every: All tokens.
        valid: ``[B, T]`` bool, False on padding.
        see: What a mask means, given whether it is of another sequence.
        key_rows: The tokens that are seen at all.
        crossing: The other sequence that the block attends to, if any.
    """

    def __init__(
        self,
        seed: Seed,
        every: Rows,
        valid: Tensor,
        see: See,
        key_rows: Callable[..., Rows],
        crossing: Crossing = ALONE,
    ) -> None:
        super().__init__(seed, every, (every.B, every.T))
        self.valid, self.see, self.key_rows, self.crossing = valid, see, key_rows, crossing
        self.seen: list[Seen | Written] = []

    def crosses(self, keys: int) -> bool:
        """Whether the attention call under way, to so many keys a sample, leaves the sequence.

        Raises:
            ReplayError: It is to keys of neither.
        """
        others, calls = self.crossing
        if keys == others and (keys != self.rows.T or len(self.seen) in calls):
            return True
        if keys != self.rows.T:
            raise ReplayError(
                f"attention of {self.rows.T} queries to {keys} keys is neither to their own tokens "
                "nor to the states that the block is given (a cached prefix, or keys of both?)"
            )
        return False

    def attention(self, call: AttentionCall) -> Tensor:
        """Output of the model's own attention, or, with dropout, of one that can be replayed.

        Raises:
            ReplayError: It is not of the block's tokens.
        """
        out: Tensor
        if call.q.shape[0] != self.rows.B or call.q.shape[2] != self.rows.T:
            raise ReplayError(
                f"attention of queries {list(call.q.shape)} is not over its {self.rows.B} samples "
                f"of {self.rows.T} tokens: is the batch not first (batch_first=False)?"
            )
        if call.mask is not None and call.mask.shape[1] not in (1, call.q.shape[1]):
            raise ReplayError(
                f"its attention of {call.q.shape[1]} heads has a mask for {call.mask.shape[1]}, "
                "which is not one for all nor one for each: leave it dense with dense_blocks"
            )
        crosses = self.crosses(call.k.shape[2])
        visible = self.see(call.flash or call.mask, call.causal, crosses)
        how = self.how(call)
        keys = self.key_rows(visible, call.k.shape[2] if crosses else None)
        lse: Tensor | None = None
        if how.dropout is not None:
            sight = Sight(self.rows, keys, visible)
            k, v = (rows_at(x, keys) for x in (call.k, call.v))
            alone = ops.attention_forward(packed(call.q), k, v, sight, how)
            rows, by_row = sunk(*alone, call.sinks)
            shape = (self.rows.B, self.rows.T)
            out = rows.unflatten(0, shape).transpose(1, 2)
            lse = by_row.unflatten(0, shape).transpose(1, 2)
        elif call.run is None:
            k, v = call.repeated or (call.k, call.v)
            out, lse = ops.fused_attention(call.q, k, v, call.mask, call.causal, call.scale)
        else:
            out = call.run()
        self.seen.append(Seen(call, out, lse, visible, keys, crosses))
        call.run = call.repeated = None
        return out

    def could_be_weights(self, leading: int, queries: int, keys: int) -> bool:
        """Whether logits are of all tokens, or of them and the other sequence's."""
        fits = leading % self.rows.B == 0 and queries == self.rows.T
        return fits and keys in (self.rows.T, self.crossing.others or self.rows.T)

    def product(
        self, weights: Weights, x: Tensor, values: Tensor, given: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As the block computes it, with dropout that can be replayed; remembers it."""
        B = self.rows.B
        logits, by_head = (y.reshape(B, -1, *y.shape[-2:]) for y in (weights.logits, values))
        crosses = self.crosses(logits.shape[-1])
        keys = Rows.every(B, logits.shape[-1], logits.device) if crosses else self.rows
        dropout = self.weights_dropped(weights.dropout)
        if dropout is not None:
            number = torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])
            columns = torch.arange(x.shape[-1], device=x.device)[None]
            x = x * ops.weights_dropout(number, columns, dropout, x.dtype)
        found = given(x)
        out = found.reshape(B, -1, *found.shape[-2:])
        lse = logits.to(ops.wide(logits.dtype)).logsumexp(-1)
        causal = not crosses and self.ordered(logits[:, 0] - lse[:, 0, :, None])
        seen = Written(replace(weights, logits=logits), out, lse, by_head, keys, causal, crosses)
        self.seen.append(seen)
        return found

    def ordered(self, logarithms: Tensor) -> bool:
        """Whether no valid query sees a later token, by probabilities ``[B, T, T]``."""
        T = self.rows.T
        later = torch.ones(T, T, dtype=torch.bool, device=logarithms.device).triu(1)
        seen = (logarithms > -200) & later & self.valid[..., None]
        return T > 1 and not bool(seen.any())


class PackedForward(Drops):
    """Forward over chosen rows only, which attend to one another."""

    def __init__(
        self, seed: Seed, rows: Rows, sight: Visibility | None, mask: Tensor | None
    ) -> None:
        super().__init__(seed, rows, (1, len(rows)))
        self.sight, self.mask = sight, mask
        self.kept: list[tuple[Tensor, Tensor, Visibility]] = []

    def attention(self, call: AttentionCall) -> Tensor:
        """Attention within the chosen rows of each sample.

        Raises:
            ReplayError: The block makes a mask of its own, for other positions than these.
        """
        if call.flash is not None or (self.sight is None and call.mask is not None):
            raise ReplayError("it makes its own attention mask: use unselected='identity'")
        # what stands for a mask of pairs hides nothing, unless the block turns it round (torch.nn)
        told_bool = self.mask is not None and self.mask.dtype == torch.bool
        turned = call.mask if told_bool and call.mask is not None else None
        if turned is not None and turned.is_floating_point() and bool(turned.isneginf().any()):
            raise ReplayError("its mask hides where it is True: use unselected='identity'")
        if call.sinks is not None or call.k.shape[2] != call.q.shape[2]:
            raise ReplayError(
                "it attends to sinks or to another sequence: use unselected='identity'"
            )
        visible, how = self.sight or Visibility(call.causal), self.how(call)
        q, k, v = (packed(x) for x in (call.q, call.k, call.v))
        sight = Sight(self.rows, self.rows, visible)
        out, lse = ops.attention_forward(q, k, v, sight, how)
        self.kept.append((out, lse, visible))
        call.run = call.repeated = None
        return from_rows(out)

    def could_be_weights(self, leading: int, queries: int, keys: int) -> bool:
        """Whether logits are of the rows."""
        return queries == len(self.rows)

    def product(
        self, weights: Weights, x: Tensor, values: Tensor, given: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Refused: rows of different samples would see one another.

        Raises:
            ReplayError: Always.
        """
        raise ReplayError("it writes its attention out by hand: use unselected='identity'")


class Replayer(Drops):
    """Replay of chosen rows: attention returns what it returned, and has a sparse backward.

    Attributes:
        key_rows: Keys of kept rows that are not replayed; None where those learn nothing.
    """

    key_rows: KeyRows | None = None

    def __init__(
        self, seed: Seed, rows: Rows, kept: list[Kept], chosen: Tensor | None = None
    ) -> None:
        super().__init__(seed, rows, (1, len(rows)))
        self.kept, self.chosen = kept, chosen
        self.calls = 0

    def knows(self, weights: Weights) -> bool:
        """Whether weights made by hand were of attention in the forward."""
        return any(one.number == weights.number for one in self.kept)

    def _next(self, width: tuple[int, int], dtype: torch.dtype) -> tuple[Kept, Tensor, Tensor]:
        """What the next attention call left, and its output and log-sum-exp at the rows."""
        kept = self.kept[self.calls]
        self.calls += 1
        out = kept.out.some(self.chosen, width, dtype)
        lse = kept.lse if self.chosen is None else ops.gather_rows(kept.lse[None], self.chosen)
        return kept, out, lse

    def attention(self, call: AttentionCall) -> Tensor:
        """The kept output, with the gradient that flows within the chosen rows.

        Raises:
            ReplayError: A bias that is trained has pairs that cannot be told.
        """
        width = call.q.shape[1], call.v.shape[3]
        kept, out, lse = self._next(width, call.q.dtype)
        found: Tensor
        if call.mask is not None and call.mask.requires_grad:
            if kept.k is not None:
                raise ReplayError(TRAINED_BIAS)
            dropped = self.weights_dropped(call.dropout)
            keys = key_rows(kept, self.rows)
            v = call.v.repeat_interleave(width[0] // call.v.shape[1], dim=1)
            found = LogitsAttention.apply(logits_of(call), v, out, lse, self.rows, keys, dropped)
            return found
        k, v, keys = call.k, call.v, self.rows
        if kept.others:
            keys = key_rows(kept, self.rows)
        elif self.key_rows is not None:
            (k, v), keys = self.key_rows.joined(k, v), self.key_rows.rows
            # copied: not held for the length of the backward pass too
            self.key_rows = None
        found = SparseAttention.apply(
            call.q, k, v, out, lse, call.sinks, kept, self.rows, keys, self.how(call)
        )
        return found

    def could_be_weights(self, leading: int, queries: int, keys: int) -> bool:
        """Whether logits are of the rows, or of them and the other sequence's tokens."""
        ours = len(self.rows), *(self.rows.B * one.others for one in self.kept if one.others)
        return queries == len(self.rows) and keys in ours

    def softmax(self, weights: Weights, given: Callable[[], Tensor]) -> Tensor:
        """Of attention only the shape: its product is there already."""
        if not self.knows(weights):
            return given()
        logits = weights.logits
        return logits.new_zeros(()).expand(logits.shape)

    def product(
        self, weights: Weights, x: Tensor, values: Tensor, given: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The kept output, with its gradient for logits and values."""
        if not self.knows(weights):
            return given(x)
        logits, by_head = (y.reshape(1, -1, *y.shape[-2:]) for y in (weights.logits, values))
        kept, out, lse = self._next((by_head.shape[1], by_head.shape[-1]), values.dtype)
        dropout, keys = self.weights_dropped(weights.dropout), key_rows(kept, self.rows)
        found: Tensor = LogitsAttention.apply(logits, by_head, out, lse, self.rows, keys, dropout)
        return found.view(*values.shape[:-2], *found.shape[-2:])
