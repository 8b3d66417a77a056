"""What the engine refuses, and what it survives, so that no step trains on a wrong gradient."""

import random
import weakref
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import zoo
from accuracy import assert_gradients_close, parameter_gradients
from lightning_sage import AllTokens, ReplayError, SagePolicy, install

ALL = SagePolicy(keep=AllTokens(), replay=None)
NAMED = SagePolicy(keep=AllTokens(), replay=None, blocks=["blocks.*"])
WRONG = [("keep", "0.5"), ("keep", None), ("keep", True), ("replay", "x"), ("sinks", 1.5)]
WRONG += [("blocks", "model.layers.*"), ("blocks", []), ("dense_blocks", 1.5)]
LENDER = nn.Linear(32, 32).double()
UNREPEATABLE = {
    "not registered": lambda _, x: LENDER(x),
    "random": lambda _, x: x + (random.random() < 0),
    "KeyError": lambda _, x: x + {9: 0.0}[x.shape[1]],
}


class Block(nn.Module):
    """Self-attention of 4 heads of 8 on a residual path, and then whatever `more` does."""

    def __init__(self, more=None):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.more = more

    def forward(self, hidden_states, mask=None, table=1.0, **asked):
        x = self.norm(hidden_states)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q * table, k * table, v, mask, is_causal=mask is None)
        x = hidden_states + self.out(y.transpose(1, 2).flatten(2))
        return self.more(self, x, **asked) if self.more else x


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.double()

    def forward(self, x, labels=None, **kwargs):
        for block in self.blocks:
            x = block(x, **kwargs)
        return x


def rows(batch=3, length=9):
    return torch.randn(batch, length, 32, dtype=torch.float64)


def train(model, *args, **kwargs):
    model.zero_grad()
    out = model(*args, **kwargs)
    (out.square().sum() if isinstance(out, torch.Tensor) else out.loss).backward()
    return parameter_gradients(model)


def refused(reason):
    return pytest.raises(ReplayError, match=rf"block 'blocks.0' \(Block\): .*{reason}")


@pytest.mark.parametrize("where", ["keyword", "config"])
def test_outputs_without_gradient_are_refused_in_training_alone(where):
    asked = "output_attentions"
    fields = zoo._LLAMA | {"num_local_experts": 4, "attn_implementation": "eager"}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields)).train()
    batch = zoo.make_batch("llama") | ({asked: True} if where == "keyword" else {})
    setattr(model.config, asked, where == "config")
    with install(model, ALL):
        with pytest.raises(ValueError, match=asked):
            model(**batch)
        with torch.no_grad():
            assert len(model(**batch)[asked.removeprefix("output_")]) == 2


def test_a_cache_is_refused_in_training_alone():
    model, ids = zoo.build("llama"), zoo.make_batch("llama")["input_ids"]
    with install(model, ALL):
        for name, value in (("use_cache", True), ("past_key_values", transformers.DynamicCache())):
            with pytest.raises(ValueError, match=name):
                model(ids, **{name: value})
        with torch.no_grad():
            past = model(ids[:, :5], use_cache=True).past_key_values
            rest = model(ids[:, 5:], past_key_values=past)
            assert rest.past_key_values.get_seq_length() == ids.shape[1]


def test_router_logits_that_are_not_followed_are_refused(monkeypatch):
    fields = zoo._LLAMA | {"num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields)).train()
    monkeypatch.setattr("lightning_sage.engine.sides._variable", lambda: None)
    with install(model, ALL), pytest.raises(ReplayError, match=r"layers.0'.*output_router_logits"):
        model(**zoo.make_batch("llama"), output_router_logits=True)


def test_experts_of_limited_capacity_are_refused_though_nothing_overflows():
    config = transformers.AutoConfig.for_model(
        "nllb-moe", vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, num_experts=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4, expert_capacity=64,
        decoder_attention_heads=4, encoder_sparse_step=2, decoder_sparse_step=2,
    )  # fmt: skip
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).train()
    ids = torch.randint(3, 64, (3, 10))
    match = r"block '.*layers.1' .*drops tokens beyond expert_capacity=64.*strict=False"
    with install(model, ALL), pytest.raises(ReplayError, match=match):
        model(input_ids=ids, labels=ids)


class Shelf(dict):
    """A mapping that blocks share, as transformers' do keys and values."""


def test_a_block_that_writes_into_an_argument_is_refused():
    """Others would find there what the dense pass made, which has no gradient."""

    def lend(self, x, shelf):
        shelf["keys"] = self.out(x)
        return x

    with install(model := Stack(Block(lend)), NAMED), refused("writes into an argument"):
        model(rows(), shelf=Shelf())


def test_without_strict_a_block_that_cannot_be_replayed_is_left_dense():
    """Exactly: its gradient is the dense one, with a warning that names it and the reason."""
    mixing = Block(lambda self, x: x + self.out(x.roll(1, 1)))
    model, x = Stack(Block(), mixing, Block()), rows()
    dense = train(model, x)
    with install(model, NAMED, strict=False) as installed:
        with pytest.warns(UserWarning, match=r"left dense: block 'blocks.1' \(Block\): .*another"):
            train(model, x)
        again = train(model, x)
        assert list(installed.refused) == ["blocks.1"]
        assert [record.name for record in installed.records] == ["blocks.0", "blocks.2"]
    assert_gradients_close(again, dense, 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_switched_on_after_installing_is_refused(reentrant):
    model, batch = zoo.build("llama"), zoo.make_batch("llama")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    with install(model, ALL):
        enable({"use_reentrant": reentrant})
        with pytest.raises((ReplayError, ValueError), match="gradient checkpointing"):
            train(model, **batch)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_field_of_the_wrong_kind_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        SagePolicy(**{name: value})


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_the_replay_runs_in_the_modes_of_its_forward(name):
    dropout = {"lora": True, "lora_dropout": 0.3} if name == "llama" else {"dropout": 0.3}
    model, batch = zoo.build(name, **dropout), zoo.make_batch(name, None)
    gradients = {}
    with install(model, NAMED if name == "plain" else ALL):
        for mode in (True, False):
            torch.manual_seed(5)
            model.train().zero_grad()
            loss = model(**batch).loss
            model.train(mode)
            loss.backward()
            assert all(module.training == mode for module in model.modules())
            gradients[mode] = parameter_gradients(model)
    assert_gradients_close(gradients[False], gradients[True], 1e-12)


def test_a_frozen_weight_changed_before_backward_is_an_error():
    model = Stack(Block())
    weight = model.blocks[0].out.weight.requires_grad_(False)
    with install(model, NAMED):
        out = model(rows())
        weight.mul_(1.5)
        with pytest.raises(RuntimeError, match=r"block 'blocks.0' was modified in place"):
            out.sum().backward()


@pytest.mark.parametrize("how", ["assigned", "functional_call"])
def test_a_parameter_replaced_before_backward_is_an_error(how):
    model, batch = zoo.build("plain"), zoo.make_batch("plain", None)
    other = {name: nn.Parameter(1.3 * p.detach()) for name, p in model.named_parameters()}
    with install(model, NAMED):
        used = other if how == "functional_call" else {}
        loss = torch.func.functional_call(model, used, (), batch).loss
        if how == "assigned":
            model.blocks[1].out.weight = other["blocks.1.out.weight"]
        with pytest.raises(RuntimeError, match=r"block 'blocks.1' was replaced"):
            loss.backward()


def test_an_interrupted_forward_leaves_the_next_right():
    model, padded = zoo.build("llama"), zoo.make_batch("llama")
    batch, mlp = zoo.make_batch("llama", None), type(model.model.layers[1].mlp)
    with install(model, SagePolicy(keep=0.4, replay=None)) as installed:
        expected = train(model, **batch)
        interrupted = mock.patch.object(mlp, "forward", side_effect=KeyboardInterrupt)
        with interrupted, pytest.raises(KeyboardInterrupt):
            model(**padded)
        assert_gradients_close(train(model, **batch), expected, 1e-12)
        assert installed.records[0].valid.all()


def test_a_wrapper_put_on_a_block_later_outlives_sage():
    model, x = Stack(Block()), rows()
    dense = train(model, x)
    installed = install(model, NAMED)
    block, inner = model.blocks[0], model.blocks[0].forward
    wrapper = block.forward = lambda *args, **kwargs: 2 * inner(*args, **kwargs)
    installed.remove()
    assert block.forward is wrapper
    assert_gradients_close(train(model, x), {name: 4 * g for name, g in dense.items()}, 1e-12)


def test_no_mask_outlives_the_step_of_a_block_called_alone():
    model, mask = Stack(Block()), torch.ones(3, 1, 9, 9).tril() > 0
    alive = weakref.ref(mask)
    with install(model, NAMED):
        model.blocks[0](rows(), mask).sum().backward()
        del mask
        assert alive() is None


@pytest.mark.parametrize("change", ["length", "mode", "told", "training"])
def test_a_call_of_another_kind_is_checked_again(change):
    def mixing(self, x, mode, told):
        mixes = told or mode == "mix" or x.shape[1] >= 32 or not self.out.training
        return x + mixes * self.out(x.roll(1, 1))

    model = Stack(Block(mixing))
    asked = {"mode": "mix" if change == "mode" else "plain", "told": change == "told"}
    with install(model, NAMED):
        train(model, rows(length=8), mode="plain", told=False)
        model.blocks[0].out.train(change != "training")
        with refused("another output"):
            model(rows(length=40 if change == "length" else 8), **asked)


@pytest.mark.parametrize("reason", UNREPEATABLE)
def test_what_a_replay_cannot_repeat_is_refused_by_name(reason):
    with install(model := Stack(Block(UNREPEATABLE[reason])), NAMED), refused(reason):
        model(rows())


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 2, 8], ids="B{}".format)
def test_one_special_token_is_refused(place, batch, dtype):
    def special(self, x):
        one = torch.zeros(x.shape[1], 1)
        one[0 if place == "first" else -1] = 1
        return x + one * self.out(x)

    model = Stack(Block(special)).to(dtype)
    with install(model, NAMED), refused("another output"):
        model(rows(batch, 64).to(dtype))


@pytest.mark.parametrize("batch", [1, 2, 8], ids="B{}".format)
def test_a_block_that_counts_its_tokens_from_the_end_is_refused(batch):
    def from_the_end(self, x):
        return x + (torch.arange(x.shape[1]) == x.shape[1] - 1)[:, None] * self.out(x)

    with install(model := Stack(Block(from_the_end)), NAMED), refused("another output"):
        model(rows(batch, 64))


def test_a_check_passed_or_not_leaves_buffers_as_they_were():
    def tracking(self, x, refuse=False):
        self.statistics(x.mT)
        return x.roll(1, 1) if refuse else x

    model, statistics = Stack(Block(tracking)), nn.BatchNorm1d(32).double()
    model.blocks[0].statistics = statistics
    with install(model, NAMED) as installed:
        with refused("another output"):
            model(rows(), refuse=True)
        installed.check({"x": rows()})
    assert statistics.num_batches_tracked + statistics.running_mean.abs().sum() == 0


@pytest.mark.parametrize("kind", ["additive", "additive unpadded", "0 and 1"])
def test_a_float_mask_of_the_batch_is_read_right(kind):
    model, batch = zoo.build("plain"), zoo.make_batch("plain", None)
    valid = torch.arange(11) < torch.tensor([[11], [9], [7], [5], [3]]) + 11 * ("un" in kind)
    mask = valid.double() if kind == "0 and 1" else -1e9 * (~valid).double()
    # the model does not know of it, so that its loss is of all tokens
    told = nullcontext() if "un" in kind else pytest.warns(UserWarning, match="padding is never")
    with install(model, NAMED) as installed:
        installed.observe({"attention_mask": mask})
        with told:
            train(model, **batch)
        train(model, **batch)
        assert all(torch.equal(record.valid, valid) for record in installed.records)


def test_hidden_states_are_found_by_name():
    """A row that is not kept hands its gradient on as it came."""
    model, x = Stack(Block(lambda _, x, first: x + first)), rows().requires_grad_()
    with install(model, SagePolicy(keep=0.3, replay=None, blocks=["blocks.*"])) as installed:
        model.blocks[0](first=rows(), hidden_states=x).sum().backward()
    rest = ~installed.records[0].kept
    assert rest.any()
    assert torch.equal(x.grad[rest], torch.ones_like(x[rest]))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("shape", [(3, 9), (1, 9), (1, 7), (1, 4)], ids="B{0[0]}-T{0[1]}".format)
def test_a_table_for_all_samples_is_packed_right(heads, shape):
    model, x = Stack(Block(), Block()), rows(*shape)
    table = torch.rand(1, heads, shape[1], 8, dtype=torch.float64)
    dense = train(model, x, table=table)
    with install(model, NAMED):
        assert_gradients_close(train(model, x, table=table), dense, 1e-10)


def test_dropout_of_everything_is_zero():
    model, x = Stack(zoo.PlainBlock(dropout=1.0)), rows()
    with install(model, NAMED):
        assert torch.equal(model(x), x)
        assert all(g.isfinite().all() for g in train(model, x).values())


@pytest.mark.parametrize("name", ["PrefixForConditionalGeneration", "PrefixForCausalLM"])
def test_labels_of_a_language_model_are_shifted_whatever_its_mask(name):
    """The prefix is seen both ways, and as many rows are kept as bear loss."""
    model = type(name, (Stack,), {})(Block())
    labels = torch.where(torch.arange(20) < 12, -100, torch.ones(2, 20, dtype=torch.long))
    mask = torch.ones(20, 20).tril().bool() | (torch.arange(20) < 12)
    policy = SagePolicy(keep=0.4, replay=None, sinks=0, keep_last=False, blocks=["blocks.*"])
    with install(model, policy) as installed:
        train(model, rows(2, 20), labels=labels, mask=mask[None, None])
    assert torch.equal(installed.records[0].kept[:, :-1], labels[:, 1:] != -100)
