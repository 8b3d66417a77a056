"""Training steps by the clock: several methods taking turns."""

import math
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from step import Contender, Setting, build, make_batch, make_room, prepare
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaModel

from lightning_sage.cross_entropy import kernel


class _AttentionOps(TorchDispatchMode):
    """Names of the scaled-dot-product kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        _, found, name = func.name().partition("_scaled_dot_product_")
        if found:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def in_common(setting: Setting, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What all contenders compute with: the attention kernel, and that of a chunked head."""
    body = next(module for module in model.modules() if isinstance(module, LlamaModel))
    with torch.no_grad(), _AttentionOps() as ops:
        body(input_ids=batch["input_ids"][:1])
    chunked = setting.head == "chunked"
    return {
        "attention": ", ".join(sorted(ops.names)),
        "cross_entropy": kernel(model, batch["input_ids"].device) if chunked else None,
    }


def race(settings: Sequence[Setting], budget_s: float = math.inf) -> list[Contender]:
    """Measure settings that share everything but the method, taking turns.

    Args:
        settings: What is measured.
        budget_s: Rounds end early when the next would outlast it.
    """
    started = perf_counter()
    model, batch = build(settings[0]), make_batch(settings[0])
    contenders = [prepare(setting, model) for setting in settings]
    common = in_common(settings[0], model, batch)
    for contender in contenders:
        contender.result |= common
    warmup, longest = settings[0].warmup, 0.0
    for turn in range(warmup + 1 + settings[0].steps):
        before = perf_counter()
        if before + longest > started + budget_s:
            budget = f"the budget of {max(budget_s, 0):.0f} s"
            say(f"{settings[0].shape}: over {budget} after {turn} rounds")
            break
        for contender in contenders:
            if "error" not in contender.result:
                _take_turn(contender, batch, turn - warmup)
        longest = max(longest, perf_counter() - before)
    return contenders


def _take_turn(contender: Contender, batch: dict[str, Tensor], turn: int) -> None:
    try:
        if turn == 0:
            contender.counted_step(batch)
        else:
            contender.timed_step(batch, counts=turn > 0)
        return
    except torch.OutOfMemoryError:
        contender.result["error"] = "out of memory"
    # outside of the handler, whose traceback holds the activations
    say(f"{contender.setting.shape}, {contender.setting.method}: out of memory, left out")
    make_room(contender.model)


def say(text: str) -> None:
    """To the user."""
    # standard output is for records and tables
    print(text, file=sys.stderr, flush=True)
