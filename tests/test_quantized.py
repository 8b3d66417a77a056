"""Adapters on quantized weights: torchao's tensors and bitsandbytes' 8 bits; for 4, see precision.

None of them knows float64. The attention of the oracle rounds otherwise than a fused kernel, which
eight-bit activations turn into steps: where there are such, the judge is autograd alone.
"""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import zoo
from accuracy import assert_gradients_close, cosine
from lightning_sage import AllTokens, SagePolicy
from steps import oracle_step, policy_of, run, sage_step, trained

MODES = ("salient", "full")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A small llama on disk, to be quantized as it is loaded."""
    folder = tmp_path_factory.mktemp("llama")
    zoo.build("llama", dtype=torch.float32).save_pretrained(folder)
    return folder


def int8_weights():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int8_weights_and_activations():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def float8_weights():
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def int4_weights():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))


SCHEMES = (int8_weights, int8_weights_and_activations, float8_weights, int4_weights)


def with_adapters(model):
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).train()


def torchao_model(folder, scheme, dtype=torch.float32):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from transformers import TorchAoConfig

    config = TorchAoConfig(scheme())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    return with_adapters(model)


def quantized(model):
    """Frozen weights of linear layers of the blocks, which are no plain tensors."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if "layers" in name and type(parameter.data) is not torch.Tensor
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchao_base_is_exact(stored, scheme, mode):
    model, batch = torchao_model(stored, scheme), zoo.make_batch("llama")
    assert len(quantized(model)) == 2 * 7
    dense_loss, dense = run("llama", model, batch)
    assert len(dense) == 2 * 7 * 2 + 1
    loss, gradients, _ = sage_step(
        "llama", model, batch, policy_of(keep=AllTokens(), attention=mode)
    )
    assert loss == dense_loss
    assert_gradients_close(gradients, dense, 1e-5)
    _, gradients, rows = sage_step("llama", model, batch, policy_of(keep=0.3, attention=mode))
    _, expected = oracle_step("llama", model, batch, rows, mode)
    if scheme is int8_weights_and_activations:
        assert cosine(gradients, expected) > 0.9999
    else:
        assert_gradients_close(gradients, expected, 1e-5)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchao_base_in_half_precision(stored, scheme):
    model, batch = torchao_model(stored, scheme, torch.bfloat16), zoo.make_batch("llama")
    _, dense = run("llama", model, batch)
    _, gradients, _ = sage_step("llama", model, batch, policy_of(keep=AllTokens()))
    assert cosine(gradients, dense) > 0.999


def test_torchao_base_trains_adapters_alone(stored):
    model = torchao_model(stored, int8_weights)
    before = {name: weight.detach().dequantize() for name, weight in quantized(model).items()}
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trained(model, SagePolicy()).remove()
    for name, weight in quantized(model).items():
        assert torch.equal(weight.detach().dequantize(), before[name])
    assert all(not torch.equal(model.get_parameter(n), adapters[n]) for n in adapters)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", MODES)
def test_eight_bits_of_bitsandbytes_are_exact(stored, mode, device):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes.nn import Linear8bitLt

    model = with_adapters(
        AutoModelForCausalLM.from_pretrained(
            stored,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            device_map={"": device},
            dtype=torch.float32,
        )
    )
    assert sum(isinstance(m, Linear8bitLt) for m in model.modules()) >= 2 * 7
    batch = {name: x.to(device) for name, x in zoo.make_batch("llama").items()}
    dense_loss, dense = run("llama", model, batch)
    policy = policy_of(keep=AllTokens(), attention=mode)
    loss, gradients, _ = sage_step("llama", model, batch, policy)
    if device == "cuda":
        # there activations are rounded to eight bits, with columns chosen by all of their rows
        assert cosine(gradients, dense) > 0.99
        return
    assert loss == dense_loss
    assert_gradients_close(gradients, dense, 1e-5)
    _, gradients, rows = sage_step("llama", model, batch, policy_of(keep=0.3, attention=mode))
    assert_gradients_close(gradients, oracle_step("llama", model, batch, rows, mode)[1], 1e-5)
