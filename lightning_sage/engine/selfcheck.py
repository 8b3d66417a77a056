"""Before a block's first sparse step: does a replay of some rows say what the dense pass said?

A random half of the tokens is replayed and compared: queries, keys and values at the rows, the
attention function as understood (mask, scale, cap) against its real output, and the block's output.
Right and wrong are orders of magnitude apart, so a block that cannot be replayed is refused by name
instead of training on a wrong gradient.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.buffers import buffers_kept, random_state_kept
from lightning_sage.engine.comparer import Comparer, NeedsPairs, norms, random_numbers
from lightning_sage.engine.dense_bytes import dense_bytes
from lightning_sage.engine.drops import Seed
from lightning_sage.engine.facts import Facts
from lightning_sage.engine.graph import graph_leaves, outlets, tell_of_attributes
from lightning_sage.engine.intercept import Tap
from lightning_sage.engine.keys import can_be_made
from lightning_sage.engine.replay import Crossing, Replayer
from lightning_sage.engine.seen import BY_HAND, Seen, Written
from lightning_sage.engine.sides import unheard
from lightning_sage.engine.trial import few, half
from lightning_sage.engine.wrapped import Learned
from lightning_sage.errors import ReplayError
from lightning_sage.ops import Rows

if TYPE_CHECKING:
    from lightning_sage.engine.job import Job


def first_call(job: Job) -> None:
    """Check a call of a kind that this block has not passed yet.

    Raises:
        ReplayError: The replay disagrees, or the block draws random numbers it cannot repeat.
    """
    session, wrapped = job.session, job.wrapped
    # where parts are sharded by themselves, ranks gather them together: all check at the same time
    seen = bool(wrapped.checked) if wrapped.nested else job.kind in wrapped.checked
    checks = session.force_check or not seen
    # not in a look at the gradient, which may be of a part of the batch
    call = wrapped.index, session.calls[wrapped.index]
    counts = session.measure_dense and call not in session.dense_bytes
    counts = counts and session.probe is None and not session.recalls
    if not checks:
        latest = next(reversed(wrapped.checked.values()))
        job.learn(wrapped.checked.get(job.kind, latest))
    if not (checks or counts):
        return
    hidden = job.hidden
    job.parts.refuse_repacking(hidden.device)
    job.parts.refuse_capacity()
    # hooks of a checkpoint around the block count what is saved, and this is saved once only
    unseen = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
    kept = random_state_kept(hidden.device), buffers_kept(job.block)
    with torch.no_grad(), kept[0], kept[1], unseen, unheard():
        if counts:
            session.dense_bytes[call] = dense_bytes(job)
        if checks:
            with job.parts.stirred():
                agreed = _compare(job, hidden)
            if agreed or wrapped.nested:
                wrapped.checked[job.kind] = job.learned


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _compare(job: Job, hidden: Tensor) -> bool:
    """True when all that was finite agreed, False when nothing was finite.

    Raises:
        ReplayError: See :func:`first_call`.
    """
    facts = job.session.facts(hidden)
    job.learn(Learned(_crossing_calls(job, facts)))
    recorder = job.session.recorder(Seed(1), facts, job.crossing)
    # compared with the model's own attention, which draws other weights to drop
    recorder.weights_too = False
    watch: list[str] = []
    called: set[str] = set()
    drawn, held = random.getstate(), job.arguments.held()
    out = job.run(recorder, *job.arguments.call(), tap=_watching(watch, called, hidden.device))
    if random.getstate() != drawn:
        random.setstate(drawn)
        watch.append("Python's random")
    if job.arguments.held() != held:
        raise ReplayError(
            "it writes into an argument, where other blocks find what it wrote without a gradient "
            "(shared keys and values?): leave it and those that read it dense with dense_blocks"
        )
    watch += [f"{list(x)}" for x in recorder.drawn if {job.T, job.B * job.T} & set(x)]
    if watch:
        raise random_numbers(watch)
    rows = Rows.of(half(facts.valid))
    if not bool(_finite(out, rows).any()):
        if job.wrapped.nested:
            raise ReplayError(
                "its first batch is padding alone, or not finite, and parts of it are sharded by "
                "themselves, which all ranks have to check together: shard it as a whole"
            )
        return False
    if any(isinstance(seen, Written) for seen in recorder.seen):
        job.learn(replace(job.learned, pairs=True))
        if job.session.policy.attention == "full":
            raise ReplayError(BY_HAND)
    keys = can_be_made(recorder.seen) and not (job.learned.pairs or job.wrapped.nested)
    job.learn(replace(job.learned, keys=keys))
    routed = bool(called & {"topk", "argmax", "sort", "argsort"})
    given = hidden, out, recorder.seen, routed, recorder.drawn
    first: ReplayError | None = None
    while True:
        try:
            _compare_replay(job, *given, rows)
            for others in _more(job, out, facts.valid, rows):
                _compare_replay(job, *given, others)
            return True
        except NeedsPairs:
            job.learn(replace(job.learned, pairs=True, keys=False))
        except ReplayError as error:
            if first is not None:
                raise first from None
            # once more, now with the block told where its tokens stand if it counts them
            first = error
            job.learn(replace(job.learned, positional=True))


def _compare_replay(
    job: Job,
    hidden: Tensor,
    out: Tensor,
    seen: list[Seen | Written],
    routed: bool,
    drawn: list[torch.Size],
    rows: Rows,
) -> None:
    """Replay some rows, and compare what attention is given and what the block returns.

    Raises:
        ReplayError: Something is not what it was.
    """
    replayer = Replayer(Seed(1), rows, [x.keep(rows, False, None) for x in seen])
    replayer.weights_too = False
    replayer.counter = job.counter(rows)
    comparer = Comparer(rows, seen, _finite(out, rows), replayer, job.learned.pairs)
    comparer.routed, comparer.drawn = routed, drawn
    comparer.full = job.session.policy.attention == "full"
    own = ops.gather_rows(hidden, rows.index)
    with job.tables_kept():
        again = _replayed(job, comparer, rows, own)
    if replayer.counter is not None:
        counted = replayer.counter.answered
        if job.learned.counted not in (0, counted):
            raise ReplayError("how often it counts its tokens depends on how many rows there are")
        job.learn(replace(job.learned, counted=counted))
    if comparer.calls != len(seen):
        raise ReplayError(
            f"its replay made {comparer.calls} attention calls where the forward made {len(seen)}"
        )
    dense = ops.gather_rows(out, rows.index)
    # the residual stream may be large; what counts is what the block adds to it
    size = norms(dense - own) + 1e-3 * norms(dense)
    hint = "" if seen else "; no attention call was seen, so its own may be hidden"
    comparer.judge("output", again, dense, size, hint)


def _finite(out: Tensor, rows: Rows) -> Tensor:
    finite: Tensor = out.flatten(0, 1)[rows.index].isfinite().all(-1)
    return finite


def _crossing_calls(job: Job, facts: Facts) -> frozenset[int]:
    """Which attention calls are to another sequence that is as long as the block's own.

    Their keys do not change with the block's hidden states.
    """
    if job.arguments.others != job.T:
        return frozenset()
    step = torch.arange(job.hidden.numel(), device=job.hidden.device).view(job.hidden.shape)
    other = job.hidden + torch.cos(step.double() * 0.7).to(job.hidden.dtype)
    keys = []
    for hidden in (job.hidden, other):
        recorder = job.session.recorder(Seed(1), facts, Crossing(job.T))
        job.run(recorder, *job.arguments.call({job.arguments.hidden: hidden}))
        keys.append([x.values if isinstance(x, Written) else x.call.k for x in recorder.seen])
    same = (torch.equal(x, y) for x, y in zip(*keys, strict=True))
    return frozenset(i for i, equal in enumerate(same) if equal)


def _replayed(job: Job, comparer: Comparer, rows: Rows, own: Tensor) -> Tensor:
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
        except (ReplayError, NeedsPairs):
            raise
        except Exception as error:
            raise ReplayError(
                f"its replay on some rows raised {type(error).__name__}: "
                f"{error or 'without a word'}; leave the block dense with dense_blocks"
            ) from error
        job.learn(replace(job.learned, outlets=outlets(job, own)))
    tell_of_attributes(job)
    known = {id(x) for x in (own, *leaves.values(), *job.parts.trainable())}
    # where parts are sharded by themselves, the replay hands gradients to whatever is there
    lost = (
        []
        if job.wrapped.nested
        else [list(x.shape) for x in graph_leaves(out) if id(x) not in known]
    )
    if lost:
        raise ReplayError(
            f"it uses {len(lost)} tensors that require grad and are not registered on it, the "
            f"first of shape {lost[0]}: their gradient would be lost; register them as parameters "
            "or pass them as arguments"
        )
    return out.detach()


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


def _more(job: Job, out: Tensor, valid: Tensor, rows: Rows) -> Iterator[Rows]:
    """Other rows to compare, once `rows` were the same."""
    # some blocks look at how many rows there are
    found = [few(rows)]
    if job.learned.positional:
        # the places that were left out: a block may count from the end, or to it
        found += [Rows.of(half(valid, ends=True)), Rows.of(valid)]
    for others in found:
        # parts that are sharded by themselves are gathered by all ranks at the same time
        if not job.wrapped.nested and bool(_finite(out, others).any()):
            yield others
