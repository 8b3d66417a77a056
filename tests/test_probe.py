"""The dense and the sparse gradient of a batch, asked for in between, without a trace."""

import random

import pytest
import torch
from torchmetrics import MeanMetric

import zoo
from accuracy import assert_gradients_close, parameter_gradients, relative_error
from lightning_sage import AllTokens, ImportanceSampling, RandomTokens, SagePolicy, install
from lightning_sage.engine.wrapped import Parts
from lightning_sage.watch.probe import block_gradients, undisturbed
from steps import told_blocks

NAMES = ["llama", "gpt2", "gemma3", "bert", "modernbert", "plain"]


def loss_of(model, batch):
    return lambda: model(**batch).loss


def flat(model, gradients):
    """By name of the parameter in the model."""
    found = {}
    for block, own in gradients.items():
        module = model.get_submodule(block)
        names = {id(p): name for name, p in module.named_parameters()}
        for parameter, gradient in zip(Parts(module).trainable(), own, strict=True):
            found[f"{block}.{names[id(parameter)]}"] = gradient
    return found


def alike(found, expected, tolerance=1e-10):
    assert found
    assert_gradients_close(found, {name: expected[name] for name in found}, tolerance)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_the_dense_pass_is_dense_training_whatever_the_policy(name, lora):
    model, batch = zoo.build(name, lora=lora), zoo.make_batch(name, zoo.MODELS[name].paddings[0])
    with zoo.exactly(name):
        model(**batch).loss.backward()
        expected = parameter_gradients(model)
        model.zero_grad()
        policy = SagePolicy(keep=0.25, attention="full", cache_dtype="int8", sinks=0)
        with install(model, told_blocks(name, policy)) as installation:
            found, records = block_gradients(installation, loss_of(model, batch), dense=True)
            alike(flat(model, found), expected)
        assert all(torch.equal(r.replayed, r.valid) for r in records)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "policy",
    [
        SagePolicy(keep=0.3, sinks=0),
        SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.3)),
        SagePolicy(keep=RandomTokens(0.4), replay=0.2, cache_dtype="int8"),
    ],
    ids=["keep", "drawn", "random"],
)
def test_the_sparse_pass_is_the_step_that_follows(policy):
    model, batch = zoo.build("gpt2", dropout=0.1, attention_dropout=0.1), zoo.make_batch("gpt2")
    with install(model, policy) as installation:
        torch.manual_seed(3)
        found, _ = block_gradients(installation, loss_of(model, batch))
        torch.manual_seed(3)
        # a seed is drawn by whoever first needs it: here everyone does, in the forward
        model(**batch).loss.backward()
        alike(flat(model, found), parameter_gradients(model))


def test_both_passes_drop_the_same():
    options = {"dropout": 0.3, "attention_dropout": 0.3, "lora_dropout": 0.3}
    model, batch = zoo.build("gpt2", lora=True, **options), zoo.make_batch("gpt2")
    # draws in the backward only, where the dense pass draws nothing
    policy = SagePolicy(keep=AllTokens(), replay=ImportanceSampling(1.0))
    with install(model, policy) as installation:
        passes = []
        for dense in (False, True):
            with undisturbed(model, torch.device("cpu")):
                passes.append(block_gradients(installation, loss_of(model, batch), dense=dense)[0])
        alike(flat(model, passes[0]), flat(model, passes[1]))


def test_tokens_that_skip_blocks_do_not_in_the_dense_pass():
    model, batch = zoo.build("llama"), zoo.make_batch("llama")
    model(**batch).loss.backward()
    expected = parameter_gradients(model)
    with install(model, SagePolicy(keep=0.3, unselected="skip")) as installation:
        found, _ = block_gradients(installation, loss_of(model, batch), dense=True)
        alike(flat(model, found), expected)
        sparse, _ = block_gradients(installation, loss_of(model, batch))
        assert relative_error(sparse["model.layers.1"][0], found["model.layers.1"][0]) > 1e-3


def test_another_policy_may_be_asked_about():
    model, batch = zoo.build("llama"), zoo.make_batch("llama")
    with install(model, SagePolicy(keep=0.3)) as installation:
        _, few = block_gradients(installation, loss_of(model, batch))
        _, more = block_gradients(installation, loss_of(model, batch), SagePolicy(keep=0.8))
        assert few[0].kept.sum() < more[0].kept.sum()
        assert installation.policy == SagePolicy(keep=0.3)


def test_hooks_on_parameters_do_not_see_it():
    model, batch = zoo.build("llama"), zoo.make_batch("llama")
    seen = []
    for parameter in model.model.layers.parameters():
        parameter.register_hook(lambda grad: seen.append(grad.shape))
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.shape))
    with install(model, SagePolicy(keep=0.5)) as installation:
        block_gradients(installation, loss_of(model, batch), dense=True)
        assert not seen
        model(**batch).loss.backward()
        assert len(seen) == 2 * len(list(model.model.layers.parameters()))


def test_nothing_is_left_of_it():
    model, batch = zoo.build("llama"), zoo.make_batch("llama")
    model.register_buffer("calls", torch.zeros(()))
    model.mean = MeanMetric()
    model.mean.update(1.0)

    def loss():
        model.calls += 1
        model.mean.update(5.0)
        random.random()
        return model(**batch).loss * torch.rand(())

    with install(model, SagePolicy(keep=0.5)) as installation:
        model(**batch).loss.backward()
        grads = parameter_gradients(model)
        records, drawn = installation.records, random.getstate()
        generator = torch.get_rng_state()
        with undisturbed(model, torch.device("cpu")):
            block_gradients(installation, loss, dense=True)
        assert installation.records == records
        assert random.getstate() == drawn
        assert torch.equal(torch.get_rng_state(), generator)
        assert model.calls == 0
        assert model.mean.compute() == 1
        assert all(torch.equal(g, grads[n]) for n, g in parameter_gradients(model).items())


def test_nothing_is_left_of_one_that_failed():
    model, batch = zoo.build("llama"), zoo.make_batch("llama")
    policy = SagePolicy(keep=0.5)

    def fail():
        raise RuntimeError("no loss")

    with install(model, policy) as installation:
        with pytest.raises(RuntimeError, match="no loss"), undisturbed(model, torch.device("cpu")):
            block_gradients(installation, fail, dense=True)
        session = installation.session
        assert session.probe is None
        assert session.policy == policy
        loss_of(model, batch)().backward()
        assert all(r.kept.sum() < r.valid.sum() for r in installation.records)
