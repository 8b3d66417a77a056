"""Bytes that a graph holds for its backward pass, counted exactly and on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MIB = 2**20


class _Held:
    """Stands in a graph for a saved tensor, and lives as long as the graph needs it."""

    def __init__(self, tensor: Tensor) -> None:
        # a saved output must not hold the node that holds it
        self.tensor = tensor.detach()


@contextmanager
def saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Count what the graph built inside holds for backward: whole storages, each once.

    Args:
        exclude: Tensors that are there anyway: parameters, buffers, the batch.

    Yields:
        A function that gives the bytes held at the time of the call.

    Example:
        >>> import torch
        >>> x = torch.ones(8, requires_grad=True)
        >>> with saved_bytes(exclude=[x]) as held:
        ...     y = x.exp().sin()
        ...     held()
        32
    """
    # a distributed tensor has no storage of its own
    local = (getattr(tensor, "_local_tensor", tensor) for tensor in exclude)
    excluded = {tensor.untyped_storage().data_ptr() for tensor in local}
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor)
        alive.add(held)
        return held

    def count() -> int:
        storages = (held.tensor.untyped_storage() for held in alive)
        sizes = {(s.device, s.data_ptr()): s.nbytes() for s in storages}
        return sum(size for (_, pointer), size in sizes.items() if pointer not in excluded)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        yield count
