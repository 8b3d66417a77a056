"""The largest batch and the longest context that fit in a budget of GPU memory, by trying.

    python examples/limits.py --only batch
    python examples/limits.py --only context

Each ends within eight minutes on one H100. A try is a whole training step of Llama with LoRA, the
first of a fit, AdamW's part included, in a process that torch allows no more than the budget (the
CUDA context, some 0.5 GiB, comes on top of it). Sizes are doubled until one does not fit, then the
gap is halved.
`PYTORCH_ALLOC_CONF=expandable_segments:True` leaves less of the budget to fragments.
Prints one line of JSON for each method, as it is done, and a table last; needs CUDA.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from measure import RESULTS, circumstances, name_of, write
from race import in_common, say
from step import Contender, Setting, build, make_batch, make_room, now, prepare
from tables import limits_table
from torch import nn

from lightning_sage import SagePolicy
from lightning_sage.memory import MIB

# tokens of a sequence while batches grow, and by how many a context is lengthened at least
BATCH_LENGTH, CONTEXT_UNIT = 2048, 256
Grows = Literal["batch", "context"]
Attempt = Callable[[Setting], bool]


@dataclass(frozen=True)
class Command:
    """What is tried.

    Args:
        shape: Size of the Llama.
        rank: Of LoRA on all linear layers.
        head: As in measure.py.
        loss: Which tokens are to be predicted.
        budget_gib: GPU memory that torch may have.
        only: Grow the batch alone, or the context alone; both by default.
        seconds: For everything; what is not tried by then is left open.
        out: File to append the JSON lines to.
    """

    shape: Literal["tiny", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"] = "llama-3.2-3b"
    rank: int = 64
    head: Literal["none", "full", "chunked"] = "none"
    loss: Literal["last-quarter", "last-token", "all"] = "last-quarter"
    budget_gib: float = 24.0
    only: Grows | None = None
    seconds: float = 420.0
    out: str = str(RESULTS / "limits.jsonl")


@dataclass(frozen=True)
class Limit:
    """What was found out.

    Attributes:
        fits: The largest size that fitted; 0 if none did.
        fails: The smallest that did not; None if the search ended before one failed.
        tries: How many there were.
    """

    fits: int
    fails: int | None
    tries: int


def find_limit(
    fits: Callable[[int], bool],
    unit: int = 1,
    resolution: float = 1 / 32,
    deadline: float = float("inf"),
) -> Limit:
    """Search for the largest size that fits: doubled from one unit on, then the gap halved.

    Args:
        fits: Whether a size does; if one does, so does every smaller one.
        unit: All sizes tried are multiples of it.
        resolution: The gap between what fits and what does not is at most this share of what
            fits, or one unit.
        deadline: No try is begun that would end later, by `perf_counter`, if it took twice as
            long as the longest before.
    """
    below, above, tries, longest = 0, None, 0, 0.0
    while above is None or above - below > max(1, below * resolution):
        size = max(1, 2 * below) if above is None else (below + above) // 2
        started = perf_counter()
        if started + 2 * longest > deadline:
            break
        if fits(size * unit):
            below = size
        else:
            above = size
        tries, longest = tries + 1, max(longest, perf_counter() - started)
    return Limit(below * unit, None if above is None else above * unit, tries)


def grown(setting: Setting, grows: Grows, size: int) -> Setting:
    """The setting of a size."""
    if grows == "batch":
        return replace(setting, batch=size, length=BATCH_LENGTH)
    return replace(setting, batch=1, length=size)


def first_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Attempt:
    """What tries the first step of a fit, SAGE's self-check included: does memory suffice?"""

    def attempt(setting: Setting) -> bool:
        contender: Contender | None = prepare(setting, model)
        try:
            batch = make_batch(setting)
            contender.loss(batch).backward()
            optimizer.step()
            now(batch["input_ids"].is_cuda)
            fitted = True
        except torch.OutOfMemoryError:
            fitted = False
        # outside of the handler, whose traceback holds the activations
        batch = contender = None
        make_room(model)
        return fitted

    return attempt


@contextmanager
def contending(setting: Setting, model: nn.Module) -> Iterator[Attempt]:
    """The attempts of one method, with an optimizer whose state stays for all of them."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    # the next method starts from the same weights
    optimizer = torch.optim.AdamW(trainable, lr=0.0)
    attempt = first_step(model, optimizer)
    # makes the optimizer's state
    attempt(replace(setting, batch=1, length=64))
    yield attempt


def contestants(base: Setting) -> list[Setting]:
    """The methods."""
    sage = replace(base, method="sage", policy=SagePolicy(keep=0.25))
    return [replace(base, method="dense"), replace(base, method="checkpointing"), sage]


def measure_limits(
    settings: Sequence[Setting],
    kinds: Sequence[Grows],
    seconds: float,
    contend: Callable[[Setting], Any],
) -> Iterator[dict[str, Any]]:
    """Search for the limits of each setting; the time is shared out evenly.

    Args:
        settings: The methods.
        kinds: What is to grow.
        seconds: For all searches; what one leaves is the others'.
        contend: Gives a context manager that gives the attempt of a setting.

    Yields:
        One record for each setting: by kind, the limit.
    """
    end, left = perf_counter() + seconds, len(settings) * len(kinds)
    for setting in settings:
        found: dict[str, Any] = {}
        with contend(setting) as attempt:
            for kind in kinds:
                sized = partial(grown, setting, kind)
                limit = find_limit(
                    lambda size, sized=sized, attempt=attempt: attempt(sized(size)),
                    unit=1 if kind == "batch" else CONTEXT_UNIT,
                    deadline=perf_counter() + (end - perf_counter()) / left,
                )
                found[kind] = asdict(limit)
                left -= 1
        yield {"name": name_of(setting), "method": setting.method, **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Try what the command line asks for."""
    command = auto_cli(Command, as_positional=False, args=arguments)
    if not torch.cuda.is_available():
        say("limits.py measures GPU memory and needs CUDA: torch sees no CUDA device here")
        sys.exit(2)
    named = {name: getattr(command, name) for name in ("shape", "rank", "head", "loss")}
    base = Setting(**named, batch=1, length=BATCH_LENGTH, dtype="bfloat16", device="cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, command.budget_gib * 2**30 / total))
    model = build(base)
    common = {
        **named,
        "dtype": base.dtype,
        "budget_gib": command.budget_gib,
        "batch_length": BATCH_LENGTH,
        "weights_mib": torch.cuda.memory_allocated() / MIB,
        **in_common(base, model, make_batch(base)),
    }
    kinds: list[Grows] = ["batch", "context"] if command.only is None else [command.only]
    records = []
    found = measure_limits(
        contestants(base), kinds, command.seconds, lambda setting: contending(setting, model)
    )
    for result in found:
        records.append({**result, **common, **circumstances("cuda")})
        print(json.dumps(records[-1]), flush=True)
        write(records[-1:], Path(command.out))
        gc.collect()
    print(limits_table(records))


if __name__ == "__main__":
    main()
