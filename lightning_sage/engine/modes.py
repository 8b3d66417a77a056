"""What decides, besides weights and arguments, how a block computes: the same in its replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Modes:
    """Train and eval modes and active adapters of a block's modules, in one call of it.

    Attributes:
        values: Equal ones are of calls of the same kind.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.values = _values(modules)
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
        now = _values(self.modules)
        frozen = [x for x in parameters if not x.requires_grad]
        try:
            if now != self.values:
                _set(self.modules, self.values)
            for x in frozen:
                x.requires_grad_(True)
            yield
        finally:
            if now != self.values:
                _set(self.modules, now)
            for x in frozen:
                x.requires_grad_(False)


@contextmanager
def attributes_kept(modules: list[nn.Module]) -> Iterator[None]:
    """Modules have afterwards the buffers and attributes that they had, whatever they cached.

    A block that is told other positions in a replay may grow its tables from them.
    """
    before = [(m, dict(m.__dict__), dict(m._buffers)) for m in modules]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            module._buffers.update(buffers)
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)


def _values(modules: list[nn.Module]) -> tuple[Any, ...]:
    """Modes, and of layers of PEFT which adapters are active and whether none is."""
    # asked in every call of every block: most modules are no layers of PEFT, and calls cost time
    adapters = [
        (
            i,
            (*active,) if active.__class__ is list else active,
            getattr(module, "_disable_adapters", False) is True,
        )
        for i, module in enumerate(modules)
        if "_active_adapter" in module.__dict__
        for active in [module.__dict__["_active_adapter"]]
    ]
    return tuple([module.training for module in modules]), tuple(adapters)


def _set(modules: list[nn.Module], values: tuple[Any, ...]) -> None:
    training, adapters = values
    for module, mode in zip(modules, training, strict=True):
        module.training = mode
    for i, active, disabled in adapters:
        own = modules[i].__dict__
        own["_active_adapter"] = list(active) if isinstance(active, tuple) else active
        own["_disable_adapters"] = disabled


def _pre_hooks(modules: list[nn.Module]) -> list[tuple[int, ...]]:
    # those of the block itself are called before SAGE is
    return [tuple(module._forward_pre_hooks) for module in modules[1:] if module._forward_pre_hooks]
