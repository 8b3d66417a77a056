"""Before a block's first sparse step: does a replay of some rows say what the dense pass said?

A random half of the tokens is replayed and compared: queries, keys and values at the rows, the
attention function as understood (mask, scale, cap) against its real output, and the block's output.
Right and wrong are orders of magnitude apart, so a block that cannot be replayed is refused by name
instead of training on a wrong gradient.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.arguments import ReplayError
from lightning_sage.buffers import buffers_kept
from lightning_sage.intercept import AttentionCall, Tap, random_state_kept
from lightning_sage.memory import saved_bytes
from lightning_sage.ops import Rows, Sight, reference
from lightning_sage.replay import Replayer, Seed, Seen, keep_attention, rows_at

if TYPE_CHECKING:
    from lightning_sage.job import Job

# rows of a sample that are compared
ROWS = 16
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def first_call(job: Job) -> None:
    """Check a call of a kind that this block has not passed yet.

    Raises:
        ReplayError: The replay disagrees, or the block draws random numbers it cannot repeat.
    """
    session, wrapped = job.session, job.wrapped
    kind = (tuple(job.modes), job.arguments.signature)
    # where parts are sharded by themselves, ranks gather them together: all check at the same time
    seen = bool(wrapped.checked) if wrapped.nested else kind in wrapped.checked
    checks = session.force_check or not seen
    # not in a look at the gradient, which may be of a part of the batch
    counts = session.measure_dense and wrapped.index not in session.dense_bytes
    counts = counts and session.probe is None
    if not (checks or counts):
        return
    hidden = job.hidden
    job.parts.refuse_repacking(hidden.device)
    # hooks of a checkpoint around the block count what is saved, and this is saved once only
    unseen = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
    with torch.no_grad(), random_state_kept(hidden.device), buffers_kept(job.block), unseen:
        if counts:
            session.dense_bytes[wrapped.index] = dense_bytes(job)
        if checks and (_compare(job, hidden) or wrapped.nested):
            wrapped.checked.add(kind)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _compare(job: Job, hidden: Tensor) -> bool:
    """True when all that was finite agreed, False when nothing was finite.

    Raises:
        ReplayError: See :func:`first_call`.
    """
    facts = job.session.facts(hidden)
    recorder = job.session.recorder(Seed(1), facts)
    # compared with the model's own attention, which draws other weights to drop
    recorder.weights_too = False
    watch: list[str] = []
    called: set[str] = set()
    drawn = random.getstate()
    out = job.run(recorder, *job.arguments.call(), tap=_watching(watch, called, hidden.device))
    if random.getstate() != drawn:
        random.setstate(drawn)
        watch.append("Python's random")
    if watch:
        raise ReplayError(
            f"it draws random numbers ({', '.join(sorted(set(watch)))}), which a replay of some "
            "rows cannot repeat: switch that off, or leave the block dense with dense_blocks"
        )
    rows = Rows.of(_half(facts.valid))
    finite = out.flatten(0, 1)[rows.index].isfinite().all(-1)
    if not bool(finite.any()):
        if job.wrapped.nested:
            raise ReplayError(
                "its first batch is padding alone, or not finite, and parts of it are sharded by "
                "themselves, which all ranks have to check together: shard it as a whole"
            )
        return False
    kept = [keep_attention(seen, rows, False, None) for seen in recorder.seen]
    replayer = Replayer(Seed(1), rows, kept)
    replayer.weights_too = False
    comparer = _Comparer(rows, recorder.seen, finite, replayer)
    comparer.routed = bool(called & {"topk", "argmax", "sort", "argsort"})
    own = ops.gather_rows(hidden, rows.index)
    again = _replayed(job, comparer, rows, own)
    if comparer.calls != len(recorder.seen):
        raise ReplayError(
            f"its replay made {comparer.calls} attention calls where the forward made "
            f"{len(recorder.seen)}"
        )
    dense = ops.gather_rows(out, rows.index)
    # the residual stream may be large; what counts is what the block adds to it
    size = _norms(dense - own) + 1e-3 * _norms(dense)
    hint = "" if recorder.seen else "; no attention call was seen, so its own may be hidden"
    comparer.judge("output", again, dense, size, hint)
    return True


def _replayed(job: Job, comparer: _Comparer, rows: Rows, own: Tensor) -> Tensor:
    """Output of the replay, ``[N, C]``, whose graph leads nowhere but to what gets a gradient.

    Raises:
        ReplayError: The replay raised, or uses a tensor whose gradient would be lost.
    """
    leaves = job.leaves()
    with torch.enable_grad():
        own = own.detach().requires_grad_()
        for i in job.extra:
            leaves[i] = leaves[i].detach().requires_grad_()
        try:
            out = job.run(comparer, *job.packed_call(rows, own, leaves)).squeeze(0)
        except ReplayError:
            raise
        except Exception as error:
            raise ReplayError(
                f"its replay on some rows raised {type(error).__name__}: {error}; leave the block "
                "dense with dense_blocks"
            ) from error
    known = {id(x) for x in (own, *leaves.values(), *job.parameters)}
    # where parts are sharded by themselves, the replay hands gradients to whatever is there
    lost = (
        []
        if job.wrapped.nested
        else [list(x.shape) for x in _graph_leaves(out) if id(x) not in known]
    )
    if lost:
        raise ReplayError(
            f"it uses {len(lost)} tensors that require grad and are not registered on it, the "
            f"first of shape {lost[0]}: their gradient would be lost; register them as parameters "
            "or pass them as arguments"
        )
    return out.detach()


def _graph_leaves(out: Tensor) -> Iterator[Tensor]:
    """Tensors in which the graph of `out` ends."""
    stack, seen = [out.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(following for following, _ in node.next_functions)


def _watching(found: list[str], called: set[str], device: torch.device) -> type[Tap]:
    """A tap that notes the functions that moved a random generator, and all that were called."""

    class Watching(Tap):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            before = _generators(device)
            result = super().__torch_function__(func, types, args, kwargs)
            called.add(getattr(func, "__name__", ""))
            if any(not torch.equal(x, y) for x, y in zip(before, _generators(device), strict=True)):
                found.append(getattr(func, "__name__", str(func)))
            return result

    return Watching


def _generators(device: torch.device) -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _half(valid: Tensor) -> Tensor:
    """A fixed random half of each sample's valid tokens, and at most `ROWS` of them.

    What is special of first and last tokens must show: the first and the last sample go without
    them, so that others stand in their places, and the samples between have them.
    """
    index = torch.arange(valid.numel(), device=valid.device).view_as(valid)
    order = valid.long().cumsum(1)
    ends = (order == 1) | (order == order[:, -1:])
    between = torch.ones_like(valid[:, :1], dtype=torch.float64)
    between[0] = between[-1] = 0
    key = torch.where(ends, 1 - 2 * between, ops.uniform(1, 0, index)).masked_fill(~valid, 2.0)
    count = ((valid.sum(1, keepdim=True) + 1) // 2).clamp(max=ROWS)
    chosen: Tensor = valid.logical_and(key.argsort(1).argsort(1) < count)
    return chosen


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = x.double().flatten(1).norm(dim=1)
    return norms


class _Comparer:
    """A replay's handler that compares what it is shown with the dense pass."""

    def __init__(self, rows: Rows, seen: list[Seen], finite: Tensor, replayer: Replayer) -> None:
        self.rows, self.seen, self.finite, self.replayer = rows, seen, finite, replayer
        self.dropout = replayer.dropout
        self.routed = False

    @property
    def calls(self) -> int:
        """Attention calls so far."""
        return self.replayer.calls

    def judge(self, what: str, got: Tensor, want: Tensor, size: Tensor, hint: str = "") -> None:
        """Compare rows, ``[N, ...]``.

        Raises:
            ReplayError: They are not the same.
        """
        if got.shape != want.shape:
            raise ReplayError(f"its {what} has shape {list(got.shape)}, not {list(want.shape)}")
        errors = (_norms(got.double() - want.double()) / size.clamp(min=1e-30))[self.finite]
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

    def attention(self, call: AttentionCall) -> Tensor:
        """Compare queries, keys, values and the attention function itself at the rows."""
        with torch.no_grad():
            self._compare(call)
        return self.replayer.attention(call)

    def _compare(self, call: AttentionCall) -> None:
        if self.calls >= len(self.seen):
            raise ReplayError("its replay makes more attention calls than the forward")
        seen, kept = self.seen[self.calls], self.replayer.kept[self.calls]
        for name in ("q", "k", "v"):
            want = rows_at(getattr(seen.call, name), self.rows)
            size = _norms(want) + 1e-3 * _norms(want).max()
            self.judge(
                f"attention input {name}", getattr(call, name)[0].transpose(0, 1), want, size
            )
        self._judge_function(seen, kept.out.values, kept.lse)

    def _judge_function(self, seen: Seen, want: Tensor, lse: Tensor) -> None:
        """The attention as understood here against what the model computed."""
        q, v = rows_at(seen.call.q, self.rows), rows_at(seen.call.v, seen.keys)
        sight = Sight(self.rows, seen.keys, seen.visible)
        got, got_lse = reference.attention_forward(q, seen.key_rows(), v, sight, seen.how)
        hint = f"; it is attention of {seen.call.q.shape[1]} heads with something unknown in it"
        self.judge("attention output", got, want, _norms(want) + 1e-3 * _norms(want).max(), hint)
        close = torch.ones_like(lse[:, 0]) * lse.shape[1] ** 0.5
        self.judge("log-sum-exp", got_lse.to(lse.dtype), lse, close + _norms(lse), hint)


def dense_bytes(job: Job) -> int:
    """Bytes that a dense forward of the block saves for backward; its graph is dropped at once.

    Parameters, buffers and arguments that blocks share are not counted.
    """
    block = job.block
    there = [*block.parameters(), *block.buffers(), *job.leaves().values()]
    hidden = job.hidden.detach().requires_grad_()
    with torch.enable_grad(), job.surroundings.restored(), saved_bytes(exclude=there) as held:
        args, kwargs = job.arguments.call({job.arguments.hidden: hidden})
        output = job.wrapped.run(block, *args, **kwargs)
        bytes_held = held()
    del output
    return bytes_held
