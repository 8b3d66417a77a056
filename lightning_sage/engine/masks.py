"""What a mask means: an unbroken run of keys for each query, or entries that must be gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_sage.engine.flash import FlashMask
from lightning_sage.ops import Visibility

# rows of a mask looked at together: the comparison never holds another [T, T]
ROWS = 256
# what calls without a mask share, by causality
PLAIN = {causal: Visibility(causal) for causal in (False, True)}


def visibility(mask: Tensor | None, causal: bool, valid: Tensor) -> Visibility:
    """Look at a mask once; waits for the device.

    Causal order, padding, sliding windows, documents packed into one sequence and prefixes seen
    both ways all let a query see an unbroken run of tokens, whose ends never fall from one query to
    the next. Anything else stays a mask: biases, holes, masks by head.

    Args:
        mask: bool (True attends) or additive, ``[B | 1, H | 1, T | 1, T]``, or None.
        causal: Whether attention is causal where there is no mask, or one by head.
        valid: ``[B, T]`` bool, False on padding.
    """
    if mask is None:
        return PLAIN[causal]
    if mask.shape[1] > 1:
        return Visibility(causal, mask=mask)
    order = valid.long().cumsum(1)
    parts = [_look(mask, valid, order, start) for start in range(0, valid.shape[1], ROWS)]
    runs, facts = zip(*parts, strict=True)
    # what queries that are padding see does not matter: they follow the one before them
    run = torch.cat(runs, dim=-1).masked_fill(~valid, 0)
    level = run.cummax(-1).values
    rising = ((run == level) | ~valid).all()
    said = torch.stack([*torch.stack(facts).all(0), rising, valid.all()]).tolist()
    ordered, up_to_itself, everything, unbroken, rises, unpadded = said
    keys = None if unpadded else valid
    if up_to_itself or everything:
        return Visibility(up_to_itself, keys=keys)
    if unbroken and rises:
        return Visibility(ordered, level[0], level[1], keys)
    return Visibility(ordered, mask=mask)


def _look(mask: Tensor, valid: Tensor, order: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """First key seen by some queries and one past the last, ``[2, B, R]``, and facts ``[4]``.

    The facts: no valid query sees a later key; each sees every valid key up to itself; each sees
    every valid key; each sees an unbroken run of valid keys.

    Args:
        mask: ``[B | 1, 1, T | 1, T]``.
        valid: ``[B, T]`` bool.
        order: ``[B, T]``, valid tokens up to each.
        start: Of the queries.
    """
    rows = mask[:, 0, start : start + ROWS] if mask.shape[2] > 1 else mask[:, 0]
    allowed = rows if rows.dtype == torch.bool else rows > -1e4
    keys = torch.arange(valid.shape[1], device=mask.device)
    queries = valid[:, start : start + ROWS]
    seen = allowed & valid[:, None] & queries[..., None]
    first = torch.where(seen, keys, len(keys)).amin(-1)
    stop = torch.where(seen, keys + 1, 0).amax(-1)
    count, own = seen.sum(-1), order[:, start : start + ROWS]
    spanned = order.gather(1, (stop - 1).clamp(min=0)) - order.gather(1, first % len(keys)) + 1
    ordered = ~(seen & (keys > keys[start : start + ROWS, None])).any()
    # a bias is no mask, and a padded key that a valid query does see has to be gathered
    exact = ~(allowed & ~valid[:, None] & queries[..., None]).any()
    if rows.dtype != torch.bool:
        exact &= (~allowed | (rows == 0)).all()
    idle = ~queries
    runs = (count > 0) & (count == spanned)
    facts = (
        ordered,
        exact & ordered & ((count == own) | idle).all(),
        exact & ((count == order[:, -1:]) | idle).all(),
        exact & (runs | idle).all(),
    )
    return torch.stack([first, stop]), torch.stack(facts)


def cross_visibility(mask: Tensor, valid: Tensor) -> Visibility:
    """What a mask of pairs with another sequence means; waits for the device.

    Args:
        mask: bool (True attends) or additive, ``[B | 1, H | 1, T | 1, S]``.
        valid: ``[B, T]`` bool, False where a query is padding.
    """
    if mask.shape[1] > 1:
        return Visibility(False, mask=mask)
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > -1e4
    allowed = allowed.expand(len(valid), *allowed.shape[1:])
    queries = valid[..., None] if allowed.shape[1] > 1 else valid.any(1)[:, None, None]
    keys = (allowed & queries).any(1)
    same = ((allowed == keys[:, None]) | ~queries).all()
    if mask.dtype != torch.bool:
        same &= (~allowed | (mask[:, 0] == 0)).all()
    if not bool(same):
        return Visibility(False, mask=mask)
    return Visibility(False, keys=None if bool(keys.all()) else keys)


class Looked:
    """A mask that was looked at, and what it means; it may be gone by now, and is not held."""

    def __init__(
        self, mask: Tensor, valid: Tensor, visible: Visibility, told: tuple[bool, bool]
    ) -> None:
        self.storage = StorageWeakRef(mask.untyped_storage())
        self.marks, self.valid, self.visible = self._marks(mask), valid, visible
        # whether causal order was asked for, and whether keys are those of another sequence
        self.told = told

    @staticmethod
    def _marks(mask: Tensor) -> tuple[Any, ...]:
        # models slice the mask they share anew in every block: the tensor is another each time
        return mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, mask._version

    def is_of(self, mask: Tensor, valid: Tensor) -> bool:
        """Whether `mask` is this one, unchanged."""
        alive = not self.storage.expired()
        return alive and self.valid is valid and self.marks == self._marks(mask)


class Looks:
    """The masks of one forward that were looked at; blocks share them."""

    def __init__(self) -> None:
        self._masks: list[Looked] = []
        self._flash: list[tuple[FlashMask, Tensor, Visibility]] = []

    def at(
        self,
        mask: Tensor | FlashMask | None,
        causal: bool,
        valid: Tensor,
        crosses: bool,
        remember: bool,
    ) -> Visibility:
        """What a mask means.

        Args:
            mask: Of pairs, see :func:`visibility`, or what flash attention is told.
            causal: As there.
            valid: As there.
            crosses: Whether keys are those of another sequence.
            remember: Whether it is looked at once for all that ask.
        """
        if mask is None:
            return visibility(None, causal and not crosses, valid)
        if isinstance(mask, FlashMask):
            for flash, of, visible in self._flash:
                if of is valid and flash.same(mask):
                    return visible
            found = mask.visibility(valid)
            self._flash = [*self._flash[-3:], (mask, valid, found)] if remember else self._flash
            return found
        for known in self._masks:
            if known.is_of(mask, valid) and known.told == (causal, crosses):
                return known.visible
        found = cross_visibility(mask, valid) if crosses else visibility(mask, causal, valid)
        if remember:
            self._masks = [*self._masks[-3:], Looked(mask, valid, found, (causal, crosses))]
        return found
