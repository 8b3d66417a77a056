"""Score of every token from a block's attention calls (Kim & Lee, ACL 2025, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sage.engine.facts import Facts, Judged
from lightning_sage.engine.seen import Seen, Written


def saliency(kind: str, seen: Sequence[Seen | Written], judged: Judged, facts: Facts) -> Tensor:
    """Attention received, value norm, or their product, summed over heads.

    Args:
        kind: As in :class:`SagePolicy`.
        seen: The block's attention calls; those to another sequence say nothing of its own tokens.
        judged: Rows whose attention counts.
        facts: Of the batch.

    Returns:
        ``[B, T]`` float64, 0 on padding, summing to 1 per sample.
    """
    valid, total = facts.valid, None
    for one in seen:
        if one.crosses:
            continue
        if kind == "attention":
            score = _received(one, judged)
        else:
            score = one.value_norms()
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


def _received(seen: Seen | Written, judged: Judged) -> Tensor:
    """``[M, G]``: by key, from the query heads that share its head."""
    sight = None if isinstance(seen, Written) else judged.sight(seen.keys, seen.visible)
    return seen.received(judged.queries, judged.ones, sight)
