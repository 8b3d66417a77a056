"""What attention and dropout do in a dense forward, in a packed forward and in a replay.

Packed rows are a batch of one: ``[1, N, C]``, samples one after the other, tokens in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.arguments import ReplayError
from lightning_sage.intercept import AttentionCall
from lightning_sage.masks import Visibility


@dataclass
class Rows:
    """Chosen rows of a batch.

    Attributes:
        index: ``[N]`` int64, sorted; row ``b * T + t`` is token t of sample b.
        counts: Rows of each sample.
        T: Tokens of a sample, chosen or not.
    """

    index: Tensor
    counts: list[int]
    T: int

    @classmethod
    def of(cls, chosen: Tensor) -> Rows:
        """The rows where `chosen`, ``[B, T]`` bool, is True."""
        return cls(chosen.flatten().nonzero().squeeze(1), chosen.sum(1).tolist(), chosen.shape[1])

    def groups(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Packed slices that attention works on at once.

        Yields:
            A slice of the packed rows, the samples ``[B']`` and the tokens ``[B', K]`` in it; one
            group where every sample has the same count.
        """
        tokens = self.index % self.T
        if len(set(self.counts)) == 1:
            samples = torch.arange(len(self.counts), device=tokens.device)
            if self.counts[0]:
                yield slice(None), samples, tokens.view(len(self.counts), -1)
            return
        start = 0
        for b, count in enumerate(self.counts):
            part = slice(start, start + count)
            if count:
                yield part, torch.tensor([b], device=tokens.device), tokens[part][None]
            start += count


def batched(x: Tensor, part: slice, samples: int) -> Tensor:
    """Packed ``[1, H, N, D]`` to ``[B', H, K, D]``, for one group."""
    rows: Tensor = x[0, :, part].unflatten(1, (samples, -1))
    return rows.transpose(0, 1)


def packed(x: Tensor) -> Tensor:
    """``[B', H, K, D]`` to packed ``[H, B' * K, D]``."""
    return x.transpose(0, 1).flatten(1, 2)


class Seen(NamedTuple):
    """An attention of a dense or packed forward.

    Attributes:
        call: What went in.
        out: ``[B, H, T, Dv]``.
        lse: ``[B, H, T]``.
    """

    call: AttentionCall
    out: Tensor
    lse: Tensor


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


class _RowDropout:
    """Dropout whose mask depends on the row alone; the same in every pass over a batch."""

    def __init__(self, seed: Seed, rows: Tensor, shape: tuple[int, int]) -> None:
        self.seed, self.rows, self.shape, self.drops = seed, rows, shape, 0

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """See :func:`lightning_sage.ops.reference.dropout_mask`."""
        leading = x.shape[:2] if x.shape[:2] == self.shape else x.shape[:1]
        if leading.numel() != len(self.rows):
            raise ReplayError(
                f"dropout of a tensor of shape {list(x.shape)} does not run along the tokens, so "
                "it cannot be replayed on some of them: set its probability to 0"
            )
        width = x[(0,) * len(leading)].numel() if x.numel() else 1
        mask = ops.dropout_mask(int(self.seed), self.drops, self.rows, width, p)
        self.drops += 1
        return x * mask.view(x.shape).to(x.dtype).div_(max(1 - p, 1e-30))


class Recorder(_RowDropout):
    """Dense forward: runs attention as the model would and remembers it."""

    def __init__(self, seed: Seed, hidden: Tensor) -> None:
        rows = torch.arange(hidden.shape[:2].numel(), device=hidden.device)
        super().__init__(seed, rows, (hidden.shape[0], hidden.shape[1]))
        self.seen: list[Seen] = []

    def attention(self, call: AttentionCall) -> Tensor:
        """Output of the model's own attention; its log-sum-exp is remembered."""
        if call.run is None:
            k, v = call.repeated or (call.k, call.v)
            out, lse = ops.attention_forward(call.q, k, v, call.mask, call.causal, call.scale)
        else:
            out = call.run()
            lse = ops.attention_lse(call.q, call.k, ops.Rule(call.scale, call.softcap, call.mask))
        self.seen.append(Seen(call, out, lse))
        call.run = call.repeated = None
        return out


class PackedForward(_RowDropout):
    """Forward over chosen rows only, which attend to one another."""

    def __init__(self, seed: Seed, rows: Rows, sight: Visibility | None) -> None:
        super().__init__(seed, rows.index, (1, len(rows.index)))
        self.chosen, self.sight = rows, sight
        self.visible: list[Visibility] = []
        self.seen: list[Seen] = []

    def attention(self, call: AttentionCall) -> Tensor:
        """Attention within the chosen rows of each sample.

        Raises:
            ReplayError: The block makes a mask of its own, for other positions than these.
        """
        if self.sight is None and call.mask is not None:
            raise ReplayError("it makes its own attention mask: use unselected='identity'")
        sight = self.sight or Visibility(call.causal)
        self.visible.append(sight)
        out = call.q.new_empty(*call.q.shape[:3], call.v.shape[-1])
        lse = torch.empty(call.q.shape[:3], device=out.device, dtype=_lse_dtype(out.dtype))
        for part, samples, tokens in self.chosen.groups():
            q, k, v = (batched(x, part, len(samples)) for x in (call.q, call.k, call.v))
            mask, causal = sight.own_keys(samples, tokens)
            if call.softcap is None:
                o, m = ops.attention_forward(q, k, v, mask, causal, call.scale)
            else:
                order = torch.arange(q.shape[2], device=q.device)[None] if causal else None
                o, m = ops.attention(q, k, v, ops.Rule(call.scale, call.softcap, mask, order))
            out[0, :, part], lse[0, :, part] = packed(o), packed(m)
        self.seen.append(Seen(call, out, lse))
        call.run = call.repeated = None
        return out


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


class Kept(NamedTuple):
    """What an attention call leaves for the replay.

    Attributes:
        out: ``[N, H, Dv]``, its output at the kept rows.
        lse: ``[N, H]``.
        k: ``[B, G, T, D]`` of every token, with `attention="full"`, else None.
        v: ``[B, G, T, Dv]``, likewise.
    """

    out: Tensor
    lse: Tensor
    k: Tensor | None
    v: Tensor | None


class Replayer(_RowDropout):
    """Replay of chosen rows: attention returns what it returned, and has a sparse backward."""

    def __init__(self, seed: Seed, rows: Rows, kept: list[Kept], visible: list[Visibility]) -> None:
        super().__init__(seed, rows.index, (1, len(rows.index)))
        self.chosen, self.kept, self.visible = rows, kept, visible
        self.calls = 0

    def attention(self, call: AttentionCall) -> Tensor:
        """The kept output, with the gradient that flows within the chosen rows."""
        kept, visible = self.kept[self.calls], self.visible[self.calls]
        self.calls += 1
        out: Tensor = _SparseAttention.apply(
            call.q, call.k, call.v, kept, self.chosen, visible, call.scale, call.softcap
        )
        return out


class _SparseAttention(torch.autograd.Function):
    """Forward: the output of the dense pass. Backward: flash backward from its log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: Kept,
        rows: Rows,
        visible: Visibility,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, *kept)
        ctx.settings = rows, visible, scale, softcap
        return kept.out.transpose(0, 1).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse, full_k, full_v = ctx.saved_tensors
        rows, visible, scale, softcap = ctx.settings
        out, lse = out.transpose(0, 1).unsqueeze(0), lse.t()[None, ..., None]
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for part, samples, tokens in rows.groups():
            n = len(samples)
            g, group_q, o, m = (batched(x, part, n) for x in (grad, q, out, lse))
            m = m.squeeze(-1)
            if full_k is None:
                mask, causal = visible.own_keys(samples, tokens)
                rule = ops.Rule(scale, softcap, mask)
                keys, values = batched(k, part, n), batched(v, part, n)
            else:
                causal = False
                rule = ops.Rule(scale, softcap, *visible.all_keys(samples, tokens))
                keys, values = full_k[samples], full_v[samples]
            grads = ops.attention_backward(g, group_q, keys, values, o, m, rule, causal)
            if full_k is not None:
                grads = grads[0], _at(grads[1], tokens), _at(grads[2], tokens)
            for target, x in zip((dq, dk, dv), grads, strict=True):
                target[0, :, part] = packed(x)
        return dq, dk, dv, None, None, None, None, None


def _at(x: Tensor, tokens: Tensor) -> Tensor:
    """``[B', G, T, D]`` at ``[B', K]`` tokens: ``[B', G, K, D]``."""
    return x.gather(2, tokens[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
