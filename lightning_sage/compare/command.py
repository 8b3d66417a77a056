"""`lightning-sage compare`: one configuration, trained by several methods, side by side."""

from __future__ import annotations

import json
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_sage.compare.table import NAME, PICTURE, picture, read_records, remarks, standings
from lightning_sage.compare.turns import Child, Task, take_turns
from lightning_sage.policy import PRESETS

METHODS = ("dense", "checkpointing", *PRESETS, "yours")
# -P: no folder goes before those that this process looks for modules in
_COMMAND = (sys.executable, "-P", "-m", "lightning_sage.compare.contest")


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        args: What `lightning-sage fit` would be given.
        steps: Optimizer steps of each method.
        methods: Which of `METHODS`, in their order in the table.
        named: Whether the user has named them.
        out: Folder for records, picture and logs.
    """

    args: list[str]
    steps: int
    methods: list[str]
    named: bool
    out: Path

    @property
    def turn(self) -> int:
        """Steps in a row: few enough that what disturbs the machine disturbs every method."""
        return max(1, min(5, self.steps // 4))


class ConfigurationError(Exception):
    """The configuration cannot be fitted by any method.

    Args:
        text: What a fit would have printed.
        code: Its exit status.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.text, self.code = text, code


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-sage compare",
        usage="lightning-sage compare --config FILE [--config FILE] [--steps N] [--methods A,B] "
        "[--out DIR] [what `lightning-sage fit` takes]",
        description="Train a configuration for some steps by several methods, from the same seed "
        "on the same batches, each in a process of its own and on one device, and print memory, "
        "speed, loss and gradient side by side. Validation, loggers, checkpoints and what saves "
        "the model are left out.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps; at least 2")
    parser.add_argument(
        "--methods", help=f"with commas between, of {', '.join(METHODS)}; all by default"
    )
    parser.add_argument("--out", type=Path, help="folder to write to; runs/compare/TIME by default")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help="run nothing: print the table of a comparison again, and draw its picture",
    )
    return parser


def parse(argv: Sequence[str]) -> Options | Path:
    """Own options, taken out of the others; with --from the folder it names.

    Raises:
        SystemExit: A value is wrong, as usual of a command line.
    """
    parser = _parser()
    known, args = parser.parse_known_args(list(argv))
    if known.source is not None:
        if args:
            parser.error(f"--from runs nothing: leave {' '.join(args)} out")
        source: Path = known.source
        return source
    if known.steps < 2:
        parser.error(f"--steps must be at least 2, one of them to warm up, got {known.steps}")
    methods = METHODS if known.methods is None else _split(known.methods)
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"--methods has {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if not methods or len(set(methods)) < len(methods):
        parser.error(f"--methods must name some, each once, got {known.methods!r}")
    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = known.out or Path("runs", "compare", time)
    if (out / NAME).exists():
        parser.error(f"--out {out} holds a comparison: name another, or show it with --from {out}")
    return Options(args, known.steps, list(methods), known.methods is not None, out)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


class Comparison:
    """Runs the methods, and writes a record of each as soon as it has ended.

    Args:
        options: What is compared.
        tell: Called with every process whenever it has got on.
    """

    def __init__(self, options: Options, tell: Callable[[Child], None]) -> None:
        self._options, self._tell = options, tell
        self._processes = ExitStack()
        self.records: list[dict[str, Any]] = []

    def run(self) -> None:
        """Take turns where memory is the host's; one after the other on a device of its own.

        Whatever ends it, no process outlives it.

        Raises:
            ConfigurationError: The first process ended before its first step, by no fault of its
                method.
        """
        self._options.out.mkdir(parents=True, exist_ok=True)
        with self._processes:
            first = self._first()
            rest = self._rest(first)
            if first.record.get("device_type", "cpu") == "cpu":
                # started at once: they build at the same time, and each waits for its turn
                children = [first, *map(self._start, rest)]
                waiting = [c for c in children if self._came_up(c)]
                take_turns(waiting, self._after)
            else:
                self._alone(first)
                for method in rest:
                    self._alone(self._start(method))

    def _start(self, method: str) -> Child:
        options = self._options
        safe = "".join(letter if letter.isalnum() else "-" for letter in method)
        folder = options.out / safe
        task = Task(options.args, method, options.steps, options.turn, str(folder))
        child = Child(task, _COMMAND, folder.with_suffix(".log"))
        self._processes.callback(child.kill)
        self._tell(child)
        return child

    def _first(self) -> Child:
        """Ready for its first step: what is wrong with the configuration has shown itself."""
        method = self._options.methods[0]
        child = self._start(method)
        child.advance()
        if child.again:
            # a pre-training would count in its memory
            child = self._start(method)
            child.advance()
        if child.code and child.record.get("exit"):
            raise ConfigurationError(child.output(), child.code)
        return child

    def _rest(self, first: Child) -> list[str]:
        rest = self._options.methods[1:]
        # what the configuration's own policy is called
        own = first.record.get("own")
        if own != "yours" and not self._options.named:
            return [name for name in rest if name != "yours"]
        return rest

    def _alone(self, child: Child) -> None:
        if self._came_up(child):
            take_turns([child], self._after)

    def _came_up(self, child: Child) -> bool:
        """Whether it asks for its first turn."""
        if child.code is None and not child.started:
            child.advance()
        if child.code is not None:
            self._after(child)
        return child.code is None

    def _after(self, child: Child) -> None:
        self._tell(child)
        if child.code is None:
            return
        order = self._options.methods.index(child.task.method)
        record = {"version": 1, "order": order, **child.record}
        self.records.append(record)
        self.records.sort(key=lambda r: r["order"])
        with (self._options.out / NAME).open("a") as file:
            file.write(json.dumps(record) + "\n")
        child.kill()


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[Child], None]]:
    """A line a method on the terminal; nothing where there is none."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    rows: dict[str, Any] = {}
    with Progress(
        *columns, TextColumn("{task.fields[state]}"), TimeElapsedColumn(), console=console,
        disable=not console.is_terminal,
    ) as progress:  # fmt: skip

        def tell(child: Child) -> None:
            name = child.task.method
            if name not in rows:
                rows[name] = progress.add_task(name, total=steps, state="")
            status = child.record.get("status", "" if child.started else "getting ready")
            done = child.record.get("steps_done", child.step)
            progress.update(rows[name], completed=done, state=status)
            if child.code is not None:
                progress.stop_task(rows[name])

        yield tell


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds, as Ctrl-C does, so that the processes are ended."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Print the table with its remarks, and draw the picture beside the records."""
    console = Console()
    # into a file or a pipe all of it
    width = console.width if console.is_terminal else None
    table = standings(records, width)
    if width is None:
        console = Console(width=1000)
    console.print(table)
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    for line in remarks(records):
        say(line)
    try:
        picture(records, folder / PICTURE)
    except ModuleNotFoundError:
        say(f"{folder / NAME} holds the numbers; for a picture of them pip install "
            f"'lightning-sage[plots]', then lightning-sage compare --from {folder}")  # fmt: skip
        return
    drawn = f" and {PICTURE}" if (folder / PICTURE).exists() else ""
    say(f"{NAME}{drawn} in {folder}")


def main(argv: Sequence[str]) -> None:
    """Run `lightning-sage compare`.

    Args:
        argv: What stands behind `compare`.

    Raises:
        SystemExit: Options or configuration are wrong, every method failed, or Ctrl-C.
    """
    options = parse(argv)
    try:
        if isinstance(options, Path):
            return show(read_records(options), options)
        with _terminable(), _progress(options.steps) as tell:
            comparison = Comparison(options, tell)
            comparison.run()
    except ConfigurationError as error:
        sys.stderr.write(error.text)
        raise SystemExit(error.code) from None
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"lightning-sage compare: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    show(comparison.records, options.out)
    if all(record["status"] != "ok" for record in comparison.records):
        raise SystemExit(1)
