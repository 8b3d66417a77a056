"""The chunked loss is the model's own, or is refused by name."""

import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sage import cross_entropy
from lightning_sage.cross_entropy import check_chunked_loss, chunked_loss

SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    # a factor on the logits is a factor on what they are made of
    "granite": {"model_type": "granite", "logits_scaling": 4.0},
    "cohere": {"model_type": "cohere", "logit_scale": 0.25},
    "phi-bias": {"model_type": "phi"},
    "mixtral-auxiliary": {"model_type": "mixtral", "output_router_logits": True},
    "llama-checkpointing": {"model_type": "llama"},
}
LORA = {
    "none": None,
    "blocks": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    "head-saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def make_model(kind, lora="none", dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SIZES, "initializer_range": 0.3, **KINDS[kind]})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if kind.endswith("checkpointing"):
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if LORA[lora] is not None:
        model = get_peft_model(model, LORA[lora], autocast_adapter_dtype=False)
    return model.train()


def make_batch(batch=3, length=21):
    ids = torch.randint(3, 97, (batch, length))
    labels = ids.masked_fill(torch.rand(batch, length) < 0.5, -100)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    labels[0, :6] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(model, batch):
    """From the model's own logits; its own loss is computed in float32 whatever they are."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.fixture(params=["torch", "slices", "liger"])
def with_kernel(request, monkeypatch):
    """Each way to compute; Liger's kernel, which needs a GPU, by what it is said to compute."""
    if request.param != "torch":
        monkeypatch.setattr(cross_entropy, "_kernel", lambda *_: request.param)
    # slices of seven rows
    monkeypatch.setattr(cross_entropy, "LOGITS", 7 * 97)

    def fused(hidden, weight, target, bias=None):
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(cross_entropy._wide(logits), target)

    functional = types.SimpleNamespace(liger_fused_linear_cross_entropy=fused)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_models_own_loss_and_gradient(kind, with_kernel):
    model, batch = make_model(kind), make_batch()
    check_chunked_loss(model, batch)
    own, chunked = model(**batch).loss, chunked_loss(model, batch)
    torch.testing.assert_close(chunked, own)
    expected, found = gradients(model, own), gradients(model, chunked)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("lora", LORA)
def test_is_exact_in_float64(lora, with_kernel):
    model, batch = make_model("llama", lora, torch.float64), make_batch()
    check_chunked_loss(model, batch)
    own, chunked = reference(model, batch), chunked_loss(model, batch)
    torch.testing.assert_close(chunked, own, rtol=1e-12, atol=0)
    expected, found = gradients(model, own), gradients(model, chunked)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_is_the_models_own_loss_without_grad():
    model, batch = make_model("llama", dtype=torch.bfloat16), make_batch()
    with torch.no_grad():
        own, chunked = model(**batch).loss, chunked_loss(model, batch)
    # not rounded to bfloat16
    assert own.dtype == chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, own, rtol=1e-5, atol=0)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_is_close_in_sixteen_bits(with_kernel, autocast):
    model, batch = make_model("llama", dtype=torch.bfloat16), make_batch()
    if autocast is not None:
        model.float()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        check_chunked_loss(model, batch)
        own, chunked = model(**batch).loss, chunked_loss(model, batch)
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, own, rtol=2**-8, atol=0)
    expected, found = gradients(model, own), gradients(model, chunked)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert error < 0.03, name


@pytest.mark.parametrize(
    ("dtype", "device", "installed", "expected"),
    [
        (torch.bfloat16, "cuda", True, "liger"),
        (torch.float16, "cuda", True, "slices"),
        (torch.bfloat16, "cuda", False, "slices"),
        (torch.float32, "cpu", True, "slices"),
    ],
)
def test_without_torchs_kernel(dtype, device, installed, expected, monkeypatch):
    model = make_model("llama", dtype=dtype)
    monkeypatch.setattr(F, "linear_cross_entropy", None, raising=False)
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", None, raising=False)
    assert cross_entropy.kernel(model, torch.device(device)) == "torch"
    monkeypatch.delattr(F, "linear_cross_entropy")
    monkeypatch.setattr(cross_entropy, "find_spec", lambda _: installed or None)
    assert cross_entropy.kernel(model, torch.device(device)) == expected


def test_a_head_that_is_more_than_its_weight_is_called(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_kernel", lambda *_: "torch")
    model = make_model("llama", "head")
    assert cross_entropy.kernel(model, torch.device("cpu")) == "slices"
    model = make_model("llama", "blocks")
    assert cross_entropy.kernel(model, torch.device("cpu")) == "torch"
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    assert cross_entropy.kernel(model, torch.device("cpu")) == "slices"


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_sum_over_the_items_of_an_accumulated_batch(items, with_kernel):
    model, batch = make_model("llama"), make_batch()
    own = model(**batch, num_items_in_batch=items).loss
    chunked = chunked_loss(model, {**batch, "num_items_in_batch": items})
    torch.testing.assert_close(chunked, own)
    torch.testing.assert_close(
        gradients(model, chunked)["lm_head.weight"], gradients(model, own)["lm_head.weight"]
    )


@pytest.mark.parametrize("items", [10, torch.tensor(10)])
def test_an_accumulated_batch_without_labels_adds_nothing(items, with_kernel):
    model, batch = make_model("llama"), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch, num_items_in_batch=items).loss == 0
    assert chunked_loss(model, {**batch, "num_items_in_batch": items}) == 0


def test_labels_shifted_by_the_caller():
    model, batch = make_model("llama"), make_batch()
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(
        chunked_loss(model, {**batch, "shift_labels": shifted}), model(**batch).loss
    )


def test_no_label_is_no_number_and_no_gradient(with_kernel):
    model, batch = make_model("llama"), make_batch()
    batch["labels"][:] = -100
    assert model(**batch).loss.isnan()
    loss = chunked_loss(model, batch)
    assert loss.isnan()
    assert not gradients(model, loss)["model.norm.weight"].any()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("lora", ["none", "head"])
def test_never_holds_all_logits(lora, monkeypatch):
    model, batch = make_model("llama", lora), make_batch(batch=4, length=64)
    batch["labels"] = batch["input_ids"]
    monkeypatch.setattr(cross_entropy, "LOGITS", 16 * 97)
    monkeypatch.setattr(cross_entropy, "_kernel", lambda *_: "slices")
    with Largest() as full:
        model(**batch).loss.backward()
    with Largest() as chunked:
        chunked_loss(model, batch).backward()
    assert full.elements >= 4 * 64 * 97
    # the blocks' own: pairs of tokens
    assert chunked.elements <= 4 * 64 * 64


def test_leaves_no_trace_even_where_the_forward_fails():
    model, batch = make_model("llama", "blocks"), make_batch()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    drawn = torch.get_rng_state()
    check_chunked_loss(model, batch)
    chunked_loss(model, batch)
    with pytest.raises(IndexError):
        chunked_loss(model, {**batch, "input_ids": batch["input_ids"] + 1000})
    after = {name: dict(vars(m)) for name, m in model.named_modules()}
    assert after == before
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_soft_cap_is_refused_by_name_however_small_the_logits_are():
    config = AutoConfig.for_model("gemma2", **SIZES, initializer_range=0.002)
    model, batch = AutoModelForCausalLM.from_config(config), make_batch()
    # at these weights the cap changes next to nothing
    torch.testing.assert_close(chunked_loss(model, batch), model(**batch).loss)
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM.*final_logit_softcapping=30.*'full'"):
        check_chunked_loss(model, batch)
    config.final_logit_softcapping = None
    check_chunked_loss(AutoModelForCausalLM.from_config(config), batch)


def test_a_loss_of_ones_own_is_refused_by_name():
    sizes = {"vocab_size": 97, "d_model": 16, "decoder_ffn_dim": 32, "decoder_layers": 1}
    config = AutoConfig.for_model("bart", **sizes, decoder_attention_heads=2, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"BartForCausalLM.*calls no loss_function"):
        check_chunked_loss(model, make_batch())


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, labels, vocab_size: logits.pow(2).mean(),
        # a mean over rows without a label too
        lambda logits, labels, vocab_size: (
            F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum") / (labels.numel() - 1)
        ),
    ],
    ids=["other", "over-all-rows"],
)
def test_another_loss_is_refused_by_name(loss):
    model = make_model("llama")
    model.loss_function = loss
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*where the model says"):
        check_chunked_loss(model, make_batch())


def test_a_head_with_dropout_is_checked_without_it():
    head = LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(make_model("llama"), head)
    dropout = model.get_output_embeddings().lora_dropout["default"]
    check_chunked_loss(model, make_batch())
    assert dropout.training


def test_what_has_no_output_layer_or_no_labels_is_refused_by_name():
    model, batch = make_model("llama"), make_batch()
    with pytest.raises(ValueError, match=r"LlamaModel.*no output layer"):
        chunked_loss(model.model, batch)
    del batch["labels"]
    with pytest.raises(ValueError, match=r"needs labels \[B, T\]"):
        check_chunked_loss(model, batch)
