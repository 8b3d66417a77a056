"""Which package is a docstring from? Labelled texts that a machine for science has on its disk."""

from __future__ import annotations

import ast
import json
import os
import platform
import random
import re
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from sysconfig import get_path
from typing import Any

from lightning_sage.corpus import stdlib_files
from lightning_sage.data import Example, Loading, Row, Split, TextModule

# last the one that is not installed
CLASSES: tuple[str, ...] = ("torch", "transformers", "lightning", "numpy", "scipy", "sklearn")
CLASSES += ("skimage", "pandas", "networkx", "sympy", "statsmodels", "matplotlib", "stdlib")
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "skimage": "scikit-image"}

# tests; code of others, which several packages hold copies of
_SKIPPED = {"test", "tests", "testing", "__pycache__"}
_SKIPPED |= {"_vendor", "_vendored", "externals", "extern", "array_api_compat", "array_api_extra"}

# a name within a longer one tells as much: PyTorch, to_numpy, LightningModule
_TELLING = r"torch|transformers|lightning|numpy|scipy|sklearn|scikit|pandas|networkx|sympy"
_TELLING += r"|statsmodels|skimage|matplotlib|pyplot|hugging[ _]?face"
_ALIASES = "np|sp|pd|nx|sm|smf|tsa|plt|mpl|pylab|hf|stdlib|cpython|python"
# with the submodules between a package and what is named of it
_NAMES = re.compile(
    rf"(?:🤗|(?i:\w*(?:{_TELLING})\w*(?:-learn|-image)?|\b(?:{_ALIASES})\b))"
    r"(?:\.[a-z_]\w*(?=\.\w))*"
)

# in characters; shorter ones say nothing that is not said in every package
_SHORTEST = 120
# files of many alike, as of overloads, would stand for their package
_PER_FILE = 8
_SHINGLE = 5


def without_names(text: str) -> tuple[str, int]:
    """The text with `library` for every name of a package, and how many there were."""
    return _NAMES.subn("library", text)


def installed() -> dict[str, str]:
    """Versions of what the texts are taken from.

    Raises:
        ModuleNotFoundError: A package is missing.
    """
    packages = {name: _DISTRIBUTIONS.get(name, name) for name in CLASSES[:-1]}
    if missing := [packages[name] for name in packages if find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"Docstrings has a class for each of its packages: pip install {' '.join(missing)}"
        )
    versions = {name: version(distribution) for name, distribution in packages.items()}
    return versions | {"stdlib": platform.python_version()}


def sources(name: str) -> dict[str, Path]:
    """Python files of an installed package, by their place in it; the package is not imported."""
    if name == "stdlib":
        root, files = Path(get_path("stdlib")), stdlib_files("train") + stdlib_files("val")
    else:
        spec: Any = find_spec(name)
        root, files = Path(spec.submodule_search_locations[0]), []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = set(subfolders) - _SKIPPED
            files += [Path(folder, file) for file in names if file.endswith(".py")]
    return {file.relative_to(root).as_posix(): file for file in sorted(files)}


def held_out(place: str) -> bool:
    """Whether a file, by its place in its package, is for validation: a fifth are.

    By a checksum, so that a file keeps its side whatever else is in the package.
    """
    return zlib.crc32(place.encode()) % 5 == 0


def docstrings(path: Path) -> Iterator[str]:
    """Those of a file's module, classes and functions, dedented, that are not too short."""
    tree = ast.Module([], [])
    # of another version of Python, or with escapes that this one warns of
    with (
        suppress(SyntaxError, UnicodeDecodeError),
        warnings.catch_warnings(action="ignore"),
        tokenize.open(path) as file,
    ):
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= _SHORTEST:
                yield text


def is_new(text: str, seen: set[tuple[str, ...]]) -> bool:
    """Whether half of a text's short runs of words are not in `seen`; if so they are added."""
    words = re.findall(r"[a-z]+", text.lower())
    runs = set(zip(*(words[i:] for i in range(_SHINGLE)), strict=False))
    if not runs or 2 * len(runs & seen) > len(runs):
        return False
    seen |= runs
    return True


def labelled(name: str, split: Split, seen: set[tuple[str, ...]]) -> Iterator[Row]:
    """Rows of a package, from a fifth of its files for validation or the others."""
    files = sources(name)
    chosen = [place for place in files if held_out(place) == (split == "val")]
    shuffle = random.Random(0).shuffle
    shuffle(chosen)
    for place in chosen:
        texts = list(docstrings(files[place]))
        shuffle(texts)
        for full in texts[:_PER_FILE]:
            text, removed = without_names(full)
            if is_new(text, seen):
                about = {"file": f"{name}/{place}", "removed": removed, "split": split}
                yield {"text": text, "label": CLASSES.index(name)} | about


def kept_rows(
    directory: Path, name: str, key: Sequence[Any], find: Callable[[], list[Row]]
) -> list[Row]:
    """Rows that take long to find, kept in a file.

    Args:
        directory: Where the file is.
        name: What it begins with.
        key: What the rows depend on.
        find: Finds them, where there is no file yet.
    """
    path = directory / f"{name}-{zlib.crc32(json.dumps(key).encode()):08x}.jsonl"
    if not path.exists():
        rows = find()
        path.parent.mkdir(parents=True, exist_ok=True)
        # renamed when whole: another process may look for it meanwhile
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        part.replace(path)
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Docstrings(TextModule):
    """Docstrings of installed packages without the packages' names; the label is the package.

    A file's docstrings are all on one side, and what mostly repeats another one is left out.

    Args:
        train_per_class: At most as many of a package to train on.
        val_per_class: At most as many of a package to validate on.
        directory: Where rows are kept once found, for these versions of the packages.
        loading: How text becomes batches.
    """

    def __init__(
        self,
        train_per_class: int = 300,
        val_per_class: int = 80,
        directory: str = "runs/evidence",
        loading: Loading | None = None,
    ) -> None:
        super().__init__(loading)
        self.limits: dict[Split, int] = {"val": val_per_class, "train": train_per_class}
        self.directory = Path(directory)

    def rows(self, split: Split) -> list[Row]:
        """`text`, `label` (its place in `CLASSES`), `file` and the number of names `removed`.

        Raises:
            ModuleNotFoundError: A package is not installed.
        """
        key = [installed(), self.limits, Path(__file__).read_text(encoding="utf-8")]
        rows = kept_rows(self.directory, "docstrings", key, self._found)
        return [row for row in rows if row["split"] == split]

    def encode(self, row: Row) -> Example:
        """The text's ids, with the tokenizer's own special tokens, and its class."""
        ids = self.tokenizer(row["text"], truncation=True, max_length=self.loading.max_tokens)
        return {"input_ids": ids["input_ids"], "labels": row["label"]}

    def _found(self) -> list[Row]:
        seen: set[tuple[str, ...]] = set()
        # validation first: what repeats one of its texts is left out of training
        rows = [
            row
            for split, limit in self.limits.items()
            for name in CLASSES
            for row in islice(labelled(name, split, seen), limit)
        ]
        random.Random(0).shuffle(rows)
        return rows
