"""The door to the ops: Triton kernels on a GPU, PyTorch's fused attention, or the reference.

The meaning of each is in :mod:`lightning_sage.ops.reference`. The environment variable
`LIGHTNING_SAGE_KERNELS` forces a choice: `triton` (on a CPU in Triton's interpreter) wherever a
kernel can serve, `reference`, or `auto`. The dense forward is the model's own in each.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lightning_sage.ops import reference, stock
from lightning_sage.ops.reference import (
    Dropout,
    How,
    dropout_mask,
    uniform,
    weights_dropout,
    wide,
)
from lightning_sage.ops.sight import Rows, Sight, Visibility, packed

__all__ = [
    "Dropout",
    "How",
    "Rows",
    "Sight",
    "Visibility",
    "attention_backward",
    "attention_forward",
    "attention_lse",
    "attention_received",
    "dropout_mask",
    "fused_attention",
    "gather_rows",
    "pack_rows",
    "packed",
    "picked",
    "row_dropout",
    "row_norms",
    "rows_of",
    "scatter_rows",
    "uniform",
    "unpack_rows",
    "weights_dropout",
    "wide",
]

VARIABLE = "LIGHTNING_SAGE_KERNELS"


def chosen_kernels() -> str:
    """What `LIGHTNING_SAGE_KERNELS` asks for.

    Raises:
        ValueError: It asks for something else than auto, triton or reference.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in ("auto", "triton", "reference"):
        raise ValueError(
            f"{VARIABLE}={choice!r}: must be auto, triton or reference; leave it unset for auto"
        )
    return choice


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernels(x: Tensor) -> bool:
    """Whether Triton kernels work on `x`.

    Raises:
        RuntimeError: They are asked for where they cannot run.
    """
    choice = chosen_kernels()
    if choice == "auto":
        # tensor cores know float64 only in some layouts: where it is used, speed is not the point
        return x.is_cuda and x.dtype != torch.float64 and _has_triton()
    if choice == "triton" and not x.is_cuda and not _interpreted():
        raise RuntimeError(
            f"{VARIABLE}=triton needs a GPU, or TRITON_INTERPRET=1 before lightning_sage's kernels "
            "are first imported; use auto"
        )
    return choice == "triton"


def _interpreted() -> bool:
    return _has_triton() and os.environ.get("TRITON_INTERPRET", "") in ("1", "true")


def _row_ops(x: Tensor) -> Any:
    """The module whose gather, scatter, norms and packing fit `x`."""
    if not _kernels(x):
        return reference
    from lightning_sage.ops import rows

    return rows


def _launched(function: Any, x: Tensor, *args: Any) -> Any:
    """A launcher called with `x` first; kernels run on the current device, which may be another."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return function(x, *args)
    return function(x, *args)


def rows_of(chosen: Tensor, count: int | None = None) -> Rows:
    """The rows where `chosen`, ``[B, T]`` bool, is True; see :func:`Rows.of`."""
    B, T = chosen.shape
    if count is None or count == B * T or not _kernels(chosen):
        return Rows.of(chosen, count)
    from lightning_sage.ops import rows as kernel

    index, ends = _launched(kernel.rows_of, chosen, count)
    found = Rows(index, B, T)
    vars(found)["ends"] = ends
    return found


def picked(flags: Tensor, count: int | None = None) -> Tensor:
    """Where `flags`, ``[N]`` bool, is True: int64; see :func:`Rows.of`."""
    return rows_of(flags[None], count).index


def gather_rows(x: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """See :func:`lightning_sage.ops.reference.gather_rows`."""
    found: Tensor = _launched(_row_ops(x).gather_rows, x, rows, weights)
    return found


def scatter_rows(values: Tensor, rows: Tensor, base: Tensor) -> Tensor:
    """See :func:`lightning_sage.ops.reference.scatter_rows`."""
    found: Tensor = _launched(_row_ops(base).scatter_rows, values, rows, base)
    return found


def row_norms(x: Tensor, rows: Tensor) -> Tensor:
    """See :func:`lightning_sage.ops.reference.row_norms`."""
    found: Tensor = _launched(_row_ops(x).row_norms, x, rows)
    return found


@cache
def _knows_float8(device: torch.device) -> bool:
    """Whether a kernel may convert to float8_e4m3fn: from compute capability 8.9 on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def pack_rows(x: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`lightning_sage.ops.reference.pack_rows`."""
    fits = dtype == torch.int8 or _knows_float8(x.device)
    pack = (_row_ops(x) if fits else reference).pack_rows
    values, scale = _launched(pack, x, rows, dtype)
    return values, scale


def unpack_rows(values: Tensor, scale: Tensor, chosen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See :func:`lightning_sage.ops.reference.unpack_rows`."""
    fits = values.dtype == torch.int8 or _knows_float8(values.device)
    ops = _row_ops(scale) if fits else reference
    found: Tensor = _launched(ops.unpack_rows, values, scale, chosen, dtype)
    return found


class _Dropout(torch.autograd.Function):
    """The mask is drawn again in the backward pass: nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, seed: int, call: int, p: float) -> Tensor:
        from lightning_sage.ops import dropout as kernel

        ctx.save_for_backward(rows)
        ctx.settings = seed, call, p
        dropped: Tensor = _launched(kernel.row_dropout, x, rows, seed, call, p)
        return dropped

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return _Dropout.apply(grad, rows, *ctx.settings), None, None, None, None


def row_dropout(x: Tensor, rows: Tensor, seed: int, call: int, p: float) -> Tensor:
    """See :func:`lightning_sage.ops.reference.row_dropout`; differentiable in `x`."""
    if _kernels(x):
        found: Tensor = _Dropout.apply(x, rows, seed, call, p)
        return found
    return reference.row_dropout(x, rows, seed, call, p)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Dense attention as the model computes it; see :func:`lightning_sage.ops.stock.forward`."""
    return stock.forward(q, k, v, mask, causal, scale)


def _attention_kernels(q: Tensor, sight: Sight) -> bool:
    """Whether the attention kernels can serve: they take intervals of keys, not masks.

    Heads wider than 256 would not fit the shared memory of most cards.
    """
    return sight.visible.mask is None and q.shape[2] <= 256 and _kernels(q)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, how: How
) -> tuple[Tensor, Tensor]:
    """See :func:`lightning_sage.ops.reference.attention_forward`."""
    if chosen_kernels() == "auto":
        found = stock.attention_forward(q, k, v, sight, how)
        if found is not None:
            return found
    if _attention_kernels(q, sight):
        from lightning_sage.ops import attention as kernel

        out, lse = _launched(kernel.attention_forward, q, k, v, sight, how)
        return out, lse
    return reference.attention_forward(q, k, v, sight, how)


def attention_lse(q: Tensor, k: Tensor, sight: Sight, how: How) -> Tensor:
    """See :func:`lightning_sage.ops.reference.attention_lse`."""
    if _attention_kernels(q, sight):
        from lightning_sage.ops import attention as kernel

        lse: Tensor = _launched(kernel.attention_lse, q, k, sight, how)
        return lse
    return reference.attention_lse(q, k, sight, how)


def attention_received(
    q: Tensor, k: Tensor, lse: Tensor, weights: Tensor, sight: Sight, how: How
) -> Tensor:
    """See :func:`lightning_sage.ops.reference.attention_received`."""
    if _attention_kernels(q, sight):
        from lightning_sage.ops import saliency as kernel

        received: Tensor = _launched(kernel.attention_received, q, k, lse, weights, sight, how)
        return received
    return reference.attention_received(q, k, lse, weights, sight, how)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sight: Sight,
    how: How,
    all_keys: tuple[Tensor, Tensor, Sight] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`lightning_sage.ops.reference.attention_backward`.

    Args:
        grad: As there, like the other arguments.
        q: As there.
        k: As there.
        v: As there.
        out: As there.
        lse: As there.
        sight: As there.
        how: As there.
        all_keys: Keys, values and sight by which the queries get their gradient, where keys besides
            those of `sight` count as constants; the keys of `sight` are among them.
    """
    given = (grad, q, k, v, out, lse, sight, how)
    fused = all_keys is None or q.device.type == "cpu"
    if chosen_kernels() == "auto" and fused:
        found = _select(stock.attention_backward, given, all_keys)
        if found is not None:
            return found
    if _attention_kernels(q, sight):
        from lightning_sage.ops import attention as kernel

        dq, dk, dv = _launched(kernel.attention_backward, *given, all_keys)
        return dq, dk, dv
    found = _select(reference.attention_backward, given, all_keys)
    assert found is not None
    return found


def _select(
    backward: Any, given: tuple[Any, ...], all_keys: tuple[Tensor, Tensor, Sight] | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A backward that gives the gradient of every key; those of the sight are picked out."""
    if all_keys is None:
        grads: tuple[Tensor, Tensor, Tensor] = backward(*given)
        return grads
    grad, q, _, _, out, lse, sight, how = given
    every_k, every_v, over_all = all_keys
    grads = backward(grad, q, every_k, every_v, out, lse, over_all, how)
    if grads is None:
        return None
    places = torch.searchsorted(over_all.keys.index, sight.keys.index)
    return grads[0], grads[1].index_select(0, places), grads[2].index_select(0, places)
