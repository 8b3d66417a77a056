"""Storages that graphs hold, each counted once, of real and of fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Ledger:
    """Storages, each once; keeps them alive, so that no other takes their place.

    Args:
        excluded: Tensors that are there anyway.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self._excluded = {x.untyped_storage()._cdata for x in excluded}
        self._alive: list[Tensor] = []
        self.sizes: dict[int, int] = {}

    def add(self, x: Tensor) -> set[int]:
        """The storage of `x`, or nothing if it is excluded."""
        storage = x.untyped_storage()
        if storage._cdata in self._excluded:
            return set()
        if storage._cdata not in self.sizes:
            self._alive.append(x.detach())
            self.sizes[storage._cdata] = storage.nbytes()
        return {storage._cdata}

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Count these no more."""
        self._excluded |= {x.untyped_storage()._cdata for x in tensors}

    def total(self, *parts: Iterable[int]) -> int:
        """Bytes of the union."""
        return sum(self.sizes[key] for key in set().union(*parts))

    @contextmanager
    def saves(self, into: Callable[[], set[int]]) -> Iterator[None]:
        """Adds what graphs save inside to the set that `into` gives at that time."""

        def pack(x: Tensor) -> Tensor:
            into().update(self.add(x))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            yield
