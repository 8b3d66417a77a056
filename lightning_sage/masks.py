"""What a mask means for packed rows: nothing, causal order, or entries that have to be gathered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# rows of a mask looked at together: the comparison never holds another [T, T]
ROWS = 256


@dataclass(frozen=True)
class Visibility:
    """Which keys a valid query sees.

    Attributes:
        causal: No query sees a later key.
        mask: ``[B | 1, H | 1, T, T]`` where its entries have to be gathered; None where `causal`
            and `keys` say it all.
        keys: ``[B, T]`` bool, False on keys that nobody sees; None where there are none.
    """

    causal: bool
    mask: Tensor | None = None
    keys: Tensor | None = None

    def all_keys(self, samples: Tensor, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Mask and positions, as :class:`Rule` takes them, of queries against all keys.

        Args:
            samples: ``[B']`` int64.
            tokens: ``[B', Q]`` int64, the queries of each.
        """
        if self.mask is not None:
            return self._rows(samples, tokens), None
        mask = None if self.keys is None else self.keys[samples][:, None, None]
        return mask, tokens if self.causal else None

    def own_keys(self, samples: Tensor, tokens: Tensor) -> tuple[Tensor | None, bool]:
        """Mask of packed valid queries against the packed keys, and whether causal order holds."""
        if self.mask is None:
            return None, self.causal
        rows = self._rows(samples, tokens)
        columns = tokens[:, None, None, :].expand(*rows.shape[:3], -1)
        return rows.gather(-1, columns), False

    def _rows(self, samples: Tensor, tokens: Tensor) -> Tensor:
        """``[B', H | 1, Q, T]``."""
        assert self.mask is not None
        mask = self.mask.expand(-1, -1, self.mask.shape[-1], -1)
        samples = samples if mask.shape[0] > 1 else torch.zeros_like(samples)
        return mask[samples[:, None], :, tokens].movedim(2, 1)


def visibility(mask: Tensor | None, causal: bool, valid: Tensor) -> Visibility:
    """Look at a mask once.

    Args:
        mask: bool (True attends) or additive, ``[B | 1, H | 1, T | 1, T]``, or None.
        causal: Whether attention applies a causal mask besides.
        valid: ``[B, T]`` bool, False on padding.
    """
    if mask is None:
        return Visibility(causal)
    if mask.shape[1] > 1:
        return Visibility(causal, mask)
    T = valid.shape[1]
    keys = torch.arange(T, device=mask.device)
    # ordered: nothing above the diagonal; plain/full: besides that, every valid key is seen
    found = torch.tensor([True, True, True], device=mask.device)
    for start in range(0, T, ROWS):
        rows = mask[:, 0, start : start + ROWS] if mask.shape[2] > 1 else mask[:, 0]
        allowed = rows if rows.dtype == torch.bool else rows > -1e4
        if rows.dtype != torch.bool:
            found[1:] &= (~allowed | (rows == 0)).all()
        later = keys > keys[start : start + ROWS, None]
        queries = valid[:, start : start + ROWS, None]
        seen = allowed & valid[:, None] & queries
        should = valid[:, None] & queries
        outcome = [~(seen & later).any(), (seen == (should & ~later)).all(), (seen == should).all()]
        found &= torch.stack(outcome)
        # a padded key that a valid query does see has to be gathered
        found[1:] &= ~(allowed & ~valid[:, None] & queries).any()
    ordered, plain, full, padded = (*found.tolist(), not bool(valid.all()))
    if plain or full:
        return Visibility(plain, keys=valid if padded else None)
    return Visibility(ordered, mask)
