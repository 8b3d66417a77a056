"""What installed packages say of themselves, for a language model with a tokenizer of its own."""

from __future__ import annotations

import ast
import random
import tokenize
import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from docstrings import held_out, kept_rows, labelled, sources

from lightning_sage.corpus import documented_functions, function_examples
from lightning_sage.data import Example, Loading, Row, Split, TextModule, encode_answer

# on every machine that this package is installed on
NAMES = ("torch", "transformers", "lightning", "numpy", "networkx", "sympy", "stdlib")
# whose functions are read; small enough to be parsed in a minute
_READ = ("stdlib", "networkx", "numpy", "sympy")
# of a file, so that a few long ones do not stand for their package
_PER_FILE = 4
# characters in front of a function, a token of code being three to four of them
_CONTEXT = 5

Task = Literal["summary", "body", "long"]


class PackageNames(TextModule):
    """Which package is a docstring from? The name is to be written, in one or two tokens.

    Args:
        train_per_package: At most as many docstrings of a package to train on.
        val_per_package: At most as many to validate on.
        directory: Where rows are kept once found.
        loading: How text becomes batches.
    """

    def __init__(
        self,
        train_per_package: int = 220,
        val_per_package: int = 32,
        directory: str = "runs/evidence",
        loading: Loading | None = None,
    ) -> None:
        super().__init__(loading)
        self.limits: dict[Split, int] = {"val": val_per_package, "train": train_per_package}
        self.directory = Path(directory)

    def rows(self, split: Split) -> list[Row]:
        """`prompt` and `answer`."""
        key = [self.limits, Path(__file__).read_text(encoding="utf-8")]
        rows = kept_rows(self.directory, "names", key, self._found)
        return [row for row in rows if row["split"] == split]

    def _found(self) -> list[Row]:
        seen: set[tuple[str, ...]] = set()
        # validation first: what repeats one of its texts is left out of training
        return [
            {"prompt": f"Documentation:\n{row['text']}", "answer": f" {name}", "split": split}
            for split, limit in self.limits.items()
            for name in NAMES
            for row in islice(labelled(name, split, seen), limit)
        ]

    def encode(self, row: Row) -> Example:
        """The start of the text, the question, and the name, on which the loss is."""
        question = self.tokenizer("\n\nPackage:", add_special_tokens=False)["input_ids"]
        room = self.loading.max_tokens - len(question) - 8
        text = self.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"][:room]
        answer = self.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        prompt = [t for t in [self.tokenizer.bos_token_id] if t is not None] + text + question
        answer = [*answer, self.tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


class FunctionTexts(TextModule):
    """Functions of installed packages, with loss on a part of them.

    Args:
        task: `summary` is the source without its docstring, then the docstring's first line, of at
            most 24 tokens; `body` is signature and docstring, then the body, which is a fifth to a
            half; `long` is as much of the file as fits, then the body, of at most 96 tokens.
        train: At most as many functions to train on.
        val: At most as many to validate on.
        directory: Where rows are kept once found.
        loading: How text becomes batches; `summary` and `body` take functions that fit and fill at
            least half of `max_tokens`, `long` those that fill all of it.
    """

    def __init__(
        self,
        task: Task,
        train: int = 1500,
        val: int = 128,
        directory: str = "runs/evidence",
        loading: Loading | None = None,
    ) -> None:
        super().__init__(loading)
        if task not in get_args(Task):
            raise ValueError(f"task must be one of {', '.join(get_args(Task))}, got {task!r}")
        self.task, self.directory = task, Path(directory)
        self.limits: dict[Split, int] = {"train": train, "val": val}

    def rows(self, split: Split) -> list[Row]:
        """`prompt` and `answer`, shuffled with a fixed seed."""
        code = Path(__file__).read_text(encoding="utf-8")
        key = [self.limits, self.loading.tokenizer, self.loading.max_tokens, code, split]
        return kept_rows(self.directory, self.task, key, lambda: self._found(split))

    def _found(self, split: Split) -> list[Row]:
        places = [
            (name, place, path)
            for name in _READ
            for place, path in sources(name).items()
            if held_out(place) == (split == "val")
        ]
        random.Random(0).shuffle(places)
        found = (
            row
            for _, _, path in places
            for row in islice((row for row in self._of(path) if self._fits(row)), _PER_FILE)
        )
        return list(islice(found, self.limits[split]))

    def _of(self, path: Path) -> Iterator[Row]:
        with (
            suppress(SyntaxError, UnicodeDecodeError),
            warnings.catch_warnings(action="ignore"),
            tokenize.open(path) as file,
        ):
            source = file.read()
            make = {"summary": _summaries, "body": function_examples, "long": self._in_context}
            yield from make[self.task](source)

    def _in_context(self, source: str) -> Iterator[Row]:
        # not splitlines: a form feed ends no line of Python
        lines = source.split("\n")
        for node, height in documented_functions(source):
            before = "\n".join(lines[:height]) + "\n"
            yield {
                "prompt": before[-_CONTEXT * self.loading.max_tokens :],
                "answer": "\n".join(lines[height : node.end_lineno]) + "\n",
            }

    def _fits(self, row: Row) -> bool:
        room = self.loading.max_tokens
        # no token is that long: not worth tokenizing
        if self.task != "long" and len(row["prompt"]) + len(row["answer"]) > 8 * room:
            return False
        if self.task == "long" and len(row["prompt"]) < _CONTEXT * room:
            return False
        example = encode_answer((row["prompt"], row["answer"]), self.tokenizer, 10**6, "answer")
        tokens = len(example["input_ids"])
        answer = sum(label != -100 for label in example["labels"])
        if self.task == "long":
            return tokens >= room and answer <= 96
        return room // 2 <= tokens <= room and (
            answer <= 24 if self.task == "summary" else tokens <= 5 * answer <= 2.5 * tokens
        )

    def encode(self, row: Row) -> Example:
        """See :func:`lightning_sage.data.encode_answer`."""
        pair = row["prompt"], row["answer"]
        return encode_answer(pair, self.tokenizer, self.loading.max_tokens, "answer")


def _summaries(source: str) -> Iterator[Row]:
    lines = source.split("\n")
    for node, height in documented_functions(source):
        start, stop = node.lineno - 1, node.body[0].lineno - 1
        body = lines[start:stop] + lines[height : node.end_lineno]
        code = "\n".join(line.removeprefix(" " * node.col_offset) for line in body)
        first = (ast.get_docstring(node) or "").split("\n")[0]
        yield {"prompt": f"{code}\n\n# What it does:", "answer": f" {first}\n"}
