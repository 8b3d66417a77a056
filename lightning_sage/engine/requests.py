"""What a caller tells a training forward with SAGE, and what may not be asked of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def mask_told(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """A mask ``[B, T]`` of the tokens that are there, or additive, as far as keywords tell.

    An encoder or decoder of torch.nn is told which are not.
    """
    name = {
        nn.TransformerEncoder: "src_key_padding_mask",
        nn.TransformerDecoder: "tgt_key_padding_mask",
    }.get(type(module), "")
    absent = kwargs.get(name)
    if isinstance(absent, Tensor):
        return absent if absent.is_floating_point() else ~absent
    return kwargs.get("attention_mask")


def refuse_requests(config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what needs every token's graph or cache.

    Raises:
        ValueError: Names the setting and the way out.
    """
    if asks(config, kwargs, "output_attentions"):
        raise ValueError(
            "output_attentions=True asks a training forward for every attention weight, which such "
            "a forward never holds: switch it off with SAGE, or ask under torch.no_grad()"
        )


def asks(config: Any, kwargs: dict[str, Any], name: str) -> bool:
    """Whether a switch is on, by keyword or else by the model's configuration."""
    said = kwargs.get(name)
    return bool(said) or (said is None and getattr(config, name, False) is True)


def refuse_cache(kwargs: dict[str, Any]) -> None:
    """Refuse a KV cache that the caller wants filled or read.

    Raises:
        ValueError: Names the keyword and the way out.
    """
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        name = "use_cache=True" if kwargs.get("use_cache") else "past_key_values"
        raise ValueError(
            f"{name}: a training forward with SAGE neither fills nor reads a KV cache: leave it "
            "out, or call the model under torch.no_grad()"
        )
