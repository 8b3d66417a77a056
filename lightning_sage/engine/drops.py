"""Dropout by token: whichever tokens are computed, each sees the mask that it always sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.engine.attention_call import AttentionCall
from lightning_sage.engine.follow import Weights
from lightning_sage.engine.positions import Counter
from lightning_sage.errors import ReplayError
from lightning_sage.ops import Dropout, How, Rows


class Seed:
    """A seed drawn from the default generator when first asked for; 31 bits.

    Drawing nothing where nothing is random leaves the user's random stream as it is, and drawing
    from it makes a run resumed with its generator's state repeat itself.
    """

    def __init__(self, value: int | None = None) -> None:
        self.value = value

    def __int__(self) -> int:
        if self.value is None:
            # ours, and not a draw of the block that may be running in sight of a tap
            with torch._C.DisableTorchFunction():
                self.value = int(torch.randint(2**31, ()))
        return self.value


def numbered(seed: int, number: int, device: torch.device) -> torch.Generator:
    """The generator of the draw that has this number in a block's forward, counted from 0."""
    return torch.Generator(device).manual_seed(seed + ((number + 1) << 32))


class Drops:
    """Dropout whose mask depends on tokens alone; the same in every pass over a batch.

    Attributes:
        weights_too: Whether attention weights are dropped. The self-check compares without.
        drawn: Shapes of the random numbers that the block drew by itself.
    """

    weights_too = True
    counter: Counter | None = None

    def __init__(self, seed: Seed, rows: Rows, shape: tuple[int, int]) -> None:
        self.seed, self.rows, self.shape, self.drops = seed, rows, shape, 0
        self.drawn: list[torch.Size] = []

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """See :func:`lightning_sage.ops.reference.row_dropout`."""
        leading = x.shape[:2] if x.shape[:2] == self.shape else x.shape[:1]
        if leading.numel() != len(self.rows):
            raise ReplayError(
                f"dropout of a tensor of shape {list(x.shape)} does not run along the tokens, so "
                "it cannot be replayed on some of them: set its probability to 0"
            )
        if x.numel() == 0:
            return x
        flat = x.reshape(len(self.rows), -1)
        dropped = ops.row_dropout(flat, self.rows.index, int(self.seed), self.drops, p)
        self.drops += 1
        return dropped.view(x.shape)

    def softmax(self, weights: Weights, given: Callable[[], Tensor]) -> Tensor:
        """As the block computes it."""
        return given()

    def draw(self, func: Callable[..., Tensor], args: Any, kwargs: dict[str, Any]) -> Tensor:
        """What a block draws for no token: the same in every pass."""
        device = torch.device(kwargs.get("device") or torch.get_default_device())
        generator = numbered(int(self.seed), len(self.drawn), device)
        found = func(*args, **kwargs, generator=generator)
        self.drawn.append(found.shape)
        return found

    def how(self, call: AttentionCall) -> How:
        """How the weights of a call are made; counts its dropout."""
        return How(call.scale, call.softcap, self.weights_dropped(call.dropout))

    def weights_dropped(self, p: float) -> Dropout | None:
        """How weights are dropped; counts their dropout."""
        if not p:
            return None
        self.drops += 1
        return Dropout(p, int(self.seed), self.drops - 1) if self.weights_too else None
