"""Score of every token from a block's attention calls (Kim & Lee, ACL 2025, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.facts import Facts, Judged
from lightning_sage.replay import Seen, rows_at


def saliency(kind: str, seen: Sequence[Seen], judged: Judged, facts: Facts) -> Tensor:
    """Attention received, value norm, or their product, summed over heads.

    Args:
        kind: As in :class:`SagePolicy`.
        seen: The block's attention calls.
        judged: Rows whose attention counts.
        facts: Of the batch.

    Returns:
        ``[B, T]`` float64, 0 on padding, summing to 1 per sample.
    """
    valid, total = facts.valid, None
    for one in seen:
        if kind == "attention":
            score = _received(one, judged)
        else:
            score = rows_at(one.call.v, one.keys).float().norm(dim=-1)
            if kind == "attention_value_norm":
                score = score * _received(one, judged)
        part = score.sum(1, dtype=torch.float64)
        if not one.keys.whole:
            part = part.new_zeros(valid.numel()).index_add(0, one.keys.index, part)
        total = part if total is None else total + part
    assert total is not None
    total = total.view(valid.shape).nan_to_num_(0.0, posinf=0.0)
    if facts.padded:
        total = total.masked_fill_(~valid, 0.0)
    return total / total.sum(-1, keepdim=True).clamp(min=1e-300)


def _received(seen: Seen, judged: Judged) -> Tensor:
    """``[M, G]``: by key, from the query heads that share its head."""
    q, lse = rows_at(seen.call.q, judged.queries), seen.lse_at(judged.queries)
    sight = judged.sight(seen.keys, seen.visible)
    return ops.attention_received(q, seen.key_rows(), lse, judged.ones, sight, seen.how)
