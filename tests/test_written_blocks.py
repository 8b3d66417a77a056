"""Blocks written by hand, around `nn.MultiheadAttention` and as nanoGPT's."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from accuracy import assert_gradients_close
from lightning_sage import AllTokens, ReplayError, install
from oracle import oracle, replayed
from torch_blocks import C, Stack, assert_exact, over_modes, policy_of, shaken, step


class Attending(nn.Module):
    """A block around `nn.MultiheadAttention`, as one writes it oneself."""

    def __init__(self, need_weights=False, uses=False, **options):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 48), nn.Linear(48, C)
        self.attention = nn.MultiheadAttention(C, 4, batch_first=True, **options)
        self.need_weights, self.uses = need_weights, uses

    def forward(self, x):
        y = self.norm(x)
        mask = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool).triu(1)
        y, weights = self.attention(
            y, y, y, attn_mask=mask, need_weights=self.need_weights, is_causal=True
        )
        if self.uses:
            y = y * weights.amax(-1, keepdim=True)
        x = x + y
        return x + self.down(F.gelu(self.up(x)))


class Causal(nn.Module):
    """nanoGPT's attention; `flash` as there."""

    def __init__(self, flash):
        super().__init__()
        self.c_attn, self.c_proj, self.flash = nn.Linear(C, 3 * C), nn.Linear(C, C), flash
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.0), nn.Dropout(0.0)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = (y.view(B, T, 4, C // 4).transpose(1, 2) for y in self.c_attn(x).split(C, 2))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class Block(nn.Module):
    def __init__(self, flash):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(C), Causal(flash), nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 48), nn.GELU(), nn.Linear(48, C))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


@over_modes
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": C, "vdim": C}])
def test_multihead_attention_in_a_block_of_ones_own(options, mode):
    model = shaken(Stack(Attending(**options), Attending(**options)))
    call = lambda m, x: m(x)  # noqa: E731
    if options != {"bias": False}:
        assert_exact(model, call, mode)
        return
    dense = step(model, call)
    with install(model, policy_of(keep=AllTokens(), attention=mode)):
        assert_gradients_close(step(model, call), dense, 1e-9)


def test_multihead_attention_that_makes_its_weights():
    """need_weights=True, the default of torch.nn, writes the attention out."""
    model = shaken(Stack(Attending(need_weights=True), Attending(need_weights=True)))
    assert_exact(model, lambda m, x: m(x), "salient")


@pytest.mark.parametrize(
    "block",
    [
        lambda: Attending(need_weights=True, uses=True),
        lambda: Attending(add_bias_kv=True),
        lambda: Attending(add_zero_attn=True),
    ],
    ids=["uses its weights", "add_bias_kv", "add_zero_attn"],
)
def test_what_multihead_attention_adds_is_refused_by_name(block):
    model = shaken(Stack(block()))
    with install(model, policy_of(keep=0.4)), pytest.raises(ReplayError, match=r"layers\.0"):
        step(model, lambda m, x: m(x))


@pytest.mark.parametrize(("flash", "mode"), [(True, "salient"), (True, "full"), (False, "salient")])
def test_nano_gpt_with_sdpa_and_by_hand(flash, mode):
    """By hand, the oracle is the same model with SDPA: the same function and parameters."""
    model, same = (shaken(Stack(Block(sdpa), Block(sdpa))) for sdpa in (flash, True))
    same.load_state_dict(model.state_dict())
    dense = step(model, lambda m, x: m(x))
    with install(model, policy_of(keep=AllTokens(), attention=mode)):
        assert_gradients_close(step(model, lambda m, x: m(x)), dense, 1e-9)
    with install(model, policy_of(keep=0.4, attention=mode)) as installation:
        found = step(model, lambda m, x: m(x))
        rows = replayed(installation.records)
    with oracle(same, rows, mode):
        expected = step(same, lambda m, x: m(x))
    assert_gradients_close(found, expected, 1e-8)


def test_nano_gpt_by_hand_is_refused_with_full_attention():
    model = shaken(Stack(Block(False)))
    with (
        install(model, policy_of(keep=0.4, attention="full")),
        pytest.raises(ReplayError, match=r"layers\.0.*attention='salient'"),
    ):
        step(model, lambda m, x: m(x))
