"""The harness of the evidence: what is run, what is skipped, and what tables make of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tasks import LIGHTNING_WARNINGS, LLAMA

EXAMPLES = Path(__file__).parents[1] / "examples"

pytest.importorskip("sklearn", reason="the evidence needs scikit-learn's digits")
pytest.importorskip("scipy", reason="intervals are SciPy's")
pytest.importorskip("matplotlib", reason="the report draws a figure")

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


@pytest.fixture(autouse=True)
def _flat(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "evidence"))


@pytest.fixture
def tiny():
    from scenarios import SCENARIOS

    from lightning_sage.data import AnswerData, Loading
    from lightning_sage.models import CausalLM, Optimization

    def module(lr, checkpointing):
        return CausalLM(
            config=LLAMA, optimization=Optimization(lr=lr), gradient_checkpointing=checkpointing
        )

    def rows(split):
        return [{"prompt": f"{n} times {n}", "answer": str(n * n)} for n in range(16)]

    def data():
        made = AnswerData("", "", loading=Loading(batch_size=4, max_tokens=32))
        made.rows = rows
        return made

    return replace(SCENARIOS["answer"], module=module, data=data, steps=2, val_batches=2)


def record(method, seed, loss, lr=1e-3, **changes):
    """A made-up line."""
    from measure import plain
    from methods import METHODS

    policy = METHODS[method]
    common = {
        "scenario": "answer",
        "title": "Made up",
        "judged": "val_loss",
        "method": method,
        "policy": None if policy is None else plain(policy),
        "precision": "32-true",
        "error": None,
        "commit": "c0ffee",
        **dict.fromkeys(("device", "threads", "torch", "transformers", "peft"), "some"),
    }
    train = {"kind": "train", "lr": lr, "seed": seed, "steps": 60, "metrics": {"val_loss": loss}}
    return common | train | {"train_losses": [3.0, 2.0]} | changes


def cost(method, saved, cached, operations):
    costs = {"saved_mib": saved, "cached_mib": cached, "operations": operations, "step_s": 1.0}
    return record(method, 0, 0.0, kind="cost", start={"val_loss": 2.0}, **costs)


def test_a_run_by_checkpointing_is_the_dense_one(tiny):
    import train

    dense, same, sparse = (
        train.run(tiny, m, 1e-3, 0) for m in ("dense", "checkpointing", "balanced")
    )
    assert dense["error"] is None
    assert dense["metrics"] == same["metrics"]
    assert dense["train_losses"] == same["train_losses"]
    # the forward is exact, and the first step starts from the same weights
    assert sparse["train_losses"][0] == pytest.approx(dense["train_losses"][0], rel=1e-6)
    assert sparse["metrics"] != dense["metrics"]
    assert 0 < sparse["replayed_fraction"] <= sparse["kept_fraction"] <= 1
    assert len(dense["train_losses"]) == 2


def test_batches_are_the_seeds(tiny):
    import train

    first, same, other = (train.train_batches(tiny, seed, 5) for seed in (0, 0, 1))
    ids = [[batch["input_ids"].tolist() for batch in batches] for batches in (first, same, other)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_what_fails_is_a_record(tiny):
    import train

    def broken(lr, checkpointing):
        raise RuntimeError("broken")

    failed = train.run(replace(tiny, module=broken), "dense", 1e-3, 0)
    assert failed["error"] == "RuntimeError('broken')"
    diverged = train.run(tiny, "dense", 1e30, 0)
    assert diverged["error"] == "not finite"
    json.dumps([failed, diverged], allow_nan=False)


SOURCE = """
def area(width, height):
    \"\"\"The area of a rectangle.

    More about it.
    \"\"\"
    result = width * height
    return result
"""


@pytest.mark.parametrize(
    ("task", "prompt", "answer"),
    [
        ("summary", "    return result\n\n# What it does:", " The area of a rectangle.\n"),
        ("body", '    """\n', "    result = width * height\n    return result\n"),
        ("long", '    """\n', "    result = width * height\n    return result\n"),
    ],
)
def test_functions_become_prompts_with_answers(task, prompt, answer, tmp_path):
    from texts import FunctionTexts

    from lightning_sage.data import Loading

    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    data = FunctionTexts(task, loading=Loading(max_tokens=256))
    [row] = data._of(path)
    assert row["prompt"].endswith(prompt)
    assert row["answer"] == answer
    assert ("More about it" in row["prompt"]) == (task != "summary")
    example = data.encode(row)
    text = data.tokenizer.decode([i for i in example["labels"] if i >= 0])
    assert text.removesuffix("</s>") == answer
    # a summary of 24 tokens at most, which these are of bytes; a long one fills all of the room
    assert data._fits(row) == (task == "body")


def test_names_of_packages_are_answers_of_a_token_or_two(tmp_path):
    from texts import PackageNames

    from lightning_sage.data import Loading

    data = PackageNames(directory=str(tmp_path), loading=Loading(max_tokens=64))
    example = data.encode({"prompt": "a text " * 40, "answer": " numpy"})
    assert len(example["input_ids"]) <= 64
    assert data.tokenizer.decode(example["input_ids"]).endswith("Package: numpy</s>")
    assert sum(label >= 0 for label in example["labels"]) == len(" numpy") + 1


def test_gains_are_shares_of_dense_trainings():
    from report import gains

    dense = {**record("dense", 0, 1.0), "start": {"val_loss": 2.0}}
    shown = gains([[dense, record("balanced", 0, 1.1), record("balanced", 0, 1.5, lr=2e-3)]])
    assert "2.000 to 1.000" in shown
    assert "0.90 (1)" in shown


def test_costs_of_a_step(tiny):
    from cost import costs

    methods = ("dense", "checkpointing", "keep 0.25", "drawn 0.25")
    found = {r["method"]: r for r in costs(tiny, methods, warmup=1, batches=2, rounds=1)}
    assert [r["error"] for r in found.values()] == [None] * 4
    dense, checkpointing, keep, replay = found.values()
    assert dense["cosine"] == pytest.approx(1)
    assert checkpointing["squared_error"] < 1e-9
    assert checkpointing["cached_mib"] < dense["cached_mib"]
    assert 0 < keep["cached_mib"] < replay["cached_mib"] < dense["cached_mib"]
    assert replay["operations"] < dense["operations"] < checkpointing["operations"]
    assert 0 < keep["squared_error"] < 1.5


def test_finished_runs_are_skipped():
    import run
    from scenarios import SCENARIOS

    lrs = SCENARIOS["answer"].lrs
    command = run.Command(scenarios="answer", methods="dense,balanced,checkpointing", seeds=3)
    tuning = list(run.plan("tune", command, []))
    assert len(tuning) == 2 * len(lrs)
    assert {one.method for one in tuning} == {"dense", "balanced"}
    # nothing is known of the learning rates yet
    assert list(run.plan("headline", command, [])) == []
    lines = [record("dense", 0, 1.0 if lr == lrs[1] else 2.0, lr) for lr in lrs]
    lines.append(record("balanced", 0, None, lr=lrs[0], error="RuntimeError()"))
    left = run.unfinished(tuning, lines)
    assert left == [run.Run("answer", "balanced", lr, 0, 60) for lr in lrs[1:]]
    headline = list(run.plan("headline", command, lines))
    assert headline == [run.Run("answer", "dense", lrs[1], seed, 60) for seed in (1, 2)]
    ladder = list(run.plan("ladder", command, lines))
    assert ladder == [run.Run("answer", "checkpointing", lrs[1], seed, 60) for seed in range(3)]
    # what its method no longer means is run again
    lines[1]["policy"] = {"keep": "another"}
    assert run.Run("answer", "dense", lrs[1], 0, 60) in run.unfinished(tuning, lines)
    assert run.uncosted(["answer"], ["dense"], [cost("dense", 1, 1, 1)]) == []
    assert run.uncosted(["answer"], ["dense"], lines) == [("answer", ["dense"])]


def test_every_method_is_tuned_or_has_a_relative_that_is():
    from methods import HEADLINE, LADDER, METHODS

    assert sorted([*HEADLINE, *LADDER]) == sorted(METHODS)
    assert set(LADDER.values()) <= set(HEADLINE)


@pytest.mark.parametrize(
    ("name", "kind", "rest"),
    [
        ("dense", "dense", ""),
        ("keep 0.25", "keep", "0.25"),
        ("mass 0.85, drawn 0.25", "mass", "0.85, drawn 0.25"),
    ],
)
def test_methods_of_one_kind_share_a_colour(name, kind, rest):
    from report import kind_of

    assert kind_of(name) == (kind, rest)


def test_the_report_pairs_seeds(tmp_path, capsys):
    import report

    dense, mine = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.1, 1: 2.3, 2: 3.2, 7: 9.0}
    lines = [cost("dense", 90, 88, 10.0), cost("checkpointing", 12, 10, 13.0)]
    lines.append(cost("balanced", 22, 20, 8.0))
    lines += [record("dense", seed, loss) for seed, loss in dense.items()]
    lines += [record("balanced", seed, loss) for seed, loss in mine.items()]
    # of the tuning: better than seed 0 at the other, but not what was chosen
    lines.append(record("balanced", 0, 0.5, lr=2e-3))
    lines.append(record("paper", 0, None, error="RuntimeError('broken')"))
    # another number of steps, of which there is no dense training
    lines += [record("balanced", seed, loss - 1, steps=120) for seed, loss in mine.items()]
    # before the method was changed
    lines.insert(0, record("balanced", 0, 50.0, policy={"keep": "another"}))
    lines.insert(0, record("balanced", 9, 50.0, policy={"keep": "another"}))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"records": "in.jsonl", "depth": "none.jsonl", "out": "out.md"}
    report.main([f"--{k}={tmp_path / v}" for k, v in files.items()])
    text = (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.png").stat().st_size > 10_000
    first, cells = (
        [cell.strip() for cell in part[part.index("| balanced") :].split("\n")[0].split("|")]
        for part in text.split("### ")[:2]
    )
    # differences 0.1, 0.3, 0.2: mean 0.2, deviation 0.1; t of 2 degrees is 4.3027
    half = 4.3027 * 0.1 / math.sqrt(3)
    # in per cent of 2, the mean of dense training; of 120 steps a mean of 0.8 less
    assert first[2:4] == [f"+10.0 ± {50 * half:.1f} (3)", f"-40.0 ± {50 * half:.1f} (3)"]
    assert {"2.00", "0.80", "+0.2000", f"{0.2 - half:+.4f} to {0.2 + half:+.4f}", "3 of 4"} <= set(
        cells
    )
    assert "after 120 steps, dense training after 60" in text
    longer = text[text.index("after 120 steps") :]
    assert [line.split("|")[1].strip() for line in longer.splitlines()[2:6]][2:] == [
        "dense", "balanced"
    ]  # fmt: skip
    assert "| 1.60 |" in " ".join(longer.split())
    assert f"{-0.8 - half:+.4f} to {-0.8 + half:+.4f}" in longer
    assert "2 lines are of earlier policies" in text
    assert "- paper: `RuntimeError('broken')`" in text
    found = report.methods_of([line for line in lines if line["steps"] == 60])
    assert report.difference(found["balanced"], found["dense"], "val_loss") == (
        pytest.approx(0.2), pytest.approx(half, rel=1e-4), 3
    )  # fmt: skip


def test_differences_are_of_what_began_at_the_same_weights():
    import report

    def began(at, method, seed, loss, **changes):
        return record(method, seed, loss, train_losses=[at, at - 0.1], **changes)

    lines = [
        began(2.5, "dense", 0, 7.0),
        began(2.0, "dense", 0, 1.0, base="mine"),
        began(2.0, "dense", 0, 50.0, lr=2e-3),
        began(2.1, "dense", 1, 1.0),
        # whichever dense training it is that began there
        began(2.500001, "balanced", 0, 7.5),
        began(2.100001, "balanced", 1, 1.1),
        # none did, and then no difference is known
        began(2.2, "speed", 0, 1.3),
        began(2.1, "speed", 1, 1.4),
        began(2.0001, "memory", 0, 1.3),
        began(2.1001, "memory", 1, 1.3),
        # where the forward is changed, only the file of weights can tell
        began(3.0, "paper skip", 0, 1.2, base="mine"),
        began(3.0, "paper skip", 1, 1.2),
        # a relative's rate, which was another once
        began(2.0, "keep 0.5", 0, 1.2, lr=2e-3),
        began(2.0, "keep 0.5", 0, 1.3),
    ]
    found = report.methods_of(lines)
    dense = found["dense"]
    assert dense.results("val_loss") == [1.0, 1.0]
    differences = {
        name: report.difference(method, dense, "val_loss") for name, method in found.items()
    }
    assert differences["balanced"][::2] == (pytest.approx(0.3), 2)
    assert differences["speed"][::2] == (pytest.approx(0.4), 1)
    assert differences["memory"] is None
    assert differences["paper skip"][::2] == (pytest.approx(0.2), 1)
    assert differences["keep 0.5"][::2] == (pytest.approx(0.3), 1)
    seeds = {name: report.row(name, found, "val_loss")[-2] for name in found}
    assert seeds == {
        "dense": "2", "balanced": "2", "speed": "1 of 2", "memory": "0 of 2",
        "paper skip": "1 of 2", "keep 0.5": "1",
    }  # fmt: skip


def test_lines_that_began_elsewhere_are_run_again(tmp_path):
    import run
    from train import base_of

    from lightning_sage.models import CausalLM

    assert base_of(CausalLM(config=LLAMA)) is None
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    here = base_of(CausalLM(str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"others")
    there = base_of(CausalLM(str(tmp_path)))
    assert len({here, there, None}) == 3
    lines = [record("dense", seed, 1.0, base=base) for seed, base in enumerate((here, there))]
    lines += [record("dense", 2, 1.0), record("dense", 3, 1.0, scenario="long", base=there)]
    assert run.from_bases({"answer": here}, lines) == [lines[0], lines[2]]


def test_names_of_packages_are_taken_out():
    from docstrings import without_names

    text = "See torch.nn.functional.relu and PyTorch's to_numpy, or np.ndarray; a tensor remains."
    shown, removed = without_names(text)
    assert removed == 4
    assert shown == "See library.relu and library's library, or library.ndarray; a tensor remains."


def test_what_mostly_repeats_is_not_new():
    from docstrings import is_new

    seen = set()
    text = "returns the largest of all the numbers that were given to it"
    assert is_new(text, seen)
    assert not is_new(text.upper() + "!", seen)
    assert not is_new("too short to say", seen)
    assert is_new("draws a line from one point of the plane to another one", seen)


def test_long_rows_have_one_length_and_loss_on_the_end():
    from sources import LongFunctions

    from lightning_sage.data import Loading

    data = LongFunctions(longest=40, loading=Loading(max_tokens=128))
    long = '    """' + "é" * 80 + '"""\n'
    source = f"x = 1\n\ndef f(a):\n{long}    return a\n\ndef g():\n{long}    return '{'b' * 60}'\n"
    [row] = data._functions(source)
    assert row["answer"] == "    return a\n"
    example = data.encode(row)
    assert 127 <= len(example["input_ids"]) <= 128
    borne = [label for label in example["labels"] if label != -100]
    assert bytes(i - 3 for i in borne[:-1]).decode() == row["answer"]
