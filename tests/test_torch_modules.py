"""Blocks of torch.nn, whose masks are the other way round: against autograd and the oracle."""

import math

import pytest
import torch
from torch import nn

from accuracy import assert_gradients_close, parameter_gradients
from lightning_sage import AllTokens, ReplayError, install
from oracle import replayed
from torch_blocks import (
    B,
    C,
    Stack,
    T,
    assert_exact,
    expected_of,
    inputs,
    over_modes,
    policy_of,
    shaken,
    step,
)

CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)  # torch.nn: True is hidden
PADDED = torch.arange(T) >= torch.tensor([9, 6, 4])[:, None]
ADDITIVE = torch.zeros(T, T).double().masked_fill(CAUSAL, -math.inf)
BIAS = ADDITIVE + torch.linspace(-1, 1, T)[None].double()
MASKS = {
    "none": {},
    "bool": {"mask": CAUSAL},
    "bool and hint": {"mask": CAUSAL, "is_causal": True},
    "float and hint": {"mask": ADDITIVE, "is_causal": True},
    "bias": {"mask": BIAS},
    "padding": {"src_key_padding_mask": PADDED},
    "padding and bool": {"mask": CAUSAL, "src_key_padding_mask": PADDED},
    "padding and float": {
        "mask": ADDITIVE,
        "src_key_padding_mask": torch.zeros(B, T).double().masked_fill(PADDED, -math.inf),
    },
}


def encoder(**options):
    options = {"batch_first": True, "dropout": 0.0} | options
    layer = nn.TransformerEncoderLayer(C, 4, 48, **options)
    return shaken(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


@over_modes
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_transformer_encoder(masks, norm_first, mode):
    model = encoder(norm_first=norm_first)
    padded = "src_key_padding_mask" in masks
    kept = assert_exact(model, lambda m, x: m(x, **masks), mode, ~PADDED if padded else None)
    if padded:
        assert not any((rows & PADDED).any() for rows in kept)


@over_modes
def test_a_mask_of_as_many_samples_as_tokens(mode):
    """[T, T] stays a mask of pairs."""
    model, square = encoder(), CAUSAL[:B, :B]
    dense = _square_step(model, square)
    with install(model, policy_of(keep=AllTokens(), attention=mode)):
        assert_gradients_close(_square_step(model, square), dense, 1e-9)


def _square_step(model, mask):
    model.zero_grad(set_to_none=True)
    model(inputs(B, B), mask=mask).tanh().sum().backward()
    return parameter_gradients(model)


@over_modes
def test_eval_mode_takes_no_fast_path_in_a_step(mode):
    """The fused kernels of torch.nn would hide the attention; evaluation itself still has them."""
    model = encoder().eval()
    assert_exact(model, lambda m, x: m(x, mask=CAUSAL), mode)
    with install(model, policy_of(keep=0.4)), torch.no_grad():
        found = model(inputs())
    with torch.no_grad():
        assert torch.equal(found, model(inputs()))


@over_modes
def test_dropout_is_replayed(mode):
    """Of attention weights, of the feed-forward and of both residual branches."""
    model = encoder(dropout=0.2, norm_first=True)
    with install(model, policy_of(keep=0.4, attention=mode)) as installation:
        found = step(model, lambda m, x: m(x, mask=CAUSAL))
        rows = replayed(installation.records)
    with expected_of(model, rows, mode):
        expected = step(model, lambda m, x: m(x, mask=CAUSAL))
    assert_gradients_close(found, expected, 1e-8)


def test_masks_by_head_are_refused_by_name():
    """[B * H, T, T], which is no table of biases [H, T, T]."""
    model, mask = encoder(), CAUSAL.expand(B * 4, T, T)
    with install(model, policy_of(keep=0.4)), pytest.raises(ReplayError, match=r"layers\.0"):
        step(model, lambda m, x: m(x, mask=mask))


def test_tokens_first_is_refused_by_name():
    model = encoder(batch_first=False)
    with (
        install(model, policy_of(keep=0.4)),
        pytest.raises(ReplayError, match=r"layers\.0.*batch_first"),
    ):
        step(model, lambda m, x: m(x.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("length", [B, T])
def test_tokens_first_is_refused_where_there_are_as_many_samples(length):
    model = encoder(batch_first=False)
    with install(model, policy_of(keep=0.4)), pytest.raises(ReplayError, match=r"layers\.0"):
        model(inputs(length, length).transpose(0, 1)).sum().backward()


@over_modes
@pytest.mark.parametrize("length", [T, 7], ids=["as long", "shorter"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_transformer_decoder(padded, length, mode):
    """Memory has its gradient, also where it is as long as the decoder's sequence."""
    layer = nn.TransformerDecoderLayer(C, 4, 48, 0.0, batch_first=True)
    model = shaken(nn.TransformerDecoder(layer, 2))
    memory = torch.randn(B, length, C, dtype=torch.float64).requires_grad_()
    masks = {"tgt_mask": CAUSAL}
    if padded:
        absent = torch.arange(length) >= torch.tensor([length, 5, 3])[:, None]
        masks["memory_key_padding_mask"] = absent

    def gradients():
        memory.grad = None
        return step(model, lambda m, x: m(x, memory, **masks)) | {"memory": memory.grad}

    dense = gradients()
    with install(model, policy_of(keep=AllTokens(), attention=mode)) as installation:
        assert_gradients_close(gradients(), dense, 1e-9)
        installation.policy = policy_of(keep=0.4, attention=mode)
        found = gradients()
        rows = replayed(installation.records)
    assert all(0 < (r.weights > 0).sum() < B * T for r in rows)
    with expected_of(model, rows, mode):
        expected = gradients()
    assert_gradients_close(found, expected, 1e-9)


class Masked(Stack):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x, CAUSAL)
        return x


@pytest.mark.parametrize("mask", [ADDITIVE, CAUSAL], ids=["additive", "bool"])
def test_skipping_goes_by_masks(mask):
    """An encoder makes a bool mask additive before its layers are given it."""
    model = encoder()
    dense = step(model, lambda m, x: m(x, mask=mask))
    with install(model, policy_of(keep=AllTokens(), unselected="skip")):
        found = step(model, lambda m, x: m(x, mask=mask))
    assert_gradients_close(found, dense, 1e-9)


def test_skipping_is_refused_with_a_mask_that_hides_where_it_is_true():
    """A bool mask of transformers says what is seen."""
    layers = (nn.TransformerEncoderLayer(C, 4, 48, 0.0, batch_first=True) for _ in range(3))
    model = shaken(Masked(*layers))
    assert_exact(model, lambda m, x: m(x), "salient")
    policy = policy_of(keep=0.4, unselected="skip")
    with install(model, policy), pytest.raises(ReplayError, match=r"layers\.1.*identity"):
        step(model, lambda m, x: m(x))
