"""Source code to train on: windows of a package, and functions with the file that leads to them."""

from __future__ import annotations

import random
import tokenize
from collections.abc import Iterator
from contextlib import suppress

import torch
from docstrings import held_out, sources
from torch import Tensor

from lightning_sage.corpus import StdlibWindows, documented_functions, stdlib_sources
from lightning_sage.data import (
    Example,
    Loading,
    Row,
    Split,
    TextModule,
    encode_answer,
)

# of a file, so that a few long ones do not stand for their package
_PER_FILE = 16


class PackageWindows(StdlibWindows):
    """Windows of `max_tokens` tokens of an installed package, with loss on every token.

    A fifth of the files is for validation.

    Args:
        package: Its name; it is not imported.
        loading: How text becomes batches.
    """

    def __init__(self, package: str, loading: Loading | None = None) -> None:
        super().__init__(loading)
        self.package = package

    def rows(self, split: Split) -> Tensor:
        """``[N, max_tokens]``, shuffled with a fixed seed; what is left of a file is dropped.

        Raises:
            ModuleNotFoundError: The package is not installed.
        """
        width, windows = self.loading.max_tokens, []
        for place, path in sources(self.package).items():
            if held_out(place) != (split == "val"):
                continue
            with suppress(SyntaxError, UnicodeDecodeError), tokenize.open(path) as file:
                # no token of any tokenizer is longer than what is read beyond the windows
                text = file.read(16 * _PER_FILE * width)
                ids = self.tokenizer(text[: _PER_FILE * width], add_special_tokens=False)
                stream = ids["input_ids"]
                windows += [stream[i : i + width] for i in range(0, len(stream), width)]
        found = torch.tensor([window for window in windows if len(window) == width])
        return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


class LongFunctions(TextModule):
    """Bodies of functions of the standard library, given all of the file before them that fits.

    Every row has `max_tokens` bytes, of which the last few bear loss.

    Args:
        longest: Bytes of a body, at most.
        loading: How text becomes batches.
    """

    def __init__(self, longest: int = 200, loading: Loading | None = None) -> None:
        super().__init__(loading)
        self.longest = longest

    def rows(self, split: Split) -> list[Row]:
        """`prompt` and `answer`, shuffled with a fixed seed."""
        rows = [row for source in stdlib_sources(split) for row in self._functions(source)]
        random.Random(0).shuffle(rows)
        return rows

    def _functions(self, source: str) -> Iterator[Row]:
        # not splitlines: a form feed ends no line of Python
        lines = source.encode().split(b"\n")
        for node, height in documented_functions(source):
            answer = b"\n".join(lines[height : node.end_lineno]) + b"\n"
            # one more for the end token
            room = self.loading.max_tokens - len(answer) - 1
            before = b"\n".join(lines[:height]) + b"\n"
            if len(answer) <= self.longest and len(before) >= room:
                # a character that is cut in two would be bytes of another number
                prompt = before[-room:].decode(errors="ignore")
                yield {"prompt": prompt, "answer": answer.decode()}

    def encode(self, row: Row) -> Example:
        """See :func:`lightning_sage.data.encode_answer`."""
        pair = (row["prompt"], row["answer"])
        return encode_answer(pair, self.tokenizer, self.loading.max_tokens, "answer")
