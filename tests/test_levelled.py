"""The script that measures balance runs through, and its record is within what is promised."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sage import corpus
from lightning_sage.corpus import stdlib_files
from tasks import LIGHTNING_WARNINGS, LLAMA

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = LIGHTNING_WARNINGS


@pytest.fixture
def balance(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import balance

    return balance


def test_ranks_are_levelled(balance, monkeypatch, tmp_path):
    names = {"textwrap.py", "shlex.py"}
    files = [path for path in stdlib_files("train") + stdlib_files("val") if path.name in names]
    monkeypatch.setattr(corpus, "stdlib_files", lambda split: files)
    monkeypatch.setattr(balance, "STEPS", 3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))
    model.save_pretrained(tmp_path)
    alone, level = (balance.train(tmp_path, kind, True) for kind in ("none", "mean"))
    assert alone["spread of tokens"] == level["spread of tokens"] > 0.1
    assert alone["spread of rows"] > 0.1
    assert level["largest"] < 0.05


def test_the_record_keeps_the_promise():
    lines = (EXAMPLES / "results" / "balance.jsonl").read_text().splitlines()
    found = {record["balance"]: record for record in map(json.loads, lines)}
    assert found["none"]["spread of rows"] > 0.3
    assert found["mean"]["largest"] <= 0.05
    # and costs no quality that a seed would not
    assert abs(found["mean"]["val_loss"] - found["none"]["val_loss"]) < 0.01
