"""Gradient checkpointing, switched on or off in a built model: what SAGE is compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_sage.discovery import find_blocks
from lightning_sage.policy import SagePolicy

# names under which blocks are given a KV cache
_CACHES = ("past_key_values", "past_key_value", "layer_past")


def switch_off(model: nn.Module) -> None:
    """Switch off the checkpointing of the Hugging Face models in `model`; others have no switch."""
    for part in _outermost(model):
        if any(getattr(module, "gradient_checkpointing", False) for module in part.modules()):
            # renamed in transformers; the older name warns where both exist
            renamed = getattr(part, "activation_checkpointing_disable", None)
            (renamed or part.gradient_checkpointing_disable)()


def switch_on(model: nn.Module, policy: SagePolicy) -> str:
    """Recompute every block of a model in the backward pass, without reentrance.

    By Hugging Face's own switch where that has an effect, which it has not in evaluation mode; else
    by `torch.utils.checkpoint` round every block, on the instance, and for good.

    Args:
        model: Built, and in the mode in which it trains.
        policy: Its `blocks` names the blocks.

    Returns:
        Which of the two.

    Raises:
        ValueError: There is no block; the message lists what was seen.
    """
    parts = _outermost(model)
    if parts and all(_has_a_switch_that_works(part) for part in parts):
        for part in parts:
            renamed = getattr(part, "activation_checkpointing_enable", None)
            (renamed or part.gradient_checkpointing_enable)({"use_reentrant": False})
        return "Hugging Face's"
    switch_off(model)
    blocks: list[Any] = list(find_blocks(model, policy).values())
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)
    return f"torch.utils.checkpoint round {len(blocks)} blocks"


def _outermost(model: nn.Module) -> list[Any]:
    """Hugging Face models that are not part of another one."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    outer: dict[str, nn.Module] = {}
    for name, module in found:
        if not any(not above or name.startswith(f"{above}.") for above in outer):
            outer[name] = module
    return list(outer.values())


def _has_a_switch_that_works(part: Any) -> bool:
    layers = [m for m in part.modules() if isinstance(m, GradientCheckpointingLayer)]
    return part.supports_gradient_checkpointing and all(m.training for m in layers or [part])


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # the second pass would add the same keys to a cache again
    without = {name: None for name in _CACHES if name in kwargs}
    if "use_cache" in kwargs:
        without["use_cache"] = False  # type: ignore[assignment]
    return checkpoint(forward, *args, use_reentrant=False, **{**kwargs, **without})
