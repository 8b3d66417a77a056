"""The methods that are compared: a policy each, and how they are tuned."""

from __future__ import annotations

from dataclasses import replace

from lightning_sage import AllTokens, ImportanceSampling, LossFirst, RandomTokens, SagePolicy
from lightning_sage.selections import Selection, TopFraction, TopMass


def bare(keep: Selection, **changes: str) -> SagePolicy:
    """A choice by itself, with nothing added to make it safe."""
    return replace(SagePolicy.preset("paper"), keep=keep, **changes)


_ALL = AllTokens()


def drawn(fraction: float, keep: Selection = _ALL) -> SagePolicy:
    """Rows of large gradient, of those drawn once."""
    return SagePolicy(keep=keep, replay=ImportanceSampling(fraction))


# None trains every token: densely, or with every block recomputed
METHODS: dict[str, SagePolicy | None] = {
    "dense": None,
    "checkpointing": None,
    **{name: SagePolicy.preset(name) for name in ("balanced", "paper", "memory", "speed")},
    **{f"random {f}": bare(RandomTokens(f)) for f in (0.25, 0.125)},
    **{f"paper {f}": bare(TopFraction(f)) for f in (0.25, 0.125)},
    **{f"keep {f}": SagePolicy(keep=f, replay=None) for f in (0.5, 0.25, 0.125, 0.0625)},
    **{f"loss first {f}": SagePolicy(keep=LossFirst(f), replay=None) for f in (0.25, 0.125)},
    **{f"replay {f}": SagePolicy(keep=_ALL, replay=f) for f in (0.5, 0.25, 0.125)},
    **{f"drawn {f}": drawn(f) for f in (0.5, 0.25, 0.125)},
    "mass 0.85": SagePolicy(keep=TopMass(0.85), replay=None),
    "mass 0.85, drawn 0.25": drawn(0.25, keep=TopMass(0.85)),
    "balanced not drawn": replace(SagePolicy.preset("balanced"), replay=0.25),
    "paper skip": bare(TopMass(0.8), unselected="skip"),
}

# tuned each by itself, with all seeds
HEADLINE = (
    *("dense", "balanced", "paper", "memory", "speed", "random 0.25", "replay 0.25", "replay 0.5"),
    *("keep 0.25", "keep 0.125", "drawn 0.5"),
)

# with fewer seeds, at the learning rate that was found for another one
LADDER = {
    "checkpointing": "dense",
    "paper skip": "paper",
    "paper 0.25": "paper",
    "paper 0.125": "paper",
    "random 0.125": "random 0.25",
    "keep 0.5": "keep 0.25",
    "keep 0.0625": "keep 0.25",
    "loss first 0.25": "memory",
    "loss first 0.125": "memory",
    "replay 0.125": "replay 0.25",
    "mass 0.85": "paper",
    "mass 0.85, drawn 0.25": "balanced",
    "balanced not drawn": "balanced",
    "drawn 0.25": "drawn 0.5",
    "drawn 0.125": "drawn 0.5",
}

# whose gradients are looked at on the model of 30 layers
DEPTH = (
    *("balanced", "speed", "memory", "paper", "random 0.25", "keep 0.25", "keep 0.5"),
    *("replay 0.25", "replay 0.5", "drawn 0.25", "drawn 0.5"),
    *("mass 0.85", "mass 0.85, drawn 0.25"),
)
