"""One block: dense forward without a graph, sparse replay in the backward pass."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_sage import ops, sharding
from lightning_sage.engine import selfcheck
from lightning_sage.engine.arguments import Arguments
from lightning_sage.engine.backward import replay
from lightning_sage.engine.cache import SparseCache
from lightning_sage.engine.facts import Facts
from lightning_sage.engine.job import Job, Surroundings
from lightning_sage.engine.packing import store
from lightning_sage.engine.replay import PackedForward
from lightning_sage.engine.seen import Kept
from lightning_sage.engine.sides import collected
from lightning_sage.engine.wrapped import ATTRIBUTE, Parts, Wrapped
from lightning_sage.errors import ReplayError
from lightning_sage.ops import Rows
from lightning_sage.records import BlockRecord


def sparse_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a wrapped block: dense values, and a sparse backward where a graph is recorded.

    A row that is kept and replayed gets the gradient of ``rows of H -> rows of block(H)``; a row
    that is not gets dL/dH = dL/dH', whatever the block is; kept ones with ``attention="kept"`` also
    what comes in through their keys and values. In a pre-norm block that is the residual
    path, exactly. A post-norm block (BERT) has none: there the identity stands in for the Jacobian
    of the layer norms. Of outputs besides the hidden states (router logits) the replayed rows
    have the gradient, unweighted.

    Where a policy draws rows, the gradient is thinned out before, at the first block of its chain
    that the backward pass reaches: see :mod:`lightning_sage.engine.chain`.

    Buffers that the block updates in its forward are updated once more by its replay, and those of
    what stands before attention again for rows that are keys alone.

    Raises:
        ReplayError: The block cannot be replayed on some of its rows.
    """
    wrapped: Wrapped | None = block.__dict__.get(ATTRIBUTE)
    if wrapped is None:
        # removed, while somebody who wrapped the block after us still calls here
        return type(block).forward(block, *args, **kwargs)
    # what is compiled around here is compiled without SAGE where no graph is recorded
    if wrapped.refused is not None or not torch.is_grad_enabled():
        return _plain(block, wrapped, args, kwargs)
    return _recorded(block, wrapped, args, kwargs)


@torch.compiler.disable(reason="SAGE runs a block's training forward outside of compiled code")  # type: ignore[untyped-decorator]
def _recorded(
    block: nn.Module, wrapped: Wrapped, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Of :func:`sparse_forward`, what is done where a graph is recorded."""
    session = wrapped.session
    if torch._C._current_graph_task_id() == -1:
        if sharding.in_checkpoint():
            session.remember(wrapped.index)
        return _sparse(block, wrapped, args, kwargs)
    # the checkpoint computes the block again, when what the model was told is over
    with session.recalling(wrapped.index):
        return _sparse(block, wrapped, args, kwargs)


def _sparse(
    block: nn.Module, wrapped: Wrapped, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The block's forward with a sparse backward pass, or densely where that cannot be."""
    try:
        job = _prepared(block, wrapped, args, kwargs)
    except ReplayError as error:
        named = _named(block, wrapped, error)
        if wrapped.session.strict:
            raise named from error
        wrapped.refused = str(error)
        warnings.warn(f"left dense: {named}", stacklevel=2)
        job = None
    if job is None:
        return _plain(block, wrapped, args, kwargs)
    if sharding.in_checkpoint() and not wrapped.session.recalls:
        wrapped.session.seeds[wrapped.index] = job.chain.seed
    arguments, hidden = job.arguments, job.hidden
    extra = [arguments.leaves[i] for i in job.extra]
    # something has to require grad where frozen embeddings enter a block that is trained
    anchor = [torch.zeros((), requires_grad=True)] if wrapped.nested else []
    try:
        outlets = job.with_outlets()
        out, *sides = _Sparse.apply(job, hidden, *extra, *job.parameters, *anchor)
        job.sides.replace(tuple(sides))
        return job.output(out, outlets)
    except ReplayError as error:
        raise _named(block, wrapped, error) from error


def _prepared(
    block: nn.Module, wrapped: Wrapped, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Job | None:
    """The call, checked where it is the first of its kind; None where nothing wants a gradient.

    Raises:
        ReplayError: The block cannot be replayed.
    """
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
    if wrapped.session.wants_routers and "router_logits" not in collected():
        raise ReplayError(
            "output_router_logits=True asks for router logits in a way that is not followed, and a "
            "loss on them would have no gradient: switch it off"
        )
    arguments = Arguments.of(block, args, kwargs)
    hidden = arguments.leaves[arguments.hidden]
    # of one token nothing can be left out, and no shape tells its pairs from one for all
    if hidden.shape[1] == 1 and (arguments.others or arguments.real):
        return None
    parts = Parts(block)
    if not (parts.slots or arguments.differentiable() or hidden.requires_grad):
        return None
    if wrapped.nested is None:
        wrapped.nested = sharding.inside(block)
    if wrapped.nested:
        # their tensors are others during the replay: it gives the gradients to them itself
        parts.slots = []
    job = Job(block, wrapped, arguments, parts, Surroundings(hidden.device))
    selfcheck.first_call(job)
    if wrapped.session.probe is not None:
        wrapped.session.probe.note(wrapped.name, job.parameters, job.seed)
    return job


def _named(block: nn.Module, wrapped: Wrapped, error: ReplayError) -> ReplayError:
    """The error with the name of the block, and a way out where it has none."""
    text = str(error)
    if text.startswith("block '"):
        return error
    if not any(way in text for way in ("dense", "use ", "set ", "freeze", "train ", "switch")):
        text += "; leave it dense with SagePolicy(dense_blocks=...) or install(..., strict=False)"
    return ReplayError(f"block '{wrapped.name}' ({type(block).__name__}): {text}")


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
    with job.sides.heard(job.B * job.T):
        out = job.run(recorder, *job.arguments.call())
    job.drawn = recorder.drawn
    replayer = policy.replayer
    # as keys alone, salient rows learn without being replayed: then the gradient alone decides
    ranks = replayer is not None and replayer.saliency_in_replay and not job.makes_keys
    choice = session.choose(facts, recorder.seen, job.chain.seed, ranks)
    kept, rows, scores, probability, job.wanted, job.budget = choice
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
    if scores is not None and ranks:
        cache.saliency = scores.flatten()[rows.index]
    if probability is not None:
        cache.probability = probability.flatten()[rows.index]
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
    if collected():
        raise ReplayError(f"{', '.join(collected())} are asked of it: use unselected='identity'")
    if not len(rows):
        raise ReplayError("unselected='skip' has no token to run: the batch is padding alone")
    own = ops.gather_rows(hidden, rows.index)
    # blocks differ in their masks (sliding windows between full attention)
    mask = job.arguments.mask()
    sight = None if mask is None else session.visibility(mask, False, facts.valid)
    forward = PackedForward(job.seed, rows, sight, mask)
    forward.counter = job.counter(rows)
    with job.tables_kept():
        out = job.run(forward, *job.packed_call(rows, own, job.leaves()))
    job.drawn = forward.drawn
    every = Rows.every(1, len(rows), hidden.device)
    attention = [Kept(store(o[None], every, packing), m, v) for o, m, v in forward.kept]
    cache = SparseCache(rows.index, store(own[None], every, packing), attention)
    job.wanted, job.budget = len(rows), session.budget(facts)
    _record(job, facts, chosen, cache)
    return ops.scatter_rows(out.squeeze(0), rows.index, hidden), cache


def _record(job: Job, facts: Facts, kept: Tensor, cache: SparseCache) -> None:
    job.valid_count = facts.count
    job.record = BlockRecord(job.wrapped.name, facts.valid, kept, cache.nbytes)
    job.session.note(job.wrapped.index, job.record)


class _Sparse(torch.autograd.Function):
    """Inputs: hidden states, other differentiable arguments, trainable parameters.

    Parameters are inputs and their gradients are returned, so that every hook on them (DDP, FSDP,
    the user's) fires once, as in a dense backward.
    """

    @staticmethod
    def forward(ctx: Any, job: Job, hidden: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        probe = job.session.probe
        skips = job.wrapped.skips and not (probe is not None and probe.dense)
        out, cache = (_skip_rows if skips else _keep_rows)(job, hidden)
        if out is hidden:
            raise ReplayError("it returns its input")
        tensors, job.attentions = cache.taken_apart()
        ctx.save_for_backward(*tensors, *job.release())
        ctx.job, ctx.held = job, len(tensors)
        return out, *(x.clone() for x in job.sides.tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *sides: Tensor) -> Any:
        job: Job = ctx.job
        saved = ctx.saved_tensors
        cache = SparseCache.put_together(saved[: ctx.held], job.attentions)
        leaves = job.restored(saved[ctx.held :])
        wants = ctx.needs_input_grad[1:]
        try:
            grads = replay(job, cache, leaves, (grad, *sides), wants)
        except ReplayError as error:
            raise _named(job.block, job.wrapped, error) from error
        return None, *grads, *([None] if job.wrapped.nested else [])
