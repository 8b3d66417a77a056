"""What a checkpoint needs so that a resumed fit draws what the uninterrupted one would have."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
import torch.distributed as dist


def random_states(device: torch.device) -> dict[str, Any]:
    """Of torch on the host and on `device`, of Python and, where it is in use, of NumPy.

    `torch.load(weights_only=True)` takes all of it.
    """
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = (str(kind), [int(key) for key in keys], *rest)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`random_states` gave."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if "numpy" in states and (numpy := sys.modules.get("numpy")):
        numpy.random.set_state(states["numpy"])


def place() -> tuple[int, int]:
    """Rank and number of ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(own: dict[str, Any]) -> list[Any]:
    """`own` of every rank."""
    _, world = place()
    everyone: list[Any] = [own] * world
    if world > 1:
        dist.all_gather_object(everyone, own)
    return everyone
