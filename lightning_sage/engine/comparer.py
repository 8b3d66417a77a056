"""Looks at what a replay gives to attention, and compares it with what the forward gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sage.engine.attention_call import AttentionCall
from lightning_sage.engine.axes import Axis, packed_argument
from lightning_sage.engine.follow import Weights
from lightning_sage.engine.replay import TRAINED_BIAS, Replayer
from lightning_sage.engine.seen import Kept, Seen, Written, rows_at, sunk
from lightning_sage.engine.sparse import probabilities
from lightning_sage.errors import ReplayError
from lightning_sage.ops import Rows, Sight, reference

TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class NeedsPairs(Exception):
    """A replay that has to see the entries of masks and biases."""


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each row, ``[N]`` float64."""
    found: Tensor = x.double().flatten(1).norm(dim=1)
    return found


def _sizes(want: Tensor) -> Tensor:
    """What errors of rows are relative to, ``[N]``; of a row that is nearly nothing, to others."""
    size = norms(want)
    return size + 1e-3 * size.max()


def random_numbers(drawn: list[str]) -> ReplayError:
    """What is raised of a block that draws what no replay can repeat: by functions or shapes."""
    return ReplayError(
        f"it draws random numbers ({', '.join(sorted(set(drawn)))}), which a replay of some rows "
        "cannot repeat: switch that off, or leave the block dense with dense_blocks"
    )


class Comparer:
    """A replay's handler that compares what it is shown with the dense pass."""

    def __init__(
        self,
        rows: Rows,
        seen: list[Seen | Written],
        finite: Tensor,
        replayer: Replayer,
        pairs: bool,
    ) -> None:
        self.rows, self.seen, self.finite, self.replayer = rows, seen, finite, replayer
        self.pairs = pairs
        self.dropout, self.counter = replayer.dropout, replayer.counter
        self.could_be_weights, self.softmax = replayer.could_be_weights, replayer.softmax
        self.routed, self.full = False, False
        self.drawn: list[torch.Size] = []

    @property
    def calls(self) -> int:
        """Attention calls so far."""
        return self.replayer.calls

    def draw(self, func: Callable[..., Tensor], args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The same numbers again.

        Raises:
            ReplayError: How many there are depends on the rows.
        """
        found = self.replayer.draw(func, args, kwargs)
        if self.replayer.drawn != self.drawn[: len(self.replayer.drawn)]:
            raise random_numbers([f"{list(shape)}" for shape in self.drawn])
        return found

    def judge(self, what: str, got: Tensor, want: Tensor, size: Tensor, hint: str = "") -> None:
        """Compare rows, ``[N, ...]``.

        Raises:
            ReplayError: They are not the same.
        """
        if got.shape != want.shape:
            raise ReplayError(f"its {what} has shape {list(got.shape)}, not {list(want.shape)}")
        errors = norms(got.double() - want.double()) / size.clamp(min=1e-30)
        # tokens of another sequence are not looked at for what is not finite
        errors = errors[self.finite] if len(errors) == len(self.finite) else errors
        # in half precision a row or two may be routed to other experts: their scores tie
        spared = min(2, len(errors) // 10) if self.routed and want.dtype.itemsize == 2 else 0
        error = float(errors.sort(descending=True).values[spared])
        allowed = TOLERANCE[want.dtype]
        attended = [kept.out.values.dtype for kept in self.replayer.kept[:1]]
        if attended and want.dtype.itemsize > attended[0].itemsize:
            allowed = TOLERANCE[attended[0]]
        if error != error:
            raise ReplayError(f"its {what} is not finite: are its weights, or what enters it?")
        if not error <= allowed:
            raise ReplayError(
                f"a replay of some rows gives another {what} than the forward (relative error "
                f"{error:.1e}, allowed {allowed:.0e}){hint}: leave the block dense with "
                "SagePolicy(dense_blocks=...), or name other blocks with SagePolicy(blocks=...)"
            )

    def _next(self) -> tuple[Seen | Written, Kept]:
        if self.calls >= len(self.seen):
            raise ReplayError("its replay makes more attention calls than the forward")
        return self.seen[self.calls], self.replayer.kept[self.calls]

    def attention(self, call: AttentionCall) -> Tensor:
        """Compare queries, keys, values, trained biases and the attention function at the rows.

        Raises:
            ReplayError: They are not the same.
            NeedsPairs: A bias is trained, and the replay was not given the entries of masks.
        """
        trained = call.mask is not None and call.mask.requires_grad
        if trained and not self.pairs:
            raise NeedsPairs
        seen, kept = self._next()
        if trained and self.full and not seen.crosses:
            raise ReplayError(TRAINED_BIAS)
        if isinstance(seen, Written):
            raise ReplayError("its replay calls attention where the forward wrote it out by hand")
        with torch.no_grad():
            keys = self._keys(seen)
            for name, rows in (("q", self.rows), ("k", keys), ("v", keys)):
                want = rows_at(getattr(seen.call, name), rows)
                got = getattr(call, name)[0].transpose(0, 1)
                self.judge(f"attention input {name}", got, want, _sizes(want))
            if trained and call.mask is not None:
                self._judge_bias(call.mask.detach(), seen)
            self._judge_function(seen, kept.out.values, kept.lse)
        return self.replayer.attention(call)

    def _keys(self, seen: Seen | Written) -> Rows:
        """The rows whose keys a replay makes."""
        if not seen.crosses:
            return self.rows
        return Rows.every(seen.keys.B, seen.keys.T, self.rows.index.device)

    def _judge_bias(self, bias: Tensor, seen: Seen) -> None:
        """A bias that is trained, ``[1, H, N, M]``, where it hides nothing."""
        assert seen.call.mask is not None
        wanted = (len(self.rows), len(self._keys(seen)))
        if bias.shape[0] != 1 or tuple(bias.shape[2:]) != wanted:
            raise ReplayError(
                f"its attention mask of shape {list(bias.shape)} requires grad (a learned bias), "
                "and is not that of the rows in a replay: freeze it"
            )
        axis = Axis.CROSS if seen.crosses else Axis.PAIRS
        want = packed_argument(seen.call.mask, axis, self.rows, real=True).expand_as(bias)
        apart = self.rows.sample[:, None] != self._keys(seen).sample
        hidden, hidden_before = (bias < -1e4) & ~apart, (want < -1e4) & ~apart
        if not torch.equal(hidden, hidden_before):
            raise ReplayError(
                "a replay of some rows hides other pairs from an attention with a learned bias "
                "than the forward: leave the block dense with SagePolicy(dense_blocks=...)"
            )
        out = apart | hidden
        got, want = (x.masked_fill(out, 0.0)[0].transpose(0, 1) for x in (bias, want))
        self.judge("attention bias", got, want, _sizes(want))

    def _judge_function(self, seen: Seen, want: Tensor, lse: Tensor) -> None:
        """The attention as understood here against what the model computed."""
        q, v = rows_at(seen.call.q, self.rows), rows_at(seen.call.v, seen.keys)
        sight = Sight(self.rows, seen.keys, seen.visible)
        alone = reference.attention_forward(q, seen.key_rows(), v, sight, seen.how)
        got, total = sunk(*alone, seen.call.sinks)
        hint = f"; it is attention of {seen.call.q.shape[1]} heads with something unknown in it"
        self.judge("attention output", got, want, _sizes(want), hint)
        close = torch.ones_like(lse[:, 0]) * lse.shape[1] ** 0.5
        self.judge("log-sum-exp", total.to(lse.dtype), lse, close + norms(lse), hint)

    def product(
        self, weights: Weights, x: Tensor, values: Tensor, given: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Compare weights made by hand, values, and their product at the rows.

        Raises:
            ReplayError: They are not the same.
        """
        if not self.replayer.knows(weights):
            return given(x)
        seen, kept = self._next()
        if isinstance(seen, Seen):
            raise ReplayError("its replay writes attention out by hand where the forward called it")
        with torch.no_grad():
            self._judge_written(seen, kept, weights, values)
        return self.replayer.product(weights, x, values, given)

    def _judge_written(self, seen: Written, kept: Kept, weights: Weights, values: Tensor) -> None:
        rows, keys = self.rows, self._keys(seen)
        by_head = values.reshape(1, -1, *values.shape[-2:])[0].transpose(0, 1)
        want = rows_at(seen.values, keys)
        self.judge("attention values", by_head, want, _sizes(want))
        logits = weights.logits.reshape(1, -1, *weights.logits.shape[-2:])
        got = probabilities(logits.to(kept.lse.dtype), kept.lse, rows, keys)[0].transpose(0, 1)
        heads = range(logits.shape[1])
        whole = torch.stack([seen.probabilities(rows, head) for head in heads], 1)
        apart = rows.sample[:, None] != keys.sample
        want = whole[:, :, keys.token].masked_fill(apart[:, None], 0.0)
        self.judge("attention weights", got, want, norms(whole))
        sums = torch.einsum("nhs,nhse->nhe", whole, seen.values[rows.sample].to(whole.dtype))
        out = kept.out.values
        self.judge("attention output", sums, out, _sizes(out))
