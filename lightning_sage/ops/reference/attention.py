"""What the attention ops mean: packed query rows, packed key rows, and who sees whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from lightning_sage.ops.reference.rows import accurate, kept, row_bits, wide
from lightning_sage.ops.sight import Group, Sight, packed

Op = TypeVar("Op", bound=Callable[..., Any])

# elements of logits held at once: a few MiB, whatever the length
CHUNK = 1 << 21


def _exactly(op: Op) -> Op:
    """Products are not rounded to autocast's dtype: log-sum-exp and replay must agree."""

    @wraps(op)
    def run(q: Tensor, *args: Any) -> Any:
        if not torch.is_autocast_enabled(q.device.type):
            return op(q, *args)
        with torch.autocast(q.device.type, enabled=False):
            return op(q, *args)

    return cast(Op, run)


class Dropout(NamedTuple):
    """Dropout of attention weights, keyed on (sample, head, query token, key token).

    The weight of query token i and key token j in head h of sample b is kept where
    :func:`dropout_mask` of row ``(b * H + h) * T + i`` is True in column j, whichever rows are
    packed beside it.

    Attributes:
        p: Probability of dropping a weight; the others are divided by 1 - p.
        seed: Of a step and block, 31 bits.
        call: Which dropout of the block.
    """

    p: float
    seed: int
    call: int


class How(NamedTuple):
    """How attention weights follow from products of queries and keys.

    Attributes:
        scale: Factor of the products.
        softcap: ``c * tanh(x / c)`` is applied to the scaled products where given.
        dropout: Of the weights, after normalisation; None for none.
    """

    scale: float
    softcap: float | None = None
    dropout: Dropout | None = None


def weights_dropout(rows: Tensor, columns: Tensor, dropout: Dropout, dtype: torch.dtype) -> Tensor:
    """Factors of attention weights: 0, or 1 / (1 - p).

    Args:
        rows: ``[..., N]`` int64, number ``(b * H + h) * T + i`` of each query in each head.
        columns: ``[..., N | 1, M]`` int64, tokens of the keys.
        dropout: What is drawn.
        dtype: Of the result.

    Returns:
        ``[..., N, M]``.
    """
    bits = row_bits(dropout.seed, dropout.call, rows)[..., None]
    factors = kept(bits, columns.to(torch.int32), dropout.p).to(dtype)
    return factors.div_(max(1 - dropout.p, 1e-30))


@_exactly
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, how: How
) -> tuple[Tensor, Tensor]:
    """Attention of packed query rows to packed key rows, and its log-sum-exp.

    ``lse[i] = log sum_j exp(logits[i, j])`` over the keys that row i sees, and
    ``out[i] = sum_j exp(logits[i, j] - lse[i]) v[j]``. Dropout changes `out` alone.

    Args:
        q: ``[N, H, D]``.
        k: ``[M, G, D]``.
        v: ``[M, G, E]``.
        sight: Which rows see which keys.
        how: How logits are made.

    Returns:
        ``[N, H, E]`` in the dtype of `q`, and ``[N, H]`` in float32 or better. A row that sees
        nothing gets 0 and -inf.
    """
    return _attend(q, k, v, sight, how)


@_exactly
def attention_lse(q: Tensor, k: Tensor, sight: Sight, how: How) -> Tensor:
    """The log-sum-exp of :func:`attention_forward` alone, ``[N, H]``."""
    return _attend(q, k, None, sight, how)[1]


def _attend(
    q: Tensor, k: Tensor, v: Tensor | None, sight: Sight, how: How
) -> tuple[Tensor, Tensor]:
    """Output, where there are values, and log-sum-exp."""
    out = q.new_zeros(*q.shape[:2], 0 if v is None else v.shape[2])
    lse = torch.full(q.shape[:2], float("-inf"), dtype=wide(q.dtype), device=q.device)
    for group in sight.groups():
        wide_q, wide_k = _group(group, (q,), (k,))
        wide_v = None if v is None else accurate(group.batched(v, group.keys))
        rule = _Rule.of(sight, group, how)
        o = q.new_empty(*wide_q.shape[:3], out.shape[2])
        m = wide_q.new_empty(wide_q.shape[:3])
        for rows in _chunks(wide_q, wide_k.shape[2]):
            part = rule.part(rows)
            logits = part.masked(part.products(wide_q[:, :, rows], wide_k))
            m[:, :, rows] = logits.logsumexp(-1)
            if wide_v is None:
                continue
            probs = (logits - _or_zero(m[:, :, rows, None])).exp_()
            # 1, but for rows whose logits are so far below zero that their sum is lost in the log
            probs = part.dropped(probs / probs.sum(-1, keepdim=True).clamp(min=1))
            grouped = probs.view(len(probs), wide_k.shape[1], -1, wide_k.shape[2]) @ wide_v
            o[:, :, rows] = grouped.view(*probs.shape[:3], -1).to(q.dtype)
        out[group.queries], lse[group.queries] = packed(o), packed(m)
    return out, lse


@_exactly
def attention_received(
    q: Tensor, k: Tensor, lse: Tensor, weights: Tensor, sight: Sight, how: How
) -> Tensor:
    """Attention that each key receives from weighted query rows (Kim & Lee, 2025, section 3).

    ``out[j, g] = sum_h sum_i weights[i] * exp(logits[h, i, j] - lse[i, h])`` over the query heads h
    that share key head g, and the rows i that see key j; before dropout.

    Args:
        q: ``[N, H, D]``, the query rows that count.
        k: ``[M, G, D]``.
        lse: ``[N, H]``, over all keys.
        weights: ``[N]``.
        sight: Which rows see which keys.
        how: How logits are made.

    Returns:
        ``[M, G]`` in float32 or better.
    """
    total = torch.zeros(k.shape[:2], dtype=wide(q.dtype), device=q.device)
    # a query that sees nothing has lse -inf, and no probability
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    for group in sight.groups():
        wide_q, wide_lse, wide_k = _group(group, (q, lse), (k,))
        by_row = weights[group.queries].view(len(wide_q), 1, 1, -1).to(wide_q)
        rule = _Rule.of(sight, group, how)
        sums = wide_k.new_zeros(*wide_q.shape[:2], 1, wide_k.shape[2])
        for rows in _chunks(wide_q, wide_k.shape[2]):
            part = rule.part(rows)
            logits = part.masked(part.products(wide_q[:, :, rows], wide_k))
            sums += by_row[..., rows] @ logits.sub_(wide_lse[:, :, rows, None]).exp_()
        by_key_head = sums.squeeze(2).unflatten(1, (k.shape[1], -1)).sum(2)
        total[group.keys] += packed(by_key_head)
    return total


@_exactly
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sight: Sight, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of attention restricted to given query and key rows, from the dense log-sum-exp.

    With ``p = exp(logits - lse)``, lse and `out` of the attention over *all* keys:
    ``dv = p^T grad``, ``ds = p * (grad v^T - rowsum(grad * out))``, ``dq = scale * ds k`` and
    ``dk = scale * ds^T q`` (Dao et al., FlashAttention, 2022, appendix B), so that keys left out
    act as constants and nothing is renormalised. With dropout, ``p`` in dv and ``grad v^T`` in ds
    are masked and divided by 1 - p.

    Args:
        grad: ``[N, H, E]``.
        q: ``[N, H, D]``.
        k: ``[M, G, D]``.
        v: ``[M, G, E]``.
        out: ``[N, H, E]``.
        lse: ``[N, H]``.
        sight: Which rows see which keys.
        how: How logits are made.

    Returns:
        Gradients of `q`, `k` and `v`, in their shapes and dtypes.
    """
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for group in sight.groups():
        wide_q, wide_grad, wide_out, wide_lse, wide_k, wide_v = _group(
            group, (q, grad, out, lse), (k, v)
        )
        rule = _Rule.of(sight, group, how)
        parts = _backward(wide_grad, wide_q, wide_k, wide_v, wide_out, wide_lse, rule)
        dq[group.queries] = packed(parts[0]).to(q.dtype)
        dk[group.keys] = packed(parts[1]).to(k.dtype)
        dv[group.keys] = packed(parts[2]).to(v.dtype)
    return dq, dk, dv


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: _Rule
) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, _, D), (G, K) = q.shape, k.shape[1:3]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    delta = (grad * out).sum(-1, keepdim=True)
    for rows in _chunks(q, K):
        part = rule.part(rows)
        products = part.products(q[:, :, rows], k)
        cap = rule.how.softcap
        slope = None if cap is None else 1 - (products / cap) ** 2
        p = (part.masked(products) - _or_zero(lse[:, :, rows, None])).exp_()
        g = grad[:, :, rows].reshape(B, G, -1, v.shape[-1])
        dv += part.dropped(p).view(B, G, -1, K).transpose(-1, -2) @ g
        dp = part.dropped((g @ v.transpose(-1, -2)).view(p.shape))
        ds = p * (dp - delta[:, :, rows])
        ds *= rule.how.scale if slope is None else rule.how.scale * slope
        ds = ds.view(B, G, -1, K)
        dq[:, :, rows] = (ds @ k).view(B, H, -1, D)
        dk += ds.transpose(-1, -2) @ q[:, :, rows].reshape(B, G, -1, D)
    return dq, dk, dv


def _or_zero(lse: Tensor) -> Tensor:
    """A log-sum-exp by which a row that sees nothing has no probability, and a NaN stays one."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def mask_of(sight: Sight, group: Group) -> Tensor | None:
    """What the rows of a group see, ``[B', H | 1, Q, K]``: bool (True attends) or additive."""
    samples = group.samples.stop - group.samples.start
    keys = (group.keys.stop - group.keys.start) // samples
    return _Rule.of(sight, group, How(1.0)).mask(keys)


def _group(group: Group, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> list[Tensor]:
    """Packed rows of one group, ``[B', H, Q, ...]``, in float32 or better."""
    found = [accurate(group.batched(x, group.queries)) for x in queries]
    return found + [accurate(group.batched(x, group.keys)) for x in keys]


def _chunks(q: Tensor, keys: int) -> Iterator[slice]:
    """Slices of query rows whose logits against `keys` keys fit the working memory."""
    B, H, Q, _ = q.shape
    step = max(1, CHUNK // max(1, B * H * keys))
    for start in range(0, Q, step):
        yield slice(start, start + step)


class _Rule(NamedTuple):
    """How the logits of one group are made and masked; a part of it, those of some rows.

    Attributes:
        how: How logits are made.
        sight: Of the whole batch.
        group: The samples.
        tokens: ``[B', Q]`` int64, tokens of the query rows.
        spans: ``[B', Q]`` each, see :attr:`Sight.spans`; None where there is a mask.
    """

    how: How
    sight: Sight
    group: Group
    tokens: Tensor
    spans: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, sight: Sight, group: Group, how: How) -> _Rule:
        samples = group.samples.stop - group.samples.start
        tokens = sight.rows.token[group.queries].view(samples, -1)
        spans = None
        if sight.visible.mask is None:
            first, stop = (x[group.queries].view(samples, -1) for x in sight.spans)
            spans = first, stop
        return cls(how, sight, group, tokens, spans)

    @property
    def columns(self) -> Tensor:
        """``[B', K]`` int64, tokens of the keys."""
        keys, group = self.sight.keys, self.group
        return keys.token[group.keys].view(group.samples.stop - group.samples.start, -1)

    def part(self, rows: slice) -> _Rule:
        """The rule of some of the query rows."""
        spans = None
        if self.spans is not None:
            spans = self.spans[0][:, rows], self.spans[1][:, rows]
        return self._replace(tokens=self.tokens[:, rows], spans=spans)

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled and capped products ``[B', H, Q, K]``, before any mask."""
        B, H, Q, D = q.shape
        G, K = k.shape[1:3]
        # scaling the queries touches far fewer numbers than scaling the products
        grouped = (q * self.how.scale).reshape(B, G, H // G * Q, D)
        products = (grouped @ k.transpose(-1, -2)).view(B, H, Q, K)
        cap = self.how.softcap
        return products if cap is None else cap * (products / cap).tanh()

    def masked(self, logits: Tensor) -> Tensor:
        """The logits with what is not seen at -inf, in place where that is possible."""
        seen = self.mask(logits.shape[-1])
        if seen is None:
            return logits
        if seen.dtype == torch.bool:
            return logits.masked_fill_(~seen, float("-inf"))
        return logits + seen

    def mask(self, keys: int) -> Tensor | None:
        """``[B', H | 1, Q, K]``, bool (True attends) or additive, for K keys a sample."""
        if self.sight.visible.plain and not self.sight.visible.causal:
            return None
        if self.spans is not None:
            first, stop = (x[:, None, :, None] for x in self.spans)
            number = torch.arange(keys, device=first.device)
            return (number >= first) & (number < stop)
        mask = self.sight.visible.mask
        assert mask is not None
        samples = torch.arange(self.group.samples.start, self.group.samples.stop)
        samples = samples.to(mask.device) if mask.shape[0] > 1 else torch.zeros_like(samples)
        tokens = self.tokens if mask.shape[2] > 1 else torch.zeros_like(self.tokens)
        rows = mask[samples[:, None], :, tokens].movedim(2, 1)
        if self.sight.keys.whole:
            return rows
        return rows.gather(-1, self.columns[:, None, None, :].expand(*rows.shape[:3], -1))

    def dropped(self, weights: Tensor) -> Tensor:
        """Attention weights ``[B', H, Q, K]`` after dropout."""
        if self.how.dropout is None:
            return weights
        H, T = weights.shape[1], self.sight.rows.T
        samples = torch.arange(self.group.samples.start, self.group.samples.stop)
        heads = samples.to(weights.device)[:, None] * H + torch.arange(H, device=weights.device)
        rows = heads[:, :, None] * T + self.tokens[:, None]
        columns = self.columns[:, None, None]
        return weights * weights_dropout(rows, columns, self.how.dropout, weights.dtype)
