"""Finds the blocks of a model, and those among its layers that are left dense by themselves."""

from __future__ import annotations

import fnmatch
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from lightning_sage.policy import SagePolicy

# of transformers' `layer_types`: a state or a convolution runs along the tokens, past any attention
_ALONG_TOKENS = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent"}
_CONTAINERS = (nn.ModuleList, nn.Sequential)


def find_blocks(model: nn.Module, policy: SagePolicy) -> dict[str, nn.Module]:
    """Blocks of `model`, by name, in order; a module that stands in several places once.

    Args:
        model: Any module.
        policy: Its `blocks` names them. None finds transformers' `GradientCheckpointingLayer`, but
            for those of :func:`left_dense`; where there is none at all, the members of lists of
            modules that have attention in them.

    Raises:
        ValueError: There are none; the message lists what was seen.
    """
    modules = _modules(model)
    if policy.blocks is None:
        layers = _layers(modules)
        left = left_dense(model)
        found = {n: m for n, m in layers.items() if n not in left} if layers else _listed(modules)
    elif callable(policy.blocks):
        accept = policy.blocks
        found = {n: m for n, m in modules if n and accept(m, n)}
    else:
        patterns = policy.blocks
        found = {n: m for n, m in modules if any(_matches(n, p) for p in patterns)}
    if not found:
        raise ValueError(_nothing_found(model, policy))
    inner = [n for n in found for outer in found if n.startswith(f"{outer}.")]
    if inner:
        raise ValueError(
            f"blocks {inner[:3]} lie inside other blocks: name one level with blocks=..."
        )
    return found


def left_dense(model: nn.Module) -> dict[str, str]:
    """Layers of transformers that no replay of some tokens could repeat, known before any forward.

    Returns:
        By name, the reason.
    """
    modules = _modules(model)
    found = {}
    for name, layer in _layers(modules).items():
        if _asks_for_lengths(type(layer).forward):
            # attention is called once for each sample: vision and audio towers of Qwen-VL
            found[name] = "take the tokens of all samples in one row"
        elif any(_shares_keys(part) for part in layer.modules()):
            found[name] = "share keys and values with other layers"
    for name, module in modules:
        found |= _along_tokens(name, module)
    return found


def left_dense_blocks(model: nn.Module, policy: SagePolicy) -> dict[str, nn.Module]:
    """The layers of :func:`left_dense`; none where the policy names blocks."""
    left = left_dense(model) if policy.blocks is None else {}
    return {name: module for name, module in _modules(model) if name in left}


def tell_of_left_dense(model: nn.Module) -> None:
    """Say which layers are left dense although they are trained, or gradients pass through them."""
    modules = dict(_modules(model))
    by_reason: dict[str, dict[str, nn.Module]] = {}
    for name, reason in left_dense(model).items():
        layer = modules[name]
        # a frozen tower in front of the model saves nothing
        if "one row" not in reason or any(p.requires_grad for p in layer.parameters()):
            by_reason.setdefault(reason, {})[name] = layer
    for reason, layers in by_reason.items():
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers.values()}))
        first, *_, last = [*layers, *layers]
        warnings.warn(
            f"{len(layers)} blocks, '{first}' to '{last}' ({kinds}), {reason} and are left dense: "
            "they save what a dense step saves",
            stacklevel=3,
        )


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules by name; what torch.compile has put around a module has the module's own name."""
    optimized = torch._dynamo.OptimizedModule
    return [
        (name.replace("_orig_mod.", "").removesuffix("._orig_mod"), module)
        for name, module in model.named_modules()
        if not isinstance(module, optimized)
    ]


def _layers(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Transformers' layers."""
    modeling = sys.modules.get("transformers.modeling_layers")
    if modeling is None:
        return {}
    return {n: m for n, m in modules if isinstance(m, modeling.GradientCheckpointingLayer)}


def _listed(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Members of the outermost lists of modules of one kind that have attention in them."""
    found: dict[str, nn.Module] = {}
    for name, module in modules:
        if not isinstance(module, _CONTAINERS) or any(name.startswith(f"{n}.") for n in found):
            continue
        members = {f"{name}.{key}".lstrip("."): part for key, part in module.named_children()}
        alike = len({type(part) for part in members.values()}) == 1
        if alike and all(map(_has_attention, members.values())):
            found |= members
    return found


def _has_attention(block: nn.Module) -> bool:
    """Whether some part of a block is attention by its name; the block itself is more than that."""
    inner = (type(part).__name__.lower() for part in block.modules() if part is not block)
    return any("attention" in name or "attn" in name for name in inner)


def _along_tokens(name: str, model: nn.Module) -> dict[str, str]:
    """Layers of a model whose configuration says that they are no attention layers."""
    config = getattr(model, "config", None)
    for field in ("layer_types", "layers_block_type"):
        kinds = getattr(config, field, None)
        if not isinstance(kinds, list | tuple):
            continue
        for child, layers in model.named_children():
            if isinstance(layers, nn.ModuleList) and len(layers) == len(kinds):
                return {
                    f"{name}.{child}.{i}".lstrip("."): "mix their tokens by no attention alone"
                    for i, kind in enumerate(kinds)
                    if kind in _ALONG_TOKENS
                }
    return {}


def _shares_keys(part: nn.Module) -> bool:
    """Whether an attention hands its keys and values to other layers, or takes theirs."""
    marks = ("is_kv_shared_layer", "store_full_length_kv")
    return any(getattr(part, mark, False) is True for mark in marks)


@cache
def _asks_for_lengths(forward: Any) -> bool:
    return "cu_seqlens" in inspect.signature(forward).parameters


def _matches(name: str, pattern: str) -> bool:
    """Whether a glob names a module; `*` stands for one part of a name, not for several."""
    parts, globs = name.split("."), pattern.split(".")
    return len(parts) == len(globs) and all(map(fnmatch.fnmatchcase, parts, globs))


def _nothing_found(model: nn.Module, policy: SagePolicy) -> str:
    lists = {
        name: f"{len(module)} x {type(module[0]).__name__}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    example = max(lists, default="layers")
    seen = Counter(type(m).__name__ for m in model.modules()).most_common(12)
    wanted = "a transformers layer with attention"
    if policy.blocks is not None:
        wanted = f"blocks={policy.blocks!r}"
    left = _summed(left_dense(model)) if policy.blocks is None else ""
    return (
        f"no block found: nothing in {type(model).__name__} is {wanted}{left}. Name the blocks, as "
        f"in SagePolicy(blocks=['{example}.*']). Lists of modules: "
        f"{'; '.join(f'{name}: {text}' for name, text in lists.items()) or 'none'}. "
        f"Modules: {', '.join(f'{name} x {count}' for name, count in seen)}"
    )


def _summed(left: Mapping[str, str]) -> str:
    counts = Counter(left.values())
    return "".join(f"; {count} layers {reason}" for reason, count in counts.items())
