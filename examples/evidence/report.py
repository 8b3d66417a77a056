"""What the lines of JSON say, by scenario and in a figure, after what to make of it: evidence.md.

From measured lines alone:

    python examples/evidence/report.py
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# where tables.py is; of this script Python adds only the folder it is in
sys.path.append(str(Path(__file__).parents[1]))

from jsonargparse import auto_cli
from methods import LADDER
from scipy.stats import t as student
from tables import markdown

Record = dict[str, Any]
EXAMPLES = Path(__file__).parents[1]
COLUMNS = (
    *("method", "cached MiB", "cached / checkpointing's", "kept", "replayed", "operations / dense"),
    *("time / dense", "cosine", "norm ratio", "squared error", "lr", "judged", "minus dense"),
    *("95 % interval", "seeds", "failed"),
)
BENEATH = (
    "The mean over seeds of the metric that is named above the table, after the last step, and of "
    "its difference to dense training with the same seed, batches and number of steps that began "
    "at the same weights: what another machine pre-trained is another model (`2 of 5`: so many "
    "seeds are paired). The learning rate is the best for seed 0, where several rates have all "
    "seeds the best of those, or that of a relative. Intervals are Student's. `operations` counts "
    "the products of a training. `cosine`, `norm ratio` and `squared error` compare the gradient "
    "of what is trained in the blocks with the dense one."
)

IN_ALL = (
    "In all, minus dense: points of accuracy, where more is better, or per cent of dense "
    "training's loss, where less is; ± half of the interval, and in brackets the seeds."
)
DEPTHS = (
    "Gradients of the parameters of all blocks of SmolLM2-135M, full fine-tuning, the mean over "
    "batches of 4 x 192 tokens: cosine with the dense gradient / norm over the dense norm (kept "
    "fraction, bytes held over those of checkpointing with both in bfloat16, operations over dense "
    "training's, head included; of the first three kinds of loss an upper bound, which counts the "
    "checks of blocks at each new shape). By `examples/evidence/depth.py`."
)
GAINS = (
    "What of dense training's gain in validation loss is had after as many steps (of dense "
    "training: the loss before and after; in brackets the seeds)."
)


@dataclass(frozen=True)
class Command:
    """What is read and written.

    Args:
        records: The lines of JSON.
        depth: Those of depth.py.
        out: The tables; the figure is beside them.
    """

    records: str = str(EXAMPLES / "results" / "evidence.jsonl")
    depth: str = str(EXAMPLES / "results" / "depth.jsonl")
    out: str = str(EXAMPLES / "evidence.md")


@dataclass
class Method:
    """What is known of a method in a scenario.

    Attributes:
        cost: The record of its step.
        trainings: Records of all its trainings.
        lr: The learning rate it is judged at.
    """

    cost: Record = field(default_factory=dict)
    trainings: list[Record] = field(default_factory=list)
    lr: float | None = None

    @property
    def by_lr(self) -> dict[float, dict[int, Record]]:
        """The last training by learning rate, and by seed."""
        found: dict[float, dict[int, Record]] = defaultdict(dict)
        for record in self.trainings:
            found[record["lr"]][record["seed"]] = record
        return dict(found)

    @property
    def finished(self) -> list[Record]:
        """Trainings at that rate that did not fail, the last of each seed."""
        chosen = self.by_lr[self.lr] if self.lr is not None else {}
        return [record for record in chosen.values() if not record["error"]]

    def results(self, metric: str) -> list[float]:
        """The metric of each of them."""
        return [record["metrics"][metric] for record in self.finished]

    def beside(self, dense: Method) -> list[tuple[Record, Record]]:
        """Each of them with the dense training that began at the same weights, if one did."""
        others = [r for r in reversed(dense.trainings) if r["lr"] == dense.lr and not r["error"]]
        return [
            (own, other)
            for own in self.finished
            if (other := next((r for r in others if began_alike(own, r)), None)) is not None
        ]

    @property
    def steps(self) -> int | None:
        """Of its trainings."""
        return next((record["steps"] for record in self.trainings), None)

    @property
    def failed(self) -> int:
        """How many trainings have, at any learning rate."""
        return sum(bool(r["error"]) for runs in self.by_lr.values() for r in runs.values())


def score(record: Record, metric: str) -> float | None:
    """What a training is judged by; None where it failed."""
    value: float | None = None if record["error"] else record["metrics"][metric]
    return value


def began_alike(mine: Record, dense: Record) -> bool:
    """Whether a training began as a dense one did: a forward is exact, and so is a first loss.

    What is pre-trained differs by machine and threads, and then so do first losses, by 4e-5 or
    more; those from the same weights by 2e-7. Where the policy changes the forward, the file must
    be the same.
    """
    if mine["seed"] != dense["seed"]:
        return False
    if (mine["policy"] or {}).get("unselected") == "skip":
        return mine.get("base") is not None and mine["base"] == dense.get("base")
    first, other = (record["train_losses"][0] for record in (mine, dense))
    return math.isclose(first, other, rel_tol=1e-5)


def read(path: Path) -> dict[tuple[str, int], list[Record]]:
    """Records by scenario and number of steps; a step's cost goes with each of its method's."""
    trained, costs = defaultdict(list), []
    for record in map(json.loads, path.read_text().splitlines()):
        if record["kind"] == "cost":
            costs.append(record)
        else:
            trained[record["scenario"], record["steps"]].append(record)
    for name in {cost["scenario"] for cost in costs} - {name for name, _ in trained}:
        trained[name, 0] = []
    found = {}
    for (name, steps), runs in trained.items():
        own, known = [c for c in costs if c["scenario"] == name], {r["method"] for r in runs}
        if runs and "dense" not in known:
            # methods that alone took as many steps are compared with dense training's number
            others = (v for (n, s), v in trained.items() if n == name and s != steps)
            dense = ([r for r in other if r["method"] == "dense"] for other in others)
            runs = [*next(filter(None, dense), []), *runs]
        if len(runs) < max(len(v) for (n, _), v in trained.items() if n == name):
            # costs alone are told once, where most was trained
            own = [c for c in own if c["method"] in known | {"dense"}]
        found[name, steps] = [*own, *runs]
    return found


def current(records: Sequence[Record]) -> list[Record]:
    """Those by the policy that their method has in its last record."""
    policies = {record["method"]: record["policy"] for record in records}
    return [record for record in records if record["policy"] == policies[record["method"]]]


def methods_of(records: Sequence[Record]) -> dict[str, Method]:
    """What is known of each method, in the order of its first record; later records count.

    What a method was run with before its policy was changed is left out.
    """
    records = current(records)
    found: dict[str, Method] = defaultdict(Method)
    for record in records:
        method = found[record["method"]]
        if record["kind"] == "cost":
            method.cost = record
        else:
            method.trainings.append(record)
    metric = records[0]["judged"] if records else ""
    for name, method in found.items():
        if name in LADDER and method.trainings:
            method.lr = method.trainings[-1]["lr"]
        elif method.trainings:
            merits = {lr: _merit(runs, metric) for lr, runs in method.by_lr.items()}
            method.lr = max(merits, key=merits.__getitem__)
    return found


def _merit(runs: dict[int, Record], metric: str) -> tuple[float, ...]:
    """More seeds mark what was chosen; before that, the tuning decides."""
    values = [value for r in runs.values() if (value := score(r, metric)) is not None]
    sign = 1 if metric == "val_accuracy" else -1
    return len(runs), sign * fmean(values) if values else -math.inf


def difference(mine: Method, dense: Method, metric: str) -> tuple[float, float, int] | None:
    """Mean of the paired differences, half of their 95 % interval, and how many there are."""
    pairs = [own["metrics"][metric] - other["metrics"][metric] for own, other in mine.beside(dense)]
    if not pairs:
        return None
    n = len(pairs)
    half = student.ppf(0.975, n - 1) * stdev(pairs) / math.sqrt(n) if n > 1 else math.inf
    return fmean(pairs), float(half), n


def row(name: str, found: dict[str, Method], metric: str) -> tuple[str, ...]:
    """A method's line of the table."""
    method, dense = found[name], found.get("dense", Method())
    cost, results = method.cost, method.results(metric)
    compared = None if name == "dense" else difference(method, dense, metric)
    checkpointing = found.get("checkpointing", Method()).cost
    mean, half, paired = compared or (None, math.inf, len(results) if name == "dense" else 0)
    return (
        name,
        _number(cost.get("cached_mib"), ".1f"),
        _number(ratio(cost, checkpointing, "cached_mib"), ".2f"),
        *(_number(cost.get(f"{kind}_fraction"), ".0%") for kind in ("kept", "replayed")),
        _number(operations(method, dense), ".2f"),
        _number(ratio(cost, dense.cost, "step_s"), ".2f"),
        *(_number(cost.get(kind), ".3f") for kind in ("cosine", "norm_ratio", "squared_error")),
        _number(method.lr, "g"),
        _number(fmean(results) if results else None, ".4f"),
        _number(mean, "+.4f"),
        f"{mean - half:+.4f} to {mean + half:+.4f}" if math.isfinite(half) else "",
        str(paired or "") if paired == len(results) else f"{paired} of {len(results)}",
        str(method.failed or "") + (" cost" if cost.get("error") else ""),
    )


def ratio(mine: Record, other: Record, kind: str) -> float | None:
    """Of two costs; None where one was not measured."""
    known = mine.get(kind) is not None and other.get(kind)
    return mine[kind] / other[kind] if known else None


def operations(mine: Method, dense: Method) -> float | None:
    """Of a training, or of a step where there is none, by dense's; None where not counted."""
    step = ratio(mine.cost, dense.cost, "operations")
    if step is None or not (mine.steps and dense.steps):
        return step
    return step * mine.steps / dense.steps


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def section(records: Sequence[Record]) -> str:
    """A scenario: results, what the learning rates were chosen by, what went wrong."""
    last, found = records[-1], methods_of(records)
    metric, steps = last["judged"], last.get("steps")
    judged = f"Judged by {metric} after {steps} steps" if steps else "Not yet trained"
    if others := {r["steps"] for r in records if r["kind"] == "train"} - {steps}:
        judged += f", dense training after {', '.join(map(str, others))}"
    table = markdown(COLUMNS, [row(name, found, metric) for name in found])
    start = next((m.cost["start"][metric] for m in found.values() if m.cost), None)
    before = f", {start:.4f} where costs were measured" if start is not None else ""
    parts = [f"### {last['title']}", f"{judged}{before}.", table]
    tuned = {name: m.by_lr for name, m in found.items() if len(m.by_lr) > 1 and name not in LADDER}
    if tuned:
        lrs = sorted({lr for by_lr in tuned.values() for lr in by_lr})
        cells = [
            (name, *(_tuned(by_lr.get(lr, {}).get(0), metric) for lr in lrs))
            for name, by_lr in tuned.items()
        ]
        grid = markdown(("seed 0 at lr", *(f"{lr:g}" for lr in lrs)), cells)
        parts.append(grid)
    errors = sorted({f"- {r['method']}: `{r['error'][:200]}`" for r in records if r["error"]})
    commits = sorted({str(r["commit"]).replace(str(r["commit"])[12:40], "") for r in records})
    outdated = len(records) - len(current(records))
    beneath = (f"{outdated} lines are of earlier policies and left out; " if outdated else "") + (
        f"{last['precision']}, {last['device']}, {last['threads']} thread, torch {last['torch']}, "
        f"transformers {last['transformers']}, peft {last['peft']}; commits {', '.join(commits)}"
    )
    return "\n\n".join([*parts, *(["\n".join(errors)] if errors else []), beneath])


def overview(scenarios: Sequence[Sequence[Record]]) -> str:
    """Every method's difference to dense training in every scenario, as far as they are known.

    Where accuracy is judged, loss is shown as well: it is less of a lottery.
    """
    columns: list[str] = []
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for records in scenarios:
        last, found = records[-1], methods_of(records)
        for metric in dict.fromkeys((last["judged"], "val_loss")):
            dense = found.get("dense", Method())
            if not dense.finished:
                continue
            points = metric == "val_accuracy"
            unit = "points" if points else "%"
            column = f"{last['scenario']}, {last['steps']} steps, {unit}"
            columns.append(column)
            scale = 100 if points else 100 / fmean(dense.results(metric))
            for name, method in found.items():
                if name != "dense":
                    compared = difference(method, dense, metric)
                    cells[name][column] = _compared(compared, scale)
    rows = [(name, *(known.get(c, "") for c in columns)) for name, known in cells.items()]
    return markdown(("method", *columns), [row for row in rows if any(row[1:])])


def _compared(found: tuple[float, float, int] | None, scale: float) -> str:
    if found is None:
        return ""
    mean, half, n = found
    interval = f" ± {scale * half:.1f}" if math.isfinite(half) else ""
    return f"{scale * mean:+.1f}{interval} ({n})"


def _tuned(record: Record | None, metric: str) -> str:
    if record is None:
        return ""
    value = score(record, metric)
    return "failed" if value is None else f"{value:.4f}"


def figure(scenarios: Sequence[Sequence[Record]], path: Path) -> None:
    """Two panels for each scenario: what training loses against memory, and against operations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [methods_of(records) for records in scenarios]
    kinds = {kind_of(name)[0]: None for methods in found for name in methods}
    # ten colours that can be told apart, with another marker for the next ten
    styles = {
        kind: {"color": f"C{i % 10}", "marker": "os^D"[i // 10 % 4]} for i, kind in enumerate(kinds)
    }
    # two scenarios a row
    drawn, axes = pyplot.subplots(
        max(1, -(-len(found) // 2)), 4, figsize=(20, 1.9 * len(found) + 1.5), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    pairs = axes.reshape(-1, 2)
    for panels in pairs[len(found) :]:
        for axis in panels:
            axis.remove()
    for panels, records, methods in zip(pairs, scenarios, found, strict=False):
        _panels(panels, records[-1], methods, styles)
    marks = [
        pyplot.Line2D([], [], linestyle="", label=kind, **style) for kind, style in styles.items()
    ]
    one = {"color": "0.4", "marker": "o", "markerfacecolor": "white"}
    marks.append(pyplot.Line2D([], [], linestyle="", label="hollow: one seed", **one))
    drawn.legend(handles=marks, loc="outside lower center", ncols=7, frameon=False, fontsize=12)
    drawn.savefig(path, dpi=90)
    pyplot.close(drawn)


def kind_of(name: str) -> tuple[str, str]:
    """What tells a method's colour, its name up to the first number, and the rest."""
    kind, _, rest = re.sub(r" (?=\d)", "\0", name, count=1).partition("\0")
    return kind, rest


def _most_trained(scenarios: Sequence[Sequence[Record]]) -> list[Sequence[Record]]:
    """Of each scenario the number of steps that most was trained for, where costs are known."""
    found: dict[str, Sequence[Record]] = {}
    for records in scenarios:
        name = records[-1]["scenario"]
        if len(records) > len(found.get(name, ())) and any(r["kind"] == "cost" for r in records):
            found[name] = records
    return list(found.values())


def _panels(axes: Any, last: Record, found: dict[str, Method], styles: dict[str, Any]) -> None:
    metric, dense = last["judged"], found.get("dense", Method())
    points = metric == "val_accuracy"
    reference = dense.results(metric)
    # so that more is worse, whatever is judged
    scale = -100 if points else 100 / fmean(reference) if reference else math.nan
    memory, time = axes
    time.sharey(memory)
    memory.set(xscale="log", xlabel="blocks hold / checkpointing's")
    memory.set_title(last["title"], loc="left", fontsize=11, fontweight="bold")
    lost = "points of accuracy lost" if points else "% more loss"
    memory.set_ylabel(f"{lost}\n(logarithmic beyond 2)")
    time.set_xlabel("operations / dense")
    for axis in axes:
        axis.axhline(0, color="0.7", linewidth=1, zorder=0)
        # most end near dense training, and some far from it
        axis.set_yscale("symlog", linthresh=2, linscale=1.5)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(color="0.93")
    for name, method in found.items():
        kind, fraction = kind_of(name)
        compared = difference(method, dense, metric)
        held = ratio(method.cost, found.get("checkpointing", Method()).cost, "cached_mib")
        for axis, x in ((memory, held), (time, operations(method, dense))):
            if x is None or compared is None:
                continue
            y, half = scale * compared[0], abs(scale) * compared[1]
            style = {"markersize": 6, "elinewidth": 0.7, **styles[kind]}
            if math.isfinite(half):
                axis.errorbar(x, y, half, **style)
            else:
                axis.errorbar(x, y, markerfacecolor="white", **style)
            axis.annotate(
                fraction, (x, y), (4, 4), textcoords="offset points", fontsize=7, color="0.3"
            )


def _is_run(record: Record) -> bool:
    return record["kind"] == "train"


def gains(scenarios: Sequence[Sequence[Record]]) -> str:
    """A table: what of dense training's gain in validation loss each method has, by scenario.

    Where the loss before training is known; each method at its best learning rate for a seed.
    """
    columns, rows = [], defaultdict(dict)
    for records in scenarios:
        runs = [r for r in records if _is_run(r) and not r["error"]]
        begun = {r["seed"]: r["start"]["val_loss"] for r in runs if "start" in r}
        if not begun:
            continue
        column = f"{runs[0]['scenario']}, {runs[0]['steps']} steps"
        columns.append(column)
        best: dict[tuple[str, int], float] = {}
        for r in runs:
            key = r["method"], r["seed"]
            best[key] = min(r["metrics"]["val_loss"], best.get(key, math.inf))
        for method in dict.fromkeys(method for method, _ in best):
            shares = [
                (begun[seed] - loss) / (begun[seed] - best["dense", seed])
                for (name, seed), loss in best.items()
                if name == method and seed in begun and ("dense", seed) in best
            ]
            if method == "dense":
                losses = [best["dense", seed] for seed in begun]
                rows[method][column] = f"{fmean(begun.values()):.3f} to {fmean(losses):.3f}"
            elif shares:
                rows[method][column] = f"{fmean(shares):.2f} ({len(shares)})"
    cells = [(name, *(cells.get(column, "") for column in columns)) for name, cells in rows.items()]
    return markdown(("method", *columns), cells)


def depths(path: Path) -> str:
    """A table of gradients on the model of 30 layers, by method and kind of loss."""
    records = {}
    for record in map(json.loads, path.read_text().splitlines()):
        records[record["method"], record["scenario"]] = record
    scenarios = list(dict.fromkeys(scenario for _, scenario in records))
    cells = [
        (method, *(_at_depth(records.get((method, scenario))) for scenario in scenarios))
        for method in dict.fromkeys(method for method, _ in records)
    ]
    return markdown(("method", *scenarios), cells)


def _at_depth(record: Record | None) -> str:
    if record is None:
        return ""
    cosine, norm = fmean(record["cosines"]), fmean(record["norm_ratios"])
    shares = (record[name] for name in ("kept_fraction", "cached", "operations"))
    return f"{cosine:.2f} / {norm:.2f} ({', '.join(f'{share:.2f}' for share in shares)})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables and draw the figure."""
    command = auto_cli(Command, as_positional=False, args=arguments)
    scenarios, out = list(read(Path(command.records)).values()), Path(command.out)
    findings = Path(__file__).with_name("findings.md").read_text().strip()
    parts = ["# Does it end where dense training does?", findings]
    if Path(command.depth).exists():
        parts += ["## A trained model of 30 layers", DEPTHS, depths(Path(command.depth))]
    if any("start" in record for records in scenarios for record in records if _is_run(record)):
        parts += [GAINS, gains(scenarios)]
    parts += ["## Measured", BENEATH]
    parts += [IN_ALL, overview(scenarios), *map(section, scenarios)]
    out.write_text("\n\n".join(parts) + "\n")
    figure(_most_trained(scenarios), out.with_suffix(".png"))


if __name__ == "__main__":
    main()
