"""One scale along which a policy keeps and replays more or less, and what holds a fidelity."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

from lightning_sage.policy import SagePolicy
from lightning_sage.records import BlockRecord
from lightning_sage.sampling import ImportanceSampling
from lightning_sage.selections import Selection

# what of a selection is moved; the fraction at most (TopMass) stays as it was set
_SETTINGS = ("fraction", "mass")
# so near to everything that it is meant
_ALL = 0.995
# log-odds by which a reading moves the dial where the error is twice what it may be, or more
_GAIN = 0.15


def setting(selection: Selection | None) -> str | None:
    """The attribute of a selection that says how much it takes; None where nothing does."""
    known = {} if selection is None else vars(selection)
    return next((name for name in _SETTINGS if name in known), None)


class Dial:
    """Moves fractions and masses of `keep` and `replay` together, in log-odds.

    Log-odds go nowhere below 0 or beyond 1, and a step of one means about as much for the error of
    a gradient at a tenth of the tokens as at nine tenths.

    Args:
        policy: What the scale's 0 stands for.
        bounds: The least and the most of a fraction or mass.

    Raises:
        ValueError: Nothing of the policy can be moved, or the bounds are no range in (0, 1].
    """

    def __init__(self, policy: SagePolicy, bounds: tuple[float, float] = (0.05, 1.0)) -> None:
        least, most = bounds
        if not 0 < least < most <= 1:
            raise ValueError(f"bounds must be two fractions, 0 < least < most <= 1, got {bounds}")
        if setting(policy.keeper) is None and setting(policy.replayer) is None:
            raise ValueError(
                f"neither keep={policy.keep!r} nor replay={policy.replay!r} has a fraction or a "
                "mass that could be moved: give one of them, such as "
                "replay=ImportanceSampling(0.5), or no fidelity_target"
            )
        self.policy, self.least, self.most = policy, least, most

    def at(self, shift: float) -> SagePolicy:
        """The policy moved by so much log-odds; more of everything where it is positive."""
        if not shift:
            return self.policy
        keep, replay = self.policy.keeper, self.policy.replayer
        return replace(
            self.policy,
            keep=self._moved(keep, shift),
            replay=None if replay is None else self._moved(replay, shift),
        )

    def _moved(self, selection: Selection, shift: float) -> Selection:
        name = setting(selection)
        if name is None:
            return selection
        odds = math.exp(_log_odds(getattr(selection, name)) + shift)
        value = odds / (1 + odds)
        moved = copy.copy(selection)
        # one below the bounds stays there rather than go up when all goes down
        least = min(self.least, getattr(selection, name))
        setattr(moved, name, self.most if value > _ALL else min(max(value, least), self.most))
        return moved

    def ends(self) -> tuple[float, float]:
        """Shifts beyond which nothing moves any more."""
        known = [
            getattr(selection, name)
            for selection in (self.policy.keeper, self.policy.replayer)
            if selection is not None and (name := setting(selection))
        ]
        down = min(_log_odds(self.least) - _log_odds(value) for value in known)
        up = max(_log_odds(min(self.most, _ALL)) - _log_odds(value) for value in known)
        return min(down, 0.0), max(up, 0.0) + 1e-6


def _log_odds(value: float) -> float:
    value = min(value, _ALL)
    return math.log(value / (1 - value))


class FidelityControl:
    """Holds the mean cosine of gradients at a target, by integral control along a dial.

    The first reading starts a search by halves on one batch. Batches differ far more than a policy
    drifts, so each later reading moves the dial by a little: in proportion to what the cosine
    lacks to 1 beyond what the target does, which has no error on average where the mean has none.

    Args:
        dial: What is moved.
        target: The cosine to hold, in (0, 1).

    Attributes:
        shift: Where the dial stands.
    """

    def __init__(self, dial: Dial, target: float) -> None:
        if not 0 < target < 1:
            raise ValueError(f"fidelity_target must lie in (0, 1), got {target}; keep=1 is exact")
        self.dial, self.target, self.shift = dial, target, 0.0
        self._searched = False

    @property
    def policy(self) -> SagePolicy:
        """The policy that the dial stands at."""
        return self.dial.at(self.shift)

    @property
    def at_its_end(self) -> bool:
        """Whether the policy can give no better gradient within the bounds."""
        return self.shift >= self.dial.ends()[1]

    def update(self, cosine: float, measure: Callable[[SagePolicy], float | None]) -> None:
        """Move the dial.

        Args:
            cosine: Of the policy's gradient on this batch.
            measure: Gives that of another policy on the same batch; None if it cannot.
        """
        least, most = self.dial.ends()
        if self._searched:
            error = (self.target - cosine) / (1 - self.target)
            self.shift = min(max(self.shift + _GAIN * min(error, 1.0), least), most)
            return
        self._searched = True
        low, high = (self.shift, most) if cosine < self.target else (least, self.shift)
        for _ in range(5):
            middle = (low + high) / 2
            found = measure(self.dial.at(middle))
            if found is None:
                return
            low, high = (middle, high) if found < self.target else (low, middle)
        self.shift = (low + high) / 2

    def resume(self, shift: float) -> None:
        """Go on from where a fit that was interrupted stood."""
        self.shift, self._searched = shift, True


def advice(policy: SagePolicy, records: list[BlockRecord]) -> str:
    """What of a policy to raise for a better gradient, by what it kept and replayed of a batch."""
    valid, kept, replayed = (
        sum(int(x.sum()) for r in records if (x := getattr(r, name)) is not None)
        for name in ("valid", "kept", "replayed")
    )
    name = "replay" if replayed < 0.9 * kept and setting(policy.replayer) else "keep"
    selection = policy.replayer if name == "replay" else policy.keeper
    share = (replayed if name == "replay" else kept) / max(valid, 1)
    if setting(selection) is None:
        text = "attention='full' and fewer bits saved (cache_dtype) are what is left to try"
    else:
        more = copy.copy(getattr(Dial(policy).at(1.0), name))
        moved = setting(more) or ""
        setattr(more, moved, round(getattr(more, moved), 2))
        text = f"raise {name}, now {selection!r} ({share:.0%} of the tokens), say to {more!r}"
    if isinstance(policy.replayer, ImportanceSampling) and name == "replay":
        text += "; a part of it is noise and no bias, as rows are drawn and weighted"
    return text
