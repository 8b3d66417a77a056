"""A run's history -> one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from statistics import median
from typing import Any

from lightning_sage.memory import MIB
from lightning_sage.report.figures import Figure, figures
from lightning_sage.report.thinning import Group, block_means, mean, number, total
from lightning_sage.report.token_view import SAMPLES, SHADES, token_view
from lightning_sage.watch.history import Run

# events beyond these are a log, which the history is already
EVENTS = 50

# what the numbers of a summary are called, and how they are written
_NUMBERS = {
    "kept_fraction": ("tokens kept", "{:.1%}"),
    "replayed_fraction": ("tokens replayed", "{:.1%}"),
    "cached_mib": ("cached a step", "{:,.4g} MiB"),
    "saved_mib": ("saved for backward a step", "{:,.4g} MiB"),
    "dense_mib": ("a dense step saves (first batch)", "{:,.4g} MiB"),
    "ratio": ("cached / dense (first batch)", "{:.3f}"),
    "peak_mib": ("peak memory", "{:,.4g} MiB"),
    "seconds": ("seconds a step (median)", "{:.3g}"),
    "fidelity_cosine": ("gradient cosine to dense", "{:.3f}"),
    "fidelity_norm_ratio": ("gradient norm / dense", "{:.3f}"),
}


def page(run: Run, place: str = "") -> str:
    """The whole page.

    Args:
        run: What was written down of a fit.
        place: Where, as the reader of the page should know it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn, missing = figures(run)
    parts = [_header(run, place)]
    if drawn:
        parts.append(f'<h2>Curves</h2><div class="figures">{"".join(map(_figure, drawn))}</div>')
    if run.tokens:
        parts.append(_tokens(run))
    else:
        missing.append("Not recorded: which tokens of a sample were kept.")
    if run.steps:
        parts.append(_blocks(run))
    parts.append(_events(run))
    if missing:
        parts.append(f"<h2>Left out</h2>{_list(missing)}")
    title = f"SAGE: {run.start.get('model') or 'a fit'}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # without it a browser asks for one
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_own('page.css')}{_shades()}</style></head>"
        f"<body><main>{''.join(parts)}</main><script>{_own('page.js')}</script></body></html>\n"
    )


def _own(name: str) -> str:
    return files("lightning_sage.report").joinpath(name).read_text(encoding="utf-8")


def _shades() -> str:
    rules = []
    for letter, paint in (("k", "keep"), ("r", "replay")):
        for shade in range(1, SHADES + 1):
            # the first step has to be seen beside none
            share = 12 + 88 * shade // SHADES
            rules.append(
                f".{letter}{shade}{{background:color-mix(in srgb,var(--shade-{paint}) {share}%,"
                "var(--page))}"
            )
    for index in range(SAMPLES):
        rules.append(
            f".choice:has(#sample-{index}:checked)~.sample:nth-of-type({index + 1})"
            "{display:block}"
        )
    return "".join(rules)


def _header(run: Run, place: str) -> str:
    start = run.start
    facts: list[tuple[str, Any]] = [("recorded in", place)] if place else []
    if start.get("parameters"):
        of_all = f"{start['parameters']:,}"
        trained = start.get("trainable")
        facts.append(
            ("parameters", of_all if trained is None else f"{of_all}, {trained:,} of them trained")
        )
    world = start.get("world") or 1
    device = str(start.get("device") or "")
    facts.append(("device", f"{world} x {device}" if world > 1 else device))
    facts.append(("precision", start.get("precision")))
    facts.append(("blocks", _named(run.blocks)))
    if run.steps:
        last = run.steps[-1]
        facts.append(("steps", f"{last['step']:,}, in {_counted(len(run.steps), 'record')}"))
        if last.get("valid") is not None:
            facts.append(("tokens a step", f"{last['valid']:,.6g}"))
    versions = start.get("versions") or {}
    facts.append(("versions", ", ".join(f"{name} {value}" for name, value in versions.items())))
    policy = [(name, _setting(value)) for name, value in start["policy"].items()]
    state = ""
    if run.summary is None:
        until = f" after step {run.steps[-1]['step']:,}" if run.steps else ""
        state = (
            f'<p class="state">This fit has not ended, or was ended from outside: its history '
            f"stops{until}. The numbers below are those of the recorded steps.</p>"
        )
    return (
        f"<header><h1>{escape(str(start.get('model') or 'Fine-tuning with SAGE'))}</h1>"
        '<p class="soft">Sparse backward passes with lightning-sage: what was kept, what it cost.'
        f"</p>{state}{_summary(run)}{_facts(facts)}<details><summary>Policy: "
        f"{escape(_short_policy(start['policy']))}</summary>{_facts(policy)}</details></header>"
    )


def _named(blocks: Sequence[str]) -> str:
    ends = blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"
    return f"{len(blocks)}: {ends}"


def _setting(value: Any) -> str:
    return "none" if value is None else str(value)


def _short_policy(policy: Mapping[str, Any]) -> str:
    names = [name for name in ("keep", "replay") if name in policy] or list(policy)[:2]
    return ", ".join(f"{name}={_setting(policy[name])}" for name in names)


def _summary(run: Run) -> str:
    values = run.summary
    if values is None:
        values = _so_far(run) if run.steps else {}
    cells = []
    for name, value in values.items():
        label, form = _NUMBERS.get(name, (name.replace("_", " "), "{:,.6g}"))
        shown = "not known" if value is None else form.format(value)
        cells.append(f"<div><dt>{escape(label)}</dt><dd>{shown}</dd></div>")
    return f'<dl class="numbers">{"".join(cells)}</dl>' if cells else ""


def _so_far(run: Run) -> dict[str, float | None]:
    whole = Group(run.steps)
    values = {
        "kept_fraction": mean(block_means(whole, "kept")),
        "replayed_fraction": mean(block_means(whole, "replayed")),
        "cached_mib": total(block_means(whole, "cached")) / MIB,
    }
    if run.dense is not None:
        values["dense_mib"] = total(run.dense) / MIB
    times = [t for line in run.steps if (t := line["seconds"]) is not None]
    values["seconds"] = median(times) if times else math.nan
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _facts(pairs: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in pairs
        if value not in (None, "")
    )
    return f'<dl class="facts">{rows}</dl>'


def _figure(figure: Figure) -> str:
    svg = figure.svg.replace("<svg ", f'<svg role="img" aria-label="{escape(figure.alt)}" ', 1)
    ramp = ""
    if figure.ramp:
        paint, highest = figure.ramp
        ramp = f'<div class="ramp">0% <b class="{paint}"></b> {highest} of valid tokens</div>'
    note = f"<span>{escape(figure.note)}</span>" if figure.note else ""
    return (
        f"<figure><figcaption><strong>{escape(figure.title)}</strong>"
        f"<span>{escape(figure.alt)}</span>{note}</figcaption>{svg}{ramp}</figure>"
    )


def _tokens(run: Run) -> str:
    view, left_out = token_view(run.tokens, run.blocks)
    key = (
        '<ul class="key"><li><span class="k0">kept by no block</span></li>'
        '<li><span class="k5">by half</span></li><li><span class="k10">by all</span></li>'
        '<li><span class="l">bears loss</span></li><li><i>·</i> space, <i>↵</i> end of line, '
        '<i>→</i> tab</li><li>of one block: <span class="kept">kept</span> '
        '<span class="again">kept and replayed</span></li></ul>'
    )
    note = f'<p class="note">{left_out}</p>' if left_out else ""
    return f"<h2>Tokens of a sample</h2>{key}{note}{view}"


def _blocks(run: Run) -> str:
    whole = Group(run.steps)
    columns: dict[str, list[str]] = {}
    if run.dense is not None:
        columns["dense, MiB"] = [_cell(number(value) / MIB, ",.2f") for value in run.dense]
    columns["kept, MiB"] = [_cell(x / MIB, ",.3f") for x in block_means(whole, "cached")]
    columns["kept"] = [_cell(value, ".1%") for value in block_means(whole, "kept")]
    columns["replayed"] = [_cell(value, ".1%") for value in block_means(whole, "replayed")]
    last = (run.fidelity[-1].get("blocks") or {}) if run.fidelity else {}
    if last:
        pairs = [last.get(name) or (None, None) for name in run.blocks]
        columns["cosine, last"] = [_cell(number(pair[0]), ".3f") for pair in pairs]
        columns["norm ratio, last"] = [_cell(number(pair[1]), ".3f") for pair in pairs]
    head = "".join(f'<th scope="col">{name}</th>' for name in ("block", *columns))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in zip(run.blocks, *columns.values(), strict=True)
    )
    return (
        "<h2>Blocks</h2><details><summary>Numbers of each block, over all recorded steps</summary>"
        f'<div class="wide" tabindex="0" role="region" aria-label="Numbers of each block"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _cell(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _events(run: Run) -> str:
    if not run.events:
        return ""
    shown = [f"Step {line['step']:,}: {line['text']}" for line in run.events[-EVENTS:]]
    if len(run.events) > EVENTS:
        shown.insert(0, f"The last {EVENTS} of {len(run.events):,}:")
    return f"<h2>Events</h2>{_list(shown)}"


def _list(items: Iterable[str]) -> str:
    """Text between backticks is code."""
    shown = (re.sub(r"`(.*?)`", r"<code>\1</code>", escape(item)) for item in items)
    return f"<ul>{''.join(f'<li>{item}</li>' for item in shown)}</ul>"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
