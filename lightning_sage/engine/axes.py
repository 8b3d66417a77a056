"""Where the tokens of a block's argument are, and how to take some of them.

The token axis is known from an argument's name and rank, never from "a dimension equal to T": head
widths, hidden widths and batches equal T often enough. What stays ambiguous is an error.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from lightning_sage.errors import ReplayError
from lightning_sage.ops import Rows

# arguments of these names are the states of another sequence, to which the block attends
OTHERS = ("encoder_hidden_states", "cross_attention_states", "memory")
# tables that are looked up by number: their length is no sequence's, even where it is the same
_TABLES = ("rel_embeddings",)
# masks of torch.nn, which are of pairs also where a batch has as many samples as tokens
_PAIRS = ("src_mask", "tgt_mask")


class Axis(Enum):
    """Where the tokens of an argument are."""

    NONE = "none"  # not along the tokens: passed on as it is
    FIRST = "first"  # [T, ...]
    BATCHED = "batched"  # [B | 1, T, ...]
    SECOND = "second"  # [H, B | 1, T] or [B | 1, H | 1, T, D]: tokens on axis 2
    HEADS = "heads"  # [B * H, 1, T]: one row for each head
    LAST = "last"  # [H, 1, L]: the last T of a longer row for each head
    PAIRS = "pairs"  # [..., T | 1, T]: a mask or bias of pairs of tokens
    OTHER = "other"  # [B, S, ...]: along the tokens of another sequence
    CROSS = "cross"  # [B | 1, H | 1, T | 1, S]: a mask or bias of tokens and those of the other

    @property
    def of_pairs(self) -> bool:
        """Whether it says something about pairs, which attention mostly knows by itself."""
        return self in (Axis.PAIRS, Axis.CROSS)


def axis_of(name: str, x: Tensor, B: int, T: int) -> Axis:
    """The rule, by name and rank.

    Raises:
        ReplayError: The axis cannot be told.
    """
    shape, batched = tuple(x.shape), x.dim() > 0 and x.shape[0] in (B, 1)
    if name == "position_bias" and x.dim() == 3 and shape[1] == 1 and shape[2] >= T:
        return Axis.LAST
    if x.dim() == 0 or T not in shape or "cu_seq" in name or name in _TABLES:
        return Axis.NONE
    if name in _PAIRS and shape == (T, T):
        return Axis.PAIRS
    if x.dim() == 1 and T != B:
        return Axis.FIRST
    if x.dim() == 2 and batched and shape[1] == T:
        return Axis.BATCHED
    if x.dim() == 2 and shape[0] == T:
        return Axis.PAIRS if shape[1] == T else Axis.FIRST
    if x.dim() == 3 and batched and shape[1] == T:
        pairs = shape[2] == T and ("mask" in name or not x.is_floating_point())
        return Axis.PAIRS if pairs else Axis.BATCHED
    if x.dim() == 3 and not x.is_floating_point() and shape[1] in (B, 1) and shape[2] == T:
        return Axis.SECOND
    if x.dim() == 3 and shape[0] % B == 0 and shape[1:] == (1, T):
        return Axis.HEADS
    if x.dim() in (3, 4) and shape[-2:] == (T, T):
        return Axis.PAIRS
    if x.dim() == 4 and batched and shape[3] == T and ("mask" in name or shape[2] == 1):
        return Axis.PAIRS
    if x.dim() == 4 and batched and shape[2] == T:
        return Axis.SECOND
    raise ReplayError(
        f"argument '{name}' of shape {list(shape)} has an axis of the length of the sequence "
        f"({T}, batch {B}), but which axis holds the tokens cannot be told: leave this block dense "
        "(SagePolicy(dense_blocks=...)) or change the batch size or length so that they differ"
    )


def axis_of_other(name: str, x: Tensor, B: int, S: int) -> Axis:
    """The rule for arguments that belong to another sequence, of length S.

    Raises:
        ReplayError: The axis cannot be told.
    """
    if x.dim() in (2, 3) and x.shape[0] in (B, 1) and x.shape[1] == S:
        return Axis.OTHER
    if x.dim() == 4 and x.shape[0] in (B, 1) and x.shape[3] == S:
        return Axis.CROSS
    if S not in x.shape:
        return Axis.NONE
    raise ReplayError(
        f"argument '{name}' of shape {list(x.shape)} is for attention to another sequence of "
        f"length {S} (batch {B}), but which axis holds its tokens cannot be told: leave this block "
        "dense (SagePolicy(dense_blocks=...))"
    )


def packed_argument(x: Tensor, axis: Axis, rows: Rows, real: bool) -> Tensor:
    """`x` for packed rows: a batch of one, N long.

    Args:
        x: The argument.
        axis: Where its tokens are.
        rows: The rows.
        real: Whether entries of pairs are wanted; else attention ignores them, and their shape only
            keeps the block on the same branch. Entries across samples mean nothing.
    """
    T, sample, token = rows.T, rows.sample, rows.token
    match axis:
        case Axis.FIRST:
            return x.index_select(0, token)
        case Axis.BATCHED if x.shape[0] == 1:
            return x.index_select(1, token)
        case Axis.BATCHED:
            return x.flatten(0, 1).index_select(0, rows.index).unsqueeze(0)
        case Axis.SECOND if x.dim() == 3:
            return x[:, sample if x.shape[1] > 1 else 0, token].unsqueeze(1)
        case Axis.SECOND:
            picked = x[0][:, token] if x.shape[0] == 1 else x[sample, :, token].movedim(0, 1)
            return picked.unsqueeze(0)
        case Axis.HEADS:
            by_head: Tensor = x.unflatten(0, (rows.B, -1))
            return by_head[sample, :, 0, token].t().unsqueeze(1)
        case Axis.LAST:
            return x[:, :, x.shape[2] - T + token]
        case Axis.OTHER:
            return x.expand(rows.B, *x.shape[1:]).flatten(0, 1).unsqueeze(0)
        case Axis.PAIRS if real:
            return _pairs(x, rows)
        case Axis.CROSS if real:
            return _cross(x, rows)
        case Axis.PAIRS:
            by_sample = x.dim() > 2 and (x.dim() == 4 or x.shape[0] == rows.B)
            size = [1, *x.shape[1:]] if by_sample else list(x.shape)
            size[-2:] = [len(rows) if m == T else m for m in size[-2:]]
            return _shape_alone(x, size)
        case Axis.CROSS:
            queries = len(rows) if x.shape[2] == T else x.shape[2]
            return _shape_alone(x, [1, x.shape[1], queries, rows.B * x.shape[3]])
    return x


def _shape_alone(x: Tensor, size: list[int]) -> Tensor:
    return x.new_full((), x.dtype == torch.bool).expand(size)


def _pairs(x: Tensor, rows: Rows) -> Tensor:
    """Entries of ``[..., T | 1, T | 1]`` at all pairs of rows: ``[..., N | 1, N | 1]``."""
    by_sample = x.dim() == 4 or (x.dim() == 3 and x.shape[0] in (rows.B, 1))
    full = x.unsqueeze(1) if by_sample and x.dim() == 3 else x
    full = full.reshape((1,) * (4 - full.dim()) + tuple(full.shape))
    B, _, Q, K = full.shape
    sample, token = rows.sample, rows.token
    # where there is one row for all queries, it is that of the key's sample
    of = sample[None, :] if Q == 1 else sample[:, None]
    query = token[:, None] if Q > 1 else token.new_zeros(1, 1)
    key = token[None, :] if K > 1 else token.new_zeros(1, 1)
    found = full[of if B > 1 else torch.zeros_like(of), :, query, key].permute(2, 0, 1)
    return found if x.dim() == 3 else found.unsqueeze(0) if x.dim() == 4 else found.squeeze(0)


def _cross(x: Tensor, rows: Rows) -> Tensor:
    """Entries of ``[B | 1, H, T | 1, S]`` at rows and all of the other tokens: ``[1, H, N, B S]``.

    Those of other samples than a row's own are its own sample's once more.
    """
    if x.shape[2] == 1:
        every = x.expand(rows.B, *x.shape[1:])
        return every.permute(1, 2, 0, 3).flatten(2).unsqueeze(0)
    sample = rows.sample if x.shape[0] > 1 else torch.zeros_like(rows.sample)
    found = x[sample, :, rows.token]
    return found.movedim(1, 0).repeat(1, 1, rows.B).unsqueeze(0)
