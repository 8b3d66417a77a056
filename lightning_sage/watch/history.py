"""What a fit writes down as it goes, a line of JSON at a time, and how it is read again."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "sage.jsonl"
VERSION = 1

Line = dict[str, Any]

# what a line of each kind must hold to be shown at all
REQUIRED: dict[str, tuple[str, ...]] = {
    "start": ("version", "policy", "blocks"),
    "dense": ("bytes",),
    "step": ("step", "seconds", "kept", "replayed", "cached"),
    "fidelity": ("step", "cosine", "norm_ratio"),
    "tokens": ("step", "text", "kept", "replayed"),
    "event": ("step", "text"),
    "end": ("summary",),
}
# one entry a block
_OF_BLOCKS = {
    "dense": ("bytes",),
    "step": ("kept", "replayed", "cached"),
    "tokens": ("kept", "replayed"),
}
DIGITS = 6


class HistoryError(ValueError):
    """A history that cannot be read: which line of which file, and why."""


@dataclass
class Run:
    """One fit as it was written down.

    Attributes:
        start: The line of that kind: policy, blocks, versions.
        dense: Bytes a dense step saves, one number a block; None where nothing was counted.
        steps: Lines of kind `step`, in order; so `fidelity`, `tokens` and `events`.
        summary: Numbers of the end; None for a fit that did not reach it.
    """

    start: Line
    dense: list[float] | None = None
    steps: list[Line] = field(default_factory=list)
    fidelity: list[Line] = field(default_factory=list)
    tokens: list[Line] = field(default_factory=list)
    events: list[Line] = field(default_factory=list)
    summary: dict[str, float | None] | None = None

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, in the order of every list with one entry a block."""
        return list(self.start["blocks"])

    def add(self, line: Line) -> None:
        """Take in a line of any kind but `start`; unknown kinds are of a later version."""
        match line["kind"]:
            case "dense":
                self.dense = line["bytes"]
            case "step":
                self.steps.append(line)
            case "fidelity":
                self.fidelity.append(line)
            case "tokens":
                self.tokens.append(line)
            case "event":
                self.events.append(line)
            case "end":
                self.summary = line["summary"]


class History:
    """A file that grows by one line at a time, and is whole after each.

    Args:
        path: The file; its folder is made when the first line is written. What it holds already
            stays: a resumed or second fit starts with a `start` line of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._opened = False
        self._given_up = False

    def write(self, kind: str, **values: Any) -> None:
        """Append one line and flush it; a disk that cannot take it is warned of once.

        Args:
            kind: One of `start`, `dense`, `step`, `fidelity`, `tokens`, `event`, `end`.
            values: Strings, numbers, None, and lists and mappings of those. Floats are rounded to
                six significant digits; what is not finite is written as null.

        Raises:
            TypeError: A value is none of these: a tensor, say.
            ValueError: The kind is unknown, or a value that it needs is missing.
        """
        if kind not in REQUIRED:
            raise ValueError(f"a line is one of {', '.join(REQUIRED)}, got {kind!r}")
        missing = [name for name in REQUIRED[kind] if name not in values]
        if missing:
            raise ValueError(f"a line of kind {kind!r} needs {', '.join(missing)}; add it")
        plain = {name: _plain(value, name) for name, value in values.items()}
        line = json.dumps({"kind": kind, **plain}, separators=(",", ":"), ensure_ascii=False)
        if self._given_up:
            return
        try:
            self._append(line)
        except OSError as error:
            self._given_up = True
            warnings.warn(
                f"{self.path} cannot be written ({error}): the fit goes on without a history",
                stacklevel=2,
            )

    def _append(self, line: str) -> None:
        if not self._opened:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            # a fit that was killed here may have left half a line
            if not self._opened and file.tell() and not _ends_a_line(self.path):
                file.write("\n")
            file.write(line + "\n")
        self._opened = True


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def _plain(value: Any, name: str) -> Any:
    match value:
        case None | bool() | int():
            return value
        case str():
            # half of a surrogate pair, as decoded from half a token, is no UTF-8
            return value.encode("utf-8", "replace").decode("utf-8")
        case float():
            return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item, f"{name}[{key!r}]") for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, name) for item in value]
    raise TypeError(
        f"{name} is a {type(value).__name__}; the history takes strings, numbers, None, lists and "
        "mappings: call item() or tolist() on a tensor"
    )


def read(path: Path) -> list[Run]:
    """The runs of a file, oldest first.

    Half a line before a `start` or at the end of the file is what a killed fit leaves: it is
    skipped, and so are lines of kinds that this version does not know.

    Args:
        path: A file that :class:`History` wrote.

    Raises:
        HistoryError: A line is no JSON object, lacks what its kind needs, comes before any `start`,
            or was written by a later version.
        OSError: The file cannot be read.
    """
    runs: list[Run] = []
    broken = ""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            line, fault = _parsed(text, where)
            # only the next fit may follow half a line
            if broken and (line is None or line["kind"] != "start"):
                raise HistoryError(broken)
            broken = fault
            if line is None:
                continue
            _check(line, where, runs[-1] if runs else None)
            if line["kind"] == "start":
                runs.append(Run(line))
            else:
                runs[-1].add(line)
    return runs


def _parsed(text: str, where: str) -> tuple[Line | None, str]:
    """The line, or what is wrong with it where it may be half a line."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        return None, f"{where} is no JSON ({error}); take it out to read the rest"
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        raise HistoryError(f"{where} is no object with a kind; take it out to read the rest")
    return line, ""


def _check(line: Line, where: str, run: Run | None) -> None:
    kind = line["kind"]
    missing = [name for name in REQUIRED.get(kind, ()) if name not in line]
    if missing:
        raise HistoryError(f"{where} ({kind}) lacks {', '.join(missing)}")
    if kind == "start":
        if line["version"] != VERSION:
            raise HistoryError(
                f"{where} is version {line['version']} and this is a reader of {VERSION}: "
                "use the lightning-sage that wrote it"
            )
        if not line["blocks"]:
            raise HistoryError(f"{where} ({kind}) names no blocks: there is nothing to show")
        return
    if run is None:
        raise HistoryError(f"{where} ({kind}) comes before any start: is it {NAME}?")
    for name in _OF_BLOCKS.get(kind, ()):
        _check_length(line, name, len(run.blocks), "blocks", where)
    if kind == "tokens":
        tokens = len(line["text"])
        for name in ("labels", "valid"):
            if line.get(name) is not None:
                _check_length(line, name, tokens, "tokens", where)
        if any(len(row) != tokens for name in ("kept", "replayed") for row in line[name]):
            raise HistoryError(f"{where} ({kind}) has a row that is not of {tokens} tokens")


def _check_length(line: Line, name: str, expected: int, what: str, where: str) -> None:
    found = len(line[name]) if isinstance(line[name], list | str) else "no"
    if found != expected:
        raise HistoryError(
            f"{where} ({line['kind']}) has {found} entries of {name} for {expected} {what}"
        )
