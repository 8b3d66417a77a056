"""Where the graph of a replay leads, and what of it would be lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_sage.engine.job import Job


def tell_of_attributes(job: Job) -> None:
    """Warn of tensors that a block leaves on itself: in the dense pass they have no graph."""
    left = {
        f"{type(module).__name__}.{name}"
        for module in job.parts.modules
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    if left and not job.wrapped.checked:
        warnings.warn(
            f"block '{job.wrapped.name}' keeps what it computes as {', '.join(sorted(left))}: a "
            "loss on that would have no gradient with SAGE; leave it dense with dense_blocks if "
            "there is one",
            stacklevel=2,
        )


def outlets(job: Job, own: Tensor) -> tuple[int, ...]:
    """Outputs of pairs of tokens that carry a gradient to parameters, whatever the tokens are.

    Attention weights depend on the tokens; a loss on them is refused elsewhere.
    """
    found: list[int] = []
    for i, x in job.outlets.items():
        (through,) = torch.autograd.grad(x.sum(), own, allow_unused=True, retain_graph=True)
        if through is None:
            found.append(i)
    return tuple(found)


def graph_leaves(out: Tensor) -> Iterator[Tensor]:
    """Tensors in which the graph of `out` ends."""
    stack, seen = [out.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(following for following, _ in node.next_functions)
