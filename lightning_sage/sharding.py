"""How a block is sharded, checkpointed or run in sequence parallel: seen from the outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)


def inside(block: nn.Module) -> bool:
    """Whether parts of a block are sharded by themselves (FSDP2), apart from the block."""
    return any(sharded(module) for module in block.modules() if module is not block)


def sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` (FSDP2) was called on this very module."""
    return isinstance(module, FSDPModule)


def conflicts(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[str]:
    """What would make the replay of a block wrong or pointless, each with a way out.

    Reentrant checkpointing around or inside a block, and sequence parallelism.
    """
    for name, module in model.named_modules():
        if _reentrant(module):
            for other in blocks:
                if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                    yield (
                        f"'{name}' is checkpointed with use_reentrant=True (a CheckpointWrapper), "
                        f"and SAGE on '{other}' saves less than that does: take the wrapper off, "
                        "or leave the block dense with dense_blocks"
                    )
    for name, block in blocks.items():
        for part, module in block.named_modules():
            if any("SequenceParallel" in origin for origin in _hook_origins(module)):
                yield (
                    f"'{name}.{part}' runs under SequenceParallel, where a rank has only some of "
                    "the tokens, and SAGE has to see all of them: use tensor parallelism without "
                    "it, or FSDP (strategy='sage_fsdp')"
                )


def in_checkpoint() -> bool:
    """Whether `checkpoint(..., use_reentrant=False)` will compute this forward again."""
    return "_checkpoint_hook" in _saving()


def recomputed_reentrantly() -> bool:
    """Whether this forward is the second of `checkpoint(..., use_reentrant=True)`.

    Its first one recorded no graph and drew dropout of its own, which this one would not repeat.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    # the other kind of checkpoint recomputes under hooks of its own
    return "_recomputation_hook" not in _saving()


def _saving() -> str:
    """The name of what takes the tensors that are saved for backward; empty where they stay."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return getattr(hooks and hooks[0], "__qualname__", "")


def _reentrant(module: nn.Module) -> bool:
    # a private module of torch, whose name is all that is relied on
    if type(module).__name__ != "CheckpointWrapper":
        return False
    implementation = getattr(module, "checkpoint_impl", None)
    return getattr(implementation, "name", "") == "REENTRANT"


def _hook_origins(module: nn.Module) -> Iterator[str]:
    """Qualified names of the functions that forward hooks of a module lead to."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        for function in (hook, *_closed_over(hook)):
            while isinstance(function, partial):
                function = function.func
            yield getattr(function, "__qualname__", "")


def _closed_over(function: Any) -> list[Any]:
    """What a closure holds: `distribute_module` puts a style's function there."""
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]


def shard(
    module: nn.Module,
    blocks: Mapping[str, nn.Module],
    mesh: DeviceMesh,
    precision: MixedPrecisionPolicy,
) -> None:
    """Shard blocks (FSDP2) and then what is around them; nothing where anything is sharded already.

    Args:
        module: A module whose own forward is not called, but those of its children are.
        blocks: Parts that are gathered one at a time.
        mesh: The ranks.
        precision: Types of gathered parameters and reduced gradients.

    Raises:
        ValueError: Parameters lie on the module itself, or are shared between parts.
    """
    if any(sharded(part) for part in module.modules()):
        return
    names = {part: name for name, part in module.named_modules()}
    parts = [*blocks.values(), *(root for root in _roots(module) if root not in blocks.values())]
    _refuse_ties([(names[part], part) for part in parts])
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=precision)
        # PEFT's own calls the model inside of it, past the hooks of what is around
        if hasattr(part, "generate") and hasattr(part, "get_base_model"):
            register_fsdp_forward_method(part, "generate")


def _refuse_ties(parts: list[tuple[str, nn.Module]]) -> None:
    """Refuse parameters that two parts share; the first part that has one takes it.

    Raises:
        ValueError: Sharding would make two parameters of them.
    """
    taken: dict[int, str] = {}
    earlier: list[nn.Module] = []
    for name, part in parts:
        inside = {id(m) for done in earlier for m in done.modules()}
        for module in part.modules():
            # modules of a block are the block's, also where they are met again around it
            for own, x in module._parameters.items() if id(module) not in inside else ():
                if x is not None and taken.setdefault(id(x), name) != name:
                    raise ValueError(
                        f"'{name}' and '{taken[id(x)]}' share a parameter ({own} of a "
                        f"{type(module).__name__}), and sharding each by itself would make two of "
                        "it: call fully_shard in configure_model on a module that has both"
                    )
        earlier.append(part)


def _roots(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that have a forward of their own and parameters."""
    if own := [name for name, x in module._parameters.items() if x is not None]:
        raise ValueError(
            f"{', '.join(own)} of {type(module).__name__} cannot be sharded, because they belong "
            "to no module that is called: put them into a module of their own, or call "
            "fully_shard in configure_model"
        )
    for child in module.children():
        if type(child).forward is nn.Module.forward:
            yield from _roots(child)
        elif any(True for _ in child.parameters()):
            yield child
