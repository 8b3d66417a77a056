"""Policies that estimate and compare show beside the user's own."""

from __future__ import annotations

from lightning_sage.policy import SagePolicy
from lightning_sage.selections import AllTokens

PRESETS: dict[str, SagePolicy] = {
    "sage": SagePolicy(),
    "keep=0.25": SagePolicy(keep=0.25),
    "keep=0.25 int8": SagePolicy(keep=0.25, cache_dtype="int8"),
    "replay=0.25": SagePolicy(keep=AllTokens(), replay=0.25),
}
