"""Hidden states in several streams (Gemma 3n, hyper-connections): to SAGE one wide row a token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class Streams(NamedTuple):
    """How hidden states with four axes are one row a token.

    Attributes:
        number: Of the streams.
        first: Whether they are ``[A, B, T, C]``; else ``[B, T, A, C]``.
    """

    number: int
    first: bool

    @classmethod
    def of(cls, x: Tensor, others: Iterable[Tensor]) -> Streams | None:
        """Told by the other arguments, which run along the same tokens; None where they do not.

        Args:
            x: The hidden states, with four axes.
            others: The other arguments.
        """
        lengths = {y.shape[-1] if y.dim() == 4 else y.shape[1] for y in others if y.dim() > 1}
        between, behind = (x.shape[axis] in lengths for axis in (1, 2))
        if between == behind:
            return None
        return cls(x.shape[0] if behind else x.shape[2], behind)

    def joined(self, x: Tensor) -> Tensor:
        """``[B, T, A * C]``."""
        return (x.permute(1, 2, 0, 3) if self.first else x).flatten(2)

    def apart(self, x: Tensor) -> Tensor:
        """The inverse."""
        streams: Tensor = x.unflatten(2, (self.number, -1))
        return streams.permute(2, 0, 1, 3) if self.first else streams
