"""Rows that wait in fewer bits: what they cost in memory and in the gradient."""

import pytest
import torch

import zoo
from accuracy import assert_gradients_close, cosine, loss_and_gradients
from lightning_sage import AllTokens, SagePolicy, install
from lightning_sage.engine.packing import Stored, store
from lightning_sage.memory import saved_bytes
from lightning_sage.ops import Rows
from oracle import oracle, replayed
from steps import policy_of

# error of packed gaussian rows, in decibels below the signal, and of the gradient of a whole step:
# its cosine with the gradient of rows kept in full
FLOORS = {"bf16": (50, 0.9999), "int8": (40, 0.9995), "fp8": (30, 0.998)}


def decibels(approximate, exact):
    error = (approximate.double() - exact.double()).norm()
    return 20 * torch.log10(exact.double().norm() / error)


@pytest.mark.parametrize("shape", [(3, 8, 256), (3, 8, 96), (3, 8, 4, 32)], ids=str)
@pytest.mark.parametrize("cache_dtype", FLOORS)
def test_rows_come_back_nearly_as_they_were(cache_dtype, shape):
    x = torch.randn(shape)
    rows = Rows.of(torch.rand(3, 8) < 0.5)
    stored = store(x, rows, cache_dtype)
    exact = x.flatten(0, 1)[rows.index]
    back = stored.some(None, shape[2:], torch.float32)
    assert back.shape == exact.shape
    assert decibels(back, exact) > FLOORS[cache_dtype][0]
    chosen = torch.arange(0, len(rows), 2)
    assert torch.equal(stored.some(chosen, shape[2:], torch.float32), back[chosen])


def test_every_bit_is_kept_by_default():
    x, rows = torch.randn(3, 8, 96), Rows.of(torch.rand(3, 8) < 0.5)
    assert torch.equal(store(x, rows, None).some(None, (96,), x.dtype), x.flatten(0, 1)[rows.index])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_short_already_is_not_made_another_format(dtype):
    x, rows = torch.randn(3, 8, 96).to(dtype), Rows.every(3, 8, "cpu")
    assert torch.equal(store(x, rows, "bf16").values, x.flatten(0, 1))


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_an_outlier_costs_its_neighbours_only(cache_dtype):
    """A scale for the whole row would leave them nothing: language models have such channels."""
    x = torch.randn(1, 4, 512)
    x[..., 7] = 1000.0
    back = store(x, Rows.every(1, 4, "cpu"), cache_dtype).some(None, (512,), torch.float32)
    assert decibels(back[:, 128:], x[0, :, 128:]) > FLOORS[cache_dtype][0]
    alone = Stored(*_whole_rows(x, cache_dtype)).some(None, (512,), torch.float32)
    if cache_dtype == "int8":
        assert decibels(alone[:, 128:], x[0, :, 128:]) < 1


def _whole_rows(x, cache_dtype):
    from lightning_sage import ops
    from lightning_sage.engine.packing import DTYPES

    return ops.pack_rows(x.unsqueeze(2), torch.arange(4), DTYPES[cache_dtype])


@pytest.mark.parametrize("mode", ["salient", "full"])
@pytest.mark.parametrize("cache_dtype", FLOORS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_the_gradient_is_nearly_that_of_full_rows(name, cache_dtype, mode):
    model, batch = zoo.build(name, dtype=torch.float32), zoo.make_batch(name)
    steps = []
    for packed in (None, cache_dtype):
        policy = policy_of(keep=0.4, attention=mode, cache_dtype=packed)
        with install(model, policy) as installed:
            loss, gradients = loss_and_gradients(model, batch)
            steps.append((loss, gradients, [r.kept for r in installed.records]))
    (loss, exact, kept), (packed_loss, gradients, packed_kept) = steps
    assert packed_loss == loss, "the forward is exact"
    assert all(torch.equal(a, b) for a, b in zip(kept, packed_kept, strict=True))
    assert FLOORS[cache_dtype][1] < cosine(gradients, exact) < 1 - 1e-12


def test_packing_in_full_precision_is_the_oracle():
    """What is packed is all that differs: with packing that loses nothing, nothing does."""
    model, batch = zoo.build("llama"), zoo.make_batch("llama")
    with install(model, policy_of(keep=0.4, attention="full")) as installed:
        _, gradients = loss_and_gradients(model, batch)
        rows = replayed(installed.records)
    with oracle(model, rows, "full"):
        _, expected = loss_and_gradients(model, batch)
    assert_gradients_close(gradients, expected, 1e-8)


# what H and O take a row: 2 * 256 numbers; and the scales of two groups and eight heads
@pytest.mark.parametrize(
    ("cache_dtype", "row"),
    [("bf16", 2 * 512), ("int8", 512 + 4 * 10), ("fp8", 512 + 4 * 10)],
)
def test_bytes_held_are_counted(cache_dtype, row):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    model = transformers.LlamaModel(config).train()
    ids = torch.randint(3, 60, (4, 32))
    outside = []
    for dtype, bytes_a_row in ((None, 4 * 512), (cache_dtype, row)):
        policy = SagePolicy(keep=0.25, replay=None, cache_dtype=dtype)
        with install(model, policy) as installed:
            installed.check({"input_ids": ids})
            with saved_bytes(exclude=[*model.parameters(), *model.buffers()]) as held:
                hidden = model(input_ids=ids).last_hidden_state  # noqa: F841 - holds the graph
                bytes_held = held()
            cached = [r.cached_bytes for r in installed.records]
        # besides the rows, their log-sum-exp and index
        assert cached == [32 * (bytes_a_row + 8 * 4 + 8)] * 2
        outside.append(bytes_held - sum(cached))
    assert outside[0] == outside[1]


@pytest.mark.parametrize("value", ["int4", "float16", 8])
def test_an_unknown_format_is_refused(value):
    with pytest.raises(ValueError, match="cache_dtype must be one of None, bf16, int8, fp8"):
        SagePolicy(cache_dtype=value)


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_a_nan_surfaces(cache_dtype):
    model, batch = zoo.build("llama", dtype=torch.float32), zoo.make_batch("llama", None)
    with install(model, policy_of(keep=AllTokens(), cache_dtype=cache_dtype)):
        model(**batch).loss.backward()
        model.zero_grad()
        model.get_input_embeddings().weight.data[batch["input_ids"][0, 3]] = torch.nan
        model(**batch).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.isnan().any()
