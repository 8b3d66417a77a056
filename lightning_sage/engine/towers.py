"""Towers for images and sound inside of a model of tokens: what is not said to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# keywords under which transformers hands over images and sound
MEDIA = ("pixel_values", "input_features", "input_values")
# what is said of the tokens of a batch
ABOUT_TOKENS = ("labels", "owner", "attention_mask")


def handed_on(
    told: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What a module hears of what its caller was told.

    Labels and padding of tokens are not about the patches of an image or the frames of a sound,
    however many there are: a tower that is called with these from a model of tokens hears nothing.

    Args:
        told: What the caller was told, labels and padding among it.
        args: What the module is called with.
        kwargs: Likewise.
    """
    reads = _reads(args, kwargs) or told.get("reads")
    if reads == "media" and told.get("reads") == "tokens":
        return {"reads": reads, "tower": True} | dict.fromkeys(ABOUT_TOKENS)
    return {**told, "reads": reads}


def _reads(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """`tokens`, `media` (images, sound), or None where neither is seen."""
    named = {str(name) for name, x in kwargs.items() if isinstance(x, Tensor)}
    labels, ids = kwargs.get("labels"), ("input_ids", "inputs_embeds")
    # labels for each token: of a decoder whose tokens are made from them, if of no other
    written = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
    placed = [x for x in args if isinstance(x, Tensor)]
    counted = bool(placed) and not placed[0].is_floating_point()
    if written or counted or any(name.endswith(ids) for name in named):
        return "tokens"
    if any(name.startswith(MEDIA) for name in named):
        return "media"
    others = (x for name, x in kwargs.items() if name != "labels" and isinstance(x, Tensor))
    first = next(iter((*placed, *others)), None)
    if first is None or (first.is_floating_point() and first.dim() < 4):
        return None
    # [B, C, H, W] of a model that has other names for it
    return "media" if first.is_floating_point() else "tokens"
