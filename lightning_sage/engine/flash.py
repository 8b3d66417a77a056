"""What transformers' flash attention masks, which is told in words and not by a mask of pairs.

Padding comes as ``[B, T]``, causal order and windows as flags, packed documents by their limits or
by positions that start again. All of it lets a token see an unbroken run of those that are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sage.errors import ReplayError
from lightning_sage.ops import Visibility


@dataclass(frozen=True, eq=False)
class FlashMask:
    """What one call was told.

    Attributes:
        present: ``[B, T]``, 0 on padding; None where there is none.
        causal: Whether a token sees no later one.
        window: Tokens that one sees, itself included, of those that are there; None for all.
        limits: ``[D + 1]``, where packed documents begin and end, as the caller gave them.
        positions: ``[1, T]``, from 0 on in every packed document.
    """

    present: Tensor | None
    causal: bool
    window: int | None
    limits: Tensor | None
    positions: Tensor | None

    @classmethod
    def of(
        cls, name: str, module: nn.Module, query: Tensor, mask: Any, told: dict[str, Any]
    ) -> FlashMask | None:
        """Of a call through transformers' interface; None where a mask says everything.

        Raises:
            ReplayError: The masks of an implementation of this name are not understood.
        """
        if name.startswith("paged") or (mask is not None and not isinstance(mask, Tensor)):
            raise ReplayError(
                f"attn_implementation='{name}' masks by a {type(mask).__name__} or a paged cache, "
                "which a replay cannot read: use 'sdpa', 'eager' or 'flash_attention_2'"
            )
        if not ("flash_attention" in name or "flash-attn" in name):
            return None
        causal, window = told.get("is_causal"), told.get("sliding_window")
        B, _, T, _ = query.shape
        given = (told.get(f"{what}_{of}") for what in ("cu_seq_lens", "max_length") for of in "qk")
        packed = mask is None and all(x is not None for x in given)
        positions = told.get("position_ids") if mask is None and not packed and B == 1 else None
        if packed and B > 1:
            raise ReplayError(
                f"cu_seq_lens_q of {B} sequences: pack all documents into one, as transformers' "
                "DataCollatorWithFlattening does"
            )
        return cls(
            mask,
            bool(module.is_causal if causal is None else causal),
            window if window is not None and window < T else None,
            told["cu_seq_lens_q"] if packed else None,
            positions,
        )

    def same(self, other: object) -> bool:
        """Whether another call was told the same: the same tensors, not equal ones."""
        return isinstance(other, FlashMask) and all(
            x is y or (not isinstance(x, Tensor) and x == y)
            for x, y in zip(vars(self).values(), vars(other).values(), strict=True)
        )

    def visibility(self, valid: Tensor) -> Visibility:
        """Which keys each query sees.

        Args:
            valid: ``[B, T]`` bool, False on padding.
        """
        keys = None if self.present is None else self.present.bool()
        starts = self._starts(valid)
        if starts is None and self.window is None:
            return Visibility(self.causal, keys=keys)
        there = torch.ones_like(valid) if keys is None else keys
        # of those that are there: which a token is, where it stands, where its document is
        order = there.long().cumsum(1) - 1
        place = there.logical_not().long().argsort(dim=1, stable=True)
        low, high = torch.zeros_like(order), order[:, -1:].expand_as(order)
        if starts is not None:
            document = starts.long().cumsum(1)
            low = document.new_tensor([document.shape[1]]).expand_as(document).clone()
            low = low.scatter_reduce(1, document - 1, order, "amin").gather(1, document - 1)
            high = torch.zeros_like(order).scatter_reduce(1, document - 1, order, "amax")
            high = high.gather(1, document - 1)
        if self.causal:
            high = order
        if self.window is not None:
            low = torch.maximum(low, order - self.window + 1)
            high = torch.minimum(high, order + self.window - 1)
        run = torch.stack(
            [place.gather(1, low.clamp(min=0)), place.gather(1, high.clamp(min=0)) + 1]
        )
        # what is not there follows the one before it
        first, stop = run.masked_fill(~there, 0).cummax(-1).values
        return Visibility(self.causal, first, stop, keys)

    def _starts(self, valid: Tensor) -> Tensor | None:
        """``[1, T]`` bool, True where a packed document begins; None where nothing is packed."""
        T = valid.shape[1]
        if self.limits is not None:
            starts = torch.zeros(T + 1, dtype=torch.bool, device=valid.device)
            starts[self.limits.long()] = True
        elif self.positions is None:
            return None
        else:
            steps = torch.arange(T, device=valid.device) + self.positions.min()
            if bool((steps == self.positions).all()):
                return None
            starts = self.positions[0] == 0
        starts[0] = True
        return starts[None, :T]
