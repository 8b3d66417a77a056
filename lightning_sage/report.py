"""Records of measured runs -> a table: memory | speed, against dense training and checkpointing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

Record = Mapping[str, Any]

# runs are compared where all of these agree
CONDITIONS = ("shape", "rank", "dtype", "batch", "length", "loss", "body", "device", "threads")
COLUMNS = (
    "method",
    "saved MiB",
    "/ dense",
    "/ checkpt.",
    "peak MiB",
    "/ dense",
    "step s",
    "/ dense",
    "/ checkpt.",
    "forward s",
    "backward s",
    "kept",
    "replayed",
)


def table(records: Sequence[Record]) -> str:
    """Markdown, one table for each condition; ratios are to the runs of the same condition.

    Args:
        records: Lines of `examples/measure.py`. Later ones replace earlier ones of the same name.
    """
    ordered = sorted(records, key=_condition)
    return "\n\n".join(_one(list(group)) for _, group in groupby(ordered, key=_condition))


def _condition(record: Record) -> tuple[str, ...]:
    return tuple(str(record[name]) for name in CONDITIONS)


def _one(records: list[Record]) -> str:
    latest = {record["name"]: record for record in records}
    rows = [_row(record, latest) for record in latest.values()]
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
    rows = [tuple(row[i] for i in used) for row in (COLUMNS, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{'<' if i == 0 else '>'}{w}}" for i, (cell, w) in cells) + " |"
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
    lines.insert(
        1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    )
    return "\n".join([_title(records[-1]), "", *lines])


def _title(record: Record) -> str:
    training = f"LoRA r={record['rank']}" if record["rank"] else "full fine-tuning"
    part = "body" if record["body"] else "with head"
    return (
        f"{record['shape']}, {training}, {record['dtype']}, {record['batch']} x {record['length']}"
        f" tokens, loss on {record['loss']}, {part}; {record['device']}, torch {record['torch']}"
    )


def _row(record: Record, latest: Mapping[str, Record]) -> tuple[str, ...]:
    if record.get("error"):
        return (record["name"], record["error"], *[""] * (len(COLUMNS) - 2))

    def ratio(key: str, baseline: str) -> str:
        mine, theirs = _number(record, key), _number(latest.get(baseline, {}), key)
        return f"{mine / theirs:.3f}" if mine is not None and theirs else ""

    return (
        record["name"],
        _shown(record, "saved_mib", ",.1f"),
        ratio("saved_mib", "dense"),
        ratio("saved_mib", "checkpointing"),
        _shown(record, "peak_mib", ",.0f"),
        ratio("peak_mib", "dense"),
        _shown(record, "step_s", ".4g"),
        ratio("step_s", "dense"),
        ratio("step_s", "checkpointing"),
        _shown(record, "forward_s", ".4g"),
        _shown(record, "backward_s", ".4g"),
        _shown(record, "kept_fraction", ".1%"),
        _shown(record, "replayed_fraction", ".1%"),
    )


def _number(record: Record, key: str) -> float | None:
    value = record.get(key)
    return value["median"] if isinstance(value, Mapping) else value


def _shown(record: Record, key: str, form: str) -> str:
    value = _number(record, key)
    return "" if value is None else format(value, form)
