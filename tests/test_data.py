import ast
import json
import sys
import types

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_sage import corpus
from lightning_sage.corpus import (
    StdlibFunctions,
    StdlibWindows,
    function_examples,
    stdlib_files,
    stdlib_sources,
)
from lightning_sage.data import (
    IGNORED,
    AnswerData,
    HubRows,
    LabelData,
    Loading,
    encode_answer,
    load_tokenizer,
    pad,
    read_rows,
)

# ByT5: bytes start after padding, end and unknown
PAD, END = 0, 1


def ids(text):
    return [byte + 3 for byte in text.encode()]


@pytest.fixture
def bytes_tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture
def word_tokenizer(tmp_path):
    """With begin and end tokens and no padding token, as Llama's."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "two": 3, "and": 4, "is": 5, "four": 6}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path / "words")
    return load_tokenizer(str(tmp_path / "words"))


def test_answers_only_bear_loss_token_by_token(bytes_tokenizer):
    example = encode_answer(("a€", "bc"), bytes_tokenizer, 256, "answer")
    assert example["input_ids"] == [*ids("a€"), *ids("bc"), END]
    assert example["labels"] == [IGNORED] * 4 + [*ids("bc"), END]


def test_loss_on_all_tokens(bytes_tokenizer):
    example = encode_answer(("ab", "cd"), bytes_tokenizer, 256, "all")
    assert example["labels"] == example["input_ids"] == [*ids("abcd"), END]


def test_begin_token_belongs_to_the_prompt(word_tokenizer):
    assert word_tokenizer.pad_token_id == word_tokenizer.eos_token_id
    example = encode_answer(("two and two", "is four"), word_tokenizer, 256, "answer")
    assert example["input_ids"] == [0, 3, 4, 3, 5, 6, 1]
    assert example["labels"] == [IGNORED] * 4 + [5, 6, 1]


@pytest.mark.parametrize("prompt", [0, 1, 3, 40])
@pytest.mark.parametrize("answer", [0, 1, 3, 40])
@pytest.mark.parametrize("max_tokens", [2, 3, 8, 9])
def test_long_rows_lose_the_start_of_the_prompt_and_the_end_of_the_answer(
    word_tokenizer, prompt, answer, max_tokens
):
    row = (" ".join(["two"] * prompt), " ".join(["four"] * answer))
    example = encode_answer(row, word_tokenizer, max_tokens, "answer")
    full = [6] * answer + [1]
    written = [label for label in example["labels"] if label != IGNORED]
    given = example["input_ids"][: -len(written)]
    assert example["input_ids"] == given + written
    assert given == [0] + [3] * (len(given) - 1)
    assert written == full[: len(written)]
    assert len(written) >= min(len(full), max_tokens // 2)
    assert len(given + written) == min(max_tokens, 1 + prompt + len(full))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side):
    examples = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
        {"input_ids": [8], "labels": [8]},
    ]
    batch = pad(examples, PAD, side)
    short = {"input_ids": [8, PAD, PAD], "attention_mask": [1, 0, 0], "labels": [8, -100, -100]}
    whole = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]}
    if side == "left":
        short = {"input_ids": [PAD, PAD, 8], "attention_mask": [0, 0, 1], "labels": [-100, -100, 8]}
    for name, column in batch.items():
        assert column.dtype == torch.long
        assert column.tolist() == [whole[name], short[name]]


def test_class_labels_are_one_a_text():
    batch = pad([{"input_ids": [5, 6], "labels": 1}, {"input_ids": [7], "labels": 0}], PAD, "right")
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].tolist() == [[5, 6], [7, PAD]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"text": "one, \\"1\\"", "label": "x"}\n\n{"text": "two", "label": "y"}\n'),
        ("rows.csv", 'text,label\r\n"one, ""1""",x\r\ntwo,y\r\n'),
    ],
)
def test_rows_of_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, newline="")
    rows = read_rows(str(path), ["text", "label"])
    assert [dict(row) for row in rows] == [
        {"text": 'one, "1"', "label": "x"},
        {"text": "two", "label": "y"},
    ]


def test_lines_of_text_files(tmp_path):
    (tmp_path / "rows.txt").write_text("one\n\n  two\n")
    data = AnswerData(
        *[str(tmp_path / "rows.txt")] * 2, prompt_field=None, answer_field="text", loss_on="answer"
    )
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].tolist() == [[*ids("one"), END, PAD, PAD], [*ids("  two"), END]]
    assert batch["labels"].tolist() == [[*ids("one"), END, -100, -100], [*ids("  two"), END]]


def test_refuses_unknown_files_and_missing_fields(tmp_path):
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(ValueError, match=r"rows\.parquet: expected a \.jsonl, \.csv or \.txt"):
        read_rows(str(tmp_path / "rows.parquet"), [])
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(ValueError, match=r"row 2 of .*rows\.jsonl has no answer; it has prompt"):
        read_rows(str(tmp_path / "rows.jsonl"), ["prompt", "answer"])


def test_rows_of_a_data_set(monkeypatch):
    calls = []

    def load_dataset(name, subset, split):
        calls.append((name, subset, split))
        return [{"question": "q", "answer": "a"}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_rows(HubRows("sums", "train[:1]", "main"), ["question"]) == [
        {"question": "q", "answer": "a"}
    ]
    assert calls == [("sums", "main", "train[:1]")]


def test_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-sage\[data\]'"):
        read_rows(HubRows("sums", "train"), [])


def test_refuses_impossible_loading():
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        Loading(max_tokens=1)
    with pytest.raises(ValueError, match="padding_side must be right or left, got 'top'"):
        Loading(padding_side="top")


def test_answer_data_from_its_own_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"q": "1+1?", "a": "2"}, {"q": "2+2=?", "a": "four"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = AnswerData(str(path), str(path), "q", "a", loading=Loading(padding_side="left"))
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    hidden = [IGNORED] * 8
    assert batch["labels"].tolist() == [[*hidden, *ids("2"), END], [*hidden[3:], *ids("four"), END]]


@pytest.mark.parametrize("classes", [None, ["no", "yes"]])
def test_label_data(tmp_path, classes):
    path = tmp_path / "rows.csv"
    path.write_text(
        "text,label\ngood,1\nnot so good,0\n".translate(
            {} if classes is None else {ord("1"): "yes", ord("0"): "no"}
        )
    )
    data = LabelData(str(path), str(path), classes=classes, loading=Loading(max_tokens=8))
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].tolist() == [1, 0]
    # the tokenizer's own end token, also where the text was cut
    assert batch["input_ids"].tolist() == [
        [*ids("good"), END, PAD, PAD, PAD],
        [*ids("not so "), END],
    ]


def test_label_data_refuses_an_unknown_class(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\ngood,maybe\n")
    data = LabelData(str(path), str(path), classes=["no", "yes"])
    with pytest.raises(ValueError, match="label 'maybe' is none of the classes no, yes"):
        data.encode({"text": "good", "label": "maybe"})


def test_training_order_is_random_and_validation_order_fixed(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"{i}\n" for i in range(10, 74)))
    data = AnswerData(str(path), str(path), None, "text", loading=Loading(batch_size=64))
    data.setup("fit")

    def order(loader):
        return next(iter(loader))["input_ids"].tolist()

    assert order(data.val_dataloader()) == order(data.val_dataloader())
    first, second = order(data.train_dataloader()), order(data.train_dataloader())
    assert first != second
    assert sorted(first) == sorted(second) == order(data.val_dataloader())


def test_stdlib_split_is_by_file_and_without_tests():
    train, val = stdlib_files("train"), stdlib_files("val")
    assert (train, val) == (stdlib_files("train"), stdlib_files("val"))
    assert not set(train) & set(val)
    assert 0.05 < len(val) / len(train + val) < 0.2
    names = {path.name for path in train + val}
    assert {"argparse.py", "textwrap.py", "json"} - names == {"json"}
    folders = {part for path in train + val for part in path.parts}
    assert not folders & {"test", "tests", "encodings", "site-packages", "__pycache__"}


def test_stdlib_without_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no Python sources in"):
        stdlib_files("train")


def test_files_that_are_not_python_are_passed_over(monkeypatch, tmp_path):
    contents = {"a.py": b"# \xe9\n", "b.py": b"# coding: latin-1\n# \xe9\n", "c.py": b"print 1\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(corpus, "stdlib_files", lambda split: sorted(tmp_path.iterdir()))
    assert list(stdlib_sources("train")) == ["# coding: latin-1\n# é\n"]


SOURCE = '''
class A:
    @property
    async def one(self):
        """First
line further left."""

        # why
        if self:
            return "\\n"

    def undocumented(self):
        return 1

    def empty(self):
        """Nothing follows."""

    def short(self): """On one line."""; return 2
\x0c
def two(
    a,
):
    "Second."
    return a
'''


def test_function_examples_exactly():
    two, one = function_examples(SOURCE)
    assert two == {"prompt": 'def two(\n    a,\n):\n    "Second."\n', "answer": "    return a\n"}
    assert one["prompt"] == 'async def one(self):\n    """First\nline further left."""\n'
    assert one["answer"] == '\n    # why\n    if self:\n        return "\\n"\n'


def test_every_stdlib_function_is_still_python():
    for source in stdlib_sources("val"):
        for row in function_examples(source):
            [function] = ast.parse(row["prompt"] + row["answer"]).body
            assert ast.get_docstring(function)
            assert ast.parse(row["prompt"]).body[0].name == function.name


@pytest.fixture
def small_stdlib(monkeypatch):
    """Two small modules in place of all."""
    files = {path.stem: path for path in stdlib_files("train") + stdlib_files("val")}
    chosen = [files["textwrap"], files["shlex"]]
    monkeypatch.setattr(corpus, "stdlib_files", lambda split: chosen)
    return chosen


@pytest.mark.parametrize("side", ["right", "left"])
def test_functions_are_asked_for_their_body(small_stdlib, bytes_tokenizer, side):
    data = StdlibFunctions(loading=Loading(max_tokens=600, batch_size=4, padding_side=side))
    data.setup("fit")
    rows = data.rows("train")
    assert rows == data.rows("train")
    batch = next(iter(data.val_dataloader()))
    for i, row in enumerate(rows[:4]):
        labels, valid = batch["labels"][i], batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][valid].tolist() == [*ids(row["prompt"] + row["answer"]), END]
        assert labels[labels != IGNORED].tolist() == [*ids(row["answer"]), END]
        assert (labels[~valid] == IGNORED).all()


def test_functions_are_never_cut(small_stdlib):
    loading = Loading(max_tokens=300)
    rows = StdlibFunctions(loading=loading).rows("train")
    lengths = [len((row["prompt"] + row["answer"]).encode()) + 1 for row in rows]
    assert 200 < max(lengths) <= 300
    everything = StdlibFunctions(loading=Loading(max_tokens=10_000)).rows("train")
    assert len(everything) > len(rows)


def test_windows_are_the_sources_in_a_fixed_order(small_stdlib):
    data = StdlibWindows(Loading(max_tokens=64, batch_size=2))
    data.setup("fit")
    windows = data.rows("val")
    assert torch.equal(windows, data.rows("val"))
    first, second = (path.read_text(encoding="utf-8") for path in small_stdlib)
    stream = [*ids(first), END, *ids(second), END]
    expected = [stream[i : i + 64] for i in range(0, len(stream) - 63, 64)]
    assert sorted(windows.tolist()) == sorted(expected)
    assert windows.tolist() != expected
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch["input_ids"], windows[:2])
    assert torch.equal(batch["labels"], windows[:2])
    assert batch["attention_mask"].all()
