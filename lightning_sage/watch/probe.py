"""The gradient of a batch as SAGE gives it, and as dense training would, without leaving a trace.

The dense one is the same mechanism with every token kept and replayed, which equals dense training
and holds about as much as gradient checkpointing does. Both passes draw the same dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sage.buffers import buffers_undo
from lightning_sage.engine.choice import Probe
from lightning_sage.engine.wrapped import ATTRIBUTE, hooks_off
from lightning_sage.install import Installation
from lightning_sage.policy import SagePolicy
from lightning_sage.records import BlockRecord
from lightning_sage.resume import random_states, restore_random_states
from lightning_sage.selections import AllTokens

# by block: one gradient a trainable parameter, None where the batch does not reach it
Gradients = dict[str, list[Tensor | None]]


def block_gradients(
    installation: Installation,
    compute_loss: Callable[[], Tensor],
    policy: SagePolicy | None = None,
    dense: bool = False,
) -> tuple[Gradients, list[BlockRecord]]:
    """Gradients of the parameters of the wrapped blocks; no `.grad` is touched.

    Args:
        installation: SAGE on the model.
        compute_loss: Calls the model and returns a loss, 0-dim; called once.
        policy: What to keep and replay; None is the installation's.
        dense: Keep and replay every token, exactly, whatever the policy says.

    Returns:
        The gradients, as this rank has them, and what the blocks did.

    Raises:
        ValueError: Parts of a block are sharded by themselves, and get their gradients by a
            backward pass of their own, which cannot be undone.
    """
    session = installation.session
    if any(b.__dict__[ATTRIBUTE].nested for b in installation.blocks.values()):
        raise ValueError("parts of blocks are sharded by themselves: shard blocks as a whole")
    before = session.policy, session.agreement, session.records
    chosen = session.policy if policy is None else replace(policy, blocks=None)
    if dense:
        chosen = replace(chosen, keep=AllTokens(), replay=None, unselected="identity")
        chosen = replace(chosen, attention="salient", cache_dtype=None)
    session.probe, session.policy, session.agreement = Probe(dense), chosen, None
    session.records = {}
    try:
        with torch.enable_grad():
            loss = compute_loss()
            of_blocks = session.probe.parameters
            inputs = list({id(p): p for own in of_blocks.values() for p in own}.values())
            with hooks_off(inputs):
                found = torch.autograd.grad(loss, inputs, allow_unused=True)
        by_id: dict[int, Tensor | None] = {
            id(p): gradient for p, gradient in zip(inputs, found, strict=True)
        }
        gradients = {n: [by_id[id(p)] for p in own] for n, own in of_blocks.items() if own}
        return gradients, installation.records
    finally:
        session.probe = None
        session.policy, session.agreement, session.records = before


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Random generators, buffers and metrics are afterwards as they were.

    Args:
        module: What is called inside.
        device: Where it computes.
    """
    states, undo = random_states(device), undoing(module)
    try:
        yield
    finally:
        restore_random_states(states, device)
        undo()


def undoing(module: nn.Module) -> Callable[[], None]:
    """What brings a module's buffers and metrics back to what they are now; as often as called."""
    buffers = buffers_undo(module)
    metrics = [(m, _state(m)) for m in module.modules() if isinstance(m, Metric)]

    def undo() -> None:
        buffers()
        for metric, state in metrics:
            vars(metric).update(_copied(state))

    return undo


def _state(metric: Metric) -> dict[str, object]:
    """What an update changes, copied: torchmetrics adds in place."""
    names = ("_update_count", "_computed", "_forward_cache", *metric._defaults)
    return _copied({name: vars(metric).get(name) for name in names})


def _copied(state: dict[str, object]) -> dict[str, object]:
    copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    return {k: list(v) if isinstance(v, list) else v for k, v in copied.items()}
