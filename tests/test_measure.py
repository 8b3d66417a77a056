import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_sage import SagePolicy
from lightning_sage.report import table

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = {
    "dense": ["--method", "dense"],
    "checkpointing": ["--method", "checkpointing", "--rank", "4"],
    "sage keep=0.25": [
        "--method",
        "sage",
        "--policy.keep",
        "0.25",
        "--body",
        "true",
        "--rank",
        "4",
    ],
    "sage keep=AllTokens(), replay=0.25, attention='full'": [
        *("--method", "sage", "--policy.keep", "AllTokens", "--policy.replay", "0.25"),
        *("--policy.attention", "full", "--loss", "all"),
    ],
}
QUICK = ["--warmup", "1", "--steps", "3", "--device", "cpu"]


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import measure

    return measure


@pytest.fixture
def race(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import race

    return race


@pytest.mark.parametrize("name", METHODS)
def test_one_run_is_one_line(measure, capsys, name, tmp_path):
    out = tmp_path / "runs.jsonl"
    measure.main([*METHODS[name], *QUICK, "--out", str(out)])
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    record = json.loads(printed)
    assert record["name"] == name
    assert record["measured_steps"] == 3
    assert record["saved_mib"] > 0
    assert record["peak_mib"] is None  # of a process on a CPU, which does not tell methods apart
    for key in ("forward_s", "backward_s", "step_s", "tokens_per_s"):
        spread = record[key]
        assert 0 < spread["p20"] <= spread["median"] <= spread["p80"]
    assert {"torch", "transformers", "peft", "commit", "date", "seed", "threads"} <= record.keys()
    assert ("kept_fraction" in record) == (record["policy"] is not None) == name.startswith("sage")


def test_the_script_runs():
    command = [sys.executable, EXAMPLES / "measure.py", *METHODS["sage keep=0.25"], *QUICK]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    # sixteen loss rows fill the budget; sinks and last token come on top
    assert json.loads(done.stdout)["kept_fraction"] == pytest.approx(21 / 64)


def test_a_suite_prints_ratios_and_appends_records(measure, race, tmp_path, capsys):
    base = race.Setting(device="cpu", warmup=0, steps=2, rank=4)
    out = tmp_path / "results" / "suite.jsonl"
    measure.run_suite([replace(base, body=True), replace(base, rank=0)], float("inf"), out)
    shown = capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    names = [record["name"] for record in records]
    assert names == 2 * [measure.name_of(setting) for setting in measure.methods(base)]
    assert len(set(names)) == len(names) / 2
    assert all(f"| {name} " in shown for name in names)
    assert "LoRA r=4" in shown
    assert "full fine-tuning" in shown
    # the forward is the dense one, whatever the backward is
    same = {r["loss_value"] for r in records[: len(names) // 2] if "skip" not in r["name"]}
    assert max(same) - min(same) < 1e-5


@pytest.mark.parametrize("loss", ["last-quarter", "last-token", "all"])
def test_the_body_bears_loss_where_the_labels_say(race, loss):
    setting = race.Setting(device="cpu", body=True, loss=loss, length=32)
    batch, rows = race.make_batch(setting), race.loss_rows(setting)
    bears = torch.zeros(setting.batch, setting.length, dtype=torch.bool)
    bears[:, rows] = True
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    assert torch.equal(bears, shifted)
    assert bears.sum() == setting.batch * {"last-quarter": 8, "last-token": 1, "all": 31}[loss]
    policy = SagePolicy(keep=1e-6 + bears.float().mean().item(), sinks=0, keep_last=False)
    contender = race.prepare(replace(setting, method="sage", policy=policy), race.build(setting))
    contender.counted_step(batch)
    for record in contender.installation.records:
        assert (record.kept | ~bears).all()


def test_contenders_share_weights(race):
    setting = race.Setting(device="cpu", rank=4, body=True)
    model = race.build(setting)
    contenders = [race.prepare(replace(setting, method=m), model) for m in ("dense", "sage")]
    for contender in contenders:
        contender.timed_step(race.make_batch(setting), counts=True)
        for mine, shared in zip(contender.model.parameters(), model.parameters(), strict=True):
            assert mine is shared
            assert mine.grad is None
    assert not hasattr(model.get_submodule("base_model.model.layers.0"), "_sage")


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_shapes_are_those_of_the_released_models(race, shape, parameters):
    model = race.build(race.Setting(device="meta", shape=shape, dtype="bfloat16"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_suites_compare_like_with_like(measure, race, suite):
    for condition in measure.suite_settings(suite, race.Setting()):
        settings = measure.methods(condition)
        assert [s.method for s in settings[:3]] == ["dense", "checkpointing", "sage"]
        default = race.Setting()
        alike = [replace(s, method=default.method, policy=default.policy) for s in settings]
        assert set(alike) == {condition}


def test_an_outlasted_budget_is_said(measure, race, tmp_path, capsys):
    base = race.Setting(device="cpu", warmup=0, steps=2)
    measure.run_suite([base], 0.0, tmp_path / "suite.jsonl")
    shown = capsys.readouterr()
    assert "over the budget of 0 s" in shown.err
    assert "over the time budget" in shown.out


def test_memory_that_does_not_suffice_is_said(measure, race, monkeypatch, capsys):
    settings = measure.methods(race.Setting(device="cpu", warmup=0, steps=1))[:2]

    def too_much(self, batch):
        if self.setting.method == "dense":
            raise torch.OutOfMemoryError

    monkeypatch.setattr(race.Contender, "counted_step", too_much)
    records = [measure.make_record(contender) for contender in race.race(settings)]
    assert "dense: out of memory" in capsys.readouterr().err
    assert [record.get("error") for record in records] == ["out of memory", None]
    assert "| out of memory |" in table(records)


def test_table_ratios():
    condition = {
        "shape": "tiny",
        "rank": 0,
        "dtype": "float32",
        "batch": 1,
        "length": 8,
        "loss": "all",
        "body": False,
        "device": "cpu",
        "threads": 1,
        "torch": "2",
    }

    def run(name, saved, step):
        return {**condition, "name": name, "saved_mib": saved, "step_s": {"median": step}}

    stale = run("sage", 1.0, 1.0)
    text = table(
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
