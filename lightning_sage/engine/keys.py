"""Keys and values of rows that are kept and not replayed: they learn from the queries that are.

A row's own branches cost a replay; as a key it costs the projections before attention alone. So a
block is run on these rows up to its attention, with a graph, and left there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sage.engine.attention_call import AttentionCall
from lightning_sage.engine.drops import Drops
from lightning_sage.engine.follow import Weights
from lightning_sage.engine.seen import Seen, Written
from lightning_sage.errors import ReplayError
from lightning_sage.ops import Rows


class Reached(Exception):
    """The block has come to its attention: what is behind is not wanted."""


class UpToAttention(Drops):
    """Run of a block on some rows, which ends where their keys and values are known."""

    found: tuple[Tensor, Tensor] | None = None

    def attention(self, call: AttentionCall) -> Tensor:
        """Take keys and values, and leave by raising :class:`Reached`."""
        self.found = call.k, call.v
        raise Reached

    def could_be_weights(self, leading: int, queries: int, keys: int) -> bool:
        """Nothing before attention is."""
        return False

    def product(
        self, weights: Weights, x: Tensor, values: Tensor, given: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As the block computes it."""
        return given(x)


class KeyRows(NamedTuple):
    """All kept rows as keys, some of which are replayed.

    Attributes:
        rows: The kept rows.
        order: ``[M]`` int64, where each of them is among the replayed ones and then the others.
        k: Keys of the others, ``[1, G, M - N, D]``, with a graph.
        v: Their values, ``[1, G, M - N, E]``.
    """

    rows: Rows
    order: Tensor
    k: Tensor
    v: Tensor

    def joined(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all kept rows, in their order, from those of the replayed ones."""
        whole_k, whole_v = (
            torch.cat(pair, dim=2).index_select(2, self.order)
            for pair in ((k, self.k), (v, self.v))
        )
        return whole_k, whole_v


def can_be_made(seen: Sequence[Seen | Written]) -> bool:
    """Whether a block's first attention is the only one to its own tokens, by a function.

    Args:
        seen: Its attention calls.
    """
    own = [one for one in seen if not one.crosses]
    return len(own) == 1 and own[0] is seen[0] and isinstance(own[0], Seen)


def key_rows(
    run: Callable[[], object], handler: UpToAttention, kept: Rows, places: tuple[Tensor, Tensor]
) -> KeyRows:
    """Run a block on rows that are not replayed, up to its attention.

    Args:
        run: Runs it by the handler.
        handler: Of these rows.
        kept: All kept rows.
        places: Which of these are replayed, and which are not.

    Raises:
        ReplayError: The block does not come to an attention.
    """
    with suppress(Reached):
        run()
    if handler.found is None:
        raise ReplayError(
            f"its run on {len(handler.rows)} rows made no attention call, and so no keys: use "
            "SagePolicy(attention='salient')"
        )
    return KeyRows(kept, torch.cat(places).argsort(), *handler.found)
