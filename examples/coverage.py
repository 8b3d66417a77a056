"""What SAGE does with every transformers type: the tests' own judgement, as lines and as a table.

    python examples/coverage.py
    python examples/coverage.py --only causal-lm:llama,seq2seq:t5

Tiny random models are judged in float64 by `tests/matrix.py`, in two processes; all of them take
some 20 minutes. Lines that are there from the same versions and sources are not done again, so that
a run that was ended goes on where it was. The table, coverage.md, is drawn from the lines alone.
"""

import gc
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from jsonargparse import auto_cli
from tables import coverage_table
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parent
PACKAGES = ("torch", "transformers", "peft")
CHUNK = 100


@dataclass(frozen=True)
class Command:
    """What is judged.

    Args:
        only: Entries `task:type`, with commas between; all by default.
        processes: How many are judged at a time.
        out: File of the JSON lines, one an entry.
        table: File of the table.
    """

    only: str | None = None
    processes: int = 2
    out: str = str(HERE / "results" / "coverage.jsonl")
    table: str = str(HERE / "coverage.md")


def versions() -> dict[str, str]:
    """What a judgement depends on: packages, and the sources of SAGE and of its judges."""
    digest = sha256()
    judges = ("matrix", "oracle", "exact", "tiny", "tiny_fields", "tiny_sizes")
    files = [*(ROOT / "lightning_sage").rglob("*.py"), *(ROOT / f"tests/{n}.py" for n in judges)]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return {name: version(name) for name in PACKAGES} | {"sources": digest.hexdigest()[:12]}


def judged(task: str, name: str) -> dict[str, Any]:
    """The line of one entry."""
    sys.path.insert(0, str(ROOT / "tests"))
    # the tests' settings of threads and of what may be downloaded
    import conftest  # noqa: F401
    import matrix

    started = perf_counter()
    verdict = matrix.judge(task, name)
    # models of the entries before this one would stay for long
    gc.collect()
    errors = {label: error for label, error in verdict.errors.items() if error is not None}
    return {
        "task": task,
        "type": name,
        "class": matrix.class_of(task, name),
        "adaptations": matrix.adaptations(task, name),
        "reason": matrix.reason(task, name),
        "verdict": verdict.word,
        "blocks": len(verdict.blocks),
        "dense": len(verdict.dense),
        "error": max(errors.values(), default=None),
        "errors": errors,
        "refused": verdict.refused,
        "wrong": verdict.wrong,
        "seconds": round(perf_counter() - started, 2),
    }


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Lines by task and type; of several the latest."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(line["task"], line["type"]): line for line in map(json.loads, lines)}


def judge_all(
    entries: Sequence[tuple[str, str]], processes: int
) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Lines of entries, as they are done."""
    spawn = multiprocessing.get_context("spawn")
    # processes end after some entries: what transformers imports of each type adds up
    for start in range(0, len(entries), CHUNK):
        with ProcessPoolExecutor(processes, spawn) as pool:
            some = entries[start : start + CHUNK]
            futures = {pool.submit(judged, *entry): entry for entry in some}
            for future in as_completed(futures):
                yield futures[future], future.result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge what has no line yet, and draw the table."""
    command = auto_cli(Command, as_positional=False, args=arguments)
    out, now = Path(command.out), versions()
    known = json.loads((ROOT / "tests" / "coverage.json").read_text())
    entries = [(task, name) for c in "ABC" for task, names in known[c].items() for name in names]
    lines = read(out)
    wanted = set((command.only or "").split(",")) - {""}
    missing = [
        entry
        for entry in entries
        if lines.get(entry, {}).get("versions") != now and (not wanted or ":".join(entry) in wanted)
    ]
    # models of a few kilobytes: a second thread costs more than it does
    os.environ["OMP_NUM_THREADS"] = "1"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for entry, line in tqdm(judge_all(missing, command.processes), total=len(missing)):
            lines[entry] = line | {"versions": now}
            file.write(json.dumps(lines[entry]) + "\n")
            file.flush()
    ordered = [lines[entry] for entry in entries if entry in lines]
    out.write_text("".join(json.dumps(line) + "\n" for line in ordered))
    Path(command.table).write_text(coverage_table(ordered, known["adaptations"]))


if __name__ == "__main__":
    main()
