"""What a pass asks of its blocks besides the policy, and what a block chose."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_sage.balance import Budget
from lightning_sage.engine.drops import Seed
from lightning_sage.ops import Rows
from lightning_sage.selections import Chosen


class Choice(NamedTuple):
    """What a block keeps.

    Attributes:
        kept: The rows, ``[B, T]``.
        rows: The same, packed.
        scores: The saliency, ``[B, T]``, where the policy uses one.
        probability: Of a row's being kept, ``[B, T]``, where that was drawn.
        wanted: How many rows the policy would have kept by itself.
        budget: What ranks agreed on, if anything.
    """

    kept: Chosen
    rows: Rows
    scores: Tensor | None
    probability: Tensor | None
    wanted: Tensor | int
    budget: Budget | None


class Probe:
    """A pass over a batch that asks for gradients of block parameters only (see `probe.py`).

    Args:
        dense: Whether every token is kept and replayed, whatever the policy says.

    Attributes:
        parameters: By block, the tensors that its forward used.
    """

    def __init__(self, dense: bool) -> None:
        self.dense = dense
        self.parameters: dict[str, list[Tensor]] = {}

    def note(self, name: str, parameters: list[Tensor], seed: Seed) -> None:
        """Remember the parameters of a call, and draw its seed.

        Drawn in every pass, and in order: a dense and a sparse pass drop the same activations.
        """
        self.parameters[name] = parameters
        int(seed)
