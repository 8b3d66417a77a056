"""One block: dense forward without a graph, sparse replay in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_sage import ops, selfcheck
from lightning_sage.arguments import Arguments, ReplayError
from lightning_sage.cache import SparseCache, keep_attention, keep_hidden, restored, sub_cache
from lightning_sage.job import ATTRIBUTE, Job, Surroundings, Wrapped, trainable
from lightning_sage.replay import PackedForward, Recorder, Replayer, Rows
from lightning_sage.session import REPLAY_STREAM, BlockRecord


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
    if not torch.is_grad_enabled():
        return wrapped.run(block, *args, **kwargs)
    try:
        if getattr(block, "gradient_checkpointing", False):
            raise ReplayError(
                "gradient checkpointing was switched on after SAGE was installed: switch it off, "
                "or on before, and SAGE takes its place"
            )
        arguments = Arguments.of(block, args, kwargs)
        slots = trainable(block)
        hidden = arguments.leaves[arguments.hidden]
        extra = [arguments.leaves[i] for i in arguments.differentiable()]
        if not (slots or extra or hidden.requires_grad):
            return wrapped.run(block, *args, **kwargs)
        job = Job(block, wrapped, arguments, slots, Surroundings(hidden.device))
        selfcheck.first_call(job)
        out = _Sparse.apply(job, hidden, *extra, *(getattr(m, n) for m, n in slots))
        return job.output(out)
    except ReplayError as error:
        if error.args and str(error).startswith("block '"):
            raise
        raise ReplayError(f"block '{wrapped.name}' ({type(block).__name__}): {error}") from error


def _keep_rows(job: Job, hidden: Tensor) -> tuple[Tensor, SparseCache]:
    """Dense forward; keeps rows by the policy."""
    session, wrapped = job.session, job.wrapped
    recorder = Recorder(job.seed, hidden)
    out = job.run(recorder, *job.arguments.call())
    valid = session.valid(hidden)
    visible = [session.visibility(s.call.mask, s.call.causal, valid) for s in recorder.seen]
    kept, scores = session.choose(wrapped.name, valid, recorder.seen, visible, job.seed)
    rows = Rows.of(kept.rows)
    full = session.policy.attention == "full"
    cache = SparseCache(
        rows.index,
        keep_hidden(hidden, rows),
        [keep_attention(seen, rows, full) for seen in recorder.seen],
        visible,
    )
    replayer = session.policy.replayer
    if scores is not None and replayer is not None and replayer.saliency_in_replay:
        cache.saliency = scores.flatten()[rows.index]
    if kept.probability is not None:
        cache.probability = kept.probability.flatten()[rows.index]
    if wrapped.chooses:
        session.skip_rows = kept.rows
    _record(job, valid, kept.rows, cache)
    return out, cache


def _skip_rows(job: Job, hidden: Tensor) -> tuple[Tensor, SparseCache]:
    """Forward of the rows that an earlier block chose; the others pass unchanged."""
    session = job.session
    chosen, valid = session.skip_rows, session.valid(hidden)
    if chosen is None or chosen.shape != hidden.shape[:2]:
        raise ReplayError("unselected='skip' found no choice made by an earlier block of this pass")
    rows = Rows.of(chosen)
    own = keep_hidden(hidden, rows)
    # blocks differ in their masks (sliding windows between full attention)
    mask = job.arguments.mask()
    sight = None if mask is None else session.visibility(mask, False, valid)
    forward = PackedForward(job.seed, rows, sight)
    out = job.run(forward, *job.packed_call(rows, own, job.leaves()))
    attention = [keep_attention(seen, _all(rows), full=False) for seen in forward.seen]
    cache = SparseCache(rows.index, own, attention, forward.visible)
    _record(job, valid, chosen, cache)
    return ops.scatter_rows(out.squeeze(0), rows.index, hidden), cache


def _all(rows: Rows) -> Rows:
    """Packed rows as rows of themselves."""
    n = len(rows.index)
    return Rows(torch.arange(n, device=rows.index.device), [n], n)


def _record(job: Job, valid: Tensor, kept: Tensor, cache: SparseCache) -> None:
    job.record = BlockRecord(job.wrapped.name, valid, kept, cache.nbytes)
    job.session.records[job.wrapped.index] = job.record


class _Sparse(torch.autograd.Function):
    """Inputs: hidden states, other differentiable arguments, trainable parameters.

    Parameters are inputs and their gradients are returned, so that every hook on them (DDP, FSDP,
    the user's) fires once, as in a dense backward.
    """

    @staticmethod
    def forward(ctx: Any, job: Job, hidden: Tensor, *others: Tensor) -> Tensor:
        out, cache = (_skip_rows if job.wrapped.skips else _keep_rows)(job, hidden)
        if out is hidden:
            raise ReplayError("it returns its input")
        tensors = cache.tensors()
        job.causal = cache.order()
        ctx.save_for_backward(*tensors, *job.release())
        ctx.job, ctx.held = job, len(tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        job: Job = ctx.job
        saved = ctx.saved_tensors
        cache = restored(saved[: ctx.held], job.causal)
        leaves = job.restored(saved[ctx.held :])
        wants = ctx.needs_input_grad[1:]
        grads = _replay(job, cache, leaves, grad, wants)
        return None, *grads


def _chosen_rows(job: Job, cache: SparseCache, grad: Tensor) -> tuple[SparseCache, Tensor | None]:
    """The rows to replay, and the weight of each row's branch gradient."""
    replayer = job.session.policy.replayer
    probability = cache.probability
    if replayer is not None and len(cache.index):
        norms = ops.gather_rows(grad, cache.index).double().norm(dim=-1)
        noise = ops.uniform(int(job.seed), REPLAY_STREAM, cache.index) if replayer.random else norms
        valid = int(job.record.valid.sum())
        # rows whose gradient is not finite are in, so that a NaN surfaces as in a dense step
        finite = norms.isfinite()
        chosen, p = replayer.replay(norms.where(finite, 0.0), cache.saliency, valid, noise)
        chosen = chosen | ~finite
        if p is not None:
            probability = p if probability is None else p * probability
        if not bool(chosen.all()):
            index = chosen.nonzero().squeeze(1)
            cache = sub_cache(cache, index)
            probability = None if probability is None else probability[index]
    if probability is not None and bool((probability >= 1).all()):
        probability = None
    record = job.record
    replayed = torch.zeros_like(record.kept)
    replayed.view(-1)[cache.index] = True
    weights = replayed.double()
    if probability is not None:
        weights.view(-1)[cache.index] = 1 / probability
    record.replayed, record.weights, record.seed = replayed, weights, job.seed.value
    return cache, None if probability is None else (1 / probability).unsqueeze(1)


def _replay(
    job: Job,
    cache: SparseCache,
    leaves: dict[int, Tensor],
    grad: Tensor,
    wants: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of hidden states, other differentiable arguments and parameters."""
    targets = job.trained()
    cache, weights = _chosen_rows(job, cache, grad)
    grad_rows = ops.gather_rows(grad, cache.index)
    weighted = grad_rows if weights is None else grad_rows * weights.to(grad.dtype)
    with torch.enable_grad():
        hidden = cache.hidden.detach().requires_grad_(wants[0])
        for i in job.extra:
            leaves[i] = leaves[i].detach().requires_grad_()
        inputs = [hidden] if wants[0] else []
        inputs += [leaves[i] for i in job.extra] + targets
        found: list[Tensor | None] = [None] * len(inputs)
        if len(cache.index):
            rows = _rows_of(cache.index, job.B, job.T)
            handler = Replayer(job.seed, rows, cache.attention, cache.visible)
            with job.modes_restored():
                out = job.run(handler, *job.packed_call(rows, hidden, leaves))
            job.forget_output()
            with _hooks_off(targets):
                found = list(
                    torch.autograd.grad(
                        out, inputs, weighted.unsqueeze(0).to(out.dtype), allow_unused=True
                    )
                )
    through = found.pop(0) if wants[0] else None
    # zeros and not None: sharding strategies wait for every rank's gradient
    others = inputs[len(inputs) - len(found) :]
    rest = [torch.zeros_like(x) if g is None else g for x, g in zip(others, found, strict=True)]
    if not wants[0]:
        return [None, *rest]
    if through is None:
        return [grad, *rest]
    if weights is not None:
        through = through + (grad_rows - weighted)
    return [ops.scatter_rows(through.to(grad.dtype), cache.index, grad), *rest]


def _rows_of(index: Tensor, B: int, T: int) -> Rows:
    return Rows(index, torch.bincount(index // T, minlength=B).tolist(), T)


@contextmanager
def _hooks_off(parameters: list[Tensor]) -> Iterator[None]:
    """Tensor hooks of parameters are for the gradient that is returned, not for the replay's."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for active, _ in hooks:
        active.clear()
    try:
        yield
    finally:
        for active, saved in hooks:
            active.update(saved)
