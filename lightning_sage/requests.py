"""What a caller may not ask of a training forward with SAGE."""

from __future__ import annotations

from typing import Any


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
