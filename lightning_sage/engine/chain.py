"""Chains of blocks that hand hidden states on to one another: where a backward pass enters one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sage.engine.drops import Seed


class Chain:
    """The blocks that one sequence of hidden states passes in one forward.

    A backward pass may thin out the gradient once in each chain, at the block that it reaches
    first: weights of rows that were drawn in every block would multiply along the depth.

    Args:
        seed: Of what is drawn once for all of its blocks.
    """

    def __init__(self, seed: Seed) -> None:
        self.seed = seed
        self._entered_by = -1

    def enter(self) -> bool:
        """Whether the backward pass under way reaches its first block of the chain; once each."""
        task = torch._C._current_graph_task_id()
        first = task != self._entered_by
        self._entered_by = task
        return first


def chain_of(hidden: Tensor, seed: Seed) -> Chain:
    """The chain of the block that hidden states ``[B, T, C]`` come from, or a new one.

    Between two blocks there may be other layers (of a hybrid, or blocks left dense): the graph is
    followed until it comes to the same tokens of another block.

    Args:
        hidden: What the block is given.
        seed: The block's, for a chain that it is the first of.
    """
    stack, seen = [hidden.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # of a block's node: its call
        job: Any = getattr(node, "job", None)
        chain = getattr(job, "chain", None)
        if not isinstance(chain, Chain):
            stack += [following for following, _ in node.next_functions]
        elif hidden.shape[:2] == (job.B, job.T):
            return chain
    return Chain(seed)
