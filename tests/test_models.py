"""Whole models, unchanged, against dense autograd and against the brute-force oracle."""

import copy
import functools

import pytest
import torch

import zoo
from accuracy import (
    assert_as_accurate,
    assert_gradients_close,
    loss_and_gradients,
    one_vector,
    relative_error,
    scales,
)
from lightning_sage import (
    AllTokens,
    GradientMass,
    ImportanceSampling,
    RandomTokens,
    SagePolicy,
    TopMass,
    install,
)
from oracle import oracle, replayed

MODES = ("salient", "full")
ADAPTATIONS = {"full": False, "lora": True}
KEEPS = {
    "keep0.3": {"keep": 0.3},
    "mass0.6": {"keep": TopMass(0.6, min_tokens=2), "keep_loss_rows": False},
}
REPLAYS = {
    "replay0.3": {"keep": AllTokens(), "replay": 0.3},
    "keep0.6-replay0.3": {"keep": 0.6, "replay": 0.3},
    "gradient-mass": {"keep": AllTokens(), "replay": GradientMass(0.7)},
    "drawn": {"keep": AllTokens(), "replay": ImportanceSampling(0.4)},
    "keep0.6-drawn": {"keep": 0.6, "replay": ImportanceSampling(0.3)},
    "keep-drawn": {"keep": ImportanceSampling(0.4), "replay": None},
    "random": {"keep": RandomTokens(0.5), "replay": None},
}


def _policy(**fields):
    # one sink and no replay choice, so that a test's subsets are what it asks for
    fields = {"replay": None, "sinks": 1} | fields
    return SagePolicy(**fields)


def _for(name, policy):
    """The policy, told where the blocks of a model without transformers are."""
    if zoo.MODELS[name].model_type != "plain":
        return policy
    return SagePolicy(
        **vars(policy) | {"blocks": lambda module, _: type(module).__name__ == "PlainBlock"}
    )


def _run(name, model, batch, autocast=False):
    """One step; the seed is for what draws outside of blocks."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), zoo.exactly(name):
        return loss_and_gradients(model, batch)


def _sage(name, model, batch, policy, **options):
    """Loss and gradients of a sparse step, and the rows that each block replayed."""
    with install(model, _for(name, policy)) as installation:
        loss, gradients = _run(name, model, batch, **options)
        return loss, gradients, replayed(installation.records)


def _oracle(name, model, batch, rows, mode, **options):
    with oracle(model, rows, mode):
        return _run(name, model, batch, **options)


@functools.cache
def _dense(name, lora, padding):
    return _run(name, zoo.build(name, lora=lora), zoo.make_batch(name, padding))


def _valid(batch):
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def _assert_strict_subset(rows, batch):
    valid = _valid(batch)
    for r in rows:
        assert not (r.weights[~valid] > 0).any(), f"{r.name} replayed padding"
        assert 0 < (r.weights > 0).sum() < valid.sum(), f"{r.name}: nothing or all replayed"


MODELS_AND_PADDINGS = [
    pytest.param(name, padding, id=f"{name}-{padding or 'unpadded'}")
    for name, case in zoo.MODELS.items()
    for padding in case.paddings
]
over_modes = pytest.mark.parametrize("mode", MODES)
over_models = pytest.mark.parametrize("name", zoo.MODELS)
over_models_and_paddings = pytest.mark.parametrize(("name", "padding"), MODELS_AND_PADDINGS)
over_adaptations = pytest.mark.parametrize("lora", ADAPTATIONS.values(), ids=ADAPTATIONS)


@over_adaptations
@over_modes
@over_models_and_paddings
def test_all_tokens_is_dense(name, padding, mode, lora):
    model, batch = zoo.build(name, lora=lora), zoo.make_batch(name, padding)
    dense_loss, dense = _dense(name, lora, padding)
    policy = _policy(keep=AllTokens(), attention=mode)
    loss, gradients, rows = _sage(name, model, batch, policy)
    assert loss == dense_loss
    assert_gradients_close(gradients, dense, 1e-10)
    assert all(torch.equal(r.weights > 0, _valid(batch)) for r in rows)


@pytest.mark.parametrize("fields", KEEPS.values(), ids=KEEPS)
@over_adaptations
@over_modes
@over_models_and_paddings
def test_kept_rows_match_oracle(name, padding, mode, lora, fields):
    model, batch = zoo.build(name, lora=lora), zoo.make_batch(name, padding)
    loss, gradients, rows = _sage(name, model, batch, _policy(attention=mode, **fields))
    _assert_strict_subset(rows, batch)
    _, expected = _oracle(name, model, batch, rows, mode)
    assert loss == _dense(name, lora, padding)[0]
    assert_gradients_close(gradients, expected, 1e-8)


@pytest.mark.parametrize("fields", REPLAYS.values(), ids=REPLAYS)
@over_modes
@over_models
def test_replayed_rows_match_oracle(name, mode, fields):
    model, batch = zoo.build(name), zoo.make_batch(name, zoo.MODELS[name].paddings[0])
    loss, gradients, rows = _sage(name, model, batch, _policy(attention=mode, **fields))
    _assert_strict_subset(rows, batch)
    oracle_loss, expected = _oracle(name, model, batch, rows, mode)
    assert relative_error(loss, oracle_loss) <= 1e-12
    assert_gradients_close(gradients, expected, 1e-8)
    drawn = any(isinstance(choice, ImportanceSampling) for choice in fields.values())
    assert drawn == any((r.weights > 1).any() for r in rows)


@pytest.mark.parametrize("keep", [AllTokens(), 0.3], ids=["all", "keep0.3"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"dropout": 0.1}) for name, case in zoo.MODELS.items() if case.dropout),
        *((name, {"lora": True, "lora_dropout": 0.05}) for name in ("llama", "gemma3", "gpt2")),
        ("gpt_neox", {"lora": True, "lora_dropout": 0.05, "dropout": 0.1}),
        *((name, {"attention_dropout": 0.2}) for name in zoo.MODELS),
        ("gpt2", {"dropout": 0.1, "attention_dropout": 0.2}),
        ("bert", {"dropout": 0.1, "attention_dropout": 0.2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@over_modes
def test_dropout_is_the_same_in_replay(name, options, mode, keep):
    model, batch = zoo.build(name, **options), zoo.make_batch(name, zoo.MODELS[name].paddings[0])
    policy = _policy(keep=keep, attention=mode)
    loss, gradients, rows = _sage(name, model, batch, policy)
    oracle_loss, expected = _oracle(name, model, batch, rows, mode)
    assert relative_error(loss, oracle_loss) <= 1e-12
    assert_gradients_close(gradients, expected, 1e-8)
    assert len({r.seed for r in rows}) == len(rows), "blocks share a seed"
    without, _ = _run(name, copy.deepcopy(model).eval(), batch)
    assert relative_error(loss, without) > 1e-6, "no dropout was applied"


@pytest.mark.parametrize("keep", [AllTokens(), 0.3], ids=["all", "keep0.3"])
@over_modes
@over_models
def test_bfloat16_is_as_accurate_as_autograd(name, mode, keep):
    """Against autograd of the dense model where all is kept, of the oracle where it is not.

    Errors are judged by their maximum, which is noisy: three batches are judged as one.
    """
    model = zoo.build(name, dtype=torch.float32)
    exact_model = copy.deepcopy(model).double()
    judged = []
    for seed in range(3):
        batch = zoo.make_batch(name, zoo.MODELS[name].paddings[0], seed=seed)
        policy = _policy(keep=keep, attention=mode)
        _, actual, rows = _sage(name, model, batch, policy, autocast=True)
        if isinstance(keep, AllTokens):
            (_, eager), (_, exact) = (
                _run(name, model, batch, autocast=True),
                _run(name, exact_model, batch),
            )
        else:
            _, eager = _oracle(name, model, batch, rows, mode, autocast=True)
            _, exact = _oracle(name, exact_model, batch, rows, mode)
        scale = scales(exact)
        judged.append([one_vector(gradients, scale) for gradients in (actual, eager, exact)])
    assert_as_accurate(*(torch.cat(vectors) for vectors in zip(*judged, strict=True)))


@over_modes
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "plain"])
def test_lora_behind_a_frozen_embedding(name, mode):
    """Nothing that enters the first block requires grad; its adapters learn all the same."""
    batch = zoo.make_batch(name, zoo.MODELS[name].paddings[0])
    _, dense = _dense(name, True, zoo.MODELS[name].paddings[0])
    model = zoo.build(name, lora=True)
    policy = _for(name, _policy(keep=AllTokens(), attention=mode))
    with install(model, policy), zoo.exactly(name):
        model(**batch).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    dense = {n: grad for n, grad in dense.items() if n != "inputs"}
    assert_gradients_close(gradients, dense, 1e-10)


# batch, tokens; heads are 4 by 8, key heads 2, width 32
@pytest.mark.parametrize(("size", "length"), [(1, 8), (8, 8), (4, 4), (2, 32), (4, 32), (1, 5)])
@over_modes
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
def test_axes_of_equal_size_are_told_apart(name, mode, size, length):
    model = zoo.build(name)
    for padding in zoo.MODELS[name].paddings:
        batch = zoo.make_batch(name, padding, size=size, length=length)
        policy = _policy(keep=0.3, attention=mode)
        loss, gradients, rows = _sage(name, model, batch, policy)
        dense_loss, _ = _run(name, model, batch)
        _, expected = _oracle(name, model, batch, rows, mode)
        assert loss == dense_loss
        assert_gradients_close(gradients, expected, 1e-8)


@pytest.mark.parametrize(
    ("dense", "sparse"),
    [(1, (1, 2)), (-1, (0, 1)), ((1,), (0, 2))],
    ids=["first", "last", "middle"],
)
@over_modes
@pytest.mark.parametrize("lora", ADAPTATIONS.values(), ids=ADAPTATIONS)
def test_dense_blocks_among_sparse_ones(lora, mode, dense, sparse):
    model, batch = zoo.build("gemma3", lora=lora), zoo.make_batch("gemma3")
    policy = _policy(keep=0.3, attention=mode, dense_blocks=dense)
    _, gradients, rows = _sage("gemma3", model, batch, policy)
    subsets = [r.name for r in rows if not torch.equal(r.weights > 0, _valid(batch))]
    assert [int(name.rsplit(".")[-1]) for name in subsets] == list(sparse)
    _, expected = _oracle("gemma3", model, batch, rows, mode)
    assert_gradients_close(gradients, expected, 1e-8)


@pytest.mark.parametrize("size", [1, 2])
@over_modes
@over_models
def test_a_single_row_is_replayed(name, mode, size):
    batch = zoo.make_batch(name, zoo.MODELS[name].paddings[0], size=size, length=6)
    model, policy = zoo.build(name), _policy(keep=AllTokens(), replay=0.01, attention=mode)
    _, gradients, rows = _sage(name, model, batch, policy)
    assert all((r.weights > 0).sum() == 1 for r in rows)
    _, expected = _oracle(name, model, batch, rows, mode)
    assert_gradients_close(gradients, expected, 1e-8)


# PlainModel knows no padding; the mean over no token is NaN with or without us
@pytest.mark.parametrize("name", sorted(zoo.MODELS.keys() - {"plain", "modernbert-classes"}))
def test_a_sample_of_padding_alone_is_left_out(name):
    model, batch = zoo.build(name), zoo.make_batch(name)
    batch["attention_mask"][2] = 0
    if zoo.MODELS[name].head == "classes":
        batch["labels"][2] = -100
    else:
        batch["labels"] = batch["labels"].masked_fill(~_valid(batch), -100)
    dense_loss, _ = _run(name, model, batch)
    loss, gradients, rows = _sage(name, model, batch, _policy(keep=0.3))
    _, expected = _oracle(name, model, batch, rows, "salient")
    assert not any(r.weights[2].any() for r in rows)
    assert loss == dense_loss
    assert_gradients_close(gradients, expected, 1e-8)


@pytest.mark.parametrize("queries", ["auto", "last", "all"])
@pytest.mark.parametrize("saliency", ["attention", "value_norm", "attention_value_norm"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "bert-classes"])
def test_default_policy_matches_oracle(name, saliency, queries):
    batch, model = zoo.make_batch(name, every_token=True), zoo.build(name)
    policy = SagePolicy(saliency=saliency, queries=queries)
    _, gradients, rows = _sage(name, model, batch, policy)
    _assert_strict_subset(rows, batch)
    _, expected = _oracle(name, model, batch, rows, policy.attention)
    assert_gradients_close(gradients, expected, 1e-8)


@over_models
def test_self_check_accepts(name):
    model = zoo.build(name)
    with install(model, _for(name, _policy(keep=0.3))) as installation, zoo.exactly(name):
        installation.check(zoo.make_batch(name, zoo.MODELS[name].paddings[0]))
    assert all(parameter.grad is None for parameter in model.parameters())
