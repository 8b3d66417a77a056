"""What an installation leaves on a block, and what the block is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sage.engine.session import Session
from lightning_sage.errors import ReplayError

ATTRIBUTE = "_sage"

# where a parameter is: its module and its name there
Slot = tuple[nn.Module, str]


@dataclass
class Learned:
    """What the self-check has found out about a kind of call.

    Attributes:
        crossing: Which attention calls are to another sequence, where lengths do not tell.
        positional: Whether the block counts its tokens by itself, to know where they stand.
        counted: How often, in a replay.
        pairs: Whether a replay has to see the entries of masks and biases.
        outlets: Which of its outputs, besides hidden states, carry a gradient to its parameters.
        keys: Whether keys and values can be made of rows that are not replayed.
    """

    crossing: frozenset[int] = frozenset()
    positional: bool = False
    counted: int = 0
    pairs: bool = False
    outlets: tuple[int, ...] = ()
    keys: bool = False


@dataclass
class Wrapped:
    """What an installation leaves on a block, as its attribute `_sage`.

    Attributes:
        name: Name of the block in the model.
        index: Place among the wrapped blocks.
        session: Shared by all of them.
        skips: Whether unselected tokens skip this block in the forward pass too.
        chooses: Whether later blocks skip what this one did not keep.
        previous: An instance attribute `forward` found on the block, if any.
        checkpointing: What the block's `gradient_checkpointing` was, if it had been set.
        checked: By the kinds of calls that passed the self-check, what it found out.
        nested: Whether parts of the block are sharded by themselves, known from its first call on.
        unreached: Parameters that no replay has given a gradient; None before the first replay.
        refused: Why the block is left dense, where that was found out in its first call.
        replayed_in: Of a block with parts sharded by themselves, its latest backward pass.
        touched: By the id of a parameter, how often the block's own forward marked it as modified.
    """

    name: str
    index: int
    session: Session
    skips: bool = False
    chooses: bool = False
    previous: Callable[..., Any] | None = None
    checkpointing: Any = None
    checked: dict[Any, Learned] = field(default_factory=dict)
    nested: bool | None = None
    unreached: set[str] | None = None
    replayed_in: int = -1
    refused: str | None = None
    touched: dict[int, int] = field(default_factory=dict)

    def run(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(block).forward(block, *args, **kwargs)

    @contextmanager
    def noting_touches(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Tell what the block's own forward does to versions of parameters from what others do.

        PEFT parametrizes the experts that it adapts for the length of a call, which sets them to
        themselves.
        """
        before = [(x, x._version) for x in parameters]
        try:
            yield
        finally:
            # also of a run that is left at its attention
            for x, version in before:
                if x._version != version:
                    self.touched[id(x)] = self.touched.get(id(x), 0) + x._version - version

    def versions(self, parameters: list[Tensor]) -> list[int]:
        """Versions of parameters, as far as others than the block changed them."""
        if not self.touched:
            return [x._version for x in parameters]
        return [x._version - self.touched.get(id(x), 0) for x in parameters]

    def refuse_second_replay(self) -> None:
        """Refuse a block with parts sharded by themselves twice in one backward pass.

        FSDP2 ends its work on a part once in a backward pass: what came later would be lost.

        Raises:
            ReplayError: It is the second time.
        """
        task = torch._C._current_graph_task_id()
        if task == self.replayed_in:
            raise ReplayError(
                f"block '{self.name}' is used twice in one backward pass, and parts of it are "
                "sharded by themselves, whose gradients would be lost: shard the block as a whole"
            )
        self.replayed_in = task

    def note_reached(
        self, slots: list[Slot], found: Sequence[Tensor | None], block: nn.Module
    ) -> None:
        """Note which parameters a replay gave a gradient."""
        # soon empty, and then there is nothing to look at
        if self.unreached is None or self.unreached:
            names = {id(module): name for name, module in block.named_modules()}
            missing = {
                f"{names[id(module)]}.{name}".lstrip(".")
                for (module, name), gradient in zip(slots, found, strict=True)
                if gradient is None
            }
            self.unreached = missing if self.unreached is None else self.unreached & missing


class Parts:
    """Modules of a block and the slots of its parameters, looked at once a call.

    Slots and not tensors, because sharding strategies swap the tensors between forward and
    backward.

    Attributes:
        modules: All of them, each once.
        slots: Where the trainable parameters are, each once.
        parameters: All of them, frozen ones too.
    """

    def __init__(self, block: nn.Module) -> None:
        self.modules, seen = [block], {id(block)}
        slots: dict[int, Slot] = {}
        self.parameters: list[Tensor] = []
        # grows while it is walked: `modules()` asks many times as often; most are empty (PEFT)
        for module in self.modules:
            for part in module._modules.values() if module._modules else ():
                if part is not None and (number := id(part)) not in seen:
                    seen.add(number)
                    self.modules.append(part)
            for name, parameter in module._parameters.items() if module._parameters else ():
                if parameter is not None:
                    self.parameters.append(parameter)
                    if parameter.requires_grad:
                        slots.setdefault(id(parameter), (module, name))
        self.slots = list(slots.values())

    def refuse_repacking(self, device: torch.device) -> None:
        """Refuse layers that a forward without grad would change for good.

        In eval mode on a CPU with AVX512-BF16, bitsandbytes lays 4-bit weights anew at a call
        without grad, which SAGE's dense pass is, and the new layout has no backward.

        Raises:
            ReplayError: There is such a layer.
        """
        for module in self.modules:
            able = getattr(module, "support_avx512bf16_for_cpu", False)
            if able and device.type == "cpu" and not module.training:
                raise ReplayError(
                    f"{type(module).__name__} of bitsandbytes is in eval mode, where it would "
                    "repack its weights on this CPU to a form without backward: call train() on "
                    "the model, and before a validation give the layers "
                    "support_avx512bf16_for_cpu=False"
                )

    @contextmanager
    def stirred(self) -> Iterator[None]:
        """With numbers in place of trainable parameters that are zero, as adapters are at first.

        What an adapter does wrong would not show as long as it does nothing.
        """
        stilled: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        try:
            for module, name in self.slots:
                own: dict[str, Any] = module._parameters
                parameter = own[name]
                if type(parameter) is nn.Parameter and not bool(parameter.any()):
                    scale = max(parameter.shape, default=1) ** -0.5
                    own[name] = nn.Parameter(torch.randn_like(parameter) * scale)
                    stilled.append((own, name, parameter))
            yield
        finally:
            for own, name, parameter in stilled:
                own[name] = parameter

    def refuse_capacity(self) -> None:
        """Refuse experts that take so many tokens only: a replay of some drops others.

        Raises:
            ReplayError: There are some.
        """
        for module in self.modules:
            capacity = getattr(module, "expert_capacity", None)
            if isinstance(capacity, int):
                raise ReplayError(
                    f"its {type(module).__name__} drops tokens beyond expert_capacity={capacity}, "
                    "which a replay of some tokens cannot repeat: leave it dense with dense_blocks "
                    "or install(..., strict=False)"
                )

    def trainable(self) -> list[Tensor]:
        """The tensors in the slots, as they are now."""
        return [getattr(module, name) for module, name in self.slots]


@contextmanager
def hooks_off(parameters: list[Tensor]) -> Iterator[None]:
    """Tensor hooks of parameters are for the gradient that trains them, and not for others."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for active, _ in hooks:
        active.clear()
    try:
        yield
    finally:
        for active, saved in hooks:
            active.update(saved)
