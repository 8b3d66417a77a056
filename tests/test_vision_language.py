"""The example of a vision-language model, much shorter."""

import json
import math
from pathlib import Path

import pytest
import torch

from lightning_sage import SagePolicy, install
from tasks import LIGHTNING_WARNINGS

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = [
    *("--seeds=1", "--pretraining=2", "--steps=2", "--rounds=1"),
    *("--batch=2", "--piece=32", "--judged=4"),
]

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    pytest.importorskip("matplotlib")
    import vision_language

    return vision_language


def test_it_writes_what_it_measures(example, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    example.main([*SHORT, f"--out={out}"])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    trained = [r for r in records if r["experiment"] == "training"]
    assert [r["method"] for r in trained] == list(example.POLICIES)
    assert all(0 <= r["accuracy"] <= 1 for r in trained)
    # all start from the same weights
    assert len({r["accuracy before"] for r in trained}) == 1
    assert [r["kept"] is None for r in trained] == [True, False, False]
    truth = {r["method"]: r for r in records if r["experiment"] == "gradients"}
    assert len(truth) == len(example.POLICIES) - 1 + len(example.CHOICES)
    assert all(-1 <= r[part] <= 1 for r in truth.values() for part in ("tower", "text"))
    costs = [r for r in records if r["experiment"] == "costs"]
    assert len(costs) == 2 * (1 + len(example.POLICIES))
    saved = {(r["tower"], r["method"]): r["saved MiB"] for r in costs}
    for tower in ("trained", "frozen"):
        assert saved[tower, "sage keep=0.25"] < saved[tower, "sage default"] < saved[tower, "dense"]
        assert saved[tower, "checkpointing"] < saved[tower, "dense"]
    assert saved["frozen", "dense"] < saved["trained", "dense"]
    assert all(math.isfinite(r["step / dense"]) for r in costs)
    assert "A step with the tower frozen" in capsys.readouterr().out


def test_pieces_held_out_are_never_trained_on(example):
    command = example.Command(batch=4)
    draw = torch.Generator().manual_seed(0)
    for held_out in (False, True):
        pieces = example.Pieces(command, 0, held_out=held_out)
        places = torch.cat([pieces._places(draw) for _ in range(50)])
        assert len(places) == 200
        assert (((places // 4).sum(1) % 5 == 0) == held_out).all()


def test_a_batch_asks_about_the_pieces_it_shows(example):
    command = example.Command(batch=16)
    pieces = example.Pieces(command, 0)
    [batch] = example.some(pieces, 1)
    again = example.some(pieces, 2)
    assert torch.equal(again[0]["pixel_values"], batch["pixel_values"])
    assert not torch.equal(again[1]["pixel_values"], batch["pixel_values"])
    tokens = (batch["input_ids"] == example.IMAGE).sum(1)
    assert (tokens == (command.piece // 8) ** 2).all()
    places = pieces._places(torch.Generator().manual_seed(0))
    height, width = pieces.photograph.shape[1:]
    for n, (y, x) in enumerate(places.tolist()):
        row_or_column = batch["input_ids"][n, -3].item() - example.ROW
        third = (3 * y // (height - 64), 3 * x // (width - 64))[row_or_column]
        assert batch["labels"][n, -1] == example.FIRST + third
        assert torch.equal(batch["pixel_values"][n], pieces.photograph[:, y : y + 64, x : x + 64])
    assert (batch["labels"][:, :-1] == -100).all()


def test_answers_are_the_loss_rows_and_patches_are_judged_by_all(example):
    command = example.Command(batch=2, piece=32)
    model = example.VisionLanguage(command, 1).model
    [batch] = example.some(example.Pieces(command, 0), 1)
    with install(model, SagePolicy(keep=0.25, sinks=0, keep_last=False)) as installation:
        model(**batch).loss.backward()
        records = installation.records
    assert {r.kept.shape[1] for r in records} == {16, 20}
    for record in records:
        if record.kept.shape[1] == 20:
            # what predicts the answer is always kept
            assert record.kept[:, -2].all()
