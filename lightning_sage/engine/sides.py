"""What transformers' hooks collect inside of a block, such as the router logits of its experts.

They are collected in the dense pass, which has no graph: the loss on them would have no gradient,
silently. So they leave the block as outputs of its own, and a replay collects them once more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from lightning_sage.errors import ReplayError

# of whole blocks, whose hooks see what SAGE returns
_OUTSIDE = ("hidden_states", "_hidden_states_layers")


def _variable() -> Any:
    """The context variable that holds what is being collected; None where there is none."""
    module = sys.modules.get("transformers.utils.output_capturing")
    return getattr(module, "_active_collector", None)


def collected() -> dict[str, list[Any]]:
    """The lists that are being filled inside of blocks, by what they hold."""
    variable = _variable()
    found = (variable.get() if variable is not None else None) or {}
    return {key: x for key, x in found.items() if key not in _OUTSIDE and isinstance(x, list)}


def unheard() -> AbstractContextManager[None]:
    """What is called inside is not collected."""
    return _collecting(None)


@contextmanager
def _collecting(into: dict[str, list[Any]] | None) -> Iterator[None]:
    variable = _variable()
    if variable is None:
        yield
        return
    token = variable.set(into)
    try:
        yield
    finally:
        variable.reset(token)


class Sides:
    """What one call of a block added to what is being collected.

    Attributes:
        keys: Which lists, by the order of what was added.
        tensors: What was added, ``[B * T, ...]`` or ``[B, T, ...]``.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.tensors: list[Tensor] = []
        self._places: list[int] = []
        self._lists: dict[str, list[Any]] = {}

    @contextmanager
    def heard(self, tokens: int) -> Iterator[None]:
        """Note what is added inside by a block that sees so many tokens.

        Raises:
            ReplayError: It does not run along them.
        """
        self._lists = collected()
        before = {key: len(x) for key, x in self._lists.items()}
        yield
        for key, x in self._lists.items():
            for place in range(before[key], len(x)):
                self._add(key, place, x[place], tokens)

    def _add(self, key: str, place: int, x: Any, tokens: int) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return
        if tokens not in (x.shape[:1].numel(), x.shape[:2].numel()):
            raise ReplayError(
                f"{key} of shape {list(x.shape)} are collected inside of it, which do not run "
                "along its tokens: switch their output off"
            )
        self.keys.append(key)
        self._places.append(place)
        self.tensors.append(x)

    def replace(self, tensors: tuple[Tensor, ...]) -> None:
        """Put tensors with a gradient where the ones without were collected."""
        for key, place, x in zip(self.keys, self._places, tensors, strict=True):
            self._lists[key][place] = x
        self.tensors, self._lists = [], {}

    @contextmanager
    def again(self) -> Iterator[list[Tensor]]:
        """Collect what a replay adds; the list is full afterwards.

        Raises:
            ReplayError: It is not as many as the dense pass added.
        """
        into: dict[str, list[Any]] = {key: [] for key in self.keys}
        found: list[Tensor] = []
        with _collecting(into or None):
            yield found
        if any(len(into[key]) != self.keys.count(key) for key in into):
            raise ReplayError(f"a replay of it adds other {', '.join(into)} than its forward")
        taken = {key: iter(x) for key, x in into.items()}
        found += [next(taken[key]) for key in self.keys]
