"""Blocks are found, wrapped and given back without a trace; only training is touched."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import zoo
from accuracy import assert_gradients_close, parameter_gradients
from lightning_sage import AllTokens, ReplayError, SagePolicy, install, uninstall


@pytest.fixture
def model():
    return zoo.build("llama")


@pytest.fixture
def batch():
    ids = torch.randint(3, 60, (2, 12))
    return {"input_ids": ids, "labels": ids}


def state(model):
    """Every attribute of every module, so far as identity and hooks go."""
    return {
        name: {
            key: dict(value) if isinstance(value, dict) else id(value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def train(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return parameter_gradients(model)


@pytest.fixture
def settled(model, batch):
    """Its state after a plain step: transformers itself leaves things at the first forward."""
    train(model, batch)
    model.zero_grad(set_to_none=True)
    return state(model)


def test_install_leaves_no_trace(model, batch, settled):
    with install(model):
        assert state(model) != settled
        train(model, batch)
    model.zero_grad(set_to_none=True)
    assert state(model) == settled


@pytest.mark.parametrize("where", ["forward", "attention", "backward", "training"])
def test_install_leaves_no_trace_after_an_exception(model, batch, settled, where, monkeypatch):
    from transformers.modeling_utils import AttentionInterface

    get_interface = AttentionInterface.get_interface

    def fail(*_args, **_kwargs):
        raise KeyError(where)

    def train_badly(planted):
        mlp = type(model.model.layers[1].mlp)
        with install(model):
            if where == "attention":
                planted.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
            elif where == "forward":
                planted.setattr(mlp, "forward", fail)
            loss = model(**batch).loss
            if where == "backward":
                planted.setattr(mlp, "forward", fail)
            loss.backward()
            raise KeyError(where)

    with monkeypatch.context() as planted, pytest.raises(KeyError, match=where):
        train_badly(planted)
    model.zero_grad(set_to_none=True)
    assert state(model) == settled
    assert AttentionInterface.get_interface is get_interface
    train(model, batch)


def test_an_exception_in_one_forward_leaves_the_next_right(model, batch):
    with install(model, SagePolicy(keep=AllTokens(), replay=None)):
        with pytest.raises(IndexError):
            model(input_ids=torch.full((2, 12), 10**6))
        with pytest.raises(ValueError, match="output_attentions=True"):
            model(**batch, output_attentions=True)
        sage = train(model, batch)
    assert_gradients_close(sage, train(model, batch), 1e-10)


def test_a_refused_block_leaves_the_model_as_it_was(batch):
    model = zoo.build("llama")
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _module, _args, out: out + torch.rand_like(out))
    model(**batch)
    before = state(model)
    with (
        pytest.raises(ReplayError, match=r"block 'model.layers.0' .*draws random numbers"),
        install(model),
    ):
        model(**batch)
    assert state(model) == before


def test_no_block_found_lists_what_was_seen():
    model = nn.ModuleDict({"stack": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    with pytest.raises(ValueError, match=r"stack: 2 x Linear") as info:
        install(model)
    assert "SagePolicy(blocks=" in str(info.value)
    with pytest.raises(ValueError, match=r"blocks=\['layers.\*'\]"):
        install(model, SagePolicy(blocks=["layers.*"]))


def test_blocks_inside_blocks_are_refused(model):
    with pytest.raises(ValueError, match="lie inside other blocks"):
        install(model, SagePolicy(blocks=["model.layers.*", "model.layers.*.mlp"]))
    assert all("_sage" not in vars(m) for m in model.modules())


def test_install_twice_is_refused(model):
    with install(model) as first:
        with pytest.raises(ValueError, match="installed on this model already"):
            install(model)
        assert len(first.blocks) == 2
    install(model).remove()


def test_remove_is_idempotent(model, settled):
    installed = install(model)
    installed.remove()
    installed.remove()
    model.zero_grad(set_to_none=True)
    assert state(model) == settled


@pytest.mark.parametrize(
    "blocks",
    [
        None,
        ["model.layers.*"],
        ["model.layers.0", "model.layers.1"],
        lambda m, n: n.endswith(("0", "1")),
    ],
    ids=["found", "glob", "names", "filter"],
)
def test_blocks_may_be_named(model, blocks):
    with install(model, SagePolicy(blocks=blocks)) as installed:
        assert list(installed.blocks) == ["model.layers.0", "model.layers.1"]


def test_dense_blocks_stay_dense(model, batch):
    with install(model, SagePolicy(keep=0.2, replay=None, dense_blocks=1)) as installed:
        assert list(installed.blocks) == ["model.layers.1"]
        train(model, batch)
        assert [r.name for r in installed.records] == ["model.layers.1"]


def test_a_forward_found_on_the_block_is_called_and_put_back(model, batch):
    block, calls = model.model.layers[0], []
    true = block.forward

    def dispatched(*args, **kwargs):
        calls.append(1)
        return true(*args, **kwargs)

    block.forward = dispatched
    with install(model):
        train(model, batch)
    assert calls
    assert block.forward is dispatched


def test_everything_but_training_is_as_before(model, batch):
    plain = model.generate(batch["input_ids"][:, :4], max_new_tokens=4, do_sample=False)
    keys = list(model.state_dict())
    with install(model):
        train(model, batch)
        assert list(model.state_dict()) == keys
        generated = model.generate(batch["input_ids"][:, :4], max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, plain)
        with torch.no_grad():
            cache = model(batch["input_ids"][:, :4], use_cache=True).past_key_values
            assert cache.get_seq_length() == 4


def test_save_pretrained_is_as_before(model, batch, tmp_path):
    with install(model):
        train(model, batch)
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert all(
        torch.equal(x, y) for x, y in zip(again.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_in_the_middle_of_training_is_a_model_of_its_own(model, batch, copying):
    with install(model, SagePolicy(keep=0.4, replay=None)) as installed:
        expected = train(model, batch)
        twin = copying(model)
        records = installed.records
        assert_gradients_close(train(twin, batch), expected, 1e-12)
        assert all(x is y for x, y in zip(installed.records, records, strict=True))
        blocks = twin.model.layers
        assert vars(blocks[0])["_sage"].session is vars(blocks[1])["_sage"].session
        assert vars(blocks[0])["_sage"].session is not vars(model.model.layers[0])["_sage"].session
        uninstall(twin)
        assert all("_sage" not in vars(m) and "forward" not in vars(m) for m in twin.modules())
        assert_gradients_close(train(model, batch), expected, 1e-12)


def test_gradient_checkpointing_is_switched_off_and_on_again(model, batch):
    # transformers 5.2x renamed it
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    with pytest.warns(UserWarning, match="gradient checkpointing is switched off"):
        installed = install(model)
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    train(model, batch)
    installed.remove()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_gradient_accumulation_adds_up(model, batch):
    with install(model, SagePolicy(keep=0.4, replay=None)):
        once = train(model, batch)
        model(**batch).loss.backward()
        twice = parameter_gradients(model)
    assert_gradients_close(twice, {name: 2 * g for name, g in once.items()}, 1e-12)


def test_two_forwards_before_their_backwards(model, batch):
    other = {"input_ids": batch["input_ids"].flip(1), "labels": batch["labels"].flip(1)}
    with install(model, SagePolicy(keep=0.4, replay=None)):
        one, two = train(model, batch), train(model, other)
        model.zero_grad()
        losses = [model(**batch).loss, model(**other).loss]
        for loss in losses:
            loss.backward()
    both = {name: one[name] + two[name] for name in one}
    assert_gradients_close(parameter_gradients(model), both, 1e-12)


def test_check_passes_and_leaves_no_mark(model, batch):
    with install(model) as installed:
        before = torch.get_rng_state()
        installed.check(batch)
        assert installed.records == []
        assert torch.equal(torch.get_rng_state(), before)
        assert all(p.grad is None for p in model.parameters())


def test_check_asks_again_after_a_pass(model, batch, monkeypatch):
    with install(model) as installed:
        installed.check(batch)
        block = type(model.model.layers[0])
        true = block.forward

        def positional(self, hidden, *args, **kwargs):
            places = torch.linspace(0, 1, hidden.shape[1])
            return true(self, hidden, *args, **kwargs) + places[:, None]

        monkeypatch.setattr(block, "forward", positional)
        with pytest.raises(ReplayError, match="another output"):
            installed.check(batch)


def test_dense_saved_bytes_are_those_of_a_dense_step(batch):
    """Counted block by block, against a dense step of the whole body."""
    from lightning_sage.memory import saved_bytes

    model = zoo.build("llama", lora=True)
    body = model.get_base_model().model
    ids = {"input_ids": batch["input_ids"]}
    outside = [*model.parameters(), *model.buffers()]
    with saved_bytes(exclude=outside) as held:
        hidden = body(**ids, use_cache=False).last_hidden_state
        dense = held()
    with install(model, measure_dense=True) as installed:
        assert installed.dense_saved_bytes is None
        body(**ids)
        measured = installed.dense_saved_bytes
        body(**ids)
        assert installed.dense_saved_bytes == measured
    # the final norm and the rotary tables are outside the blocks
    assert dense - 3 * hidden.nbytes <= measured <= dense


def test_a_batch_is_observed_where_keywords_say_nothing(model, batch):
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    labels = torch.where(torch.arange(12) < 6, -100, ids)
    policy = SagePolicy(keep=0.3, sinks=0, keep_last=False)
    with install(model, policy) as installed:
        installed.observe({"labels": labels, "attention_mask": mask})
        model.model(ids).last_hidden_state[mask.bool()].sum().backward()
        record = installed.records[0]
        assert torch.equal(record.valid, mask.bool())
        # position i bears the loss of token i + 1
        assert not record.kept[:, :5].any()
        installed.observe(None)
        model.model(ids).last_hidden_state.sum().backward()
        assert installed.records[0].valid.all()


def test_triton_is_not_imported_by_installing():
    code = (
        "import sys, lightning_sage, torch; "
        "print('triton' in sys.modules and 'lightning_sage.ops' in sys.modules)"
    )
    plain = "import sys, torch, transformers, lightning; print('triton' in sys.modules)"
    ours, theirs = (
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (code, plain)
    )
    assert ours == theirs or ours.strip() == "False"
