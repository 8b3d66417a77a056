"""The judges are judged: against finite differences, autograd, and faults planted in them."""

import pytest
import torch
from torch.nn import functional as F

import oracle as judge
import zoo
from accuracy import (
    assert_as_accurate,
    assert_gradients_close,
    cosine,
    loss_and_gradients,
    relative_error,
)
from lightning_sage.memory import saved_bytes
from oracle import Rows, oracle

MODES = ("salient", "full")


def _block_case():
    model = zoo.build("plain")
    hidden = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(hidden)
    inside = torch.tensor([[1, 0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 1, 0]]).bool()
    return model, hidden, cotangent, inside


def _oracle_block(model, hidden, cotangent, weights, mode):
    with oracle(model, [Rows("blocks.0", weights)], mode):
        output = model.blocks[0](hidden)
    parameters = dict(model.blocks[0].named_parameters())
    wanted = [hidden, *parameters.values()]
    gradients = torch.autograd.grad(output, wanted, cotangent)
    return output, dict(zip(["hidden", *parameters], gradients, strict=True))


def _attention_parts(p, hidden):
    normed = F.layer_norm(hidden, (32,), p["norm1.weight"], p["norm1.bias"])
    qkv = normed @ p["qkv.weight"].T + p["qkv.bias"]
    q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in qkv.split(32, -1))
    return q, k, v


def _objective(p, hidden, base_p, base_hidden, cotangent, inside, mode):
    """What the rows inside contribute, where all that lies outside keeps its base value."""
    q, k, v = _attention_parts(p, hidden)
    base_q, base_k, base_v = _attention_parts(base_p, base_hidden)
    rows = inside[:, None, :, None]
    v = torch.where(rows, v, base_v)
    if mode == "full":
        k = torch.where(rows, k, base_k)
    logits = q @ k.mT / 8**0.5
    if mode != "full":
        logits = torch.where(rows.mT, logits, base_q @ base_k.mT / 8**0.5)
    causal = torch.ones(7, 7).tril().bool()
    y = logits.masked_fill(~causal, -torch.inf).softmax(-1) @ v
    x = hidden + y.transpose(1, 2).flatten(2) @ p["out.weight"].T + p["out.bias"]
    normed = F.layer_norm(x, (32,), p["norm2.weight"], p["norm2.bias"])
    up = F.gelu(normed @ p["up.weight"].T + p["up.bias"])
    output = x + up @ p["down.weight"].T + p["down.bias"]
    return (cotangent * torch.where(inside[..., None], output, hidden)).sum()


def _assert_matches_finite_differences(mode, oracle_mode=None):
    model, hidden, cotangent, inside = _block_case()
    _, gradients = _oracle_block(model, hidden, cotangent, inside.double(), oracle_mode or mode)
    with torch.no_grad():
        base = {"hidden": hidden, **dict(model.blocks[0].named_parameters())}
        for name, value in base.items():
            step = torch.randn_like(value)
            ends = []
            for sign in (1, -1):
                moved = base | {name: value + sign * 1e-5 * step}
                ends.append(
                    _objective(moved, moved["hidden"], base, hidden, cotangent, inside, mode)
                )
            numeric = (ends[0] - ends[1]) / 2e-5
            analytic = (gradients[name] * step).sum()
            assert (numeric - analytic).abs() <= 1e-7 * (1 + numeric.abs()), name


@pytest.mark.parametrize("mode", MODES)
def test_oracle_matches_finite_differences(mode):
    _assert_matches_finite_differences(mode)


@pytest.mark.parametrize("mode", MODES)
def test_oracle_of_the_other_mode_is_caught(mode):
    other = MODES[1 - MODES.index(mode)]
    with pytest.raises(AssertionError):
        _assert_matches_finite_differences(mode, other)


def _keys_and_values_leak(x, inside):
    return x if x.dim() == 4 else torch.where(inside, x, x.detach())


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("frozen_outside", _keys_and_values_leak),
        ("_identity_outside", lambda hidden, output, weight: output),
        ("_identity_outside", lambda hidden, output, weight: output * weight),
    ],
    ids=["leaky-values", "dense-output", "no-identity"],
)
@pytest.mark.parametrize("mode", MODES)
def test_planted_fault_is_caught(monkeypatch, mode, name, fault):
    monkeypatch.setattr(judge, name, fault)
    with pytest.raises(AssertionError):
        _assert_matches_finite_differences(mode)


def test_weights_scale_the_branches_and_not_the_residual_path():
    model, hidden, cotangent, _ = _block_case()
    weights = torch.rand(2, 7, dtype=torch.float64) + 0.5
    value, actual = _oracle_block(model, hidden, cotangent, weights, "full")
    _, through = _oracle_block(
        model, hidden, weights[..., None] * cotangent, torch.ones_like(weights), "full"
    )
    through["hidden"] = cotangent + through["hidden"] - weights[..., None] * cotangent
    assert_gradients_close(actual, through, 1e-12)
    assert torch.allclose(value, model.blocks[0](hidden), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_oracle_over_all_rows_is_autograd(name, mode):
    model = zoo.build(name)
    for padding in zoo.MODELS[name].paddings:
        batch = zoo.make_batch(name, padding)
        valid = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        with zoo.exactly(name):
            dense_loss, dense = loss_and_gradients(model, batch)
        rows = [Rows(block, valid.double()) for block in _block_names(model)]
        with zoo.exactly(name), oracle(model, rows, mode):
            loss, gradients = loss_and_gradients(model, batch)
        assert relative_error(loss, dense_loss) <= 1e-12
        assert_gradients_close(gradients, dense, 1e-10)
        assert not any("forward" in vars(module) for module in model.modules())


def _block_names(model):
    from transformers.modeling_layers import GradientCheckpointingLayer

    kinds = (GradientCheckpointingLayer, zoo.PlainBlock)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_parameter_of_the_zoo_is_felt(name, lora):
    _, gradients = loss_and_gradients(zoo.build(name, lora=lora), zoo.make_batch(name, None))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.any() for gradient in gradients.values())


def test_as_accurate_refuses_a_worse_kernel():
    exact = torch.linspace(0, 1, 9, dtype=torch.float64)
    assert_as_accurate(exact + 2e-3, exact + 1e-3, exact)
    with pytest.raises(AssertionError, match="eager PyTorch in the same dtype allows"):
        assert_as_accurate(exact + 3e-3, exact + 1e-3, exact)


def test_gradient_judges_refuse_nan_and_a_missing_name():
    gradients = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert_gradients_close(gradients, gradients, 1e-12)
    assert cosine(gradients, gradients) == pytest.approx(1)
    with pytest.raises(AssertionError, match="b by nan"):
        assert_gradients_close(gradients | {"b": torch.full((2,), torch.nan)}, gradients, 1.0)
    with pytest.raises(AssertionError):
        assert_gradients_close({"a": gradients["a"]}, gradients, 1.0)


def test_saved_bytes_counts_storages_while_they_are_held():
    weight = torch.randn(4, 8, requires_grad=True)
    x = torch.randn(16, 8)
    with saved_bytes(exclude=[weight]) as held:
        y = F.linear(x[:2], weight)  # saves a view: all of x stays
        z = y.exp()
        assert held() == x.nbytes + z.nbytes
    del y, z
    assert held() == 0
