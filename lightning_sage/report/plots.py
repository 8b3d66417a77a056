"""Curves, bars and heat maps as SVG that takes its colours from the page it stands in."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_sage.report.block_names import block_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Numbers = Sequence[float]

# matplotlib draws with these, and the page's style sheet says what they look like
_PAINTS = ("ink", "soft", "rule", "keep", "replay", "dense", "third", "warn")
_SENTINEL = {name: f"#0b0d{index:02x}" for index, name in enumerate(_PAINTS)}
LEVELS = 16
_LEVEL = [f"#0b0e{index:02x}" for index in range(LEVELS)]
WIDTH, HEIGHT = 400, 210
# more markers than this hide their line
FEW = 25
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning-sage",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "text.color": _SENTINEL["ink"],
    "axes.labelcolor": _SENTINEL["soft"],
    "axes.edgecolor": _SENTINEL["rule"],
    "xtick.color": _SENTINEL["rule"],
    "ytick.color": _SENTINEL["rule"],
    "xtick.labelcolor": _SENTINEL["soft"],
    "ytick.labelcolor": _SENTINEL["soft"],
    "grid.color": _SENTINEL["rule"],
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Curve:
    """One line over steps.

    Attributes:
        label: Its name in the legend.
        paint: Name of its colour.
        x: Steps.
        y: Values, NaN where there is none.
        low: Lower edge of a band about it, or None.
        high: Upper edge.
        dashed: Told apart from its neighbour without colour.
    """

    label: str
    paint: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    dashed: bool = False


def curves(
    name: str,
    drawn: Sequence[Curve],
    unit: str,
    top: float | None = None,
    bottom: float | None = 0.0,
    rules: Sequence[tuple[float, str]] = (),
) -> str:
    """Lines over steps, with a legend above where there are several.

    Args:
        name: Of the figure, once a page.
        drawn: The lines.
        unit: What the vertical axis measures.
        top: Upper end of the vertical axis; None takes what is drawn.
        bottom: Lower end; None takes what is drawn.
        rules: Heights to mark by a level line, with a label each; two at most.
    """
    with _axes(name) as (axes, finished):
        for curve in drawn:
            colour = _SENTINEL[curve.paint]
            if curve.low is not None and curve.high is not None:
                axes.fill_between(
                    curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0
                )
            axes.plot(
                curve.x,
                curve.y,
                color=colour,
                label=curve.label,
                linewidth=1.8,
                linestyle=(0, (4, 2)) if curve.dashed else "-",
                marker="o" if len(curve.x) <= FEW else "",
                markersize=3.5,
            )
        for (height, label), style in zip(rules, (":", "-."), strict=False):
            colour = _SENTINEL["warn"]
            axes.axhline(height, color=colour, linewidth=1.4, linestyle=style, label=label)
        _limit(axes, bottom, top)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        _whole_steps(axes, [x for curve in drawn for x in curve.x])
        if len(drawn) + len(rules) > 1:
            _legend(axes)
    return finished()


def bars(
    name: str, series: Sequence[tuple[str, str, Numbers]], blocks: Sequence[str], unit: str
) -> str:
    """Bars for each block, one series before the other: the last is in front, and narrower.

    Args:
        name: Of the figure, once a page.
        series: Label, colour and one number a block, from back to front.
        blocks: Names of the blocks.
        unit: What the vertical axis measures.
    """
    ticks = block_ticks(blocks)
    with _axes(name) as (axes, finished):
        for index, (label, paint, values) in enumerate(series):
            heights = [0.0 if math.isnan(value) else value for value in values]
            axes.bar(
                range(len(blocks)),
                heights,
                width=0.84 if index == 0 else 0.5,
                color=_SENTINEL[paint],
                label=label,
            )
        aside = max(0.7, 2.5 - len(blocks) / 2)
        axes.set_xlim(-aside, len(blocks) - 1 + aside)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        crowded = sum(len(label) for label in ticks.labels) > 44
        axes.set_xticks(ticks.at, ticks.labels, rotation=90 if crowded else 0)
        axes.set_xlabel(ticks.title)
        axes.set_ylabel(unit)
        if len(series) > 1:
            _legend(axes)
    return finished()


def heat_map(
    name: str,
    edges: Numbers,
    columns: Sequence[Numbers],
    blocks: Sequence[str],
    highest: float,
    paint: str,
) -> str:
    """A cell for each block and stretch of steps, the fuller the higher its value.

    Args:
        name: Of the figure, once a page.
        edges: Steps between columns, one more than there are columns.
        columns: For each a number a block; NaN leaves its cell empty.
        blocks: Names of the blocks, the first at the top.
        highest: Value of the fullest colour; the emptiest is 0.
        paint: Name of that colour.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners: list[list[tuple[float, float]]] = [[] for _ in range(LEVELS)]
    for row in range(len(blocks)):
        levels = [_level(column[row], highest) for column in columns]
        for first, last, level in _stretches(levels):
            left, right = edges[first], edges[last]
            # the fifth point closes the cell; its place does not matter
            corners[level] += [
                (left, row - 0.5),
                (right, row - 0.5),
                (right, row + 0.5),
                (left, row + 0.5),
                (left, row - 0.5),
            ]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    ticks = block_ticks(blocks)
    with _axes(name, height=90 + min(320, max(60, 12 * len(blocks)))) as (axes, finished):
        for level, points in enumerate(corners):
            if points:
                cells = Path(points, codes * (len(points) // 5))
                patch = PathPatch(cells, facecolor=_LEVEL[level], linewidth=0, antialiased=False)
                axes.add_patch(patch)
        axes.grid(visible=False)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(len(blocks) - 0.5, -0.5)
        axes.set_yticks(ticks.at, ticks.labels)
        # the whole title is longer than few blocks are high
        axes.set_ylabel("block")
        axes.set_xlabel("step")
        _whole_steps(axes, edges)
    svg = finished()
    for level, colour in enumerate(_LEVEL):
        share = round(100 * level / (LEVELS - 1))
        svg = svg.replace(colour, f"color-mix(in srgb, var(--{paint}) {share}%, var(--page))")
    return svg


def _level(value: float, highest: float) -> int | None:
    if math.isnan(value):
        return None
    return round(min(1.0, max(0.0, value / highest)) * (LEVELS - 1))


def _stretches(levels: Sequence[int | None]) -> Iterator[tuple[int, int, int]]:
    """First, one past the last, and level of each run of equal levels."""
    start = 0
    for end in range(1, len(levels) + 1):
        if end == len(levels) or levels[end] != levels[start]:
            level = levels[start]
            if level is not None:
                yield start, end, level
            start = end


@contextmanager
def _axes(name: str, height: int = HEIGHT) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes to draw on, and what gives the SVG once the drawing is done."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        yield figure.add_subplot(), lambda: svg
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        svg = _for_a_page(file.getvalue(), name)


def _limit(axes: Axes, bottom: float | None, top: float | None) -> None:
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    if top is not None:
        axes.set_ylim(top=top)
    low, high = axes.get_ylim()
    if low == high:
        axes.set_ylim(low, low + 1)


def _whole_steps(axes: Axes, steps: Numbers) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if steps and min(steps) == max(steps):
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        borderaxespad=0.3,
        handlelength=1.6,
        columnspacing=1.2,
    )


def _for_a_page(svg: str, name: str) -> str:
    """Only the element, in the page's colours and font, its ids this figure's own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    used: Any = set(re.findall(r'(?:href="#|url\(#)(\w+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    # coordinates only: text between tags stays as it was written
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for paint, colour in _SENTINEL.items():
        svg = svg.replace(colour, f"var(--{paint})")
    return svg
