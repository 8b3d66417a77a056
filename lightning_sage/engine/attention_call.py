"""One attention call of a block, whichever way it was seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sage.engine.flash import FlashMask
from lightning_sage.errors import ReplayError


@dataclass
class AttentionCall:
    """One attention call of a block.

    Attributes:
        q: ``[B, H, T, D]``.
        k: ``[B, G, T, D]``, not repeated.
        v: ``[B, G, T, Dv]``, not repeated.
        mask: bool (True attends) or additive, ``[B | 1, H | 1, T, T]``, or None.
        causal: Whether the call asked for a causal mask.
        scale: Factor of the products.
        softcap: Cap of the logits, or None.
        dropout: Probability of dropping an attention weight.
        run: The model's own computation, without dropout, ``[B, H, T, Dv]``; None where it is
            PyTorch's SDPA.
        repeated: Keys and values as SDPA was given them, ``[B, H, T, D]`` where grouped.
        sinks: ``[H]``, logits of a key without a value, which every query sees; or None.
        flash: What stands in the place of `mask` and `causal`, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    run: Callable[[], Tensor] | None = None
    repeated: tuple[Tensor, Tensor] | None = None
    sinks: Tensor | None = None
    flash: FlashMask | None = None

    def prepared(self) -> AttentionCall:
        """The call as the ops take it: mask ``[B | 1, H | 1, T, T]``, and in autocast's dtype.

        Raises:
            ReplayError: Its queries are not ``[B, H, T, D]``.
        """
        if self.q.dim() != 4:
            raise ReplayError(f"attention of queries {list(self.q.shape)} is not over [B, H, T, D]")
        device = self.q.device.type
        if torch.is_autocast_enabled(device):
            self._cast(torch.get_autocast_dtype(device))
        if self.mask is not None and self.mask.dim() != 4:
            self.mask = self.mask.reshape((1,) * (4 - self.mask.dim()) + tuple(self.mask.shape))
        return self

    def _cast(self, dtype: torch.dtype) -> None:
        """What autocast does to the inputs of SDPA and of products, and the ops do not."""
        self.q, self.k, self.v = (x.to(dtype) for x in (self.q, self.k, self.v))
        if self.repeated is not None:
            k, v = self.repeated
            self.repeated = k.to(dtype), v.to(dtype)
        if self.mask is not None and self.mask.is_floating_point():
            self.mask = self.mask.to(dtype)


def biased(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """A bias by position and a mask, in one."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask
