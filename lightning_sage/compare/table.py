"""A comparison's records -> a table: memory | speed | loss | gradient; and a picture of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]

NAME = "compare.jsonl"
PICTURE = "compare.png"
FAILURES = {"oom": "OOM", "killed": "OOM (killed)", "failed": "failed"}
_BASELINES = {"dense": "dense", "checkpt.": "checkpointing"}
# left out of a terminal that is too narrow, the first one first
_DISPENSABLE = ("replayed", "tokens/s", "kept", "peak MiB", "s / checkpt.", "MiB / checkpt.")
# where a label may stand about its point, in points: above, below, beside, and further off
_PLACES = [
    (x * far, y * far)
    for far in (1.0, 1.8, 2.8, 4.0, 5.5)
    for x, y in ((0, 7), (0, -7), (9, 0), (-9, 0), (8, 8), (8, -8), (-8, 8), (-8, -8))
]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Records of a comparison, in the order of its methods.

    Raises:
        FileNotFoundError: There are none in `folder`.
        ValueError: A line is none.
    """
    file = folder / NAME
    if not file.is_file():
        raise FileNotFoundError(f"no {NAME} in {folder}: give the folder that compare wrote")
    try:
        records = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        return sorted(records, key=lambda record: record["order"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} has a line that is no record of a method: {error}") from None


def label(record: Record) -> str:
    """The method's name, and whether it is the configuration's own."""
    name = str(record["name"])
    return f"{name} (yours)" if record.get("own") == name != "yours" else name


def standings(records: Sequence[Record], width: int | None = None) -> Table:
    """One row a method; ratios are to dense training and to checkpointing.

    Args:
        records: One for each method.
        width: Characters to fit into by leaving columns out; None leaves none out.
    """
    wide = Console(width=1000)
    left_out: list[str] = []
    for name in ("", *_DISPENSABLE):
        left_out.append(name)
        table = _table(records, left_out)
        if width is None or wide.measure(table).maximum <= width:
            break
    return table


def _table(records: Sequence[Record], left_out: Sequence[str]) -> Table:
    rows = [_row(record, records) for record in records]
    names = [name for name in rows[0] if name not in left_out and any(row[name] for row in rows)]
    title = Words(_title(records[0]))
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        # the unit stands above what the ratio is to
        heading = name.replace(" / ", "\n/ ").replace(" MiB", "\nMiB").replace(" cos", "\ncos")
        justify: Any = "left" if name == "method" else "right"
        table.add_column(Words(heading), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*[Words(row[name]) for name in names])
    return table


def _title(record: Record) -> str:
    parts = [f"{record['steps']} steps"]
    parts += [str(record[name]) for name in ("model", "device", "precision") if record.get(name)]
    one_device = [note for note in record.get("notes", ()) if note.startswith("one device")]
    return "; ".join([", ".join(parts), *one_device])


def _row(record: Record, records: Sequence[Record]) -> dict[str, str]:
    done = record["status"] == "ok"
    cells = {"method": label(record)}
    cells["saved MiB"] = _mib(record, "saved_mib") if done else FAILURES[record["status"]]
    for short, other in _BASELINES.items():
        cells[f"MiB / {short}"] = _ratio(record, records, other, "saved_mib")
    cells["peak MiB"] = _mib(record, "peak_mib")
    cells["step s"] = _shown(record, "step_s", "#.3g")
    for short, other in _BASELINES.items():
        cells[f"s / {short}"] = _ratio(record, records, other, "step_s")
    cells["tokens/s"] = _shown(record, "tokens_per_s", ",.0f")
    cells["loss"] = _shown(record, "loss", ".4f")
    cosine = _shown(record, "fidelity_cosine", ".3f")
    cells["gradient cosine"] = "exact" if done and record["name"] in _BASELINES.values() else cosine
    cells["its norm"] = _shown(record, "fidelity_norm_ratio", ".2f")
    for name in ("kept", "replayed"):
        cells[name] = _shown(record, f"{name}_fraction", ".0%")
    return cells


def _number(record: Record, key: str) -> float | None:
    value = record.get(key)
    number: float | None = value["median"] if isinstance(value, Mapping) else value
    return number


def _shown(record: Record, key: str, form: str) -> str:
    value = _number(record, key)
    return "" if value is None else format(value, form)


def _mib(record: Record, key: str) -> str:
    value = _number(record, key)
    return "" if value is None else format(value, ",.1f" if value >= 10 else ".2f")


def _ratio(record: Record, records: Sequence[Record], other: str, key: str) -> str:
    mine = _number(record, key)
    theirs = next((_number(r, key) for r in records if r["name"] == other), None)
    return f"{mine / theirs:.3f}" if mine is not None and theirs else ""


def remarks(records: Sequence[Record]) -> list[str]:
    """What to know when reading the table, a line each."""
    done = [record for record in records if record["status"] == "ok"]
    lines = [f"{label(r)}: {r['error']}" for r in records if r["status"] != "ok"]
    if not done:
        return lines
    first = done[0]
    peak = "device memory" if first["device_type"] != "cpu" else "resident memory of its process"
    how = [r["checkpointing"] for r in done if r.get("checkpointing")]
    count = first["loss_over_steps"]
    last = f"mean of the last {count} steps" if count > 1 else "of the last step"
    lines.append(
        f"saved: what a batch's graph holds for backward; peak: {peak}; step: median; loss: {last}"
        + "".join(f"; checkpointing: {text}" for text in how)
    )
    # the first is in the title
    lines += [note for note in first["notes"] if not note.startswith("one device")]
    if not first["peak_of_steps"]:
        lines.append("peak: of the process's whole life, as it cannot be reset here")
    whole = [r for r in done if r["steps_done"] == r["steps"]]
    lines += [
        f"warning: {label(r)} ended after {r['steps_done']} of {r['steps']} steps"
        for r in done
        if r not in whole
    ]
    other = [label(r) for r in whole if r["batches"] != whole[0]["batches"]]
    if other:
        lines.append(
            f"warning: {', '.join(other)} saw other batches than {label(whole[0])}, as their "
            "checksums differ: losses do not compare"
        )
    return lines


def picture(records: Sequence[Record], path: Path) -> None:
    """Memory against time of a step, a labelled point a method; PNG.

    Args:
        records: One for each method.
        path: Where it goes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    shown = [r for r in records if r["status"] == "ok" and r["step_s"] and r["saved_mib"]]
    if not shown:
        return
    # on a device what counts is its peak; a process's is mostly what it has imported
    cuda = shown[0]["device_type"] != "cpu" and all(r["peak_mib"] for r in shown)
    key = "peak_mib" if cuda else "saved_mib"
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for record in shown:
        _point(axes, record, key)
    _scale(axes, shown, key)
    axes.set_xlabel("seconds a step (median; bar: 20th to 80th percentile)")
    axes.set_ylabel("peak of device memory, MiB" if cuda else "saved for backward, MiB")
    axes.set_title(_title(shown[0]), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, which="major", alpha=0.3, linewidth=0.6)
    lost = [f"{label(r)}: {FAILURES[r['status']]}" for r in records if r["status"] != "ok"]
    if lost:
        text = "\n".join(["not in the picture", *lost])
        axes.text(1.02, 1, text, transform=axes.transAxes, va="top", fontsize=9, color="firebrick")
    _name_points(axes, shown, key)
    figure.savefig(path)


def _point(axes: Axes, record: Record, key: str) -> None:
    time = record["step_s"]
    baseline = record["name"] in _BASELINES.values()
    axes.errorbar(
        time["median"],
        record[key],
        xerr=[[time["median"] - time["p20"]], [time["p80"] - time["median"]]],
        fmt="s" if baseline else "o",
        markersize=7,
        color="dimgray" if baseline else "tab:blue",
        elinewidth=1,
        capsize=2,
    )


def _scale(axes: Axes, shown: Sequence[Record], key: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xlim(0, 1.2 * max(r["step_s"]["p80"] for r in shown))
    low, high = min(r[key] for r in shown), max(r[key] for r in shown)
    if high > 8 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.8, high * 1.8)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.15 * high)


def _name_points(axes: Axes, shown: Sequence[Record], key: str) -> None:
    """Put each label where it hides nothing, as near to its point as that goes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    # points with their bars
    taken = []
    for record in shown:
        (left, y), (right, _) = axes.transData.transform(
            [(record["step_s"][edge], record[key]) for edge in ("p20", "p80")]
        )
        taken.append(Bbox([[left - 4, y - 8], [right + 4, y + 8]]))
    for record in shown:
        for x, y in _PLACES:
            text = axes.annotate(
                label(record),
                (record["step_s"]["median"], record[key]),
                (x, y),
                textcoords="offset points",
                ha="left" if x > 0 else "right" if x < 0 else "center",
                va="bottom" if y > 0 else "top" if y < 0 else "center",
                fontsize=9,
                # a line to labels that are further off
                arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.6}
                if max(abs(x), abs(y)) > 10
                else None,
            )
            # of the words alone, without the line
            text.set_in_layout(False)
            text.update_positions(renderer)
            box = Text.get_window_extent(text).padded(2)
            within = all(axes.bbox.contains(*corner) for corner in (box.min, box.max))
            free = within and not any(box.overlaps(other) for other in taken)
            if free or (x, y) == _PLACES[-1]:
                taken.append(box)
                break
            text.remove()
