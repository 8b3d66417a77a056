"""MemoryBudget: on the first batches of a fit, finds how much of a policy fits in so many bytes."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product
from typing import Any, Literal, NamedTuple

import torch

from lightning_sage.memory_size import parse_size
from lightning_sage.policy import SagePolicy
from lightning_sage.sampling import ImportanceSampling, LossFirst
from lightning_sage.selections import AllTokens, Selection

# shares of the tokens that are tried; 1 leaves the policy's own choice alone
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625)
# of the budget: left for batches longer than the first, and for fragments
MARGIN = 0.1


class Rung(NamedTuple):
    """At most how much is kept and replayed, and in how many bits it is held.

    Attributes:
        keep: Share of each sample's tokens.
        replay: Share of the batch's tokens, at most `keep`.
        cache_dtype: None for every bit; not used where the policy has one of its own.
    """

    keep: float
    replay: float
    cache_dtype: Literal["int8"] | None

    def of(self, policy: SagePolicy) -> SagePolicy:
        """The policy, with no more than this.

        Raises:
            ValueError: Its `keep` cannot be limited.
        """
        keep, replay = policy.keeper, policy.replayer
        if self.keep < 1:
            keep = limited(keep, self.keep)
        if self.replay < self.keep:
            replay = (
                ImportanceSampling(self.replay) if replay is None else limited(replay, self.replay)
            )
        dtype = policy.cache_dtype or self.cache_dtype
        return replace(policy, keep=keep, replay=replay, cache_dtype=dtype)

    def __str__(self) -> str:
        bits = "" if self.cache_dtype is None else f", held in {self.cache_dtype}"
        return f"at most {self.keep:.0%} kept and {self.replay:.0%} replayed{bits}"


def limited(selection: Selection, share: float) -> Selection:
    """The selection, taking at most so much.

    Raises:
        ValueError: It has neither a `fraction` nor a `max_fraction`.
    """
    if isinstance(selection, AllTokens):
        return LossFirst(share)
    less = copy.copy(selection)
    for name in ("max_fraction", "fraction"):
        if name in vars(less):
            own = getattr(less, name)
            setattr(less, name, share if own is None else min(own, share))
            return less
    raise ValueError(
        f"memory_budget limits what is kept, and {selection!r} has neither a fraction nor a "
        "max_fraction to limit: use TopMass, LossFirst, or no memory_budget"
    )


def ladder(policy: SagePolicy) -> list[Rung]:
    """Rungs from the best expected gradient down.

    The gradient gets worse most with the rows replayed, less with the rows kept to choose them
    from, and least with eight bits in place of all (examples/fidelity.py).
    """
    dtypes: list[Literal["int8"] | None] = [None]
    if policy.cache_dtype is None:
        dtypes.append("int8")
    most = _most(policy)
    rungs = [Rung(k, r, d) for k, r, d in product(SHARES, SHARES, dtypes) if r <= k]
    rungs = [rung for rung in rungs if rung.replay == rung.keep or rung.replay < most]
    return sorted(rungs, key=lambda x: (-min(x.replay, most), -x.keep, x.cache_dtype is not None))


def _most(policy: SagePolicy) -> float:
    """Share of the batch that a policy replays at most."""
    fraction: float = getattr(policy.replayer, "fraction", 1.0)
    return fraction


class Use(NamedTuple):
    """What a step took, all blocks together.

    Attributes:
        bytes: What the budget is about: the device's peak, or what SAGE cached.
        cached: Bytes that SAGE cached.
        valid: Valid tokens.
        kept: Rows kept.
        replayed: Rows replayed.
    """

    bytes: int
    cached: int
    valid: int
    kept: int
    replayed: int


class Costs(NamedTuple):
    """What the bytes of a step are made of.

    Attributes:
        base: What has nothing to do with SAGE: weights, optimizer, logits.
        always: Cached, however few rows are kept (keys and values, with `attention="full"`).
        row: Cached for each row kept.
        bits: What both are multiplied by, by `cache_dtype`.
        replay: At the peak of the backward pass, for each row replayed.
    """

    base: float
    always: float
    row: float
    bits: dict[str | None, float]
    replay: float

    @classmethod
    def of(cls, few: Use, more: Use, more_in_full: Use) -> Costs:
        """From three steps, the first two in the same bits.

        Args:
            few: Of few rows.
            more: Of more rows.
            more_in_full: Of as many, in other bits.
        """
        row = max(more.cached - few.cached, 0) / max(more.kept - few.kept, 1)
        always = max(more.cached - row * more.kept, 0.0)
        bits = more_in_full.cached / max(row * more_in_full.kept + always, 1.0)
        grown = (more.bytes - more.cached) - (few.bytes - few.cached)
        replay = max(grown, 0) / max(more.replayed - few.replayed, 1)
        base = max(use.bytes - use.cached - replay * use.replayed for use in (more, more_in_full))
        return cls(max(base, 0.0), always, row, {"few": 1.0, None: bits}, replay)

    def cached(self, kept: float, cache_dtype: str | None) -> float:
        """Bytes expected for so many rows."""
        bits = self.bits[None] if cache_dtype is None else self.bits["few"]
        return bits * (self.always + self.row * kept)


# of what a row's replay holds, what its run up to attention does: 0.27 to 0.31, says `estimate`
_AS_KEY = 0.3

# where memory runs out before anything could be measured: by how the rungs compare, roughly
_GUESSED = Costs(0.0, 0.0, 1.0, {"few": 0.3, None: 1.0}, 0.3)


class MemoryBudget:
    """Finds the best rung whose step fits, keeps to it, and goes down where it does not suffice.

    Four short steps tell what a step is made of (:class:`Costs`). The rung found is watched for
    the rest of the fit, and once lowered is not raised again.

    Args:
        budget: A size (`20GiB`), or a share of the device's memory, above 0 and at most 1 (0.9 or
            `90%`). On a CPU it is about the bytes that SAGE caches.
        policy: What is to be limited.

    Raises:
        ValueError: It is no size and no share, or the policy cannot be limited.

    Attributes:
        rung: What holds now.
        trying: Whether it is still looking for a rung.
        limit: The budget in bytes, from :meth:`start` on.
    """

    # the first is not counted: self-check, optimizer state
    _TRIALS = (
        Rung(0.125, 0.125, "int8"),
        Rung(0.125, 0.125, "int8"),
        Rung(0.25, 0.25, "int8"),
        Rung(0.25, 0.25, None),
    )

    def __init__(self, budget: str | float, policy: SagePolicy) -> None:
        self.share = _share(budget)
        self.limit = parse_size(budget) if self.share is None else 0
        self._policy, self.rungs = policy, ladder(policy)
        for rung in self.rungs:
            rung.of(policy)
        self.rung, self.on_device = self._TRIALS[0], False
        self._uses: list[Use] = []
        self._costs: Costs | None = None
        self.trying, self._tokens = True, 1

    def start(self, device: torch.device, resident: int) -> None:
        """Begin a fit.

        Args:
            device: Where it computes.
            resident: Bytes of weights and of gradients to come.

        Raises:
            ValueError: The weights alone do not fit, or there is no memory to have a share of.
        """
        self.on_device = device.type != "cpu"
        if self.share is not None:
            if not self.on_device:
                raise ValueError(
                    f"memory_budget={self.share} is a share of a device's memory, and the CPU has "
                    "none of its own: give the bytes that SAGE may cache, such as '500MiB'"
                )
            total = torch.get_device_module(device).get_device_properties(device).total_memory
            self.limit = int(self.share * total)
        if self.on_device and resident > self.limit * (1 - MARGIN):
            raise ValueError(
                f"memory_budget of {shown(self.limit)} is below what weights and gradients need: "
                f"{shown(resident)}, and a tenth is kept as margin; give more, or train fewer "
                "weights (LoRA)"
            )

    def state(self) -> dict[str, Any]:
        """The rung that was found, and what it was found by."""
        costs = None if self._costs is None else tuple(self._costs)
        return {"rung": tuple(self.rung), "costs": costs, "tokens": self._tokens}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.rung, self.trying, self._tokens = Rung(*state["rung"]), False, state["tokens"]
        self._costs = None if state["costs"] is None else Costs(*state["costs"])

    def of(self, policy: SagePolicy) -> SagePolicy:
        """`policy`, with no more than the rung allows."""
        return self.rung.of(policy)

    def note(self, use: Use) -> str | None:
        """Learn from a step; of several ranks, from the one that took most.

        Returns:
            What has been decided, in words; None where nothing changed.
        """
        if not self.trying:
            return self.lower(use.bytes / self.limit) if use.bytes > self.limit else None
        self._uses.append(use)
        self._tokens = max(self._tokens, use.valid)
        if len(self._uses) < len(self._TRIALS):
            self.rung = self._TRIALS[len(self._uses)]
            return None
        self.trying, self._costs = False, Costs.of(*self._uses[1:])
        for rung in self.rungs:
            if self._costs.base + self._above(rung) <= self.limit * (1 - MARGIN):
                self.rung = rung
                return f"memory budget of {shown(self.limit)}: {rung}"
        self.rung = min(self.rungs, key=self._above)
        return f"memory budget of {shown(self.limit)} is not enough even for {self.rung}"

    def lower(self, by: float = 1.25) -> str | None:
        """Go down for good: to the best rung that takes at most a `by`-th of what SAGE takes now.

        Returns:
            What holds now, in words; None where there is nothing below.
        """
        self.trying = False
        most = self._above(self.rung) / by
        below = [rung for rung in self.rungs if self._above(rung) <= most]
        if not below:
            return None
        self.rung = below[0]
        return f"memory budget of {shown(self.limit)} lowered: {self.rung}"

    def _above(self, rung: Rung) -> float:
        """Bytes above the base that a rung is expected to take, of the largest batch seen."""
        costs = self._costs or _GUESSED
        replayed = min(rung.replay, _most(self._policy)) * self._tokens
        if self._policy.attention == "kept":
            replayed += _AS_KEY * max(rung.keep * self._tokens - replayed, 0)
        dtype = rung.cache_dtype if self._policy.cache_dtype is None else "few"
        return costs.cached(rung.keep * self._tokens, dtype) + costs.replay * replayed


def _share(budget: str | float) -> float | None:
    """A share of a device's memory; None where it is something else."""
    try:
        percent = isinstance(budget, str) and budget.strip().endswith("%")
        value = float(budget.strip().rstrip("%")) if isinstance(budget, str) else float(budget)
    except ValueError:
        return None
    value = value / 100 if percent else value
    return value if 0 < value <= 1 and not isinstance(budget, bool) else None


def shown(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
