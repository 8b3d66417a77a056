"""Blocks of plain PyTorch in a stack: one training step, what is expected of it, and a policy."""

import contextlib
import math
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from accuracy import assert_gradients_close, parameter_gradients
from lightning_sage import AllTokens, SagePolicy, install
from oracle import oracle, replayed

MODES = ("salient", "full")
over_modes = pytest.mark.parametrize("mode", MODES)
B, T, C = 3, 9, 32


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def shaken(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double().train()


def inputs(batch=B, length=T):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, C, generator=draw, dtype=torch.float64)


def step(model, call, valid=None):
    """Gradients of parameters, and of the inputs, of a loss that differs from token to token."""
    model.zero_grad(set_to_none=True)
    x = inputs().requires_grad_()
    out = call(model, x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    if valid is not None:
        weight = weight * valid[..., None]
    (out * weight).tanh().sum().backward()
    return parameter_gradients(model) | {"x": x.grad}


def policy_of(**fields):
    plain = {"replay": None, "sinks": 1, "keep_last": False, "queries": "all"}
    return SagePolicy(**{"blocks": ["layers.*"], "keep_loss_rows": False} | plain | fields)


def attention_by_hand(
    query, key, value, width, heads, weight, bias, bias_k, bias_v, add_zero, p, out_weight,
    out_bias, training=True, key_padding_mask=None, need_weights=True, attn_mask=None,
    is_causal=False, **_,
):  # fmt: skip
    """`F.multi_head_attention_forward` of `nn.MultiheadAttention`, in plain sight of the oracle."""
    parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x, w, b in parts
    )
    mask = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=q.dtype)
    if attn_mask is not None:
        by_head = attn_mask.dim() == 3
        mask = mask + _additive(attn_mask.unflatten(0, (-1, heads)) if by_head else attn_mask)
    if key_padding_mask is not None:
        mask = mask + _additive(key_padding_mask)[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p if training else 0.0)
    return F.linear(y.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None


def _additive(mask):
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -math.inf)


@contextlib.contextmanager
def expected_of(model, rows, mode):
    with (
        mock.patch.object(F, "multi_head_attention_forward", attention_by_hand),
        oracle(model, rows, mode),
    ):
        yield


def assert_exact(model, call, mode, valid=None, tolerance=1e-9, **fields):
    """All tokens give the dense gradient, and some that of the oracle; returns what was kept."""
    dense = step(model, call, valid)
    with install(model, policy_of(keep=AllTokens(), attention=mode, **fields)):
        assert_gradients_close(step(model, call, valid), dense, tolerance)
    with install(model, policy_of(keep=0.4, attention=mode, **fields)) as installation:
        found = step(model, call, valid)
        records = installation.records
    assert all(0 < r.kept.sum() < B * T for r in records)
    with expected_of(model, replayed(records), mode):
        expected = step(model, call, valid)
    assert_gradients_close(found, expected, tolerance)
    return [r.kept for r in records]
