"""transformers' layers, told apart: those that take samples, and towers that take them packed."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import nn


def layers(
    modules: Iterable[tuple[str, nn.Module]],
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Find transformers' layers among named modules.

    Returns:
        Those that take hidden states ``[B, T, C]``, and those that take the tokens of all samples
        in one row, ``[N, C]``, as the vision and audio towers of Qwen-VL and its kin do: attention
        is called once for each sample there, and a replay of some rows would not know whose they
        are. What tells them is known before any forward: they ask for `cu_seqlens`.
    """
    modeling = sys.modules.get("transformers.modeling_layers")
    if modeling is None:
        return {}, {}
    found = {n: m for n, m in modules if isinstance(m, modeling.GradientCheckpointingLayer)}
    packed = {n: m for n, m in found.items() if _asks_for_lengths(type(m).forward)}
    return {n: m for n, m in found.items() if n not in packed}, packed


@cache
def _asks_for_lengths(forward: Any) -> bool:
    return "cu_seqlens" in inspect.signature(forward).parameters


def tell_of_packed(model: nn.Module) -> None:
    """Say which blocks are left dense although they are trained; frozen ones save nothing."""
    _, packed = layers(model.named_modules())
    trained = {n: m for n, m in packed.items() if any(p.requires_grad for p in m.parameters())}
    if trained:
        kinds = ", ".join(sorted({type(m).__name__ for m in trained.values()}))
        first, *_, last = [*trained, *trained]
        warnings.warn(
            f"{len(trained)} blocks '{first}' to '{last}' ({kinds}) take the tokens of all samples "
            "in one row and are left dense; freeze them, or let them save what a dense step saves",
            stacklevel=3,
        )
