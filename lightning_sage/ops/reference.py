"""What the ops mean, in plain PyTorch: docstrings of record, and what runs where no kernel does.

Axes: B batch, T tokens, N packed rows, Q query rows, H query heads, G key/value heads (H a multiple
of G), D head width. K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# elements of logits held at once: a few MiB, whatever the length
CHUNK = 1 << 21


def _accurate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class Rule(NamedTuple):
    """How logits follow from products of queries and keys, and which keys a query sees.

    Attributes:
        scale: Factor of the products.
        softcap: ``c * tanh(x / c)`` is applied to the scaled products where given.
        mask: bool (True attends) or additive, broadcastable to ``[B, H, Q, T]``.
        positions: ``[B | 1, Q]`` int64; where given, row i sees keys 0 to positions[i] only.
    """

    scale: float
    softcap: float | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None

    def part(self, rows: slice) -> Rule:
        """The rule of some of the query rows."""
        mask = self.mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., rows, :]
        return self._replace(
            mask=mask,
            positions=None if self.positions is None else self.positions[:, rows],
        )

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled and capped products ``[B, H, Q, T]``, before any mask."""
        B, H, Q, D = q.shape
        G, T = k.shape[1:3]
        # scaling the queries touches far fewer numbers than scaling the products
        grouped = (q * self.scale).reshape(B, G, H // G * Q, D)
        products = (grouped @ k.transpose(-1, -2)).view(B, H, Q, T)
        return products if self.softcap is None else self.softcap * (products / self.softcap).tanh()

    def masked(self, logits: Tensor) -> Tensor:
        """The logits with masks applied, in place where that is possible."""
        if self.positions is not None:
            keys = torch.arange(logits.shape[-1], device=logits.device)
            logits = logits.masked_fill_(keys > self.positions[:, None, :, None], float("-inf"))
        if self.mask is None:
            return logits
        if self.mask.dtype == torch.bool:
            return logits.masked_fill_(~self.mask, float("-inf"))
        return logits + self.mask


def chunks(q: Tensor, keys: int) -> Iterator[slice]:
    """Slices of query rows whose logits against `keys` keys fit the working memory."""
    B, H, Q, _ = q.shape
    step = max(1, CHUNK // max(1, B * H * keys))
    for start in range(0, Q, step):
        yield slice(start, start + step)


def attention_lse(q: Tensor, k: Tensor, rule: Rule) -> Tensor:
    """Log-sum-exp of each query's logits, a few query rows at a time.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, T, D]``.
        rule: How logits are made.

    Returns:
        ``[B, H, Q]`` in float32 or better; -inf for a query that sees nothing.
    """
    q, k = _accurate(q), _accurate(k)
    lse = q.new_empty(q.shape[:3])
    for rows in chunks(q, k.shape[2]):
        part = rule.part(rows)
        lse[:, :, rows] = part.masked(part.products(q[:, :, rows], k)).logsumexp(-1)
    return lse


def attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Attention of some query rows and its log-sum-exp, a few rows at a time.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, T, D]``.
        v: ``[B, G, T, Dv]``.
        rule: How logits are made.

    Returns:
        ``[B, H, Q, Dv]`` in the dtype of `q`, and ``[B, H, Q]`` in float32 or better. A query that
        sees nothing gets 0 and -inf.
    """
    wide_q, wide_k, wide_v = _accurate(q), _accurate(k), _accurate(v)
    lse = wide_q.new_empty(q.shape[:3])
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for rows in chunks(q, k.shape[2]):
        part = rule.part(rows)
        logits = part.masked(part.products(wide_q[:, :, rows], wide_k))
        lse[:, :, rows] = logits.logsumexp(-1)
        probs = (logits - lse[:, :, rows, None]).exp_().nan_to_num_(0.0)
        grouped = probs.view(len(probs), v.shape[1], -1, k.shape[2]) @ wide_v
        out[:, :, rows] = grouped.view(*probs.shape[:3], -1).to(q.dtype)
    return out, lse


def attention_received(q: Tensor, k: Tensor, lse: Tensor, weights: Tensor, rule: Rule) -> Tensor:
    """Attention that each key receives from weighted query rows (Kim & Lee, 2025, section 3).

    ``out[b, h, j] = sum_i weights[b, i] * exp(logits[b, h, i, j] - lse[b, h, i])``, a few query
    rows at a time.

    Args:
        q: ``[B, H, Q, D]``, the query rows that count.
        k: ``[B, G, T, D]``.
        lse: ``[B, H, Q]``, over all keys.
        weights: ``[B, Q]``; rows of weight 0 may hold anything.
        rule: How logits are made.

    Returns:
        ``[B, H, T]`` in float32 or better.
    """
    q, k = _accurate(q), _accurate(k)
    total = q.new_zeros(*q.shape[:2], k.shape[2])
    # a query that sees nothing has lse -inf, and no probability
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    for rows in chunks(q, k.shape[2]):
        part = rule.part(rows)
        logits = part.masked(part.products(q[:, :, rows], k))
        probs = logits.sub_(lse[:, :, rows, None]).exp_()
        total += (weights[:, None, None, rows].to(probs) @ probs).squeeze(2)
    return total


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of attention restricted to given queries and keys, from the dense log-sum-exp.

    With ``p = exp(logits - lse)``, lse and `out` of the attention over *all* keys:
    ``dv = p^T grad``, ``ds = p * (grad v^T - rowsum(grad * out))``, ``dq = scale * ds k`` and
    ``dk = scale * ds^T q`` (Dao et al., FlashAttention, 2022, appendix B), so that keys left out
    act as constants and nothing is renormalised.

    Args:
        grad: ``[B, H, Q, Dv]``.
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, Dv]``.
        out: ``[B, H, Q, Dv]``.
        lse: ``[B, H, Q]``.
        rule: How logits are made.

    Returns:
        Gradients of `q`, `k` and `v`, in their dtypes.
    """
    (B, H, _, D), (G, K) = q.shape, k.shape[1:3]
    wide_q, wide_k, wide_v, wide_grad = map(_accurate, (q, k, v, grad))
    dq, dk, dv = (torch.zeros_like(x) for x in (wide_q, wide_k, wide_v))
    delta = (wide_grad * _accurate(out)).sum(-1)
    for rows in chunks(q, K):
        part = rule.part(rows)
        products = part.products(wide_q[:, :, rows], wide_k)
        slope = None if rule.softcap is None else 1 - (products / rule.softcap) ** 2
        p = (part.masked(products) - lse[:, :, rows, None]).exp_().nan_to_num_(0.0, posinf=0.0)
        p = p.view(B, G, -1, K)
        g = wide_grad[:, :, rows].reshape(B, G, -1, v.shape[-1])
        dv += p.transpose(-1, -2) @ g
        ds = p * (g @ wide_v.transpose(-1, -2) - delta[:, :, rows].reshape(B, G, -1, 1))
        ds *= rule.scale if slope is None else rule.scale * slope.view_as(ds)
        dq[:, :, rows] = (ds @ wide_k).view(B, H, -1, D)
        dk += ds.transpose(-1, -2) @ wide_q[:, :, rows].reshape(B, G, -1, D)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of `x`, packed: ``out[i] = x.flatten(0, 1)[rows[i]]``.

    Args:
        x: ``[B, T, ...]``.
        rows: ``[N]`` int64 in ``[0, B * T)``; row ``b * T + t`` is token t of sample b.

    Returns:
        ``[N, ...]``.
    """
    return x.flatten(0, 1).index_select(0, rows)


def scatter_rows(values: Tensor, rows: Tensor, base: Tensor) -> Tensor:
    """A copy of `base` with some rows replaced; the inverse of :func:`gather_rows`.

    Args:
        values: ``[N, ...]``.
        rows: ``[N]`` int64, no row twice.
        base: ``[B, T, ...]``, left as it is.

    Returns:
        ``[B, T, ...]``.
    """
    out = base.clone(memory_format=torch.contiguous_format)
    out.flatten(0, 1).index_copy_(0, rows, values)
    return out


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


def _row_bits(seed: int, stream: int, rows: Tensor) -> Tensor:
    key = _mix(torch.tensor(_int32(seed + 0x9E3779B9 * (stream + 1)), dtype=torch.int32))
    return _mix(_mix(rows.to(torch.int32)) ^ key.to(rows.device))


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
    columns = torch.arange(width, dtype=torch.int32, device=rows.device) * -0x61C88647
    bits = _mix(_row_bits(seed, call, rows).unsqueeze(1) + _mix(columns))
    return ((bits >> 8) & 0xFFFFFF) >= round(p * 0x1000000)
