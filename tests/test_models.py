"""Whole models, unchanged, against dense autograd and against the brute-force oracle."""

import copy
import functools

import pytest
import torch

import zoo
from accuracy import (
    assert_as_accurate,
    assert_gradients_close,
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
from steps import oracle_step, policy_of, run, sage_step, told_blocks

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
    "random": {"keep": RandomTokens(0.5), "replay": None},
}


@functools.cache
def _dense(name, lora, padding):
    return run(name, zoo.build(name, lora=lora), zoo.make_batch(name, padding))


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
    policy = policy_of(keep=AllTokens(), attention=mode)
    loss, gradients, rows = sage_step(name, model, batch, policy)
    assert loss == dense_loss
    assert_gradients_close(gradients, dense, 1e-10)
    assert all(torch.equal(r.weights > 0, _valid(batch)) for r in rows)


@pytest.mark.parametrize("fields", KEEPS.values(), ids=KEEPS)
@over_adaptations
@over_modes
@over_models_and_paddings
def test_kept_rows_match_oracle(name, padding, mode, lora, fields):
    model, batch = zoo.build(name, lora=lora), zoo.make_batch(name, padding)
    loss, gradients, rows = sage_step(name, model, batch, policy_of(attention=mode, **fields))
    _assert_strict_subset(rows, batch)
    _, expected = oracle_step(name, model, batch, rows, mode)
    assert loss == _dense(name, lora, padding)[0]
    assert_gradients_close(gradients, expected, 1e-8)


@pytest.mark.parametrize("fields", REPLAYS.values(), ids=REPLAYS)
@pytest.mark.parametrize("mode", ["kept", *MODES])
@over_models
def test_replayed_rows_match_oracle(name, mode, fields):
    model, batch = zoo.build(name), zoo.make_batch(name, zoo.MODELS[name].paddings[0])
    loss, gradients, rows = sage_step(name, model, batch, policy_of(attention=mode, **fields))
    _assert_strict_subset(rows, batch)
    oracle_loss, expected = oracle_step(name, model, batch, rows, mode)
    assert relative_error(loss, oracle_loss) <= 1e-12
    assert_gradients_close(gradients, expected, 1e-8)
    kinds = ImportanceSampling | RandomTokens
    drawn = any(isinstance(choice, kinds) for choice in fields.values())
    assert drawn == any(r.drawn is not None for r in rows)


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
    policy = policy_of(keep=keep, attention=mode)
    loss, gradients, rows = sage_step(name, model, batch, policy)
    oracle_loss, expected = oracle_step(name, model, batch, rows, mode)
    assert relative_error(loss, oracle_loss) <= 1e-12
    assert_gradients_close(gradients, expected, 1e-8)
    assert len({r.seed for r in rows}) == len(rows), "blocks share a seed"
    without, _ = run(name, copy.deepcopy(model).eval(), batch)
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
        policy = policy_of(keep=keep, attention=mode)
        _, actual, rows = sage_step(name, model, batch, policy, autocast=True)
        if isinstance(keep, AllTokens):
            (_, eager), (_, exact) = (
                run(name, model, batch, autocast=True),
                run(name, exact_model, batch),
            )
        else:
            _, eager = oracle_step(name, model, batch, rows, mode, autocast=True)
            _, exact = oracle_step(name, exact_model, batch, rows, mode)
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
    policy = told_blocks(name, policy_of(keep=AllTokens(), attention=mode))
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
        policy = policy_of(keep=0.3, attention=mode)
        loss, gradients, rows = sage_step(name, model, batch, policy)
        dense_loss, _ = run(name, model, batch)
        _, expected = oracle_step(name, model, batch, rows, mode)
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
    policy = policy_of(keep=0.3, attention=mode, dense_blocks=dense)
    _, gradients, rows = sage_step("gemma3", model, batch, policy)
    subsets = [r.name for r in rows if not torch.equal(r.weights > 0, _valid(batch))]
    assert [int(name.rsplit(".")[-1]) for name in subsets] == list(sparse)
    _, expected = oracle_step("gemma3", model, batch, rows, mode)
    assert_gradients_close(gradients, expected, 1e-8)


@pytest.mark.parametrize("size", [1, 2])
@over_modes
@over_models
def test_a_single_row_is_replayed(name, mode, size):
    batch = zoo.make_batch(name, zoo.MODELS[name].paddings[0], size=size, length=6)
    model, policy = zoo.build(name), policy_of(keep=AllTokens(), replay=0.01, attention=mode)
    _, gradients, rows = sage_step(name, model, batch, policy)
    assert all((r.weights > 0).sum() == 1 for r in rows)
    _, expected = oracle_step(name, model, batch, rows, mode)
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
    dense_loss, _ = run(name, model, batch)
    loss, gradients, rows = sage_step(name, model, batch, policy_of(keep=0.3))
    _, expected = oracle_step(name, model, batch, rows, "salient")
    assert not any(r.weights[2].any() for r in rows)
    assert loss == dense_loss
    assert_gradients_close(gradients, expected, 1e-8)


@pytest.mark.parametrize("queries", ["auto", "last", "all"])
@pytest.mark.parametrize("saliency", ["attention", "value_norm", "attention_value_norm"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "bert-classes"])
def test_default_policy_matches_oracle(name, saliency, queries):
    batch, model = zoo.make_batch(name, every_token=True), zoo.build(name)
    policy = SagePolicy(saliency=saliency, queries=queries)
    _, gradients, rows = sage_step(name, model, batch, policy)
    _assert_strict_subset(rows, batch)
    _, expected = oracle_step(name, model, batch, rows, policy.attention)
    assert_gradients_close(gradients, expected, 1e-8)


@over_models
def test_self_check_accepts(name):
    model = zoo.build(name)
    with install(model, told_blocks(name, policy_of(keep=0.3))) as installation, zoo.exactly(name):
        installation.check(zoo.make_batch(name, zoo.MODELS[name].paddings[0]))
    assert all(parameter.grad is None for parameter in model.parameters())
