"""Which tokens bear loss, and whose attention counts, as far as labels tell."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Heard(NamedTuple):
    """What is known of the labels of a batch.

    Attributes:
        labels: What was given as labels.
        owner: Names of the classes of the modules that were given them.
        side: `encoder` or `decoder` of a model of two sequences, whose labels are the decoder's,
            or `tower`, for images or sound in a model of tokens; else None.
    """

    labels: Any
    owner: str
    side: str | None


def loss_rows(queries: str, heard: Heard, valid: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Query rows whose attention counts, and rows that bear loss.

    Args:
        queries: As in :class:`SagePolicy`.
        heard: What is known of labels.
        valid: ``[B, T]`` bool.
        causal: Whether tokens see no later ones: then labels are those of the next token (not in a
            decoder that is given an encoder's states, whose inputs are shifted), and a sequence is
            judged by its last token.

    Returns:
        Both ``[B, T]`` bool. They differ for a sequence label on an encoder alone, whose head may
        read the first token or all: all count as queries, the first is a loss row.

    Raises:
        ValueError: `queries="labels"` and no token labels are known.
    """
    labels, owner, side = heard
    per_token = isinstance(labels, Tensor) and labels.shape == valid.shape
    per_token = per_token and not labels.is_floating_point()
    order = valid.long().cumsum(-1)
    last = valid & (order == order[:, -1:])
    # what a tower hands on is read patch by patch, and an encoder's states token by token
    if side == "tower" or (side == "encoder" and queries != "last"):
        return valid, valid
    if queries == "labels" and not per_token:
        raise ValueError(
            "queries='labels' needs integer labels [B, T] as a keyword of the model's forward "
            "or in the batch, and none were seen; use queries='auto', 'last' or 'all'"
        )
    if queries == "last":
        return last, last
    if queries == "all" or not isinstance(labels, Tensor):
        return valid, valid
    if not per_token:
        if labels.dim() > (2 if labels.is_floating_point() else 1):  # of pixels, say
            return valid, valid
        return (last, last) if causal else (valid, valid & (order == 1))
    labelled = labels.to(valid.device) != -100
    # a prefix that is seen both ways leaves a language model's labels shifted
    causal = causal or any(kind in owner for kind in ("CausalLM", "ConditionalGeneration"))
    if causal and "TokenClassification" not in owner and side != "decoder":
        labelled = torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], dim=1)
    return labelled & valid, labelled & valid
