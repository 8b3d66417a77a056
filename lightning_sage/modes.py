"""What decides, besides weights and arguments, how a block computes: the same in its replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# what PEFT's layers ask: which adapters are active, and whether none is
_ADAPTERS = ("_active_adapter", "_disable_adapters")


class Modes:
    """Train and eval modes and active adapters of a block's modules, in one call of it.

    Attributes:
        values: By module; equal lists of them are of calls of the same kind.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.values = tuple(_mode(module) for module in modules)
        self._hooks = _pre_hooks(modules)

    @property
    def hooks_changed(self) -> bool:
        """Whether a pre-hook inside of the block came or went: PEFT has some for one forward."""
        return _pre_hooks(self.modules) != self._hooks

    @contextmanager
    def restored(self, parameters: list[Tensor]) -> Iterator[None]:
        """As in the call; whatever there is now is there again afterwards.

        Args:
            parameters: What was trained then: PEFT freezes the adapters that it switches off.
        """
        pairs = zip(self.modules, self.values, strict=True)
        changed = [(module, mode, now) for module, mode in pairs if (now := _mode(module)) != mode]
        frozen = [x for x in parameters if not x.requires_grad]
        try:
            for module, mode, _ in changed:
                _set_mode(module, mode)
            for x in frozen:
                x.requires_grad_(True)
            yield
        finally:
            for module, _, now in changed:
                _set_mode(module, now)
            for x in frozen:
                x.requires_grad_(False)


def _mode(module: nn.Module) -> tuple[Any, ...]:
    active, disabled = (module.__dict__.get(name) for name in _ADAPTERS)
    return module.training, tuple(active) if isinstance(active, list) else active, disabled


def _set_mode(module: nn.Module, mode: tuple[Any, ...]) -> None:
    module.training, active, disabled = mode
    values = list(active) if isinstance(active, tuple) else active, disabled
    for name, value in zip(_ADAPTERS, values, strict=True):
        if value is not None:
            module.__dict__[name] = value


def _pre_hooks(modules: list[nn.Module]) -> list[tuple[int, ...]]:
    # those of the block itself are called before SAGE is
    return [tuple(module._forward_pre_hooks) for module in modules[1:] if module._forward_pre_hooks]
