"""PyTorch's own fused attention, asked for its log-sum-exp and given one in the backward pass.

These aten ops are not public: every device and dtype is compared once with the reference on a small
problem, and ops that are missing or disagree are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sage.ops import reference
from lightning_sage.ops.reference import How, wide
from lightning_sage.ops.sight import Rows, Sight, Visibility, packed

# torch.nn.attention.SDPBackend; the enum's members are not plain integers
FLASH, EFFICIENT, CUDNN = 1, 2, 3


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    """What ``F.scaled_dot_product_attention`` returns, and its log-sum-exp where it is to be had.

    Args:
        q: ``[B, H, T, D]``.
        k: ``[B, G, T, D]``.
        v: ``[B, G, T, E]``.
        mask: As SDPA takes it.
        causal: As SDPA takes it.
        scale: Factor of the products.

    Returns:
        ``[B, H, T, E]``, and ``[B, H, T]`` or None.
    """
    grouped = k.shape[1] != q.shape[1]
    choice = torch._fused_sdp_choice(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    if _tells(choice, str(q.device), q.dtype, q.shape[-1], mask is not None):
        try:
            return _chosen_forward(choice, q, k, v, mask, causal, scale)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # a shape that SDPA itself prepares in a way of its own
            pass
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out, None


def _chosen_forward(
    choice: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The op behind SDPA's choice, which gives its log-sum-exp too."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_additive(mask, q.dtype), scale=scale
        )
        return out, lse
    if choice == FLASH:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return out, lse
    bias = None if mask is None else _aligned(mask, q, k)
    if choice == CUDNN:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, bias, True, 0.0, causal, False, scale=scale
        )
        return out, lse.reshape(q.shape[:3])
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, causal, scale=scale
    )
    return out, lse[..., : q.shape[2]]


def _aligned(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask as the bias that the kernels take: rows at multiples of 16 numbers, heads expanded."""
    *leading, T = mask.shape
    bias = mask.new_zeros(*leading, -(-T // 16) * 16, dtype=q.dtype)[..., :T]
    if mask.dtype == torch.bool:
        bias.masked_fill_(~mask, float("-inf"))
    else:
        bias.copy_(mask)
    return bias.expand(*q.shape[:3], k.shape[2])


@cache
def _tells(choice: int, device: str, dtype: torch.dtype, width: int, masked: bool) -> bool:
    """Whether the op behind SDPA's choice gives here the log-sum-exp that the reference gives."""
    kind = torch.device(device).type
    if kind == "cpu":
        return choice == FLASH and _agrees(device, dtype)
    if kind != "cuda" or choice not in (FLASH, EFFICIENT, CUDNN) or width % 8:
        return False
    every = Rows.every(2, 24, torch.device(device))
    q, k, v = _ramps(every, 4, 4, width, dtype)
    visible = Visibility(causal=True)
    expected = reference.attention_forward(q, k, v, Sight(every, every, visible), How(0.25))
    q, k, v = (x.to(dtype).unflatten(0, (2, 24)).transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(24, 24, dtype=torch.bool, device=device).tril()[None, None]
    given = (choice, q, k, v, mask if masked else None, not masked, 0.25)
    return _gives(lambda: map(packed, _chosen_forward(*given)), expected, dtype)


def _ramps(rows: Rows, heads: int, keys: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values in float64 that `dtype` can hold; no draw from a generator."""
    size = (len(rows), heads, width), (len(rows), keys, width), (len(rows), keys, width)
    found = []
    for shape, step in zip(size, (0.7, 0.3, 0.9), strict=True):
        count = shape[0] * shape[1] * shape[2]
        ramp = torch.arange(count, dtype=torch.float64, device=rows.index.device)
        # as large as products of few numbers are, whatever the width
        wave = torch.sin(ramp * step) * (16 / width) ** 0.5
        found.append(wave.view(shape).to(dtype).double())
    return found


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, how: How
) -> tuple[Tensor, Tensor] | None:
    """:func:`reference.attention_forward` by a fused forward, or None where none can serve."""
    if not (sight.own and _knows(q, v, how)):
        return None
    if q.is_cuda:
        return _cuda_forward(q, k, v, sight, how.scale)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = torch.empty(q.shape[:2], dtype=wide(q.dtype), device=q.device)
    for group in sight.groups():
        a = group.batched(q, group.queries)
        b, c = (group.batched(x, group.keys) for x in (k, v))
        o, m = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            a, b, c, 0.0, sight.visible.causal, scale=how.scale
        )
        out[group.queries], lse[group.queries] = packed(o), packed(m)
    return out, lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sight: Sight, how: How
) -> tuple[Tensor, Tensor, Tensor] | None:
    """:func:`reference.attention_backward` by the flash backward, or None where it cannot serve.

    Rows are sorted by position, so that the causal order of packed rows is that of the tokens, and
    the kernel takes its probabilities from the log-sum-exp that it is given.
    """
    if not _knows(q, v, how):
        return None
    if q.is_cuda:
        return _cuda_backward(grad, q, k, v, out, lse, sight, how.scale) if sight.own else None
    # a mask held whole: not where it would outgrow the working memory by far
    if not sight.own and len(sight.rows) * sight.keys.most > 16 * reference.attention.CHUNK:
        return None
    return _cpu_backward(grad, q, k, v, out, lse, sight, how.scale)


def _knows(q: Tensor, v: Tensor, how: How) -> bool:
    """Whether there is nothing in it, besides a mask, that flash attention does not know."""
    width = q.shape[2]
    if how.softcap is not None or how.dropout is not None or width != v.shape[2] or not len(q):
        return False
    if q.device.type == "cpu":
        return _agrees("cpu", q.dtype)
    return width % 8 == 0 and width <= 256 and _agrees(str(q.device), q.dtype, width)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sight: Sight,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    # a row that sees nothing: -inf less -inf would be NaN
    lse = lse.to(wide(q.dtype)).masked_fill(lse == float("-inf"), 0.0)
    for group in sight.groups():
        g, a, o, m = (group.batched(x, group.queries) for x in (grad, q, out, lse))
        b, c = (group.batched(x, group.keys) for x in (k, v))
        mask = None if sight.own else reference.mask_of(sight, group)
        # the kernel indexes the log-sum-exp as [B, T, H] memory seen as [B, H, T]
        m = m.transpose(1, 2).contiguous().transpose(1, 2)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, a, b, c, o, m, 0.0, sight.own and sight.visible.causal,
            attn_mask=_additive(mask, q.dtype), scale=scale,
        )  # fmt: skip
        dq[group.queries] = packed(parts[0])
        dk[group.keys], dv[group.keys] = packed(parts[1]), packed(parts[2])
    return dq, dk, dv


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float
) -> tuple[Tensor, Tensor]:
    ends, most = sight.rows.ends, sight.rows.most
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(x.contiguous() for x in (q, k, v)),
        ends, ends, most, most, 0.0, sight.visible.causal, False, scale=scale,
    )  # fmt: skip
    return out, lse.t()


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sight: Sight,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, q, k, v, out = (x.contiguous() for x in (grad, q, k, v, out))
    ends, most = sight.rows.ends, sight.rows.most
    philox, none = _no_philox(q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse.t().contiguous(), ends, ends, most, most, 0.0,
        sight.visible.causal, philox, none, scale=scale,
    )  # fmt: skip
    return dq, dk, dv


@cache
def _no_philox(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of a dropout that there is not."""
    philox = torch.zeros(2, dtype=torch.uint64, device=device)
    return philox, torch.empty(0, dtype=torch.uint64, device=device)


@cache
def _agrees(device: str, dtype: torch.dtype, width: int = 16) -> bool:
    """Whether forward and backward of the fused ops mean here what the reference says."""
    kind = torch.device(device).type
    if kind == "cuda" and dtype not in (torch.float16, torch.bfloat16):
        return False
    if kind not in ("cpu", "cuda") or not dtype.is_floating_point:
        return False
    # rows left out are the case that decides, and a sample without any is one that a kernel may
    # have forgotten
    chosen = torch.ones(3, 24, dtype=torch.bool, device=device)
    chosen[0, 1::2] = chosen[1] = False
    some, every = Rows.of(chosen), Rows.every(3, 24, chosen.device)
    q, k, v = _ramps(every, 4, 2, width, dtype)
    grad = q.flip(0)
    visible, how = Visibility(causal=True), How(0.25)
    dense = reference.attention_forward(q, k, v, Sight(every, every, visible), how)
    out, lse = (x[some.index] for x in dense)
    q, k, v, grad = (x[some.index] for x in (q, k, v, grad))
    sight = Sight(some, some, visible)
    expected = [*reference.attention_forward(q, k, v, sight, how)] if kind == "cuda" else []
    expected += reference.attention_backward(grad, q, k, v, out, lse, sight, how)
    q, k, v, grad, out = (x.to(dtype) for x in (q, k, v, grad, out))
    lse = lse.to(wide(dtype))
    given = (grad, q, k, v, out, lse, sight, 0.25)

    def run() -> tuple[Tensor, ...]:
        if kind == "cpu":
            return _cpu_backward(*given)
        return *_cuda_forward(q, k, v, sight, 0.25), *_cuda_backward(*given)

    return _gives(run, expected, dtype)


def _gives(
    run: Callable[[], Iterable[Tensor]], expected: Iterable[Tensor], dtype: torch.dtype
) -> bool:
    """Whether an op that may not be there returns what is expected, as far as `dtype` can tell."""
    try:
        pairs = list(zip(run(), expected, strict=True))
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):
        return False
    allowed = 64 * torch.finfo(dtype).eps
    return all(bool((x.double() - y).abs().max() <= allowed * y.abs().max()) for x, y in pairs)
