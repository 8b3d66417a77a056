"""`lightning-sage report RUN_DIR`: one HTML page of what a fit kept, and what that cost."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_sage.report.page import page
from lightning_sage.watch.history import NAME, HistoryError, Run, read

PAGE = "report.html"


class ReportError(ValueError):
    """There is nothing to report on, or no way to: what was looked for, and the way out."""


def report(folder: Path, out: Path | None = None, run: int | None = None) -> tuple[Path, str]:
    """Write the page of a run.

    Args:
        folder: Where the history is (`trainer.log_dir`), or any folder above: the history that was
            written to last is taken. The file itself will do.
        out: Where to write; None is `report.html` beside the history.
        run: Which fit, where the history holds several: 1 is the first; None takes the last.

    Returns:
        The page that was written, and a line on what it shows.

    Raises:
        ReportError: There is no history, no such run, no matplotlib, or nowhere to write.
        HistoryError: The history cannot be read.
    """
    path, found = find(folder)
    runs = read(path)
    if not runs:
        raise ReportError(f"{path} holds no fit yet: look again once a step was logged")
    chosen = len(runs) if run is None else run
    if not 1 <= chosen <= len(runs):
        raise ReportError(f"--run must lie in 1 to {len(runs)} for {path}, got {run}")
    of_runs = f", run {chosen} of {len(runs)}" if len(runs) > 1 else ""
    target = path.with_name(PAGE) if out is None else out
    if target.is_dir():
        target = target / PAGE
    text = _page(runs[chosen - 1], f"{path.parent.name or path.parent.resolve().name}{of_runs}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(
            f"{target} cannot be written ({error}); name another with --out"
        ) from None
    others = f"; the newest of {found} below {folder}" if found > 1 else ""
    return target, f"{path}{of_runs}{others}"


def find(folder: Path) -> tuple[Path, int]:
    """The history in a folder, or the newest below it, and how many there are.

    Raises:
        ReportError: There is none.
    """
    if folder.is_file():
        return folder, 1
    if (folder / NAME).is_file():
        return folder / NAME, 1
    found = [path for path in folder.rglob(NAME) if path.is_file()]
    if not found:
        there = f"no {NAME} in or below {folder}" if folder.is_dir() else f"no folder {folder}"
        raise ReportError(
            f"{there}; a fit writes {NAME} into trainer.log_dir when it has a SageCallback and a "
            "logger: Trainer(logger=CSVLogger('logs'), callbacks=[SageCallback()])"
        )
    # the path decides between files of the same second
    return max(found, key=lambda path: (path.stat().st_mtime, path)), len(found)


def _page(run: Run, place: str) -> str:
    try:
        return page(run, place)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ReportError(
            "the report draws with matplotlib, which is not installed: "
            "pip install 'lightning-sage[plots]'"
        ) from None


def main(argv: list[str] | None = None) -> None:
    """Run `lightning-sage report`.

    Args:
        argv: What follows `report`; None takes the process's own arguments.

    Raises:
        SystemExit: With status 2 and a message, where there is nothing to report on.
    """
    parser = argparse.ArgumentParser("lightning-sage report", description=__doc__)
    parser.add_argument("folder", metavar="RUN_DIR", type=Path, help=f"holds {NAME}, or is above")
    parser.add_argument("--out", type=Path, help=f"the page; RUN_DIR/{PAGE} if not given")
    parser.add_argument("--run", type=int, help="which fit of several; the last if not given")
    given = parser.parse_args(argv)
    try:
        target, shown = report(given.folder, given.out, given.run)
    except (ReportError, HistoryError, OSError) as error:
        sys.stderr.write(f"lightning-sage report: {error}\n")
        raise SystemExit(2) from None
    sys.stdout.write(f"report of {shown}\nwritten to {target}\n")
