"""PyTorch's own fused attention, asked for its log-sum-exp and given one in the backward pass.

These aten ops are not public: every (device, dtype, grouping) is compared once with the reference
on a small problem, and one that is missing or disagrees is not used.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sage.ops import reference
from lightning_sage.ops.reference import Rule

# torch.nn.attention.SDPBackend; the enum's members are not plain integers
FLASH, EFFICIENT = 1, 2


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    """What ``F.scaled_dot_product_attention`` returns, and its log-sum-exp where it is to be had.

    Args:
        q: ``[B, H, T, D]``.
        k: ``[B, G, T, D]``.
        v: ``[B, G, T, Dv]``.
        mask: As SDPA takes it.
        causal: As SDPA takes it.
        scale: Factor of the products.

    Returns:
        ``[B, H, T, Dv]``, and ``[B, H, T]`` or None.
    """
    grouped = k.shape[1] != q.shape[1]
    choice = torch._fused_sdp_choice(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    if choice == FLASH and q.device.type == "cpu" and _agrees("cpu", q.dtype):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_additive(mask, q.dtype), scale=scale
        )
        return out, lse
    if choice == FLASH and q.is_cuda and q.shape[-1] % 8 == 0 and _agrees("cuda", q.dtype):
        result = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return result[0], result[1]
    if choice == EFFICIENT and not grouped and mask is None:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
        return out, lse[..., : q.shape[2]]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out, None


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """:func:`reference.attention_backward` by the flash backward, or None where it cannot serve.

    Given rows sorted by position, the causal order of the packed rows is that of the tokens.

    Args:
        grad: ``[B, H, Q, D]``.
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        out: ``[B, H, Q, D]``.
        lse: ``[B, H, Q]``.
        mask: bool or additive, broadcastable to ``[B, H, Q, K]``.
        causal: Whether row i sees rows 0 to i only.
        scale: Factor of the products.
    """
    device = q.device.type
    if q.shape[-1] != v.shape[-1] or not _agrees(device, q.dtype):
        return None
    if device == "cpu":
        return _cpu_backward(grad, q, k, v, out, lse, mask, causal, scale)
    if mask is not None or q.shape[-1] % 8 or q.shape[-1] > 256:
        return None
    return _cuda_backward(grad, q, k, v, out, lse, mask, causal, scale)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # the kernel indexes the log-sum-exp as [B, T, H] memory seen as [B, H, T]
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    mask = _additive(mask, q.dtype)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return dq, dk, dv


def _cuda_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    assert mask is None
    grad, q, k, v, out = (x.transpose(1, 2).contiguous() for x in (grad, q, k, v, out))
    none = torch.empty(0, dtype=torch.int32, device=q.device)
    philox = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        none,
        none,
        q.shape[1],
        k.shape[1],
        0.0,
        causal,
        philox,
        philox,
        scale=scale,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads[:3])
    return dq, dk, dv


@cache
def _agrees(device: str, dtype: torch.dtype) -> bool:
    """Whether forward and backward of the fused ops mean here what the reference says."""
    if device == "cuda" and dtype not in (torch.float16, torch.bfloat16):
        return False
    if device not in ("cpu", "cuda") or not dtype.is_floating_point:
        return False
    # a fixed problem: no draw from the user's generator
    ramp = torch.arange(2 * 4 * 24 * 16, dtype=torch.float64, device=device)
    q = torch.sin(ramp * 0.7).view(2, 4, 24, 16).to(dtype)
    k, v = (torch.cos(ramp * f)[: q.numel() // 2].view(2, 2, 24, 16).to(dtype) for f in (0.3, 0.9))
    grad = torch.cos(ramp * 0.13).view(2, 4, 24, 16).to(dtype)
    rule = Rule(0.25, positions=torch.arange(24, device=device)[None])
    out, lse = reference.attention(q.double(), k.double(), v.double(), rule)
    run = _cpu_backward if device == "cpu" else _cuda_backward
    # every second row and key: those left out are the case that decides
    for step in (1, 2):
        args = [x[:, :, ::step] for x in (grad, q, k, v, out)]
        part = lse[:, :, ::step]
        rule = Rule(0.25, positions=torch.arange(24 // step, device=device)[None])
        g, a, b, c, o = (x.double() for x in args)
        expected = reference.attention_backward(g, a, b, c, o, part, rule)
        part = part if dtype == torch.float64 else part.float()
        g, a, b, c, o = (x.to(dtype) for x in args)
        try:
            got = run(g, a, b, c, o, part, None, True, 0.25)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError):
            return False
        if not all(_close(x, y, dtype) for x, y in zip(got, expected, strict=True)):
            return False
    return True


def _close(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    return bool((x.double() - y).abs().max() <= 64 * torch.finfo(dtype).eps * y.abs().max())
