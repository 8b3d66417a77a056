"""Adapters of PEFT that no replay of some rows can repeat, known by their configuration.

Most kinds act row by row and need nothing of us. Some of those that do not would pass the
self-check while their weights are still zero, or in half precision: they are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_OTHER = "use another kind, such as LoRA, or train without SAGE"
_CACHE = (
    "hands its prefix to every block as a filled KV cache, which is not replayed: use prompt "
    "tuning (PromptTuningConfig, PromptEncoderConfig), whose virtual tokens are rows like the "
    "others, or train without SAGE"
)
# by PEFT's name of the kind
_KINDS = {
    "PREFIX_TUNING": _CACHE,
    "CARTRIDGE": _CACHE,
    "LILY": f"mixes its weights by a mean over all tokens of a batch: {_OTHER}",
    "PVERA": f"draws random numbers for every token: {_OTHER}, for instance VeRA",
    "POLY": f"is told the tasks of a batch past the blocks, by hooks of one forward: {_OTHER}",
    "XLORA": f"is told its scalings past the blocks, by hooks of one forward: {_OTHER}",
}
# by the field of a LoRA configuration
_FIELDS = {
    "alora_invocation_tokens": (
        "is told where it is invoked past the blocks, by hooks of one forward: leave "
        "alora_invocation_tokens out, or train without SAGE"
    ),
    "monteclora_config": (
        "draws its weights anew in every forward: leave monteclora_config out, or train without "
        "SAGE"
    ),
    "velora_config": (
        "compresses by the mean of the rows it sees, which in a replay are some of them: set "
        "VeloraConfig(init_type='random'), or train without SAGE"
    ),
}


def conflicts(model: nn.Module) -> Iterator[str]:
    """Active adapters that no replay can repeat, each with a way out."""
    for name, config in _active(model).items():
        kind = _kind(config)
        if kind in _KINDS:
            yield f"adapter '{name}' ({kind}) {_KINDS[kind]}"
        for field, reason in _FIELDS.items():
            value = getattr(config, field, None)
            if value and getattr(value, "init_type", None) != "random":
                yield f"adapter '{name}' ({kind} with {field}) {reason}"


def _active(model: nn.Module) -> dict[str, Any]:
    """Configurations of the adapters in use, by name; models in models have the same."""
    found: dict[str, Any] = {}
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        active = getattr(module, "active_adapters", ())
        if callable(active):
            # transformers' own, which raises unless it was what put the adapters in
            active = active() if getattr(module, "_hf_peft_config_loaded", False) else ()
        if isinstance(configs, Mapping):
            # of a mixture of adapters, these are the active ones
            mixed = [name for name, config in configs.items() if _kind(config) == "XLORA"]
            found |= {name: configs[name] for name in (*active, *mixed) if name in configs}
    return found


def _kind(config: Any) -> str:
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))
