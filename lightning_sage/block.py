"""One block: dense forward without a graph, sparse replay in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_sage import ops, selfcheck, sharding
from lightning_sage.arguments import Arguments
from lightning_sage.axes import ReplayError
from lightning_sage.balance import fit_replayed, least
from lightning_sage.cache import SparseCache
from lightning_sage.facts import Facts
from lightning_sage.job import Job, Surroundings
from lightning_sage.ops import Rows
from lightning_sage.packing import store
from lightning_sage.records import BlockRecord
from lightning_sage.replay import PackedForward, Replayer
from lightning_sage.seen import Kept
from lightning_sage.selections import Selection
from lightning_sage.session import REPLAY_STREAM
from lightning_sage.wrapped import ATTRIBUTE, Parts, Wrapped, hooks_off


def sparse_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a wrapped block: dense values, and a sparse backward where a graph is recorded.

    A row that is kept and replayed gets the gradient of ``rows of H -> rows of block(H)``; a row
    that is not gets dL/dH = dL/dH', whatever the block is. In a pre-norm block that is the residual
    path, exactly. A post-norm block (BERT) has none: there the identity stands in for the Jacobian
    of the layer norms, and rows drawn by importance sampling correct it without bias, since their
    1/p weights (block minus identity).

    Buffers that the block updates in its forward are updated once more by its replay.

    Raises:
        ReplayError: The block cannot be replayed on some of its rows.
    """
    wrapped: Wrapped | None = block.__dict__.get(ATTRIBUTE)
    if wrapped is None:
        # removed, while somebody who wrapped the block after us still calls here
        return type(block).forward(block, *args, **kwargs)
    # what is compiled around here is compiled without SAGE where no graph is recorded
    if not torch.is_grad_enabled():
        return _plain(block, wrapped, args, kwargs)
    return _recorded(block, wrapped, args, kwargs)


@torch.compiler.disable(reason="SAGE runs a block's training forward outside of compiled code")  # type: ignore[untyped-decorator]
def _recorded(
    block: nn.Module, wrapped: Wrapped, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Of :func:`sparse_forward`, what is done where a graph is recorded."""
    try:
        if getattr(block, "gradient_checkpointing", False):
            raise ReplayError(
                "gradient checkpointing was switched on after SAGE was installed: switch it off, "
                "or on before, and SAGE takes its place"
            )
        if sharding.recomputed_reentrantly():
            raise ReplayError(
                "it is called again by checkpoint(..., use_reentrant=True), which makes its first "
                "call without a graph: use use_reentrant=False, or leave the block dense"
            )
        arguments = Arguments.of(block, args, kwargs)
        parts = Parts(block)
        hidden = arguments.leaves[arguments.hidden]
        extra = [arguments.leaves[i] for i in arguments.differentiable()]
        if not (parts.slots or extra or hidden.requires_grad):
            return _plain(block, wrapped, args, kwargs)
        if wrapped.nested is None:
            wrapped.nested = sharding.inside(block)
        if wrapped.nested:
            # their tensors are others during the replay: it gives the gradients to them itself
            parts.slots = []
        job = Job(block, wrapped, arguments, parts, Surroundings(hidden.device))
        selfcheck.first_call(job)
        if wrapped.session.probe is not None:
            wrapped.session.probe.note(wrapped.name, job.parameters, job.seed)
        # something has to require grad where frozen embeddings enter a block that is trained
        anchor = [torch.zeros((), requires_grad=True)] if wrapped.nested else []
        outlets = job.with_outlets()
        out = _Sparse.apply(job, hidden, *extra, *job.parameters, *anchor)
        return job.output(out, outlets)
    except ReplayError as error:
        if error.args and str(error).startswith("block '"):
            raise
        raise ReplayError(f"block '{wrapped.name}' ({type(block).__name__}): {error}") from error


def _plain(
    block: nn.Module, wrapped: Wrapped, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with wrapped.noting_touches(block.parameters() if wrapped.touched else ()):
        return wrapped.run(block, *args, **kwargs)


def _keep_rows(job: Job, hidden: Tensor) -> tuple[Tensor, SparseCache]:
    """Dense forward; keeps rows by the policy."""
    session, wrapped, policy = job.session, job.wrapped, job.session.policy
    facts = session.facts(hidden)
    recorder = session.recorder(job.seed, facts, job.crossing)
    out = job.run(recorder, *job.arguments.call())
    choice = session.choose(wrapped.name, facts, recorder.seen, job.seed)
    kept, rows, scores, job.wanted, job.budget = choice
    if wrapped.nested and not len(rows):
        raise ReplayError(
            "it has no token to replay, and parts of it are sharded by themselves, for which the "
            "other ranks would wait: shard it as a whole"
        )
    cache = SparseCache(
        rows.index,
        store(hidden, rows, policy.cache_dtype),
        [x.keep(rows, policy.attention == "full", policy.cache_dtype) for x in recorder.seen],
    )
    replayer = policy.replayer
    if scores is not None and replayer is not None and replayer.saliency_in_replay:
        cache.saliency = scores.flatten()[rows.index]
    if kept.probability is not None:
        cache.probability = kept.probability.flatten()[rows.index]
    if wrapped.chooses:
        session.skip_rows = kept.rows, rows
    _record(job, facts, kept.rows, cache)
    return out, cache


def _skip_rows(job: Job, hidden: Tensor) -> tuple[Tensor, SparseCache]:
    """Forward of the rows that an earlier block chose; the others pass unchanged."""
    session, packing = job.session, job.session.policy.cache_dtype
    facts = session.facts(hidden)
    if session.skip_rows is None or session.skip_rows[0].shape != hidden.shape[:2]:
        raise ReplayError("unselected='skip' found no choice made by an earlier block of this pass")
    chosen, rows = session.skip_rows
    if not len(rows):
        raise ReplayError("unselected='skip' has no token to run: the batch is padding alone")
    own = ops.gather_rows(hidden, rows.index)
    # blocks differ in their masks (sliding windows between full attention)
    mask = job.arguments.mask()
    sight = None if mask is None else session.visibility(mask, False, facts.valid)
    forward = PackedForward(job.seed, rows, sight)
    out = job.run(forward, *job.packed_call(rows, own, job.leaves()))
    every = Rows.every(1, len(rows), hidden.device)
    attention = [Kept(store(o[None], every, packing), m, v) for o, m, v in forward.kept]
    cache = SparseCache(rows.index, store(own[None], every, packing), attention)
    job.wanted, job.budget = len(rows), session.budget(facts)
    _record(job, facts, chosen, cache)
    return ops.scatter_rows(out.squeeze(0), rows.index, hidden), cache


def _record(job: Job, facts: Facts, kept: Tensor, cache: SparseCache) -> None:
    job.valid_count = facts.count
    job.record = BlockRecord(job.wrapped.name, facts.valid, kept, cache.nbytes)
    job.session.records[job.wrapped.index] = job.record


class _Sparse(torch.autograd.Function):
    """Inputs: hidden states, other differentiable arguments, trainable parameters.

    Parameters are inputs and their gradients are returned, so that every hook on them (DDP, FSDP,
    the user's) fires once, as in a dense backward.
    """

    @staticmethod
    def forward(ctx: Any, job: Job, hidden: Tensor, *others: Tensor) -> Tensor:
        probe = job.session.probe
        skips = job.wrapped.skips and not (probe is not None and probe.dense)
        out, cache = (_skip_rows if skips else _keep_rows)(job, hidden)
        if out is hidden:
            raise ReplayError("it returns its input")
        tensors, job.attentions = cache.taken_apart()
        ctx.save_for_backward(*tensors, *job.release())
        ctx.job, ctx.held = job, len(tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        job: Job = ctx.job
        saved = ctx.saved_tensors
        cache = SparseCache.put_together(saved[: ctx.held], job.attentions)
        leaves = job.restored(saved[ctx.held :])
        wants = ctx.needs_input_grad[1:]
        grads = _replay(job, cache, leaves, grad, wants)
        return None, *grads, *([None] if job.wrapped.nested else [])


def _chosen_rows(
    job: Job, cache: SparseCache, grad: Tensor
) -> tuple[Rows, Tensor | None, Tensor | None]:
    """Rows to replay, which of the kept rows they are (None: all), and their weights ``[R]``."""
    index, probability, agreement = cache.index, cache.probability, job.session.agreement
    picked, wanted = None, job.wanted
    if job.session.policy.replayer is not None:
        picked, p, wanted = _picked(job, job.session.policy.replayer, cache, grad)
        if p is not None:
            probability = p if probability is None else p * probability
        if picked is not None:
            index = index.index_select(0, picked)
            probability = None if probability is None else probability.index_select(0, picked)
    if agreement is not None:
        agreement.note(wanted, job.valid_count)
    weights = None if probability is None else 1 / probability
    record = job.record
    assert record is not None
    record.rows, record.factors, record.seed = index, weights, job.seed.value
    return Rows(index, job.B, job.T), picked, weights


def _picked(
    job: Job, replayer: Selection, cache: SparseCache, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | int]:
    """Which kept rows are replayed (None: all), their probabilities, how many without a budget."""
    kept, valid, budget = len(cache.index), job.valid_count, job.budget
    wanted: Tensor | int | None = replayer.replay_count(kept, valid)
    count = wanted if budget is None else min(budget.rows, kept)
    known = wanted is not None or job.session.agreement is None
    if count == kept and known:
        return None, None, least(kept if wanted is None else wanted, job.wanted)
    norms = ops.row_norms(grad, cache.index).double()
    noise = ops.uniform(int(job.seed), REPLAY_STREAM, cache.index) if replayer.random else norms
    # rows whose gradient is not finite come first, so that a NaN surfaces as in a dense step
    norms = norms.where(norms.isfinite(), float("inf"))
    given = norms, cache.saliency, valid, noise
    # with a budget what it would choose by itself is only asked for where that is to be counted
    own = replayer.replay(*given) if budget is None or wanted is None else None
    if wanted is None:
        assert own is not None
        wanted = own.rows.sum()
    wanted = least(wanted, job.wanted)
    if count == kept:
        return None, None, wanted
    if budget is not None:
        own = fit_replayed(replayer, own, budget, given)
    assert own is not None
    assert count is None or isinstance(count, int)
    return ops.picked(own.rows, count), own.probability, wanted


def _replay(
    job: Job,
    cache: SparseCache,
    leaves: dict[int, Tensor],
    grad: Tensor,
    wants: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of hidden states, other differentiable arguments and parameters."""
    targets = job.trained()
    rows, picked, weights = _chosen_rows(job, cache, grad)
    if weights is not None:
        weights = weights.to(ops.wide(grad.dtype))
    with torch.enable_grad():
        hidden = cache.hidden.some(picked, (job.C,), job.dtype).requires_grad_(wants[0])
        for i in job.extra:
            leaves[i] = leaves[i].detach().requires_grad_()
        inputs = [hidden] if wants[0] else []
        inputs += [leaves[i] for i in job.extra] + targets
        found: list[Tensor | None] = [None] * len(inputs)
        if len(rows):
            weighted = ops.gather_rows(grad, rows.index, weights)
            handler = Replayer(job.seed, rows, cache.attention, picked)
            handler.positions = rows.token if job.learned.positional else None
            with job.modes.restored(job.parameters):
                out = job.run(handler, *job.packed_call(rows, hidden, leaves))
                job.forget_output()
                found = _gradients(job, out, inputs, weighted.unsqueeze(0).to(out.dtype))
    through = found.pop(0) if wants[0] else None
    # zeros and not None: sharding strategies wait for every rank's gradient
    others = inputs[len(inputs) - len(found) :]
    rest = [torch.zeros_like(x) if g is None else g for x, g in zip(others, found, strict=True)]
    if not wants[0]:
        return [None, *rest]
    if through is None:
        return [grad, *rest]
    # what comes in through the residual path is not weighted
    return [ops.scatter_rows(through, rows.index, grad, weights), *rest]


def _gradients(job: Job, out: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Gradients of `inputs`, the last of which are the parameters that the job returns.

    Where parts of the block are sharded by themselves, their hooks have to see a backward pass of
    their own: then there are none, and gradients go to the parameters from here.
    """
    if job.wrapped.nested:
        job.wrapped.refuse_second_replay()
        torch.autograd.backward(out, grad)
        return [x.grad for x in inputs]
    with hooks_off(job.parameters):
        found = torch.autograd.grad(out, inputs, grad, allow_unused=True)
    job.wrapped.note_reached(job.parts.slots, found[len(inputs) - len(job.parameters) :], job.block)
    return list(found)
