"""The door to the ops: what fits the device, or the reference.

The meaning of each is in :mod:`lightning_sage.ops.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sage.ops import reference, stock
from lightning_sage.ops.reference import (
    Rule,
    attention,
    attention_lse,
    attention_received,
    chunks,
    dropout_mask,
    gather_rows,
    scatter_rows,
    uniform,
)

__all__ = [
    "Rule",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_lse",
    "attention_received",
    "chunks",
    "dropout_mask",
    "gather_rows",
    "scatter_rows",
    "uniform",
]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Fused attention of all tokens and its log-sum-exp.

    Args:
        q: ``[B, H, T, D]``.
        k: ``[B, G, T, D]``.
        v: ``[B, G, T, Dv]``.
        mask: As ``F.scaled_dot_product_attention`` takes it.
        causal: As ``F.scaled_dot_product_attention`` takes it.
        scale: Factor of the products.

    Returns:
        ``[B, H, T, Dv]`` and ``[B, H, T]``.
    """
    out, lse = stock.forward(q, k, v, mask, causal, scale)
    if lse is None:
        positions = torch.arange(q.shape[2], device=q.device)[None] if causal else None
        lse = attention_lse(q, k, Rule(scale, mask=mask, positions=positions))
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.attention_backward`; `causal`: row i sees rows 0 to i only.

    `rule.positions` is for query rows that are not the key rows, `causal` for those that are.
    """
    mask = _with_positions(rule, q, k.shape[2])
    if rule.softcap is None and (mask is None) == (rule.mask is None and rule.positions is None):
        grads = stock.backward(grad, q, k, v, out, lse, mask, causal, rule.scale)
        if grads is not None:
            return grads
    if causal:
        rule = rule._replace(positions=torch.arange(q.shape[2], device=q.device)[None])
    return reference.attention_backward(grad, q, k, v, out, lse, rule)


def _with_positions(rule: Rule, q: Tensor, keys: int) -> Tensor | None:
    """Mask and positions as one mask, unless that would outgrow the working memory by far."""
    if rule.positions is None:
        return rule.mask
    if rule.positions.numel() * keys > 16 * reference.CHUNK or q.device.type != "cpu":
        return None
    seen = torch.arange(keys, device=q.device) <= rule.positions[:, None, :, None]
    if rule.mask is None:
        return seen
    if rule.mask.dtype == torch.bool:
        return seen & rule.mask
    return rule.mask.masked_fill(~seen, float("-inf"))
