"""What attention and dropout do in a dense forward, in a packed forward and in a replay.

Packed rows are a batch of one: ``[1, N, C]``, samples one after the other, tokens in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.arguments import ReplayError
from lightning_sage.intercept import AttentionCall
from lightning_sage.ops import How, Rows, Sight, Visibility, packed
from lightning_sage.packing import Stored, store

# what a mask and a flag for causal order mean for the batch under way
See = Callable[[Tensor | None, bool], Visibility]


def rows_at(x: Tensor, rows: Rows) -> Tensor:
    """Packed rows ``[N, H, D]`` of ``[B, H, T, D]``; all of them without a copy where possible."""
    return packed(x) if rows.whole else ops.gather_rows(x.transpose(1, 2), rows.index)


def from_rows(x: Tensor) -> Tensor:
    """Packed ``[N, H, D]`` as a batch of one, ``[1, H, N, D]``."""
    return x.transpose(0, 1).unsqueeze(0)


@dataclass
class Seen:
    """An attention of a dense forward.

    Attributes:
        call: What went in.
        out: ``[B, H, T, E]``.
        lse: ``[B, H, T]``, or None where the fused kernel did not give it.
        visible: What the mask means.
        keys: The tokens that are seen at all.
    """

    call: AttentionCall
    out: Tensor
    lse: Tensor | None
    visible: Visibility
    keys: Rows
    _key_rows: Tensor | None = None

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
        return ops.attention_lse(q, self.key_rows(), sight, self.how)


class Seed:
    """A seed drawn from the default generator when first asked for; 31 bits.

    Drawing nothing where nothing is random leaves the user's random stream as it is, and drawing
    from it makes a run resumed with its generator's state repeat itself.
    """

    def __init__(self, value: int | None = None) -> None:
        self.value = value

    def __int__(self) -> int:
        if self.value is None:
            self.value = int(torch.randint(2**31, ()))
        return self.value


class _Drops:
    """Dropout whose mask depends on tokens alone; the same in every pass over a batch.

    Attributes:
        weights_too: Whether attention weights are dropped. The self-check compares without.
    """

    weights_too = True

    def __init__(self, seed: Seed, rows: Rows, shape: tuple[int, int]) -> None:
        self.seed, self.rows, self.shape, self.drops = seed, rows, shape, 0

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """See :func:`lightning_sage.ops.reference.row_dropout`."""
        leading = x.shape[:2] if x.shape[:2] == self.shape else x.shape[:1]
        if leading.numel() != len(self.rows):
            raise ReplayError(
                f"dropout of a tensor of shape {list(x.shape)} does not run along the tokens, so "
                "it cannot be replayed on some of them: set its probability to 0"
            )
        if x.numel() == 0:
            return x
        flat = x.reshape(len(self.rows), -1)
        dropped = ops.row_dropout(flat, self.rows.index, int(self.seed), self.drops, p)
        self.drops += 1
        return dropped.view(x.shape)

    def how(self, call: AttentionCall) -> How:
        """How the weights of a call are made; counts its dropout."""
        if not call.dropout:
            return How(call.scale, call.softcap)
        self.drops += 1
        drop = ops.Dropout(call.dropout, int(self.seed), self.drops - 1)
        return How(call.scale, call.softcap, drop if self.weights_too else None)


class Recorder(_Drops):
    """Dense forward: runs attention as the model would and remembers it."""

    def __init__(self, seed: Seed, every: Rows, see: See, key_rows: Callable[..., Rows]) -> None:
        super().__init__(seed, every, (every.B, every.T))
        self.see, self.key_rows = see, key_rows
        self.seen: list[Seen] = []

    def attention(self, call: AttentionCall) -> Tensor:
        """Output of the model's own attention, or, with dropout, of one that can be replayed."""
        out: Tensor
        visible, how = self.see(call.mask, call.causal), self.how(call)
        keys = self.key_rows(visible)
        lse: Tensor | None = None
        if how.dropout is not None:
            sight = Sight(self.rows, keys, visible)
            k, v = (rows_at(x, keys) for x in (call.k, call.v))
            rows, by_row = ops.attention_forward(packed(call.q), k, v, sight, how)
            shape = (self.rows.B, self.rows.T)
            out = rows.unflatten(0, shape).transpose(1, 2)
            lse = by_row.unflatten(0, shape).transpose(1, 2)
        elif call.run is None:
            k, v = call.repeated or (call.k, call.v)
            out, lse = ops.fused_attention(call.q, k, v, call.mask, call.causal, call.scale)
        else:
            out = call.run()
        self.seen.append(Seen(call, out, lse, visible, keys))
        call.run = call.repeated = None
        return out


class Kept(NamedTuple):
    """What an attention call leaves for the replay.

    Attributes:
        out: Its output at the kept rows, ``[N, H, E]``.
        lse: ``[N, H]``.
        visible: What its mask meant.
        k: ``[M, G, D]`` of every token that is seen, with `attention="full"`, else None.
        v: ``[M, G, E]``, likewise.
        keys: ``[M]`` int64, which tokens these are; None for all.
    """

    out: Stored
    lse: Tensor
    visible: Visibility
    k: Stored | None = None
    v: Stored | None = None
    keys: Tensor | None = None


class PackedForward(_Drops):
    """Forward over chosen rows only, which attend to one another."""

    def __init__(self, seed: Seed, rows: Rows, sight: Visibility | None) -> None:
        super().__init__(seed, rows, (1, len(rows)))
        self.sight = sight
        self.kept: list[tuple[Tensor, Tensor, Visibility]] = []

    def attention(self, call: AttentionCall) -> Tensor:
        """Attention within the chosen rows of each sample.

        Raises:
            ReplayError: The block makes a mask of its own, for other positions than these.
        """
        if self.sight is None and call.mask is not None:
            raise ReplayError("it makes its own attention mask: use unselected='identity'")
        visible, how = self.sight or Visibility(call.causal), self.how(call)
        q, k, v = (packed(x) for x in (call.q, call.k, call.v))
        sight = Sight(self.rows, self.rows, visible)
        out, lse = ops.attention_forward(q, k, v, sight, how)
        self.kept.append((out, lse, visible))
        call.run = call.repeated = None
        return from_rows(out)


class Replayer(_Drops):
    """Replay of chosen rows: attention returns what it returned, and has a sparse backward."""

    def __init__(
        self, seed: Seed, rows: Rows, kept: list[Kept], chosen: Tensor | None = None
    ) -> None:
        super().__init__(seed, rows, (1, len(rows)))
        self.kept, self.chosen = kept, chosen
        self.calls = 0

    def attention(self, call: AttentionCall) -> Tensor:
        """The kept output, with the gradient that flows within the chosen rows."""
        kept, how = self.kept[self.calls], self.how(call)
        self.calls += 1
        width = call.q.shape[1], call.v.shape[3]
        out = kept.out.some(self.chosen, width, call.q.dtype)
        lse = kept.lse if self.chosen is None else ops.gather_rows(kept.lse[None], self.chosen)
        found: Tensor = _SparseAttention.apply(
            call.q, call.k, call.v, out, lse, kept, self.rows, how
        )
        return found


class _SparseAttention(torch.autograd.Function):
    """Forward: the output of the dense pass. Backward: flash backward from its log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        kept: Kept,
        rows: Rows,
        how: How,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = kept, rows, how
        return from_rows(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        kept, rows, how = ctx.settings
        q, k, v, grad = (packed(x) for x in (q, k, v, grad))
        sight, all_keys = Sight(rows, rows, kept.visible), None
        if kept.k is not None:
            every = Rows.every(rows.B, rows.T, rows.index.device)
            keys = every if kept.keys is None else Rows(kept.keys, rows.B, rows.T)
            whole = (x.some(None, y.shape[1:], y.dtype) for x, y in ((kept.k, k), (kept.v, v)))
            all_keys = *whole, Sight(rows, keys, kept.visible)
        grads = ops.attention_backward(grad, q, k, v, out, lse, sight, how, all_keys)
        return *(from_rows(x) for x in grads), None, None, None, None, None


def keep_attention(seen: Seen, rows: Rows, full: bool, cache_dtype: str | None) -> Kept:
    """What a dense attention call leaves: output and log-sum-exp at the rows, or all keys too."""
    if rows.whole and cache_dtype is None:
        out = Stored(own(packed(seen.out)))
    else:
        out = store(seen.out.transpose(1, 2), rows, cache_dtype)
    kept = Kept(out, seen.lse_at(rows), seen.visible)
    if not full:
        return kept
    if cache_dtype is None:
        k, v = (Stored(own(x)) for x in (seen.key_rows(), rows_at(seen.call.v, seen.keys)))
    else:
        k, v = (
            store(x.transpose(1, 2), seen.keys, cache_dtype) for x in (seen.call.k, seen.call.v)
        )
    return kept._replace(k=k, v=v, keys=None if seen.keys.whole else seen.keys.index)


def own(x: Tensor) -> Tensor:
    """`x` without the rest of a fused projection that it may be a view of."""
    whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if whole else x.clone(memory_format=torch.contiguous_format)
