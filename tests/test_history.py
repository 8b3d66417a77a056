"""The history of a fit: what is written is what is read, whatever became of the fit."""

import json
import math

import pytest
import torch

from histories import made, start
from lightning_sage.watch.history import NAME, History, HistoryError, read

BLOCKS = ["layers.0", "layers.1"]
STEP = {"seconds": 0.5, "kept": [0.1, 0.2], "replayed": [0.1, 0.1], "cached": [5, 6]}


@pytest.fixture
def history(tmp_path):
    history = History(tmp_path / "version_0" / NAME)
    start(history, BLOCKS)
    return history


def test_what_is_written_is_read(tmp_path):
    (run,) = read(made(tmp_path, blocks=3, lines=5, samples=2))
    assert run.blocks == [f"model.layers.{block}" for block in range(3)]
    assert len(run.dense) == 3
    assert [line["step"] for line in run.steps] == [10, 20, 30, 40, 50]
    assert len(run.fidelity) == 5
    assert [line["step"] for line in run.tokens] == [10, 20]
    assert run.events[0]["text"].startswith("memory budget")
    assert run.summary["kept_fraction"] == 0.543


def test_a_line_is_on_the_disk_when_write_returns(history):
    history.write("step", step=1, **STEP)
    assert [json.loads(line)["kind"] for line in history.path.read_text().splitlines()] == [
        "start",
        "step",
    ]


def test_numbers_are_written_so_that_any_reader_of_json_takes_them(history):
    history.write("step", step=1, loss=math.nan, saved=math.inf, **{**STEP, "seconds": 1 / 3})
    text = history.path.read_text().splitlines()[1]
    line = json.loads(text, parse_constant=pytest.fail)
    assert line["loss"] is line["saved"] is None
    assert line["seconds"] == 0.333333
    assert line["step"] == 1
    history.write("step", step=2**40, **{**STEP, "cached": [2**40 + 1, 1.5e-9]})
    assert read(history.path)[0].steps[1]["cached"] == [2**40 + 1, 1.5e-9]


@pytest.mark.parametrize("text", ["\u2028", "é\n\t\0", "\ud800", '"</script>'])
def test_any_text_stays_on_its_line(history, text):
    history.write("event", step=1, text=text)
    assert history.path.read_bytes().count(b"\n") == 2
    whole = text.encode("utf-8", "replace").decode()
    assert read(history.path)[0].events[0]["text"] == whole


@pytest.mark.parametrize(
    ("kind", "values", "error", "words"),
    [
        ("epoch", {}, ValueError, "start, dense"),
        ("step", {"step": 1}, ValueError, "needs seconds, kept"),
        ("end", {"summary": {"loss": torch.ones(2)}}, TypeError, "Tensor.*tolist"),
        ("end", {"summary": {"loss": {1}}}, TypeError, "loss.*set"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_no_line(history, kind, values, error, words):
    with pytest.raises(error, match=words):
        history.write(kind, **values)
    assert len(history.path.read_text().splitlines()) == 1


def test_a_disk_that_cannot_be_written_does_not_end_the_fit(tmp_path):
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / NAME)
    with pytest.warns(UserWarning, match="goes on without a history"):
        start(history, BLOCKS)
    # once: a second warning would be an error here
    history.write("event", step=1, text="still here")


def test_a_second_fit_in_the_same_folder_is_a_second_run(history):
    history.write("step", step=1, **STEP)
    again = History(history.path)
    start(again, ["other"])
    again.write("end", summary={"ratio": 0.5})
    first, second = read(history.path)
    assert (first.summary, len(first.steps)) == (None, 1)
    assert (second.blocks, second.summary) == (["other"], {"ratio": 0.5})


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_killed_fit_is_read_up_to_its_last_whole_line(history, cut):
    history.write("step", step=1, **STEP)
    history.write("step", step=2, **STEP)
    history.path.write_bytes(history.path.read_bytes()[: -1 - cut])
    assert [line["step"] for line in read(history.path)[0].steps] == [1]
    # and the fit that is started next does not go on within that line
    start(History(history.path), BLOCKS)
    first, second = read(history.path)
    assert len(first.steps) == 1
    assert second.blocks == BLOCKS


def test_half_a_line_amid_a_fit_is_no_killed_fit(history):
    with history.path.open("a") as file:
        file.write('{"kind":"st\n')
    history.write("step", step=1, **STEP)
    with pytest.raises(HistoryError, match="line 2 is no JSON"):
        read(history.path)


def test_kinds_of_a_later_version_are_passed_over(history):
    with history.path.open("a") as file:
        file.write('{"kind":"weather","sky":"blue"}\n\n')
    history.write("step", step=1, **STEP)
    assert len(read(history.path)[0].steps) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "no object with a kind"),
        ('{"step":1}', "no object with a kind"),
        ('{"kind":"step","step":1}', "lacks seconds, kept"),
        (json.dumps({"kind": "step", "step": 1, **STEP, "kept": [1]}), "1 entries of kept for 2"),
        (json.dumps({"kind": "step", "step": 1, **STEP, "kept": None}), "no entries of kept for 2"),
        ('{"kind":"start","version":2,"policy":{},"blocks":[]}', "version 2"),
        ('{"kind":"start","version":1,"policy":{},"blocks":[]}', "no blocks"),
        (
            '{"kind":"tokens","step":1,"text":["a"],"kept":["1","11"],"replayed":["1","0"]}',
            "not of 1 tokens",
        ),
        (
            '{"kind":"tokens","step":1,"text":["a"],"kept":["1","1"],"replayed":["1","0"],'
            '"valid":""}',
            "0 entries of valid for 1 tokens",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(history, line, words):
    with history.path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(HistoryError, match=rf"{NAME}, line 2.*{words}"):
        read(history.path)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / NAME).write_text('{"kind":"step","step":1,"seconds":1,"kept":[],')
    assert read(tmp_path / NAME) == []
    line = json.dumps({"kind": "step", "step": 1, **STEP})
    (tmp_path / NAME).write_text(f"{line}\n")
    with pytest.raises(HistoryError, match="before any start"):
        read(tmp_path / NAME)
