"""Every transformers type, tiny: right to 1e-7 in float64, or refused by name. Never wrong.

Types that stand for the others are tested by default, all of them with ``-m coverage``.
"""

import importlib.util
import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import matrix
from lightning_sage.engine.attention_call import AttentionCall
from lightning_sage.engine.axes import Axis, axis_of

# by task: every adaptation, every kind of input, the types that most people fine-tune
REPRESENTATIVES = {
    "causal-lm": """qwen2@window phi3 gemma cohere2 granite olmo2 smollm3 starcoder2 falcon@alibi
        mixtral qwen3_moe deepseek_v3 hrm_text gpt_oss bloom gptj mpt gpt_neo ctrl doge xmod
        llama4_text gemma3n_text@kvshare gemma4_text@kvshare qwen3_next jamba nemotron_h lfm2
        granitemoehybrid phimoe mamba""",
    "masked-lm": "roberta distilbert esm albert deberta-v2 squeezebert flaubert",
    "seq-cls": "xlm-roberta deberta-v2 gpt2",
    "seq2seq": "t5 bart mbart pegasus marian t5gemma2 switch_transformers prophetnet qwen2_audio",
    "image-cls": "vit dinov2 siglip beit@relpos imagegpt swin resnet",
    "image-text": "llava qwen2_5_vl",
}


def _entries():
    for task, name in matrix.entries("A", "B", "C"):
        stands = name in REPRESENTATIVES[task].split()
        marks = [] if stands else pytest.mark.coverage
        yield pytest.param(task, name, id=f"{task}-{name}", marks=marks)


@pytest.mark.parametrize(("task", "name"), list(_entries()))
def test_a_type_is_right_or_refused(task, name):
    verdict = matrix.judge(task, name)
    known = matrix.class_of(task, name) == "C" or f"{task}:{name}" in matrix.TABLE["refused"]
    # of class C: a model that runs its blocks without a graph, and their parts again in backward
    expected = ("refused", "dense") if known else ("right",)
    assert verdict.word in expected, str(verdict)


def test_the_representatives_stand_for_every_adaptation():
    chosen = {(task, name) for task, names in REPRESENTATIVES.items() for name in names.split()}
    assert chosen <= set(matrix.entries("A", "B", "C"))
    codes = {code for entry in chosen for code in matrix.adaptations(*entry)}
    assert codes == {code for entry in matrix.entries("B") for code in matrix.adaptations(*entry)}


def _without_sinks(*args, sinks=None, **kwargs):
    return AttentionCall(*args, **kwargs)


def _without_bias(name, x, B, T):
    return Axis.NONE if name == "position_bias" else axis_of(name, x, B, T)


def _uncounted(_counter, func, args, kwargs):
    return func(*args, **kwargs)


# by adaptation, an entry that needs it, and the function that makes it with one that does not
SWITCHES = {
    "iface": ("causal-lm:gpt_oss", "engine.intercept._patch_interface", lambda: False),
    "sinks": ("causal-lm:gpt_oss", "engine.intercept.AttentionCall", _without_sinks),
    "eagertap": ("causal-lm:gptj", "engine.follow.Follower.see", lambda *_: NotImplemented),
    "nomask": ("image-cls:imagegpt", "engine.follow.Follower.see", lambda *_: NotImplemented),
    "modlist": ("causal-lm:ctrl", "discovery._listed", lambda _: {}),
    "hybrid": ("causal-lm:qwen3_next", "discovery._along_tokens", lambda *_: {}),
    "kvshare": ("causal-lm:gemma4_text@kvshare", "discovery._shares_keys", lambda _: False),
    "packed2d": ("image-text:qwen2_5_vl", "discovery._asks_for_lengths", lambda _: False),
    "cross": ("seq2seq:bart", "engine.arguments._is_states", lambda *_: False),
    "bias": ("seq2seq:t5", "engine.arguments.Arguments.need_pairs", lambda _: None),
    "pairtable": ("masked-lm:deberta-v2", "engine.arguments.Arguments.need_pairs", lambda _: None),
    "arange": ("causal-lm:llama4_text", "engine.positions.Counter.see", _uncounted),
    "alibi": ("causal-lm:mpt", "engine.arguments.axis_of", _without_bias),
    "localmask": ("causal-lm:gpt_neo", "engine.positions.Counter.see", _uncounted),
}


@pytest.mark.parametrize(
    ("entry", "function", "instead"), list(SWITCHES.values()), ids=list(SWITCHES)
)
def test_without_its_adaptation_a_type_is_refused(entry, function, instead, monkeypatch):
    monkeypatch.setattr(f"lightning_sage.{function}", instead)
    verdict = matrix.judge(*entry.split(":"), left_dense=False)
    assert verdict.word == "refused", str(verdict)


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """examples/coverage.py, whose name is also that of a well-known package."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("coverage_example", EXAMPLES / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def _line(task, name, verdict="right", **more):
    errors = {"all": 1e-15} if verdict == "right" else {}
    return {
        "task": task,
        "type": name,
        "class": matrix.class_of(task, name),
        "adaptations": matrix.adaptations(task, name),
        "reason": matrix.reason(task, name),
        "verdict": verdict,
        "blocks": 2,
        "dense": 1,
        "error": max(errors.values(), default=None),
        "errors": errors,
        "refused": {} if verdict == "right" else {"all": "block 'x': it cannot: leave it dense"},
        "wrong": [],
        "seconds": 1.0,
    } | more


def test_a_run_goes_on_where_it_was_ended(example, monkeypatch, tmp_path):
    asked = []

    def judge_all(entries, processes):
        asked.append(entries)
        return [(entry, _line(*entry)) for entry in entries]

    monkeypatch.setattr(example, "judge_all", judge_all)
    out, table = tmp_path / "lines.jsonl", tmp_path / "table.md"
    files = ["--out", str(out), "--table", str(table)]
    example.main(["--only", "causal-lm:llama,seq2seq:t5", *files])
    example.main(["--only", "causal-lm:llama,causal-lm:gpt2", *files])
    monkeypatch.setattr(
        example, "versions", lambda: {"transformers": "6", "torch": "3", "peft": "1"}
    )
    example.main(["--only", "causal-lm:llama", *files])
    both = [("causal-lm", "llama"), ("seq2seq", "t5")]
    assert asked == [both, [("causal-lm", "gpt2")], [("causal-lm", "llama")]]
    # in the order of the classes, each entry once
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["type"] for line in lines] == ["gpt2", "llama", "t5"]
    assert "| llama " in table.read_text()


def test_the_table_has_a_row_a_type_and_says_why_not(example, tmp_path):
    lines = [
        _line("causal-lm", "llama"),
        _line("seq-cls", "llama"),
        _line("causal-lm", "gptj", "refused"),
        _line("causal-lm", "mamba", "refused"),
    ]
    seen = {"transformers": "5", "torch": "2", "peft": "1"}
    known = matrix.TABLE["adaptations"]
    table = example.coverage_table([line | {"versions": seen} for line in lines], known)
    rows = {row.split("|")[1].strip(): row for row in table.splitlines() if row.startswith("| ")}
    assert rows["llama"].count("1e-15") == 2
    assert "2 of 3" in rows["llama"]
    assert "it cannot" in rows["gptj"]
    assert matrix.TABLE["C"]["causal-lm"]["mamba"] in rows["mamba"]


def test_the_tracked_table_is_drawn_from_the_tracked_lines(example):
    lines = list(example.read(EXAMPLES / "results" / "coverage.jsonl").values())
    table = example.coverage_table(lines, matrix.TABLE["adaptations"])
    assert (EXAMPLES / "coverage.md").read_text() == table


def test_what_the_tracked_lines_say(example):
    """Every type of class A, most of class B, none wrong."""
    lines = example.read(EXAMPLES / "results" / "coverage.jsonl")
    assert lines.keys() == set(matrix.entries("A", "B", "C"))
    words = defaultdict(set)
    for line in lines.values():
        if line["task"] != "image-text" and "@" not in line["type"]:
            words[line["type"]].add((line["class"], line["verdict"]))
    assert all(verdict != "wrong" for found in words.values() for _, verdict in found)
    worst = {name: max(c for c, _ in found) for name, found in words.items()}
    right = {name for name, found in words.items() if {v for _, v in found} == {"right"}}
    assert len(right & {name for name, c in worst.items() if c == "A"}) == 148
    assert len(right & {name for name, c in worst.items() if c == "B"}) >= 60
