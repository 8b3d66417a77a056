"""A module's buffers and the random generators, brought back to what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def buffers_undo(module: nn.Module) -> Callable[[], None]:
    """What undoes all that is done to a module's buffers from now on; as often as it is called."""
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    names = [(part, dict(part._buffers)) for part in module.modules()]

    def undo() -> None:
        for buffer, value in values:
            buffer.data.copy_(value)
        for part, buffers in names:
            part._buffers.update(buffers)

    return undo


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Whatever a module does to its buffers inside, by value or by name, is undone."""
    undo = buffers_undo(module)
    try:
        yield
    finally:
        undo()


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the generators afterwards are as before."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
