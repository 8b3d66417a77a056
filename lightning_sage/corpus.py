"""The running Python's standard library as text: there on every machine, nothing to download."""

from __future__ import annotations

import ast
import os
import random
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_sage.data import Example, Loading, Row, Split, TextModule, encode_answer

# repetitive; generated tables; not of the standard library
_SKIPPED = {"test", "tests", "idle_test"}
_SKIPPED |= {"encodings", "pydoc_data"}
_SKIPPED |= {"site-packages", "dist-packages", "__pycache__"}


def stdlib_files(split: Split) -> list[Path]:
    """Python sources of the running interpreter's standard library, without tests and tables.

    A tenth of the files, by a checksum of the name, is for validation: a file keeps its side
    whatever else is installed.

    Raises:
        FileNotFoundError: The interpreter keeps no sources on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - _SKIPPED
        names += [Path(folder, file).relative_to(root) for file in files if file.endswith(".py")]
    if not names:
        raise FileNotFoundError(f"no Python sources in {root}: give your own text instead")
    held_out = {name for name in names if zlib.crc32(name.as_posix().encode()) % 10 == 0}
    return [root / name for name in sorted(names) if (name in held_out) == (split == "val")]


def stdlib_sources(split: Split) -> Iterator[str]:
    """Texts of :func:`stdlib_files`, but for files that are not Python to this interpreter."""
    for path in stdlib_files(split):
        with suppress(SyntaxError, UnicodeDecodeError), tokenize.open(path) as file:
            source = file.read()
            ast.parse(source)
            yield source


def documented_functions(
    source: str,
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Functions of a Python source with a docstring and a body, and the docstring's last line."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = node.body[0].end_lineno if ast.get_docstring(node) else None
        if docstring is None or len(node.body) == 1 or node.body[1].lineno <= docstring:
            continue
        yield node, docstring


def function_examples(source: str) -> Iterator[Row]:
    """Functions of a Python source: `prompt` is signature and docstring, `answer` is the body."""
    # not splitlines: a form feed ends no line of Python
    lines = source.split("\n")
    for node, docstring in documented_functions(source):
        text = [
            _unindent(line, node.col_offset) for line in lines[node.lineno - 1 : node.end_lineno]
        ]
        height = docstring - node.lineno + 1
        yield {
            "prompt": "\n".join(text[:height]) + "\n",
            "answer": "\n".join(text[height:]) + "\n",
        }


def _unindent(line: str, width: int) -> str:
    # lines of a docstring may start further left than the function
    return line if line[:width].strip() else line[width:]


class StdlibWindows(TextModule):
    """Consecutive windows of `max_tokens` tokens of source code, with loss on every token.

    Args:
        loading: How text becomes batches.
    """

    def rows(self, split: Split) -> Tensor:
        """``[N, max_tokens]``, shuffled with a fixed seed; files end with the end token."""
        end = [t for t in [self.tokenizer.eos_token_id] if t is not None]
        stream: list[int] = []
        for source in stdlib_sources(split):
            ids = self.tokenizer(source, add_special_tokens=False)["input_ids"]
            stream += ids + end
        width = self.loading.max_tokens
        windows = torch.tensor(stream[: len(stream) // width * width]).view(-1, width)
        return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]

    def encode(self, row: Tensor) -> Example:
        """The window, to be predicted token by token."""
        return {"input_ids": row, "labels": row}


class StdlibFunctions(TextModule):
    """Functions: signature and docstring are given, the body is to be written.

    Only functions that fit `max_tokens` bytes, uncut.

    Args:
        loss_on: `answer` for loss on the body only, `all` for loss on every token.
        loading: How text becomes batches.
    """

    def __init__(
        self, loss_on: Literal["answer", "all"] = "answer", loading: Loading | None = None
    ) -> None:
        super().__init__(loading)
        self.loss_on = loss_on

    def rows(self, split: Split) -> list[Row]:
        """Rows of :func:`function_examples`, shuffled with a fixed seed."""
        rows = [row for source in stdlib_sources(split) for row in function_examples(source)]
        rows = [row for row in rows if self._fits(row)]
        random.Random(0).shuffle(rows)
        return rows

    def _fits(self, row: Row) -> bool:
        # one more for the end token
        return len((row["prompt"] + row["answer"]).encode()) < self.loading.max_tokens

    def encode(self, row: Row) -> Example:
        """See :func:`lightning_sage.data.encode_answer`."""
        pair = (row["prompt"], row["answer"])
        return encode_answer(pair, self.tokenizer, self.loading.max_tokens, self.loss_on)
