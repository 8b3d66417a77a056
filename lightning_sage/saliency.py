"""Score of every token from a block's attention calls (Kim & Lee, ACL 2025, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.ops import Rows, Sight
from lightning_sage.replay import Seen, rows_at


def saliency(kind: str, seen: Sequence[Seen], queries: Rows, valid: Tensor) -> Tensor:
    """Attention received, value norm, or their product, summed over heads.

    Args:
        kind: As in :class:`SagePolicy`.
        seen: The block's attention calls.
        queries: Rows whose attention counts.
        valid: ``[B, T]`` bool.

    Returns:
        ``[B, T]`` float64, 0 on padding, summing to 1 per sample.
    """
    total = torch.zeros(valid.numel(), dtype=torch.float64, device=valid.device)
    for one in seen:
        if kind == "attention":
            score = _received(one, queries)
        else:
            score = rows_at(one.call.v, one.keys).float().norm(dim=-1)
            if kind == "attention_value_norm":
                score = score * _received(one, queries)
        by_key = score.sum(1, dtype=torch.float64)
        total = total + by_key if one.keys.whole else total.index_add(0, one.keys.index, by_key)
    total = total.view(valid.shape).nan_to_num_(0.0, posinf=0.0).masked_fill_(~valid, 0.0)
    return total / total.sum(-1, keepdim=True).clamp(min=1e-300)


def _received(seen: Seen, queries: Rows) -> Tensor:
    """``[M, G]``: by key, from the query heads that share its head."""
    q, lse = rows_at(seen.call.q, queries), seen.lse_at(queries)
    weights = torch.ones(len(queries), dtype=lse.dtype, device=lse.device)
    sight = Sight(queries, seen.keys, seen.visible)
    return ops.attention_received(q, seen.key_rows(), lse, weights, sight, seen.how)
