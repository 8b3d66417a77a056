"""How many tokens of a batch are valid, and how many bear loss, before the model has seen it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# labels of their own tokens; causal language models compare them with those of the next
_OWN_LABELS = ("TokenClassification", "MaskedLM", "PreTraining")


def count_tokens(batch: Any) -> Tensor | int:
    """Valid tokens of a batch; 0-dim, and not waited for, where it is a tensor.

    Args:
        batch: A mapping with `attention_mask` or `input_ids`, ``[B, T]``.

    Raises:
        ValueError: It is not.
    """
    found = batch if isinstance(batch, Mapping) else {}
    mask, ids = found.get("attention_mask"), found.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask != 0).sum()
    if isinstance(ids, Tensor):
        return ids.numel()
    raise ValueError(
        "ranks can agree on a budget where batches are mappings with attention_mask or input_ids, "
        f"and this one is {_described(batch)}: use balance='none', or such batches"
    )


def loss_tokens(batch: Any, shifted: bool) -> Tensor | int:
    """Labels of a batch that count in a loss, as the model's own loss counts them.

    Args:
        batch: A mapping with `labels`: ``[B, T]`` integers, -100 where there is no loss, or
            anything with a first axis of B, one label a sample.
        shifted: Whether labels are those of the next token: see :func:`labels_are_shifted`.

    Raises:
        ValueError: There are no labels.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise ValueError(
            "token_weighted=True counts the labels of a batch, which has to be a mapping with "
            f"'labels', and this one is {_described(batch)}: give a function of the batch that "
            "counts, token_weighted=count"
        )
    if labels.dim() < 2 or labels.is_floating_point():
        return len(labels)
    return ((labels[:, 1:] if shifted else labels) != -100).sum()


class Window:
    """Weights of losses whose gradients end in one optimizer step.

    A loss is the mean over its own batch, of one rank. The mean over the tokens of all of them
    needs weights in proportion to their tokens, and how many there are in all is known at the end
    only: until then the unit is the number that all ranks together had in the first batch.
    """

    def __init__(self) -> None:
        self._counts: list[float] = []

    def weight(self, own: float, everyone: float) -> float:
        """Of the next batch.

        Args:
            own: Loss-bearing tokens of this rank, times the ranks that gradients are averaged over.
            everyone: Those of all ranks.
        """
        self._counts.append(everyone)
        return own / self._unit() if self._unit() else 0.0

    def factor(self, divisor: int) -> float:
        """What the sum of the gradients still lacks.

        Args:
            divisor: What each loss was divided by already.
        """
        total = sum(self._counts)
        return self._unit() * divisor / total if total else 1.0

    def _unit(self) -> float:
        return next((count for count in self._counts if count), 0.0)


def labels_are_shifted(model: nn.Module) -> bool:
    """Whether labels are compared with the logits of the token before, so that the first has none.

    So it is but for token classification, masked language models and encoder-decoders.
    """
    modules = list(model.modules())
    own = any(kind in type(module).__name__ for module in modules for kind in _OWN_LABELS)
    configs = (vars(module).get("config") for module in modules)
    return not own and not any(getattr(c, "is_encoder_decoder", False) is True for c in configs)


def _described(batch: Any) -> str:
    keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
    return f"a {type(batch).__name__}{keys}"
