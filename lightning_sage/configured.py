"""What of SAGE the settings of a Trainer ask for, before there is a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_sage.callback import SageCallback
from lightning_sage.policy import SagePolicy, as_policy
from lightning_sage.strategies import SageModelParallelStrategy, SageStrategy


def as_list(callbacks: Any) -> list[Any]:
    """Callbacks as Lightning lets one write them: a list, one alone, or none."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]


def sage_among(callbacks: Iterable[Any]) -> SageCallback | None:
    """The first SageCallback."""
    return next((c for c in callbacks if isinstance(c, SageCallback)), None)


def policy_of(trainer: Mapping[str, Any], callback: SageCallback | None) -> SagePolicy | None:
    """The policy that holds: the callback's, else that of a strategy that brings one, else None.

    Args:
        trainer: Settings of a Trainer.
        callback: Its SageCallback, if there is one.
    """
    if callback is not None:
        return callback.policy
    strategy = trainer["strategy"]
    if isinstance(strategy, SageStrategy | SageModelParallelStrategy):
        return as_policy(strategy.policy)
    return as_policy(None) if str(strategy).startswith("sage_") else None
