"""Records -> tables."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RESULTS = EXAMPLES / "results"

CONDITION = {
    "shape": "tiny",
    "rank": 0,
    "dtype": "float32",
    "batch": 1,
    "length": 8,
    "loss": "all",
    "head": "full",
    "device": "cpu",
    "threads": 1,
    "torch": "2",
}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import tables

    return tables


def test_table_ratios(tables):
    def run(name, saved, step):
        return {**CONDITION, "name": name, "saved_mib": saved, "step_s": {"median": step}}

    stale = run("sage", 1.0, 1.0)
    text = tables.table(
        [stale, run("dense", 8.0, 2.0), run("checkpointing", 2.0, 4.0), run("sage", 0.5, 1.0)]
    )
    title, _, head, _, *rows = text.splitlines()
    assert "full fine-tuning, float32, 1 x 8 tokens" in title
    # columns without any value are left out
    assert "peak" not in head
    cells = {row.split("|")[1].strip(): [x.strip() for x in row.split("|")[2:-1]] for row in rows}
    assert cells["sage"] == ["0.5", "0.062", "0.250", "1", "0.500", "0.250"]
    assert cells["dense"][:2] == ["8.0", "1.000"]
    assert len(cells) == 3


def test_a_table_shows_activation_memory_against_both_baselines(tables):
    values = {"dense": 200.0, "checkpointing": 50.0, "sage": 20.0}
    text = tables.table([{**CONDITION, "name": n, "activation_mib": v} for n, v in values.items()])
    *_, last = text.splitlines()
    assert [cell.strip() for cell in last.split("|")[1:-1]] == ["sage", "20", "0.100", "0.400"]


def test_records_from_before_there_was_a_choice_of_heads_are_still_read(tables):
    old = [json.loads(line) for line in (RESULTS / "cpu.jsonl").read_text().splitlines()]
    assert tables.table(old).startswith("small-cpu, LoRA r=16, float32, 4 x 512 tokens")
    before = {name: value for name, value in CONDITION.items() if name != "head"}
    runs = [
        {**before, "name": "dense", "body": False, "saved_mib": 1.0},
        {**before, "name": "sage", "body": True, "saved_mib": 2.0},
        {**CONDITION, "name": "sage", "head": "none", "saved_mib": 4.0},
        {**CONDITION, "name": "sage", "head": "chunked", "saved_mib": 8.0},
    ]
    titles = [part.splitlines()[0] for part in tables.table(runs).split("\n\n")[::2]]
    assert [title.split(", ")[5].split(";")[0] for title in titles] == [
        "with chunked head",
        "with head",
        "without head",
    ]


def test_limits_say_what_fitted_and_what_did_not(tables):
    condition = {**CONDITION, "rank": 64, "head": "chunked", "budget_gib": 24.0}
    condition["batch_length"] = 2048

    def run(name, batch, context):
        keys = ("fits", "fails", "tries")
        found = {"batch": batch, "context": context}
        return {
            **condition,
            "name": name,
            **{k: dict(zip(keys, v, strict=True)) for k, v in found.items() if v is not None},
        }

    dense = run("dense", (4, 5, 4), (0, 1024, 1))
    sage = run("sage", (100, 103, 12), (131_072, None, 8))
    title, _, head, _, *rows = tables.limits_table([sage, dense, sage]).splitlines()
    assert "24 GiB" in title
    assert "with chunked head" in title
    assert "sequences of 2048" in head
    assert [cell.strip() for cell in rows[0].split("|")[1:-1]] == [
        *("sage", "100 (< 103)", "25.00"),
        # nothing of dense fitted: no ratio
        "131,072 (open)",
    ]
    assert rows[1].endswith(" 0 (< 1,024) |")
    only_batch = [run("dense", (4, 5, 4), None), run("checkpointing", (20, 21, 9), None)]
    text = tables.limits_table(only_batch)
    assert "context" not in text
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]] == [
        *("checkpointing", "20 (< 21)", "5.00", "1.00"),
    ]
