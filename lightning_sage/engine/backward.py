"""Backward pass of a block: choose among the kept rows, replay them, hand gradients on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sage import ops
from lightning_sage.balance import fit_replayed, least
from lightning_sage.engine.cache import SparseCache
from lightning_sage.engine.job import Job
from lightning_sage.engine.keys import KeyRows, UpToAttention, key_rows
from lightning_sage.engine.replay import Replayer
from lightning_sage.engine.session import REPLAY_STREAM
from lightning_sage.engine.thinning import kept_norms, thinned
from lightning_sage.engine.wrapped import hooks_off
from lightning_sage.errors import ReplayError
from lightning_sage.ops import Rows
from lightning_sage.selections import Selection


class _Part(NamedTuple):
    """Rows that are replayed at once.

    Attributes:
        rows: The rows.
        picked: Which of the kept rows they are; None for all.
        others: Kept rows whose keys and values learn from these; None where they do not.
    """

    rows: Rows
    picked: Tensor | None
    others: Tensor | None = None


def _chosen_rows(job: Job, cache: SparseCache, grad: Tensor) -> _Part:
    """Rows to replay."""
    index, agreement = cache.index, job.session.agreement
    picked, wanted = None, job.wanted
    if job.session.policy.replayer is not None:
        picked, wanted = _picked(job, job.session.policy.replayer, cache, grad)
        if picked is not None:
            index = index.index_select(0, picked)
    if agreement is not None:
        agreement.note(wanted, job.valid_count)
    record = job.record
    assert record is not None
    record.rows, record.seed = index, job.seed.value
    others = record.keys = None
    if picked is not None and job.makes_keys and 0 < len(picked) < len(cache.index):
        left = torch.ones(len(cache.index), dtype=torch.bool, device=picked.device)
        left.index_fill_(0, picked, False)
        others = ops.picked(left, len(cache.index) - len(picked))
        record.keys = cache.index.index_select(0, others)
    return _Part(Rows(index, job.B, job.T), picked, others)


def _picked(
    job: Job, replayer: Selection, cache: SparseCache, grad: Tensor
) -> tuple[Tensor | None, Tensor | int]:
    """Which kept rows are replayed (None: all), and how many would be without a budget."""
    kept, valid, budget = len(cache.index), job.valid_count, job.budget
    wanted: Tensor | int | None = replayer.replay_count(kept, valid)
    count = wanted if budget is None else min(budget.rows, kept)
    known = wanted is not None or job.session.agreement is None
    if count == kept and known:
        return None, least(kept if wanted is None else wanted, job.wanted)
    norms = kept_norms(cache, grad)
    noise = ops.uniform(int(job.seed), REPLAY_STREAM, cache.index) if replayer.random else norms
    given = norms, cache.saliency, valid, noise
    # with a budget what it would choose by itself is only asked for where that is to be counted
    own = replayer.replay(*given) if budget is None or wanted is None else None
    if wanted is None:
        assert own is not None
        wanted = own.rows.sum()
    wanted = least(wanted, job.wanted)
    if count == kept:
        return None, wanted
    if budget is not None:
        own = fit_replayed(replayer, own, budget, given)
    assert own is not None
    assert count is None or isinstance(count, int)
    return ops.picked(own.rows, count), wanted


def _parts(job: Job, whole: _Part) -> Iterator[_Part]:
    """Rows in parts of whole samples, where all their pairs are held at once.

    A part has no more rows than a sample has tokens, or is one sample: its pairs are no more than
    those that a dense pass holds of one sample.
    """
    rows, picked, _ = whole
    if not job.learned.pairs or job.wrapped.nested or len(rows) <= job.T:
        yield whole
        return
    start = stop = 0
    for count in (*rows.counts, job.T + 1):
        if stop > start and stop - start + count > job.T:
            part = slice(start, stop)
            some = torch.arange(start, stop, device=rows.index.device)
            yield _Part(
                Rows(rows.index[part], rows.B, rows.T),
                some if picked is None else picked[part],
            )
            start = stop
        stop += count


def replay(
    job: Job,
    cache: SparseCache,
    leaves: dict[int, Tensor],
    grads: Sequence[Tensor],
    wants: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of hidden states, other differentiable arguments and parameters.

    Args:
        job: The call.
        cache: What it left.
        leaves: Its arguments besides the hidden states, by index.
        grads: Of the hidden states that it returned, and of what else was collected inside of it.
        wants: Which inputs want a gradient, hidden states first.
    """
    grad, targets = grads[0], job.trained()
    _look_at_padding(job, grad)
    grad = thinned(job, cache, grad)
    grads = (grad, *grads[1:])
    whole = _chosen_rows(job, cache, grad)
    for i in job.extra:
        leaves[i] = leaves[i].detach().requires_grad_()
    others = [leaves[i] for i in job.extra] + targets
    through, as_keys = [], None
    rest: list[Tensor | None] = [None] * len(others)
    for part in _parts(job, whole) if len(whole.rows) else ():
        hidden = cache.hidden.some(part.picked, (job.C,), job.dtype).requires_grad_(wants[0])
        inputs = [hidden, *others] if wants[0] else others
        keys = None
        if part.others is not None:
            keys = cache.hidden.some(part.others, (job.C,), job.dtype).requires_grad_(wants[0])
            inputs = [keys, *inputs] if wants[0] else inputs
        found = _replayed(job, cache, leaves, part, grads, (hidden, keys), inputs)
        if wants[0]:
            as_keys = None if keys is None else _zeros_for(found.pop(0), keys)
            through.append(_zeros_for(found.pop(0), hidden))
        rest = [_sum(x, y) for x, y in zip(rest, found, strict=True)]
    # zeros and not None: sharding strategies wait for every rank's gradient
    rest = [torch.zeros_like(x) if g is None else g for x, g in zip(others, rest, strict=True)]
    if not wants[0]:
        return [None, *rest]
    if not through:
        return [grad, *rest]
    rows = torch.cat(through) if len(through) > 1 else through[0]
    into = ops.scatter_rows(rows, whole.rows.index, grad)
    if as_keys is not None:
        assert job.record is not None
        assert job.record.keys is not None
        into.flatten(0, 1).index_add_(0, job.record.keys, as_keys.to(into.dtype))
    return [into, *rest]


def _look_at_padding(job: Job, grad: Tensor) -> None:
    """Warn once of a loss that reaches padding: rows that are never kept would have learned."""
    known = job.wrapped.unreached is not None or job.wrapped.nested
    if known or job.record is None or job.session.told_of_padding:
        return
    padding = ~job.record.valid
    if 0 < job.valid_count < padding.numel() and bool((grad.count_nonzero(-1) > 0)[padding].any()):
        job.session.told_of_padding = True
        warnings.warn(
            f"the loss has a gradient at tokens that are padding to SAGE, behind block "
            f"'{job.wrapped.name}': padding is never kept, so the block learns nothing from it "
            "(does the model pool over padding, or read its last position? then pad on the other "
            "side, or leave attention_mask out)",
            stacklevel=2,
        )


def _zeros_for(gradient: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if gradient is None else gradient


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y


def _replayed(
    job: Job,
    cache: SparseCache,
    leaves: dict[int, Tensor],
    part: _Part,
    grads: Sequence[Tensor],
    states: tuple[Tensor, Tensor | None],
    inputs: list[Tensor],
) -> list[Tensor | None]:
    """Gradients of `inputs` through some rows.

    Args:
        job: The call.
        cache: What it left.
        leaves: Its arguments besides the hidden states, by index.
        part: The rows.
        grads: See :func:`replay`.
        states: Hidden states of the rows, ``[R, C]``, and of those that are keys alone.
        inputs: What the gradients are of.
    """
    (rows, picked, others), (hidden, keys) = part, states
    handler = Replayer(job.seed, rows, cache.attention, picked)
    handler.counter = job.counter(rows)
    with torch.enable_grad(), job.modes.restored(job.parameters):
        if keys is not None:
            assert picked is not None
            assert others is not None
            handler.key_rows = _keys(job, cache, leaves, (picked, others), keys)
        with job.sides.again() as sides, job.tables_kept():
            out = job.run(handler, *job.packed_call(rows, hidden, leaves))
        job.forget_output()
        _refuse_another(job, cache, handler)
        outputs, of_rows = [out], [ops.gather_rows(grads[0], rows.index)[None]]
        for x, grad in zip(sides, grads[1:], strict=True):
            if not x.requires_grad:
                continue
            by_token = grad.reshape(job.B, job.T, *grad.shape[-1:])
            outputs.append(x.flatten(0, -2))
            of_rows.append(ops.gather_rows(by_token, rows.index))
        return _gradients(
            job, outputs, inputs, [g.to(x.dtype) for g, x in zip(of_rows, outputs, strict=True)]
        )


def _keys(
    job: Job,
    cache: SparseCache,
    leaves: dict[int, Tensor],
    places: tuple[Tensor, Tensor],
    hidden: Tensor,
) -> KeyRows:
    """Keys and values of all kept rows: `places` says which are replayed, and which are not."""
    assert job.record is not None
    assert job.record.keys is not None
    kept, others = (Rows(index, job.B, job.T) for index in (cache.index, job.record.keys))
    handler = UpToAttention(job.seed, others, (1, len(others)))
    handler.counter = job.counter(others)
    with job.tables_kept():
        call = job.packed_call(others, hidden, leaves)
        return key_rows(lambda: job.run(handler, *call), handler, kept, places)


def _refuse_another(job: Job, cache: SparseCache, handler: Replayer) -> None:
    """Refuse a replay that took another way than its forward, or than the self-check saw.

    Raises:
        ReplayError: Names what is different.
    """
    counted = 0 if handler.counter is None else handler.counter.answered
    for what, got, want in (
        ("attention calls", handler.calls, len(cache.attention)),
        ("draws of random numbers", handler.drawn, job.drawn),
        ("counts of its tokens", counted, job.learned.counted),
    ):
        if got != want:
            raise ReplayError(
                f"its replay of {len(handler.rows)} rows made other {what} ({got}) than expected "
                f"({want}): leave it dense with dense_blocks"
            )


def _gradients(
    job: Job, outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of `inputs`, the last of which are the parameters that the job returns.

    Where parts of the block are sharded by themselves, their hooks have to see a backward pass of
    their own: then there are none, and gradients go to the parameters from here.
    """
    if job.wrapped.nested:
        job.wrapped.refuse_second_replay()
        torch.autograd.backward(outputs, grads)
        return [x.grad for x in inputs]
    with hooks_off(job.parameters):
        found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
    job.wrapped.note_reached(job.parts.slots, found[len(inputs) - len(job.parameters) :], job.block)
    return list(found)
