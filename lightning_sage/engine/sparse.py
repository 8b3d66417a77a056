"""Attention of a replay: returns what the dense pass returned, and has a sparse backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.engine.attention_call import AttentionCall
from lightning_sage.engine.seen import Kept
from lightning_sage.ops import Dropout, How, Rows, Sight, packed, wide


def from_rows(x: Tensor) -> Tensor:
    """Packed ``[N, H, D]`` as a batch of one, ``[1, H, N, D]``."""
    return x.transpose(0, 1).unsqueeze(0)


def key_rows(kept: Kept, rows: Rows) -> Rows:
    """The tokens whose keys and values the replay makes: its own, or those of another sequence."""
    if not kept.others:
        return rows
    return Rows.every(rows.B, kept.others, rows.index.device)


class SparseAttention(torch.autograd.Function):
    """Forward: the output of the dense pass. Backward: flash backward from its log-sum-exp."""

    @staticmethod
    def forward(  # noqa: D102 - see the class
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        sinks: Tensor | None,
        kept: Kept,
        rows: Rows,
        keys: Rows,
        how: How,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.settings = kept, rows, keys, how
        return from_rows(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # noqa: D102 - see the class
        q, k, v, out, lse, sinks = ctx.saved_tensors
        kept, rows, keys, how = ctx.settings
        q, k, v, grad = (packed(x) for x in (q, k, v, grad))
        if kept.others:
            grads = _cross_backward(grad, q, k, v, out, lse, kept, rows, keys, how)
        else:
            sight, all_keys = Sight(rows, keys, kept.visible), None
            if kept.k is not None:
                every = Rows.every(rows.B, rows.T, rows.index.device)
                seen = every if kept.keys is None else Rows(kept.keys, rows.B, rows.T)
                whole = (x.some(None, y.shape[1:], y.dtype) for x, y in ((kept.k, k), (kept.v, v)))
                all_keys = *whole, Sight(rows, seen, kept.visible)
            grads = ops.attention_backward(grad, q, k, v, out, lse, sight, how, all_keys)
        into_sinks = None
        if sinks is not None and ctx.needs_input_grad[5]:
            # a key without a value: its probability times what it would have to gain
            gained = -(grad.to(lse.dtype) * out).sum(-1)
            into_sinks = ((sinks - lse).exp() * gained).sum(0).to(sinks.dtype)
        return *(from_rows(x) for x in grads), None, None, into_sinks, *[None] * 4


def _cross_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Kept,
    rows: Rows,
    keys: Rows,
    how: How,
) -> tuple[Tensor, Tensor, Tensor]:
    """All keys of the other sequence get their gradient; those that nobody sees get none."""
    if kept.keys is None:
        return ops.attention_backward(grad, q, k, v, out, lse, Sight(rows, keys, kept.visible), how)
    seen = Rows(kept.keys, keys.B, keys.T)
    sight = Sight(rows, seen, kept.visible)
    some_k, some_v = (x.index_select(0, seen.index) for x in (k, v))
    dq, dk, dv = ops.attention_backward(grad, q, some_k, some_v, out, lse, sight, how)
    every_dk = torch.zeros_like(k).index_copy_(0, seen.index, dk)
    return dq, every_dk, torch.zeros_like(v).index_copy_(0, seen.index, dv)


class LogitsAttention(torch.autograd.Function):
    """Attention of packed rows whose logits are there, ``[1, H, N, M]``, and get a gradient."""

    @staticmethod
    def forward(  # noqa: D102 - see the class
        ctx: Any,
        logits: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rows: Rows,
        keys: Rows,
        dropout: Dropout | None,
    ) -> Tensor:
        ctx.save_for_backward(logits, v, out, lse)
        ctx.settings = rows, keys, dropout
        # blocks take views of a product
        return from_rows(out).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # noqa: D102 - see the class
        logits, v, out, lse = ctx.saved_tensors
        rows, keys, dropout = ctx.settings
        dtype = wide(v.dtype)
        grad = grad.to(dtype)
        p = probabilities(logits.to(dtype), lse, rows, keys)
        held = weights_held(p, rows, keys, dropout)
        dropped = p if held is None else p * held
        dv = dropped.transpose(-1, -2) @ grad
        dp = grad @ v.to(dtype).transpose(-1, -2)
        if held is not None:
            dp *= held
        delta = (grad * from_rows(out).to(dtype)).sum(-1, keepdim=True)
        into = p * (dp - delta)
        return into.to(logits.dtype), dv.to(v.dtype), None, None, None, None, None


def probabilities(logits: Tensor, lse: Tensor, rows: Rows, keys: Rows) -> Tensor:
    """Attention of packed rows ``[1, H, N, M]``, 0 across samples; nothing is renormalised."""
    apart = rows.sample[:, None] != keys.sample[None, :]
    shifted = logits - from_rows(lse[..., None])
    return shifted.masked_fill(apart, float("-inf")).exp()


def weights_held(weights: Tensor, rows: Rows, keys: Rows, dropout: Dropout | None) -> Tensor | None:
    """Factors of packed attention weights ``[1, H, N, M]`` after dropout; None for none."""
    shape, device = weights.shape, weights.device
    if dropout is None:
        return None
    heads = torch.arange(shape[1], device=device)[:, None]
    number = (rows.sample * shape[1] + heads) * rows.T + rows.token
    columns = keys.token.expand(*shape[1:])
    return ops.weights_dropout(number, columns, dropout, weights.dtype)[None]


def logits_of(call: AttentionCall) -> Tensor:
    """Logits of a call, ``[B, H, T, S]`` in float32 or better; not what a plain `causal` hides."""
    dtype = ops.wide(call.q.dtype)
    q, k = call.q.to(dtype), call.k.to(dtype)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    return logits if call.mask is None else logits + call.mask
