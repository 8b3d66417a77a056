"""What the ops mean, in plain PyTorch: docstrings of record, and what runs where no kernel does.

Axes: B batch, T tokens, N packed query rows, M packed key rows, H query heads, G key/value heads
(H a multiple of G), D head width, E value width, C width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sage.ops.sight import Group, Sight, packed

# elements of logits held at once: a few MiB, whatever the length
CHUNK = 1 << 21


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
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = _accurate(q).new_full(q.shape[:2], float("-inf"))
    for group in sight.groups():
        wide_q, wide_k, wide_v = _group(group, (q,), (k, v))
        rule = _Rule.of(sight, group, how)
        o = torch.empty(*wide_q.shape[:3], v.shape[2], dtype=q.dtype, device=q.device)
        m = wide_q.new_empty(wide_q.shape[:3])
        for rows in _chunks(wide_q, wide_k.shape[2]):
            part = rule.part(rows)
            logits = part.masked(part.products(wide_q[:, :, rows], wide_k))
            m[:, :, rows] = logits.logsumexp(-1)
            probs = (logits - m[:, :, rows, None]).exp_().nan_to_num_(0.0)
            probs = part.dropped(probs)
            grouped = probs.view(len(probs), v.shape[1], -1, wide_k.shape[2]) @ wide_v
            o[:, :, rows] = grouped.view(*probs.shape[:3], -1).to(q.dtype)
        out[group.queries], lse[group.queries] = packed(o), packed(m[..., None]).squeeze(-1)
    return out, lse


def attention_lse(q: Tensor, k: Tensor, sight: Sight, how: How) -> Tensor:
    """The log-sum-exp of :func:`attention_forward` alone, ``[N, H]``."""
    lse = _accurate(q).new_full(q.shape[:2], float("-inf"))
    for group in sight.groups():
        wide_q, wide_k = _group(group, (q,), (k,))
        rule = _Rule.of(sight, group, how)
        m = wide_q.new_empty(wide_q.shape[:3])
        for rows in _chunks(wide_q, wide_k.shape[2]):
            part = rule.part(rows)
            logits = part.masked(part.products(wide_q[:, :, rows], wide_k))
            m[:, :, rows] = logits.logsumexp(-1)
        lse[group.queries] = packed(m[..., None]).squeeze(-1)
    return lse


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
    total = _accurate(q).new_zeros(k.shape[0], k.shape[1])
    # a query that sees nothing has lse -inf, and no probability
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    for group in sight.groups():
        wide_q, wide_lse, wide_k = _group(group, (q, lse[..., None]), (k,))
        by_row = weights[group.queries].view(len(wide_q), 1, 1, -1).to(wide_q)
        rule = _Rule.of(sight, group, how)
        sums = wide_k.new_zeros(*wide_q.shape[:2], 1, wide_k.shape[2])
        for rows in _chunks(wide_q, wide_k.shape[2]):
            part = rule.part(rows)
            logits = part.masked(part.products(wide_q[:, :, rows], wide_k))
            sums += by_row[..., rows] @ logits.sub_(wide_lse[:, :, rows]).exp_()
        sums = sums.unflatten(1, (k.shape[1], -1)).sum(2).transpose(2, 3)
        total[group.keys] += packed(sums).squeeze(-1)
    return total


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
            group, (q, grad, out, lse[..., None]), (k, v)
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
        p = (part.masked(products) - lse[:, :, rows]).exp_().nan_to_num_(0.0, posinf=0.0)
        g = grad[:, :, rows].reshape(B, G, -1, v.shape[-1])
        dv += part.dropped(p).view(B, G, -1, K).transpose(-1, -2) @ g
        dp = part.dropped((g @ v.transpose(-1, -2)).view(p.shape))
        ds = p * (dp - delta[:, :, rows])
        ds *= rule.how.scale if slope is None else rule.how.scale * slope
        ds = ds.view(B, G, -1, K)
        dq[:, :, rows] = (ds @ k).view(B, H, -1, D)
        dk += ds.transpose(-1, -2) @ q[:, :, rows].reshape(B, G, -1, D)
    return dq, dk, dv


def mask_of(sight: Sight, group: Group) -> Tensor | None:
    """What the rows of a group see, ``[B', H | 1, Q, K]``: bool (True attends) or additive."""
    samples = group.samples.stop - group.samples.start
    keys = (group.keys.stop - group.keys.start) // samples
    return _Rule.of(sight, group, How(1.0)).mask(keys)


def _accurate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _group(group: Group, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> list[Tensor]:
    """Packed rows of one group, ``[B', H, Q, D]``, in float32 or better."""
    found = [_accurate(group.batched(x, group.queries)) for x in queries]
    return found + [_accurate(group.batched(x, group.keys)) for x in keys]


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
        p, seed, call = self.how.dropout
        H, T = weights.shape[1], self.sight.rows.T
        samples = torch.arange(self.group.samples.start, self.group.samples.stop)
        heads = samples.to(weights.device)[:, None] * H + torch.arange(H, device=weights.device)
        rows = heads[:, :, None] * T + self.tokens[:, None]
        columns = self.columns[:, None, None].to(torch.int32)
        kept = _kept(_row_bits(seed, call, rows)[..., None], columns, p)
        return weights * kept / max(1 - p, 1e-30)


def gather_rows(x: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Rows of `x`, packed: ``out[i] = x.flatten(0, 1)[rows[i]] * weights[i]``, rounded once.

    Args:
        x: ``[B, T, ...]``.
        rows: ``[N]`` int64 in ``[0, B * T)``; row ``b * T + t`` is token t of sample b.
        weights: ``[N]``; None for 1.

    Returns:
        ``[N, ...]``, contiguous, in the dtype of `x`.
    """
    if rows.numel() == 0:
        return x.new_empty(0, *x.shape[2:])
    # not by a flat index: where x is a transposed view, flattening would copy all of it
    out = x[rows // x.shape[1], rows % x.shape[1]].contiguous()
    return out if weights is None else (_accurate(out) * _column(weights, out)).to(x.dtype)


def scatter_rows(
    values: Tensor, rows: Tensor, base: Tensor, weights: Tensor | None = None
) -> Tensor:
    """A copy of `base` with some rows replaced; the inverse of :func:`gather_rows`.

    ``out.flatten(0, 1)[rows[i]] = values[i] + (1 - weights[i]) * base.flatten(0, 1)[rows[i]]``,
    rounded once: the gradient of a block whose branches are weighted, but not its residual path.

    Args:
        values: ``[N, ...]``.
        rows: ``[N]`` int64, no row twice.
        base: ``[B, T, ...]``, left as it is.
        weights: ``[N]``; None for 1.

    Returns:
        ``[B, T, ...]`` in the dtype of `base`.
    """
    out = base.clone(memory_format=torch.contiguous_format)
    if weights is not None:
        own = gather_rows(base, rows)
        values = _accurate(values) + (1 - _column(weights, own)) * _accurate(own)
    out.flatten(0, 1).index_copy_(0, rows, values.to(base.dtype))
    return out


def row_norms(x: Tensor, rows: Tensor) -> Tensor:
    """Euclidean norm of each row, ``[N]`` in float32 or better.

    Args:
        x: ``[B, T, C]``.
        rows: ``[N]`` int64, see :func:`gather_rows`.
    """
    return _accurate(gather_rows(x, rows)).norm(dim=-1)


def _column(weights: Tensor, x: Tensor) -> Tensor:
    return weights.to(_accurate(x).dtype).view(-1, *(1,) * (x.dim() - 1))


# largest number of a packed dtype: the largest entry of a group is brought to it
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def pack_rows(x: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of `x` in eight bits, each group of the last axis with a scale of its own.

    ``scale = max |x| / LARGEST[dtype]`` over the group, ``values = round(x / scale)``, to the
    nearest, ties to even. A group of zeros has scale 0, and one that is not finite a NaN scale.

    Args:
        x: ``[B, T, K, D]``: K groups of D numbers.
        rows: ``[N]`` int64, see :func:`gather_rows`.
        dtype: int8 or float8_e4m3fn.

    Returns:
        ``[N, K, D]`` in `dtype`, and the scales ``[N, K]`` in float32.
    """
    own = gather_rows(x, rows).float()
    scale = own.abs().amax(-1) / LARGEST[dtype]
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    shrunk = (own * _inverse(scale)[..., None]).nan_to_num_(0.0)
    return (shrunk.round() if dtype == torch.int8 else shrunk).to(dtype), scale


def _inverse(scale: Tensor) -> Tensor:
    # of a denormal scale the inverse would overflow: its rows are zeros then
    return torch.where(scale > 1e-37, 1 / scale, 0.0)


def unpack_rows(values: Tensor, scale: Tensor, chosen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What :func:`pack_rows` packed, or some of its rows.

    Args:
        values: ``[N, K, D]``.
        scale: ``[N, K]`` float32.
        chosen: ``[R]`` int64 in ``[0, N)``; None for all.
        dtype: Of the result.

    Returns:
        ``[R, K, D]``.
    """
    if chosen is not None:
        values, scale = values[chosen], scale[chosen]
    return (values.float() * scale[..., None]).to(dtype)


def _mix(x: Tensor) -> Tensor:
    """Permute int32 by a 32-bit integer hash (Wellons' lowbias32), wrapping as unsigned would."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B
    return x ^ ((x >> 16) & 0xFFFF)


def _int32(x: int) -> int:
    return (x + 0x80000000) % 0x100000000 - 0x80000000


def uniform(seed: int, stream: int, rows: Tensor) -> Tensor:
    """A random number per row that depends on nothing but its arguments.

    Args:
        seed: Of a step and block, 31 bits.
        stream: Tells draws of the same seed apart.
        rows: int64, any shape.

    Returns:
        float64 in [0, 1), the shape of `rows`.
    """
    bits = _row_bits(seed, stream, rows) >> 1 & 0x7FFFFFFF
    return bits.double() / 0x80000000


def stream_key(seed: int, stream: int) -> int:
    """The 32 bits, signed, that a seed and a stream come down to."""
    return int(_mix(torch.tensor(_int32(seed + 0x9E3779B9 * (stream + 1)), dtype=torch.int32)))


def _row_bits(seed: int, stream: int, rows: Tensor) -> Tensor:
    return _mix(_mix(rows.to(torch.int32)) ^ stream_key(seed, stream))


def dropout_threshold(p: float) -> int:
    """An element is kept where its 24 bits are at least this."""
    return round(p * 0x1000000)


def _kept(row_bits: Tensor, columns: Tensor, p: float) -> Tensor:
    bits = _mix(row_bits + _mix(columns * -0x61C88647))
    return ((bits >> 8) & 0xFFFFFF) >= dropout_threshold(p)


def dropout_mask(seed: int, call: int, rows: Tensor, width: int, p: float) -> Tensor:
    """Dropout by row: any subset of rows sees the very mask that the whole tensor saw.

    An element is a hash of (seed, call, row, column), so the mask is never stored.

    Args:
        seed: Of a step and block, 31 bits.
        call: Which dropout of the block, counted from 0 in the order of its forward.
        rows: ``[N]`` int64, row ``b * T + t`` is token t of sample b.
        width: Elements of a row.
        p: Probability of dropping an element.

    Returns:
        ``[N, width]`` bool, True where the element is kept.
    """
    columns = torch.arange(width, dtype=torch.int32, device=rows.device)
    return _kept(_row_bits(seed, call, rows).unsqueeze(1), columns, p)


def row_dropout(x: Tensor, rows: Tensor, seed: int, call: int, p: float) -> Tensor:
    """`x` where :func:`dropout_mask` keeps it, divided by 1 - p, and 0 elsewhere.

    Args:
        x: ``[N, C]``.
        rows: ``[N]`` int64.
        seed: See :func:`dropout_mask`.
        call: See :func:`dropout_mask`.
        p: Probability of dropping an element.

    Returns:
        ``[N, C]``, contiguous.
    """
    mask = dropout_mask(seed, call, rows, x.shape[1], p)
    wide = _accurate(x)
    return (wide * mask.to(wide.dtype).mul_(1 / max(1 - p, 1e-30))).to(x.dtype)
