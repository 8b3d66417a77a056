import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_sage import SagePolicy

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = {
    "dense": ["--method", "dense"],
    "checkpointing": ["--method", "checkpointing", "--rank", "4"],
    "sage keep=0.25": [
        "--method",
        "sage",
        "--policy.keep",
        "0.25",
        "--head",
        "none",
        "--rank",
        "4",
    ],
    "sage default": ["--method", "sage", "--head", "chunked"],
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
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import step

    return step


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
    # of a process on a CPU, which does not tell methods apart
    assert record["peak_mib"] is record["activation_mib"] is None
    assert record["attention"] == "flash_attention_for_cpu"
    kernel = "torch" if hasattr(torch.nn.functional, "linear_cross_entropy") else "slices"
    assert record["cross_entropy"] == (kernel if record["head"] == "chunked" else None)
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


def test_presets_are_called_by_name(measure, step):
    named = [measure.name_of(setting) for setting in measure.methods(step.Setting())]
    assert named[2:6] == ["sage balanced", "sage memory", "sage speed", "sage keep=0.25"]


def test_a_suite_prints_ratios_and_appends_records(measure, step, tmp_path, capsys):
    base = step.Setting(device="cpu", warmup=0, steps=2, rank=4)
    out = tmp_path / "results" / "suite.jsonl"
    measure.run_suite([replace(base, head="none"), replace(base, rank=0)], float("inf"), out)
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
def test_the_body_bears_loss_where_the_labels_say(step, loss):
    setting = step.Setting(device="cpu", head="none", loss=loss, length=32)
    batch, rows = step.make_batch(setting), step.loss_rows(setting)
    bears = torch.zeros(setting.batch, setting.length, dtype=torch.bool)
    bears[:, rows] = True
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    assert torch.equal(bears, shifted)
    assert bears.sum() == setting.batch * {"last-quarter": 8, "last-token": 1, "all": 31}[loss]
    policy = SagePolicy(keep=1e-6 + bears.float().mean().item(), sinks=0, keep_last=False)
    contender = step.prepare(replace(setting, method="sage", policy=policy), step.build(setting))
    contender.counted_step(batch)
    for record in contender.installation.records:
        assert (record.kept | ~bears).all()


def test_contenders_share_weights(step):
    setting = step.Setting(device="cpu", rank=4, head="none")
    model = step.build(setting)
    contenders = [step.prepare(replace(setting, method=m), model) for m in ("dense", "sage")]
    for contender in contenders:
        contender.timed_step(step.make_batch(setting), counts=True)
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
def test_shapes_are_those_of_the_released_models(step, shape, parameters):
    model = step.build(step.Setting(device="meta", shape=shape, dtype="bfloat16"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_suites_compare_like_with_like(measure, step, suite):
    for condition in measure.suite_settings(suite, step.Setting()):
        settings = measure.methods(condition)
        assert [s.method for s in settings[:3]] == ["dense", "checkpointing", "sage"]
        default = step.Setting()
        alike = [replace(s, method=default.method, policy=default.policy) for s in settings]
        assert set(alike) == {condition}


def test_an_outlasted_budget_is_said(measure, step, tmp_path, capsys):
    base = step.Setting(device="cpu", warmup=0, steps=2)
    measure.run_suite([base], 0.0, tmp_path / "suite.jsonl")
    shown = capsys.readouterr()
    assert "over the budget of 0 s" in shown.err
    assert "over the time budget" in shown.out


def test_memory_that_does_not_suffice_is_said(measure, race, step, monkeypatch, capsys):
    settings = measure.methods(step.Setting(device="cpu", warmup=0, steps=1))[:2]

    def too_much(self, batch):
        if self.setting.method == "dense":
            raise torch.OutOfMemoryError

    monkeypatch.setattr(step.Contender, "counted_step", too_much)
    records = [measure.make_record(contender) for contender in race.race(settings)]
    assert "dense: out of memory" in capsys.readouterr().err
    assert [record.get("error") for record in records] == ["out of memory", None]
    assert "| out of memory |" in measure.table(records)


@pytest.mark.parametrize("rank", [0, 4])
def test_every_head_has_the_loss_of_the_same_rows(step, rank):
    losses, kept = {}, {}
    for head in ("full", "chunked", "none"):
        setting = step.Setting(device="cpu", head=head, rank=rank, method="sage")
        contender = step.prepare(setting, step.build(setting))
        batch = step.make_batch(setting)
        losses[head] = contender.loss(batch).item()
        kept[head] = [record.kept for record in contender.installation.records]
    assert losses["chunked"] == pytest.approx(losses["full"], rel=1e-5)
    for first, *others in zip(*kept.values(), strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_a_part_of_a_suite_is_named(measure, step):
    conditions = measure.suite_settings("gpu", step.Setting())
    names = [measure.condition_name(condition) for condition in conditions]
    assert names == [
        *("3b-16x256", "3b-4x2048", "3b-4x2048-chunked"),
        *("1b-4x2048-rank0", "8b-2x4096", "8b-1x32768"),
    ]
    assert all(c.rank == 64 and c.dtype == "bfloat16" for c in conditions if c.rank)
    assert measure.chosen_conditions(conditions, None) == conditions
    part = measure.chosen_conditions(conditions, "8b-2x4096, 3b-16x256")
    assert part == [conditions[4], conditions[0]]
    # what the docstring says to run is all there is, and each once
    commands = re.findall(r"--only (\S+)", measure.__doc__)
    assert sorted(",".join(commands).split(",")) == sorted(names)
    with pytest.raises(ValueError, match="no condition 3b-1x1 here, but 3b-16x256, "):
        measure.chosen_conditions(conditions, "3b-1x1")


def test_activation_is_a_steps_peak_above_that_of_a_forward(step, monkeypatch):
    """CUDA's account, by a machine that has none: numbers put in, numbers taken out."""
    setting = step.Setting(device="cpu", rank=4, head="none")
    contender, peaks = step.prepare(setting, step.build(setting)), [130, 190]
    grown = []

    def peak():
        gradients = [p.grad for p in contender.model.parameters() if p.requires_grad]
        assert all(gradient is not None for gradient in gradients)
        grown.append(sum(gradient.norm() for gradient in gradients))
        return peaks.pop(0) * step.MIB

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100 * step.MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    batch = step.make_batch(setting)
    contender.loss(batch).backward()
    trained = [p for p in contender.model.parameters() if p.requires_grad]
    assert contender.activation(batch) == {
        "resident_mib": 100,
        "gradients_mib": sum(p.nbytes for p in trained) / step.MIB,
        "forward_mib": 30,
        "step_mib": 90,
        "activation_mib": 60,
    }
    # the forward was without grad, the step added its gradients to those there
    assert grown[1] == pytest.approx(2 * grown[0].item(), rel=1e-5)


@pytest.mark.gpu
def test_activation_on_a_gpu(measure, race, step):
    # wide rather than many: what a step needs beside its activations is small
    base = step.Setting(device="cuda", rank=4, head="none", batch=8, length=512, warmup=1, steps=2)
    records = [measure.make_record(c) for c in race.race(measure.methods(base)[:3])]
    dense, checkpointing, sage = (record["activation_mib"] for record in records)
    assert records[0]["attention"] in {"flash_attention", "efficient_attention", "cudnn_attention"}
    assert dense > 2 * checkpointing > 0
    assert dense > 2 * sage > 0
    # transients aside it is what autograd holds
    assert dense == pytest.approx(records[0]["saved_mib"], rel=0.5)
    assert len({round(record["forward_mib"], 1) for record in records}) == 1
