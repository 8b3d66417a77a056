import json
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, EarlyStopping
from rich.console import Console
from torch.utils.data import DataLoader

from lightning_sage import SageCallback, SagePolicy
from lightning_sage.compare import command
from lightning_sage.compare.callbacks import ContestMeter, Turns, spread, warm_up
from lightning_sage.compare.checkpointing import switch_off, switch_on
from lightning_sage.compare.command import METHODS, Options, main, parse
from lightning_sage.compare.contest import ContestCLI, is_out_of_memory
from lightning_sage.compare.table import picture, read_records, remarks, standings
from lightning_sage.compare.turns import Child, Task, take_turns
from lightning_sage.memory import saved_bytes
from lightning_sage.models import CausalLM
from lightning_sage.policy import PRESETS
from lightning_sage.saving import SavePretrained
from tasks import LIGHTNING_WARNINGS, LLAMA
from zoo import build, make_batch

pytestmark = [
    *LIGHTNING_WARNINGS,
    # Lightning's own use of jsonargparse
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]
MODEL = "lightning_sage.models.CausalLM"
YOURS = {"class_path": "lightning_sage.SageCallback", "init_args": {"policy": {"keep": 0.5}}}


class Fragile(CausalLM):
    """Fails in a way of its own with most methods."""

    def training_step(self, batch, batch_idx):
        sage = next((c for c in self.trainer.callbacks if isinstance(c, SageCallback)), None)
        if sage is None and not any(
            getattr(m, "gradient_checkpointing", 0) for m in self.modules()
        ):
            raise torch.OutOfMemoryError("no room for 2 GiB")
        if sage is None and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if sage is not None and sage.policy.replay is None:
            raise RuntimeError("broken on purpose")
        return super().training_step(batch, batch_idx)


class Shuffled(LightningDataModule):
    """Batches in an order that is drawn from torch's own generator, anew in every epoch."""

    def train_dataloader(self):
        rows = make_batch("llama", size=8)
        samples = [{name: values[n] for name, values in rows.items()} for n in range(8)]
        return DataLoader(samples, batch_size=2, shuffle=True)


class Noted(Callback):
    """One of the user's own."""


def arguments(folder, model=MODEL, callbacks=(YOURS,), **trainer):
    """A tiny Llama on eight lines of text, which an epoch of four batches reads."""
    rows = [{"text": f"{n} and {'x' * (10 + 5 * n)}"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "seed_everything": 3,
        "model": {"class_path": model, "init_args": {"config": LLAMA}},
        "data": {
            "class_path": "lightning_sage.data.AnswerData",
            "init_args": {
                **dict.fromkeys(("train", "val"), str(folder / "rows.jsonl")),
                "prompt_field": None,
                "answer_field": "text",
                "loading": {"tokenizer": "bytes", "batch_size": 2, "max_tokens": 64},
            },
        },
        "trainer": {"accelerator": "cpu", "callbacks": list(callbacks), **trainer},
    }
    file = folder / "config.yaml"
    # JSON is YAML
    file.write_text(json.dumps(config))
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Records of a real comparison, and the folder that it was run in."""
    folder = tmp_path_factory.mktemp("compared")
    saving = {
        "class_path": "lightning_sage.saving.SavePretrained",
        "init_args": {"directory": str(folder / "model")},
    }
    own = arguments(folder, callbacks=[YOURS, saving], devices=2, strategy="sage_ddp")
    methods = "dense,checkpointing,memory,yours"
    main([*own, "--steps", "6", "--methods", methods, "--out", str(folder / "out")])
    return read_records(folder / "out"), folder


def test_methods_train_on_the_same_batches(compared):
    records, _ = compared
    assert [r["name"] for r in records] == ["dense", "checkpointing", "memory", "yours"]
    assert {(r["status"], r["steps_done"], r["seed"]) for r in records} == {("ok", 6, 3)}
    # over the end of an epoch, too
    assert len({r["batches"] for r in records}) == 1
    dense, checkpointing, quarter, yours = records
    assert dense["losses"] == pytest.approx(checkpointing["losses"], rel=1e-5)
    assert dense["losses"] != pytest.approx(quarter["losses"], rel=1e-6)
    assert checkpointing["checkpointing"] == "Hugging Face's"
    assert quarter["saved_mib"] < yours["saved_mib"] < dense["saved_mib"]
    assert checkpointing["saved_mib"] < dense["saved_mib"]
    assert 0.2 < quarter["kept_fraction"] <= yours["kept_fraction"] < 1
    assert 0 < quarter["fidelity_cosine"] <= yours["fidelity_cosine"] <= 1
    assert yours["policy"]["keep"] == 0.5
    for record in records:
        assert record["measured_steps"] == len(record["step_seconds"]) == 3
        assert record["peak_mib"] > 100
        assert record["step_s"]["p20"] <= record["step_s"]["median"] <= record["step_s"]["p80"]
        assert record["config"]["model"]["class_path"] == MODEL
        assert record["notes"] == ["one device, not devices=2, strategy=sage_ddp"]


def test_methods_take_turns(compared):
    records, _ = compared
    turns = sorted((*turn, r["name"]) for r in records for turn in r["turns"])
    assert [name for *_, name in turns] == [r["name"] for r in records] * 6
    assert all(end <= begin for (_, end, _), (begin, *_) in pairwise(turns))


def test_a_comparison_leaves_its_records_and_a_picture(compared, capsys):
    records, folder = compared
    left = {path.name for path in folder.iterdir()}
    assert left == {"rows.jsonl", "config.yaml", "out"}
    files = {path.name for path in (folder / "out").iterdir()}
    logs = {"dense.log", "checkpointing.log", "memory.log", "yours.log"}
    assert files == {"compare.jsonl", "compare.png", *logs}
    (folder / "out/compare.png").unlink()
    main(["--from", str(folder / "out")])
    assert (folder / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.split()}
    assert rows["dense"][2] == rows["checkpointing"][3] == "1.000"
    assert rows["yours"][2] == f"{records[3]['saved_mib'] / records[0]['saved_mib']:.3f}"
    assert "warning" not in printed


def test_a_method_that_fails_is_shown_and_the_others_go_on(tmp_path, capsys):
    methods = "dense,checkpointing,memory,speed"
    own = arguments(tmp_path, model=f"{__name__}.Fragile")
    main([*own, "--steps", "4", "--methods", methods, "--out", str(tmp_path / "out")])
    records = read_records(tmp_path / "out")
    assert [r["status"] for r in records] == ["oom", "killed", "failed", "ok"]
    assert records[3]["steps_done"] == 4
    # what is known of those that failed is written down as well
    assert all(r["config"]["seed_everything"] == 3 for r in records)
    printed = capsys.readouterr().out
    for text in ("OOM (killed)", "memory: RuntimeError: broken on purpose", "signal 9"):
        assert text in printed
    assert "RuntimeError" in (tmp_path / "out/memory.log").read_text()


@pytest.mark.parametrize(
    ("wrong", "code", "text"),
    [
        ("--model.init_args.nonsense=1", 2, "nonsense"),
        ("--data.init_args.train=nowhere.jsonl", 1, "nowhere.jsonl"),
    ],
)
def test_errors_of_the_configuration_come_from_the_first_process(
    tmp_path, capsys, wrong, code, text
):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main([*arguments(tmp_path), wrong, "--out", str(out)])
    assert stopped.value.code == code
    assert text in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["dense.log"]


def test_options_are_taken_out_of_those_of_fit():
    own = ["--config", "a.yaml", "--trainer.max_steps", "-1", "--config=b.yaml", "--model.x=--y"]
    options = parse([*own[:2], "--steps=9", *own[2:], "--methods", "yours, dense"])
    assert options.args == own
    assert (options.steps, options.methods, options.turn) == (9, ["yours", "dense"], 2)
    assert options.out.parts[:2] == ("runs", "compare")
    assert parse([]).methods == list(METHODS)
    assert parse(["--from", "there"]) == Path("there")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--steps", "1"], "at least 2, one of them to warm up, got 1"),
        (["--steps", "many"], "invalid int value"),
        (["--methods", "dense,spares"], "has spares; there are dense, checkpointing"),
        (["--methods", ","], "must name some"),
        (["--methods", "dense,dense"], "each once"),
        (["--from", "there", "--model=x"], "leave --model=x out"),
    ],
)
def test_wrong_options_are_refused(argv, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(argv)
    assert text in capsys.readouterr().err


def test_a_comparison_is_not_added_to_another(tmp_path, capsys):
    (tmp_path / "compare.jsonl").touch()
    with pytest.raises(SystemExit, match="2"):
        parse(["--out", str(tmp_path)])
    assert "holds a comparison" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "text"), [(None, "no compare.jsonl in"), ("{}", "no record"), ("{", "no record")]
)
def test_a_folder_without_records(tmp_path, line, text):
    if line is not None:
        (tmp_path / "compare.jsonl").write_text(line)
    with pytest.raises(SystemExit, match=text):
        main(["--from", str(tmp_path)])


# a method's process with nothing but its side of the talk; `act` is called before each step
STUB = """
import json, os, sys, time
task = json.loads(sys.stdin.readline())
method, steps = task["method"], task["steps"]
def tell(kind, **values): print(json.dumps({"kind": kind, **values}), flush=True)
def note(what):
    with open(os.path.join(os.path.dirname(task["folder"]), "notes"), "a") as file:
        file.write(f"{what} {method} {os.getpid()}\\n")
def act(step): pass
DEVICE = "cpu"
"""
RUN = """
tell("built", record={"device_type": DEVICE, "own": None})
for step in range(steps):
    tell("turn", step=step)
    if not sys.stdin.readline(): sys.exit("alone")
    note("step")
    act(step)
note("end")
tell("result", record={"status": "ok"})
"""


def stub(monkeypatch, script=""):
    monkeypatch.setattr(command, "_COMMAND", (sys.executable, "-c", STUB + script + RUN))


def run(tmp_path, *methods, steps=3, tell=lambda child: None):
    options = Options([], steps, list(methods), True, tmp_path)
    comparison = command.Comparison(options, tell)
    comparison.run()
    return comparison.records


def notes(tmp_path):
    return [line.split() for line in (tmp_path / "notes").read_text().splitlines()]


def test_who_dies_loses_only_its_turn(tmp_path, monkeypatch):
    stub(monkeypatch, "def act(step): method == 'balanced' and step and sys.exit('gone')")
    records = run(tmp_path, "dense", "balanced", "yours")
    assert [r["status"] for r in records] == ["ok", "failed", "ok"]
    assert records[1]["error"] == "gone"
    assert [name for what, name, _ in notes(tmp_path) if what == "step"] == [
        *["dense", "balanced", "yours"] * 2,
        *["dense", "yours"],
    ]


def test_on_a_device_methods_run_one_after_the_other(tmp_path, monkeypatch):
    stub(monkeypatch, "note('start')\nDEVICE = 'cuda'")
    assert [r["status"] for r in run(tmp_path, "dense", "balanced")] == ["ok", "ok"]
    whole = ["start", "step", "step", "step", "end"]
    found = [(what, name) for what, name, _ in notes(tmp_path)]
    assert found == [(what, name) for name in ("dense", "balanced") for what in whole]


def test_nothing_of_a_preparation_stays_in_the_process(tmp_path, monkeypatch):
    seen = "note('start')\nif not os.path.exists('seen'):\n    open('seen', 'w').close()\n"
    stub(monkeypatch, f"{seen}    tell('again')\n    sys.exit()")
    monkeypatch.chdir(tmp_path)
    assert [r["status"] for r in run(tmp_path, "dense")] == ["ok"]
    starts = [process for what, _, process in notes(tmp_path) if what == "start"]
    assert len(set(starts)) == 2


def test_no_process_outlives_the_comparison(tmp_path, monkeypatch):
    stub(monkeypatch, "note('start')\ndef act(step): step and time.sleep(600)")

    def interrupt(child):
        if child.started:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "dense", "yours", tell=interrupt)
    processes = {int(process) for *_, process in notes(tmp_path)}
    assert len(processes) == 2
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_terminated_comparison_ends_its_processes(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    stub(monkeypatch, "def act(step): os.kill(os.getppid(), 15); time.sleep(600)")
    with pytest.raises(SystemExit) as stopped:
        main(["--methods", "dense", "--out", str(tmp_path)])
    assert stopped.value.code == 143
    [(*_, process)] = notes(tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_child_whose_parent_is_gone_ends(tmp_path, monkeypatch):
    stub(monkeypatch)
    child = Child(Task([], "dense", 3, 1, str(tmp_path / "x")), command._COMMAND, tmp_path / "log")
    assert child.advance()
    child._process.stdin.close()
    assert not child.advance()
    assert child.record["error"] == "alone"
    child.kill()


FORKS = """
import os, signal, sys, time
from lightning_sage.compare.turns import Parent
parent = Parent()
folder = parent.task().folder
if not os.fork():
    open(folder, "w").write(str(os.getpid()))
    time.sleep(60)
while not (os.path.exists(folder) and open(folder).read()):
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_method_has_forked_neither_holds_the_others_up_nor_stays(tmp_path):
    task = Task([], "dense", 3, 1, str(tmp_path / "pid"))
    child = Child(task, (sys.executable, "-c", FORKS), tmp_path / "log")
    began = time.monotonic()
    assert not child.advance()
    assert time.monotonic() - began < 40
    assert child.record["status"] == "killed"
    child.kill()
    forked = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{forked}/stat")
    # gone, or dead and not yet buried by whoever took it in
    for _ in range(200):
        if not state.exists() or state.read_text().rpartition(") ")[2][0] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("it is still there")


def test_exit_status_says_whether_all_failed(tmp_path, monkeypatch, capsys):
    stub(monkeypatch, "def act(step): sys.exit('gone')")
    with pytest.raises(SystemExit) as stopped:
        main(["--methods", "dense,balanced", "--out", str(tmp_path)])
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "dense: gone" in printed
    assert "balanced: gone" in printed
    assert not (tmp_path / "compare.png").exists()


def test_yours_runs_where_it_is_no_preset_or_is_asked_for(tmp_path, monkeypatch):
    stub(monkeypatch)
    options = Options([], 2, ["dense", "yours"], False, tmp_path)
    comparison = command.Comparison(options, lambda child: None)
    comparison.run()
    assert [r["name"] for r in comparison.records] == ["dense"]


def test_take_turns_with_nobody():
    take_turns([], print)


class Alone:
    """A parent who always says yes."""

    def __init__(self):
        self.turns, self.asked = [], []

    def wait_for_turn(self, step):
        self.asked.append(step)

    def end_turn(self):
        pass


def contest(folder, method, *more, steps=4, turn=2, **settings):
    task = Task([*arguments(folder, **settings), *more], method, steps, turn, str(folder / "own"))
    return ContestCLI(task, Alone())


def test_a_contest_is_the_configuration_without_what_gets_in_its_way(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-sage"])
    save = {"class_path": "lightning_sage.saving.SavePretrained", "init_args": {"directory": "m"}}
    stop = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "v"},
    }
    own = {"class_path": f"{__name__}.Noted"}
    swa = {
        "class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging",
        "init_args": {"swa_lrs": 0.1, "device": None},
    }
    cli = contest(
        tmp_path, "memory", "--ckpt_path=null", "--weights_only=null",
        callbacks=[YOURS, save, stop, own, swa], max_epochs=7, num_nodes=2,
        accumulate_grad_batches=2, gradient_clip_val=0.5, fast_dev_run=True, limit_val_batches=3,
    )  # fmt: skip
    trainer = cli.trainer
    kinds = [type(c) for c in trainer.callbacks]
    assert kinds == [Turns, Noted, SageCallback, ContestMeter]
    assert trainer.callbacks[2].policy == PRESETS["memory"]
    assert not {SavePretrained, EarlyStopping} & set(kinds)
    assert (trainer.max_steps, trainer.max_epochs, trainer.limit_val_batches) == (4, -1, 0)
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (2, 0.5)
    assert (trainer.world_size, trainer.loggers, trainer.fast_dev_run) == (1, [], False)
    assert cli.notes == ["one device, not num_nodes=2"]
    assert cli.own == SagePolicy(keep=0.5)
    assert cli.yours == "yours"


# the preset, written out
MEMORY = {
    "keep": {"class_path": "lightning_sage.LossFirst", "init_args": {"fraction": 0.25}},
    "replay": None,
    "cache_dtype": "int8",
}


@pytest.mark.parametrize(
    ("callbacks", "strategy", "own"),
    [
        ([], "auto", None),
        ([], "sage_ddp", "balanced"),
        ([{"class_path": "lightning_sage.SageCallback"}], "auto", "balanced"),
        ([YOURS], "sage_ddp", "yours"),
        (
            [],
            {
                "class_path": "lightning_sage.SageStrategy",
                "init_args": {"policy": {**MEMORY, "blocks": ["model.*.layers.*"]}},
            },
            "memory",
        ),
    ],
)
def test_what_the_configuration_itself_does(tmp_path, monkeypatch, callbacks, strategy, own):
    monkeypatch.setattr("sys.argv", ["lightning-sage"])
    cli = contest(tmp_path, "dense", callbacks=callbacks, strategy=strategy)
    assert cli.yours == own
    assert not any(isinstance(c, SageCallback) for c in cli.trainer.callbacks)
    if own is None:
        with pytest.raises(ValueError, match="it has none: add one"):
            contest(tmp_path, "yours", callbacks=callbacks)


def test_policies_are_not_moved_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-sage"])
    moved = {**YOURS, "init_args": {"policy": {"keep": 0.5}, "memory_budget": "1GiB"}}
    cli = contest(tmp_path, "yours", callbacks=[moved])
    assert cli.notes == ["without the configuration's memory_budget"]


def test_what_a_contest_measures(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-sage"])
    cli = contest(tmp_path, "yours", accumulate_grad_batches=2)
    losses, tokens = [], []

    def compute_loss(batch):
        loss = cli.model.model(**batch).loss
        if not looking(cli):
            losses.append(loss.item())
            tokens.append(int(batch["attention_mask"].sum()))
        return loss

    cli.model.compute_loss = compute_loss
    cli.fit()
    result = cli.meter.result(torch.device("cpu"))
    assert cli.parent.asked == [0, 2]
    assert len(losses) == 8
    assert result["losses"] == pytest.approx([sum(losses[i : i + 2]) / 2 for i in (0, 2, 4, 6)])
    assert result["loss"] == pytest.approx(result["losses"][-1])
    assert result["tokens_per_step"] == pytest.approx(sum(tokens[4:]) / 2)
    assert result["measured_steps"] == 2
    assert 0.4 < result["kept_fraction"] < 1
    assert 0 < result["cached_mib"] < result["saved_mib"]


def looking(cli):
    """Whether SAGE looks at the gradient, and this is no step."""
    sage = next(c for c in cli.trainer.callbacks if isinstance(c, SageCallback))
    return sage.installation.session.probe is not None


def test_batches_do_not_depend_on_what_a_method_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-sage"])
    found = []
    # the default draws the rows that it replays
    for method in ("dense", "balanced"):
        own = f"--data={__name__}.Shuffled"
        cli = contest(tmp_path, method, own, steps=6)
        cli.fit()
        found.append(cli.meter.result(torch.device("cpu")))
    assert found[1]["replayed_fraction"] < found[1]["kept_fraction"]
    assert found[0]["batches"] == found[1]["batches"]


@pytest.mark.parametrize("method", ["dense", "memory"])
def test_checkpointing_of_the_configuration_is_switched_off(tmp_path, monkeypatch, method):
    monkeypatch.setattr("sys.argv", ["lightning-sage"])
    saved = []
    for on in ("false", "true"):
        cli = contest(tmp_path, method, f"--model.init_args.gradient_checkpointing={on}")
        cli.fit()
        saved.append(cli.meter.result(torch.device("cpu"))["saved_mib"])
    assert saved[0] == saved[1] > 0


def gradients(model, batch):
    model.zero_grad()
    with saved_bytes([*model.parameters(), *model.buffers(), *batch.values()]) as held:
        loss = model(**batch).loss
        bytes_held = held()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], bytes_held


@pytest.mark.parametrize(
    ("name", "training", "how"),
    [
        ("llama", True, "Hugging Face's"),
        ("llama", False, "torch.utils.checkpoint round"),
        ("plain", True, "torch.utils.checkpoint round"),
    ],
)
def test_checkpointing_gives_the_dense_gradient_from_less(name, training, how):
    policy = SagePolicy(blocks=["blocks.*"] if name == "plain" else None)
    padding = None if name == "plain" else "right"
    model, batch = build(name).train(training), make_batch(name, padding)
    if name == "llama":
        model.config.use_cache = True
    expected, dense = gradients(model, batch)
    assert switch_on(model, policy).startswith(how)
    found, held = gradients(model, batch)
    torch.testing.assert_close(found, expected)
    assert held < dense
    if how == "Hugging Face's":
        switch_off(model)
        assert gradients(model, batch)[1] == dense


def test_a_model_without_blocks_cannot_be_checkpointed():
    with pytest.raises(ValueError, match="no block found"):
        switch_on(torch.nn.Linear(2, 2), SagePolicy())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


def test_how_steps_are_used():
    assert [warm_up(steps) for steps in (2, 4, 5, 6, 50)] == [1, 2, 2, 3, 3]
    assert spread([]) is None
    assert spread([2.0]) == {"median": 2, "p20": 2, "p80": 2}
    assert spread([float(n) for n in range(11)]) == {"median": 5, "p20": 2, "p80": 8}


def record(name, saved=None, seconds=None, **more):
    step = {"median": seconds, "p20": seconds, "p80": seconds} if seconds else None
    common = {"steps": 50, "steps_done": 50, "batches": "a", "device_type": "cpu", "notes": []}
    rest = {"status": "ok" if saved else "oom", "loss_over_steps": 12, "peak_of_steps": True}
    return (
        {"name": name, "saved_mib": saved, "step_s": step, "peak_mib": None} | common | rest | more
    )


RECORDS = [
    record("dense", 744.0, 1.0, loss=2.5, tokens_per_s={"median": 20480.0}),
    record("checkpointing", 36.0, 1.34, checkpointing="Hugging Face's"),
    record("memory", 9.0, 0.67, own="memory", fidelity_cosine=0.9321, kept_fraction=0.25),
]


def text_of(records, width=None):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(standings(records, width))
    return captured.get()


def test_the_table():
    lines = [" ".join(line.split()) for line in text_of(RECORDS).splitlines()]
    assert "dense 744.0 1.000 20.667 1.00 1.000 0.746 20,480 2.5000 exact" in lines
    assert "checkpointing 36.0 0.048 1.000 1.34 1.340 1.000 exact" in lines
    assert "memory (yours) 9.00 0.012 0.250 0.670 0.670 0.500 0.932 25%" in lines


def test_the_table_fits_a_narrow_terminal():
    full, narrow = text_of(RECORDS), text_of(RECORDS, width=80)
    assert max(len(line.rstrip()) for line in full.splitlines()) > 80
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= 80
    assert "tokens/s" in full
    assert "tokens/s" not in narrow
    assert "gradient" in narrow


def test_the_table_without_baselines_or_results():
    lost = [record("dense", error="x"), record("balanced", status="failed", error="y")]
    assert "OOM" in text_of(lost)
    assert "failed" in text_of(lost)
    assert remarks(lost) == ["dense: x", "balanced: y"]
    assert "memory (yours)" in text_of(RECORDS[2:])


def test_remarks_warn_of_what_does_not_compare():
    quiet = remarks(RECORDS)
    assert len(quiet) == 1
    assert "mean of the last 12 steps; checkpointing: Hugging Face's" in quiet[0]
    other = {**RECORDS[1], "batches": "b", "notes": ["one device, not devices=2"]}
    ended = {**RECORDS[2], "steps_done": 20, "batches": "c"}
    assert remarks([RECORDS[0], other, ended])[1:] == [
        "warning: memory (yours) ended after 20 of 50 steps",
        "warning: checkpointing saw other batches than dense, as their checksums differ: losses do "
        "not compare",
    ]
    assert "whole life" in remarks([{**RECORDS[0], "peak_of_steps": False}])[1]


def words(records, tmp_path, monkeypatch):
    """Where words of a picture stand, in pixels, and how wide it is."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a: (figures.append(self), save(self, *a))[1]
    )
    picture(records, tmp_path / "p.png")
    [figure] = figures
    texts = {t.get_text(): t.get_window_extent() for t in figure.axes[0].texts}
    return texts, figure.bbox


def test_no_label_of_the_picture_hides_another(tmp_path, monkeypatch):
    crowd = [record(f"keep=0.{n}", 20.0 + n / 50, 0.6 + n / 500) for n in range(1, 8)]
    lost = [record("yours", error="x"), record("balanced", status="killed", error="y")]
    texts, whole = words([*RECORDS, *crowd, *lost], tmp_path, monkeypatch)
    assert len(texts) == 11
    assert "not in the picture\nyours: OOM\nbalanced: OOM (killed)" in texts
    boxes = [box.padded(-1) for name, box in texts.items()]
    assert all(whole.contains(*corner) for box in boxes for corner in (box.min, box.max))
    labels = [(n, b) for n, b in texts.items() if n.startswith(("keep", "dense"))]
    # a label's own box holds the line to its point, if there is one: near ones have none
    near = [b.padded(-1) for _, b in labels if b.height < 20]
    assert len(near) >= 3
    assert not any(a.overlaps(b) for i, a in enumerate(near) for b in near[:i])


def test_without_matplotlib_the_numbers_are_there(tmp_path, monkeypatch, capsys):
    lines = [json.dumps({**r, "order": n}) + "\n" for n, r in enumerate(RECORDS)]
    (tmp_path / "compare.jsonl").write_text("".join(lines))
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    main(["--from", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "744.0" in printed
    assert "pip install 'lightning-sage[plots]'" in printed
    assert not (tmp_path / "compare.png").exists()


def test_presets_have_names_that_a_list_can_hold():
    assert not [name for name in METHODS if "," in name]
