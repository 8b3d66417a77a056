"""Records of measured runs -> a table: memory | speed, against dense training and checkpointing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

Record = Mapping[str, Any]

# runs are compared where all of these agree
CONDITIONS = ("shape", "rank", "dtype", "batch", "length", "loss", "head", "device", "threads")
BASELINES = ("dense", "checkpointing")
HEADS = {"none": "without head", "full": "with head", "chunked": "with chunked head"}
COLUMNS = (
    "method",
    "saved MiB",
    "/ dense",
    "/ checkpt.",
    "peak MiB",
    "/ dense",
    "activation MiB",
    "/ dense",
    "/ checkpt.",
    "step s",
    "/ dense",
    "/ checkpt.",
    "forward s",
    "backward s",
    "kept",
    "replayed",
)
VERDICTS = ("right", "refused", "dense", "wrong")
COVERAGE = """# Every transformers type

Drawn by `examples/coverage.py` from [results/coverage.jsonl](results/coverage.jsonl), which the
tests' own judge wrote: a tiny random model of each type in float64 ({packages}), against dense
autograd where every token is kept and against a brute-force oracle where some are; right and left
padding, `attention="salient"` and "full", full fine-tuning and LoRA on every linear layer. A number
is the largest error of any gradient; a type that is not right is refused before a step is taken,
for the reason in the last column, and `install(..., strict=False)` leaves its blocks dense.
Class A works as it is, B with an adaptation that SAGE makes by itself, C cannot. `blocks` counts
those that are replayed, and of how many layers of transformers; "dense" are types none of whose
blocks is replayed, whose gradients are those of dense training."""


def table(records: Sequence[Record]) -> str:
    """Markdown, one table for each condition; ratios are to the runs of the same condition.

    Args:
        records: Lines of `examples/measure.py`. Later ones replace earlier ones of the same name.
    """
    ordered = sorted(records, key=_condition)
    return "\n\n".join(_one(list(group)) for _, group in groupby(ordered, key=_condition))


def limits_table(records: Sequence[Record]) -> str:
    """Markdown, one row a method: the largest batch and longest context that fit in a budget.

    A cell says what fitted, and in brackets the least that did not.

    Args:
        records: Lines of `examples/limits.py`, of the same condition.
    """
    latest = {record["name"]: record for record in records}
    rows = []
    for record in latest.values():
        row = [record["name"]]
        for kind in ("batch", "context"):
            row.append(_limit(record.get(kind)))
            row.extend(_times(record, latest.get(name), kind) for name in BASELINES)
        rows.append(row)
    record = records[-1]
    title = (
        f"{record['shape']}, LoRA r={record['rank']}, {record['dtype']}, loss on {record['loss']}, "
        f"{HEADS[record['head']]}, {record['budget_gib']:g} GiB; {record['device']}, "
        f"torch {record['torch']}"
    )
    batch = f"sequences of {record['batch_length']}"
    columns = ("method", batch, "/ dense", "/ checkpt.", "context", "/ dense", "/ checkpt.")
    return f"{title}\n\n{markdown(columns, rows)}"


def _limit(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    above = "open" if found["fails"] is None else f"< {found['fails']:,}"
    return f"{found['fits']:,} ({above})"


def _times(record: Record, baseline: Record | None, kind: str) -> str:
    mine, theirs = record.get(kind), (baseline or {}).get(kind)
    if not mine or not theirs or not theirs["fits"]:
        return ""
    return f"{mine['fits'] / theirs['fits']:.2f}"


def _condition(record: Record) -> tuple[str, ...]:
    known = {**record, "head": _head(record)}
    return tuple(str(known[name]) for name in CONDITIONS)


def _head(record: Record) -> str:
    """`none`, `full` or `chunked`; earlier records only say whether the body was alone."""
    return str(record.get("head") or ("none" if record["body"] else "full"))


def _one(records: list[Record]) -> str:
    latest = {record["name"]: record for record in records}
    rows = [_row(record, latest) for record in latest.values()]
    return f"{_title(records[-1])}\n\n{markdown(COLUMNS, rows)}"


def markdown(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; columns that are empty all the way are left out."""
    used = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    rows = [tuple(row[i] for i in used) for row in (columns, *cells)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{'<' if i == 0 else '>'}{w}}" for i, (cell, w) in cells) + " |"
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
    lines.insert(
        1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    )
    return "\n".join(lines)


def _title(record: Record) -> str:
    training = f"LoRA r={record['rank']}" if record["rank"] else "full fine-tuning"
    head = HEADS[_head(record)]
    return (
        f"{record['shape']}, {training}, {record['dtype']}, {record['batch']} x {record['length']}"
        f" tokens, loss on {record['loss']}, {head}; {record['device']}, torch {record['torch']}"
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
        _shown(record, "activation_mib", ",.0f"),
        ratio("activation_mib", "dense"),
        ratio("activation_mib", "checkpointing"),
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


def coverage_table(records: Sequence[Record], adaptations: Mapping[str, str]) -> str:
    """Markdown: how many types are right, and a row a type.

    Args:
        records: Lines of `examples/coverage.py`.
        adaptations: What their codes mean.
    """
    tasks = list(dict.fromkeys(record["task"] for record in records))
    by_type = {
        name: {record["task"]: record for record in group}
        for name, group in groupby(sorted(records, key=_type), key=_type)
    }
    rows = [
        (
            name,
            max(record["class"] for record in found.values()),
            " ".join(sorted({code for record in found.values() for code in record["adaptations"]})),
            *(_covered(found.get(task)) for task in tasks),
            _blocks(found.values()),
            _why(found.values()),
        )
        for name, found in by_type.items()
    ]
    columns = ("type", "class", "adapted by", *tasks, "blocks", "why not")
    counts = [
        (
            f"class {c}",
            *(str(sum(r["class"] == c and r["verdict"] == v for r in records)) for v in VERDICTS),
        )
        for c in "ABC"
    ]
    codes = "\n".join(f"* **{code}**: {meaning}" for code, meaning in adaptations.items())
    seen = records[0]["versions"]
    packages = ", ".join(f"{name} {seen[name]}" for name in ("transformers", "torch", "peft"))
    return (
        "\n\n".join(
            (
                COVERAGE.format(packages=packages),
                markdown(("entries", *VERDICTS), counts),
                codes,
                markdown(columns, rows),
            )
        )
        + "\n"
    )


def _type(record: Record) -> str:
    name: str = record["type"]
    return name


def _covered(record: Record | None) -> str:
    if record is None:
        return ""
    return f"{record['error']:.0e}" if record["verdict"] == "right" else record["verdict"]


def _blocks(records: Iterable[Record]) -> str:
    """Of the first task; those that are not layers of transformers count as well."""
    record = next(iter(records))
    return f"{record['blocks']} of {record['blocks'] + record['dense']}" if record["blocks"] else ""


def _why(records: Iterable[Record]) -> str:
    """The reason, else SAGE's own first message."""
    for record in records:
        if record["verdict"] != "right":
            said = [*record["wrong"], *record["refused"].values()]
            if not said:
                return record["reason"]
            return record["reason"] or said[0].split(": leave")[0].replace("|", "/")[:160]
    return ""
