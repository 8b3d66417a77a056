"""Which tokens: SagePolicy, the one description of what is kept and replayed.

Two independent choices. `keep` is made in the forward pass, per sample, and bounds memory; `replay`
is made in the backward pass, over the rows that were kept in the whole batch, and bounds time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import Tensor, nn

from lightning_sage.sampling import ImportanceSampling, LossFirst
from lightning_sage.selections import Selection, TopFraction, TopMass

BlockFilter = Callable[[nn.Module, str], bool]
Keep = Selection | float
Replay = Selection | float | None
Preset = Literal["memory", "balanced", "speed", "paper"]


@dataclass(frozen=True)
class SagePolicy:
    """What is kept in the forward pass and replayed in the backward pass.

    The defaults are the paper's choice (Kim & Lee, ACL 2025) made safe: the loss-bearing rows are
    always in, and where that keeps more than half of the tokens, half are replayed: those of
    largest gradient, and where more than half bear loss, a weighted draw of them.
    What costs less for the same quality is :meth:`preset`.

    Args:
        keep: Rows kept in the forward pass: a selection, or a float for TopFraction.
        replay: Rows replayed among the kept: a selection, a float for TopFraction by gradient, or
            None for all of them.
        saliency: Score of a token: attention it receives, norm of its values, or their product.
        queries: Query rows whose attention counts: the loss-bearing ones (`auto`: learned from the
            model's `labels`), the last valid token, the labelled ones, or all.
        attention: Whose keys and values the replayed queries meet in the backward pass. `kept`:
            those of every kept row, which learn as keys and values where they are not replayed
            themselves (blocks that write attention out by hand, have several of their own tokens or
            a trained bias of pairs, or are sharded part by part: as `salient`).
            `salient`: those of the replayed rows. `full`: those of every token, as constants
            outside the replayed rows, for which keys and values are kept.
        sinks: First valid tokens of a sample that are always kept.
        keep_last: Always keep the last valid token.
        keep_loss_rows: Always keep the loss-bearing rows; where they alone exceed the budget of
            `keep`, the highest-scored of them (by `LossFirst` and `RandomTokens` any). Sinks and
            last token come on top of the budget where the loss-bearing rows fill it.
        dense_blocks: Blocks left as they are: the first n, the last n (negative), or indices.
        unselected: `identity` computes every token in the forward pass; `skip` (the authors'
            released variant) lets unselected tokens skip the blocks after the first tenth, which
            changes the training forward.
        cache_dtype: How kept rows (and keys and values, with `attention="full"`) wait for the
            backward pass: `int8` or `fp8` (e4m3) with a scale for every head or 128 numbers,
            `bf16`, or None for every bit. The forward stays exact; the replay starts from the
            rounded rows.
        blocks: Names or glob patterns (`*` is one part of a name) of the blocks, or a filter
            ``(module, name) -> bool``; None finds transformers' layers.
    """

    keep: Keep = TopMass(0.8)
    replay: Replay = ImportanceSampling(0.5)
    saliency: Literal["attention", "value_norm", "attention_value_norm"] = "attention"
    queries: Literal["auto", "last", "labels", "all"] = "auto"
    attention: Literal["kept", "salient", "full"] = "kept"
    sinks: int = 4
    keep_last: bool = True
    keep_loss_rows: bool = True
    dense_blocks: int | tuple[int, ...] = ()
    unselected: Literal["identity", "skip"] = "identity"
    cache_dtype: Literal["bf16", "int8", "fp8"] | None = None
    blocks: list[str] | BlockFilter | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, before any model is touched."""
        for name, choices in (
            ("saliency", ("attention", "value_norm", "attention_value_norm")),
            ("queries", ("auto", "last", "labels", "all")),
            ("attention", ("kept", "salient", "full")),
            ("unselected", ("identity", "skip")),
            ("cache_dtype", (None, "bf16", "int8", "fp8")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}"
                )
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"sinks must be a number of tokens, got {self.sinks!r}; 0 keeps none")
        for name, optional in (("keep", False), ("replay", True)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number or isinstance(value, Selection) or (optional and value is None)):
                raise ValueError(f"{name} must be a fraction or a selection, got {value!r}")
        indices = (
            self.dense_blocks
            if isinstance(self.dense_blocks, tuple | list)
            else (self.dense_blocks,)
        )
        if not all(isinstance(i, int) for i in indices):
            raise ValueError(
                f"dense_blocks must be a count or indices of blocks, got {self.dense_blocks!r}"
            )
        if self.blocks is not None and (isinstance(self.blocks, str) or not self.blocks):
            raise ValueError(
                f"blocks must be a list of names or patterns, or a filter, got {self.blocks!r}"
            )
        if type(self.keeper).keep is Selection.keep:
            raise ValueError(f"{self.keep!r} chooses by gradient: use it as replay, not as keep")
        if self.replayer is not None and type(self.replayer).replay is Selection.replay:
            raise ValueError(f"{self.replay!r} chooses in the forward: use it as keep, not replay")
        if self.unselected == "skip" and self.attention == "full":
            raise ValueError(
                "attention='full' needs keys and values of every token, which unselected='skip' "
                "never computes; use attention='salient'"
            )

    @staticmethod
    def preset(name: Preset) -> SagePolicy:
        """A policy that was measured against dense training (examples/evidence.md).

        Args:
            name: `balanced` is what SAGE does where no policy is given. `speed` computes less, by
                a noisier gradient. `memory` holds a quarter of each sample: where more tokens bear
                loss, a random choice of them. `paper` is the method as published.

        Raises:
            ValueError: There is none of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; choose among {', '.join(PRESETS)}")
        return PRESETS[name]

    @property
    def keeper(self) -> Selection:
        """`keep` as a selection."""
        return self.keep if isinstance(self.keep, Selection) else TopFraction(self.keep)

    @property
    def replayer(self) -> Selection | None:
        """`replay` as a selection; None replays every kept row."""
        if self.replay is None or isinstance(self.replay, Selection):
            return self.replay
        return TopFraction(self.replay)

    def priority(self, valid: Tensor, loss_rows: Tensor) -> Tensor:
        """Rows that are kept first.

        Args:
            valid: ``[B, T]`` bool, False on padding.
            loss_rows: ``[B, T]`` bool, True where the row bears loss.

        Returns:
            ``[B, T]`` int64: 2 for sinks and the last valid token, plus 1 for loss-bearing rows.
        """
        order = valid.long().cumsum(-1)
        fixed = valid & (order <= self.sinks)
        if self.keep_last:
            fixed = fixed | (valid & (order == order[:, -1:]))
        priority = 2 * fixed.long()
        if self.keep_loss_rows:
            priority = priority + (loss_rows & valid).long()
        return priority

    def left_dense(self, count: int) -> set[int]:
        """Indices of the blocks left dense, of `count` in all.

        Raises:
            ValueError: An index is out of range, or no block would be left to wrap.
        """
        n = self.dense_blocks
        if isinstance(n, int):
            indices = tuple(range(count)[:n] if n >= 0 else range(count)[n:])
        else:
            indices = tuple(n)
        wrong = [i for i in indices if not -count <= i < count]
        if wrong:
            raise ValueError(f"dense_blocks {wrong} out of range: the model has {count} blocks")
        dense = {i % count for i in indices}
        if len(dense) == count:
            raise ValueError(f"dense_blocks={n!r} leaves none of the {count} blocks to wrap")
        return dense


PRESETS = {
    "memory": SagePolicy(LossFirst(0.25), replay=None, cache_dtype="int8"),
    "balanced": SagePolicy(TopMass(0.95), ImportanceSampling(0.33), cache_dtype="int8"),
    "speed": SagePolicy(TopMass(0.9), ImportanceSampling(0.2), cache_dtype="int8"),
    "paper": SagePolicy(TopMass(0.8), replay=None, sinks=0, keep_loss_rows=False),
}


def as_policy(given: SagePolicy | Preset | None) -> SagePolicy:
    """The policy that is meant: itself, the preset of a name, or the one for whoever has no wish.

    Raises:
        ValueError: There is no preset of that name.
    """
    if isinstance(given, SagePolicy):
        return given
    return SagePolicy.preset("balanced" if given is None else given)


def named(policy: SagePolicy) -> str:
    """A policy as its user would say it: the preset that it is, or all that differs."""
    for name, preset in PRESETS.items():
        if replace(policy, blocks=None, dense_blocks=()) == preset:
            return f"preset '{name}'"
    default = SagePolicy()
    changed = {f.name: getattr(policy, f.name) for f in fields(policy)}
    own = [f"{k}={v!r}" for k, v in changed.items() if v != getattr(default, k)]
    return f"SagePolicy({', '.join(own)})"
