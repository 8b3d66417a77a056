"""Models that see: towers, pairs of towers and vision-language models, with pictures in the batch.

Against dense autograd and the brute-force oracle, and what of a batch each of their blocks hears.
"""

import functools
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

import pictures
from accuracy import assert_gradients_close, parameter_gradients, relative_error
from lightning_sage import (
    AllTokens,
    ImportanceSampling,
    RandomTokens,
    SageCallback,
    SagePolicy,
    install,
)
from lightning_sage.discovery import left_dense
from lightning_sage.engine.session import Session
from lightning_sage.engine.towers import handed_on
from oracle import oracle, replayed
from pictures import LANGUAGE, MODELS, PATCHES, SIZE, TOWERS
from steps import policy_of
from tasks import LIGHTNING_WARNINGS

pytestmark = [
    *LIGHTNING_WARNINGS,
    # the towers of Qwen-VL are left dense; those tests that are about it look at the warning
    pytest.mark.filterwarnings("ignore:.* take the tokens of all samples in one row:UserWarning"),
]

# what is trained: everything, all but the tower, adapters of the language model alone
ADAPTATIONS = {"full": {}, "frozen-tower": {"frozen_tower": True}, "lora": {"lora": True}}
KEEPS = {
    "keep0.4": {"keep": 0.4},
    "random": {"keep": RandomTokens(0.4), "keep_loss_rows": False},
    "drawn": {"keep": AllTokens(), "replay": ImportanceSampling(0.4)},
}
# by default those that stand for the others
REPRESENTATIVES = ["vit", "dinov2", "clip-pair", "llava", "gemma3", "idefics3", "qwen2_vl"]
CASES = [
    pytest.param(
        *(name, padding, options),
        id="-".join([name, padding or "unpadded", adaptation]),
        marks=[] if name in REPRESENTATIVES else pytest.mark.coverage,
    )
    for name in MODELS
    for padding in pictures.paddings(name)
    for adaptation, options in ADAPTATIONS.items()
    if name in LANGUAGE or not options
]
over_cases = pytest.mark.parametrize(("name", "padding", "options"), CASES)
# what is trained and where padding stands have nothing to do with one another
over_fewer_cases = pytest.mark.parametrize(
    ("name", "padding", "options"),
    [case for case in CASES if not case.values[2] or case.values[1] == "right"],
)
over_modes = pytest.mark.parametrize("mode", ["salient", "full"])
over_towers = pytest.mark.parametrize("name", TOWERS)
packed_models = pytest.mark.parametrize("name", [n for n, c in LANGUAGE.items() if c.packed])
# their few image tokens let a text be as long as its picture has patches
seers = pytest.mark.parametrize("name", ["gemma3", "idefics3", "clip-pair"])


def step(model, batch):
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    with pictures.exactly():
        loss = model(**batch).loss
        loss.backward()
    return loss.detach(), parameter_gradients(model)


def sage_step(model, batch, policy):
    with install(model, policy) as installation:
        loss, gradients = step(model, batch)
        # a tower may be read before its last block, which then has no backward
        reached = [r for r in installation.records if r.replayed is not None]
        return loss, gradients, replayed(reached)


@functools.cache
def dense(name, padding, **options):
    return step(pictures.build(name, **options), pictures.make_batch(name, padding))


def tower_blocks(rows):
    return [r for r in rows if r.weights.shape[1] in (PATCHES, PATCHES + 1, SIZE * PATCHES)]


@over_modes
@over_cases
def test_all_tokens_is_dense(name, padding, options, mode):
    model, batch = pictures.build(name, **options), pictures.make_batch(name, padding)
    dense_loss, expected = dense(name, padding, **options)
    policy = policy_of(keep=AllTokens(), attention=mode)
    loss, gradients, rows = sage_step(model, batch, policy)
    assert loss == dense_loss
    assert_gradients_close(gradients, expected, 1e-10)
    if name in LANGUAGE:
        sees = not options and not LANGUAGE[name].packed
        assert bool(tower_blocks(rows)) == sees, "a tower is wrapped where it learns"
        text = [r for r in rows if r.weights.shape == batch["input_ids"].shape]
        assert len(text) == 2
        for r in text:
            assert torch.equal(r.weights > 0, batch["attention_mask"].bool())


@pytest.mark.parametrize("fields", KEEPS.values(), ids=KEEPS)
@over_modes
@over_fewer_cases
def test_rows_match_oracle(name, padding, options, mode, fields):
    model, batch = pictures.build(name, **options), pictures.make_batch(name, padding)
    loss, gradients, rows = sage_step(model, batch, policy_of(attention=mode, **fields))
    assert all(0 < (r.weights > 0).sum() < r.weights.numel() for r in rows)
    with oracle(model, rows, mode):
        oracle_loss, expected = step(model, batch)
    assert loss == dense(name, padding, **options)[0]
    assert relative_error(loss, oracle_loss) <= 1e-12
    assert_gradients_close(gradients, expected, 1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_the_default_policy_matches_the_oracle(name):
    model, batch = pictures.build(name), pictures.make_batch(name)
    # SigLIP's text tower is read at its last position, padding or not
    reads_padding = pytest.warns(UserWarning, match="read its last position")
    with reads_padding if name == "siglip-pair" else nullcontext():
        _, gradients, rows = sage_step(model, batch, SagePolicy())
    with oracle(model, rows, "salient"):
        _, expected = step(model, batch)
    assert_gradients_close(gradients, expected, 1e-8)
    # nothing is known of a tower's patches: all are kept, and half of them are drawn
    if name in LANGUAGE:
        tower = tower_blocks(rows)
        assert not tower or any((r.drawn > 1).any() for r in tower if r.drawn is not None)


def test_stochastic_depth_is_refused_by_name():
    """BEiT's default: it draws samples to leave out, which a replay of rows cannot repeat."""
    from transformers.models.beit.modeling_beit import BeitDropPath

    model = pictures.build("beit")
    model.beit.layers[1].drop_path = BeitDropPath(0.1)
    with install(model), pytest.raises(RuntimeError, match=r"BeitLayer\): it draws random numbers"):
        model(**pictures.make_batch("beit"))


@pytest.fixture
def judged(monkeypatch):
    """Queries, loss rows and valid tokens that blocks were judged by, by number of tokens."""
    seen, original = {}, Session.loss_rows

    def loss_rows(session, valid, causal):
        found = original(session, valid, causal)
        seen.setdefault((valid.shape[1], session._heard("tower") or False), (*found, valid))
        return found

    monkeypatch.setattr(Session, "loss_rows", loss_rows)
    return seen


@over_towers
def test_a_class_is_read_off_all_tokens_and_first_of_all_the_first(name, judged):
    sage_step(pictures.build(name), pictures.make_batch(name), SagePolicy())
    [(queries, loss_rows, valid)] = judged.values()
    assert queries.all()
    assert valid.all()
    assert loss_rows[:, 0].all()
    assert loss_rows.sum() == SIZE


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_answers_are_the_loss_rows_of_a_text(name, padding, judged):
    batch = pictures.make_batch(name, padding)
    sage_step(pictures.build(name), batch, SagePolicy())
    queries, loss_rows, valid = judged[batch["input_ids"].shape[1], False]
    assert torch.equal(valid, batch.get("attention_mask", torch.ones_like(valid)).bool())
    # the token before each that is to be said
    expected = torch.zeros_like(valid)
    expected[:, :-1] = batch["labels"][:, 1:] != -100
    assert torch.equal(loss_rows, expected)
    assert torch.equal(queries, expected)
    assert not loss_rows[batch["input_ids"] == pictures.IMAGE_TOKEN][:-1].any()


def as_long_as_the_tower(name):
    """A padded batch whose text has as many tokens as the tower."""
    batch = pictures.make_batch(name, length=PATCHES + name.startswith("clip"))
    assert not batch["attention_mask"].all()
    return batch


@pytest.mark.parametrize("queries", ["auto", "last", "labels"])
@pytest.mark.parametrize("name", ["gemma3", "idefics3"])
def test_queries_that_are_named_are_those_of_the_text(name, queries, judged):
    batch = as_long_as_the_tower(name)
    sage_step(pictures.build(name), batch, SagePolicy(queries=queries))
    tokens = batch["input_ids"].shape[1]
    assert judged[tokens, True][0].all()
    assert not judged[tokens, False][0].all()


@seers
def test_a_tower_does_not_take_a_text_of_its_length_for_its_own(name, judged):
    batch, model = as_long_as_the_tower(name), pictures.build(name)
    _, expected = step(model, batch)
    _, gradients, _ = sage_step(model, batch, policy_of(keep=AllTokens()))
    assert_gradients_close(gradients, expected, 1e-10)
    tokens = batch["input_ids"].shape[1]
    _, _, valid = judged[tokens, False]
    assert torch.equal(valid, batch["attention_mask"].bool())
    for patches in judged[tokens, True]:
        assert patches.all()


@seers
def test_nor_that_of_a_batch_handed_over(name, judged):
    """Of a module that computes its loss itself, the model is told nothing by keyword."""
    batch, model = as_long_as_the_tower(name), pictures.build(name)
    told = {k: v for k, v in batch.items() if k not in ("labels", "return_loss")}
    with install(model, SagePolicy()) as installation, pictures.exactly():
        installation.observe(batch)
        model(**told)
    tokens = batch["input_ids"].shape[1]
    for patches in judged[tokens, True]:
        assert patches.all()
    if "labels" in batch:
        # shifted too where tokens of a picture see one another, and attention is not causal
        _, loss_rows, _ = judged[tokens, False]
        assert torch.equal(loss_rows[:, :-1], batch["labels"][:, 1:] != -100)


def test_a_tower_called_by_itself_does_not_hear_the_text_in_the_batch(judged):
    """As in a vision-language model that one writes oneself, with two models side by side."""
    tower = pictures.tower_of(pictures.build("gemma3"))
    batch = as_long_as_the_tower("gemma3")
    with install(tower, SagePolicy()) as installation:
        installation.observe(batch)
        tower(batch["pixel_values"])
    [(queries, loss_rows, valid)] = judged.values()
    assert (queries & loss_rows & valid).all()


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        (torch.zeros(SIZE, 16, 16, dtype=torch.long), "all"),
        (torch.zeros(SIZE, 9, dtype=torch.long), "all"),
        (torch.zeros(SIZE, dtype=torch.long), "first"),
        (torch.zeros(SIZE, 4), "first"),
    ],
    ids=["pixels", "another-sequence", "class", "several-classes"],
)
def test_which_labels_are_of_a_whole_picture(labels, rows, judged):
    model = pictures.build("vit").vit
    with install(model, SagePolicy()) as installation:
        installation.observe({"labels": labels})
        model(**{"pixel_values": pictures.make_batch("vit")["pixel_values"]})
    [(queries, loss_rows, _)] = judged.values()
    assert queries.all()
    assert loss_rows.sum() == (SIZE if rows == "first" else queries.numel())


IDS, MASK = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5)
PICTURE, SOUND = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 30)
SAID = {"labels": IDS, "attention_mask": MASK, "owner": "Someone"}


@pytest.mark.parametrize(
    ("outer", "inner", "hears"),
    [
        ({"input_ids": IDS, "pixel_values": PICTURE}, {"pixel_values": PICTURE}, False),
        ({"input_ids": IDS, "pixel_values": PICTURE}, {"images": PICTURE}, False),
        ({"pixel_values": PICTURE, "labels": IDS}, {"pixel_values": PICTURE}, False),
        ({"input_features": SOUND, "labels": IDS}, {"input_features": SOUND}, False),
        ({"inputs_embeds": SOUND, "pixel_values": PICTURE}, {"pixel_values": PICTURE}, False),
        ({"pixel_values": PICTURE, "labels": IDS[:, 0]}, {"pixel_values": PICTURE}, True),
        ({"pixel_values": PICTURE, "labels": MASK}, {"pixel_values": PICTURE}, True),
        ({"pixel_values": PICTURE, "labels": IDS}, {"input_ids": IDS}, True),
        ({"input_ids": IDS, "pixel_values": PICTURE}, {"inputs_embeds": SOUND}, True),
        ({"input_ids": IDS, "pixel_values": PICTURE}, {"hidden_states": SOUND}, True),
        ({"input_ids": IDS}, {"position_ids": IDS, "inputs_embeds": SOUND}, True),
        ({"input_ids": IDS}, {"hidden_states": SOUND, "attention_mask": PICTURE}, True),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_what_a_module_inside_another_hears(outer, inner, hears):
    told = handed_on({}, (), outer) | SAID
    by_name, by_place = handed_on(told, (), inner), handed_on(told, tuple(inner.values()), {})
    # sound without its name may be anything
    for found in (by_name,) if "input_features" in inner else (by_name, by_place):
        assert (found["labels"] is not None) == hears
        assert (found["attention_mask"] is not None) == hears
        assert bool(found.get("tower")) != hears


def test_tokens_by_place_beside_a_picture_by_name_are_tokens():
    told = handed_on({}, (), {"input_ids": IDS}) | SAID
    assert handed_on(told, (IDS,), {"pixel_values": PICTURE})["labels"] is IDS


@packed_models
def test_packed_towers_are_left_dense_and_this_is_said_where_they_learn(name):
    model = pictures.build(name)
    assert left_dense(model).keys() == {f"model.visual.blocks.{i}" for i in range(2)}
    told = r"2 blocks, 'model.visual.blocks.0' to 'model.visual.blocks.1' \(Qwen\w+VisionBlock\)"
    with pytest.warns(UserWarning, match=told):
        installation = install(model)
    assert installation.blocks.keys() == {f"model.language_model.layers.{i}" for i in range(2)}
    installation.remove()
    frozen = pictures.build(name, frozen_tower=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install(frozen).remove()


@packed_models
def test_a_packed_tower_alone_has_no_block_and_by_name_is_refused(name):
    model = pictures.build(name)
    with pytest.raises(ValueError, match="2 layers take the tokens of all samples in one row"):
        install(model.model.visual)
    blocks = ["model.visual.blocks.*"]
    with (
        install(model, SagePolicy(blocks=blocks)),
        pytest.raises(RuntimeError, match=r"visual.blocks.0' .*not hidden states \[B, T, C\]"),
    ):
        model(**pictures.make_batch(name))


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_tokens_of_a_picture_see_one_another(name):
    """Without this the tests above would say nothing of such masks."""
    model, batch = pictures.build(name), pictures.make_batch(name)
    loss, _ = step(model, batch)
    apart = batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    causal, _ = step(model, apart)
    assert relative_error(loss, causal) > 1e-6


class Described(LightningModule):
    """A vision-language model as one trains it."""

    def __init__(self, name):
        super().__init__()
        self.model = pictures.build(name)

    def training_step(self, batch):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_the_blocks_of_the_language_model_can_be_named():
    """As examples/vision_language.md names them."""
    pattern = "model.model.language_model.layers.*"
    assert pattern in (Path(__file__).parents[1] / "examples" / "vision_language.md").read_text()
    with install(Described("llava"), SagePolicy(blocks=[pattern])) as installation:
        assert list(installation.blocks) == [pattern.replace("*", str(i)) for i in range(2)]


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_callback_alone_trains_it(name, tmp_path):
    module, batches = Described(name), [pictures.make_batch(name, seed=seed) for seed in range(2)]
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SageCallback()],
    )  # fmt: skip
    before = {n: p.clone() for n, p in module.named_parameters()}
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, loader)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert any("language_model" in n or "text_model" in n for n in moved)
    tower = {n for n in moved if any(s in n for s in ("vision", "visual"))}
    assert tower
