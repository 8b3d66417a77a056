"""What a run's history shows in pictures: which numbers are drawn, and how they are thinned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from lightning_sage.memory import MIB
from lightning_sage.report.plots import Curve, bars, curves, heat_map
from lightning_sage.report.thinning import Group, block_means, mean, number, thinned, total
from lightning_sage.watch.history import Line, Run

# points of a line and columns of a heat map, at most
POINTS, COLUMNS = 200, 48
# a step this many times longer than the median would flatten all others
OUTLIER = 4


@dataclass(frozen=True)
class Figure:
    """A picture with its words.

    Attributes:
        title: What it shows.
        svg: The drawing.
        alt: The drawing in a sentence, with its numbers.
        note: What to know when reading it; may be empty.
        ramp: Colour and highest value of a heat map's scale, or None.
    """

    title: str
    svg: str
    alt: str
    note: str = ""
    ramp: tuple[str, str] | None = None


def figures(run: Run) -> tuple[list[Figure], list[str]]:
    """What can be drawn of a run, and a line about each thing that cannot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not run.steps:
        return [], ["No step was recorded: the fit ended before its first interval of logging."]
    # two tall ones side by side, where there are two columns
    drawn = [_memory(run), _fractions(run), *_heat_maps(run), _loss(run), *_fidelity(run)]
    drawn += [_seconds(run), _held(run), _peak(run)]
    missing = []
    if run.dense is None:
        missing.append("Not counted: what a dense step saves (`measure_dense=False`).")
    if not run.fidelity:
        missing.append(
            "Not measured: gradient fidelity. `SageCallback(fidelity_every_n_steps=100)` does."
        )
    if not any(line.get("peak") for line in run.steps):
        missing.append("Not recorded: peak memory of the phases of a step.")
    if not any(line.get("loss") is not None for line in run.steps):
        missing.append("Not recorded: the loss; training_step returned none.")
    return [figure for figure in drawn if figure is not None], missing


def _memory(run: Run) -> Figure:
    kept = [value / MIB for value in block_means(Group(run.steps), "cached")]
    series: list[tuple[str, str, list[float]]] = [("kept by SAGE", "keep", kept)]
    alt = f"SAGE keeps {total(kept):,.1f} MiB a step in {len(kept)} blocks"
    note = "Mean over the recorded steps."
    if run.dense is not None:
        dense = [number(value) / MIB for value in run.dense]
        series.insert(0, ("saved by a dense step", "dense", dense))
        alt += f", where a dense step saves {total(dense):,.1f} MiB"
        note = "Kept: mean over the recorded steps. Dense: counted on the first batch."
    svg = bars("memory", series, run.blocks, "MiB")
    return Figure("Memory for the backward pass, by block", svg, f"{alt}.", note)


def _curve(
    label: str, paint: str, groups: Sequence[Group], key: Callable[[Line], float], band: bool = True
) -> Curve:
    """The mean of each group, with a band from the least to the greatest where groups are thick."""
    spread = [group.values(key) or [math.nan] for group in groups]
    thick = band and any(len(group.lines) > 1 for group in groups)
    return Curve(
        label,
        paint,
        [group.step for group in groups],
        [group.mean(key) for group in groups],
        [min(values) for values in spread] if thick else None,
        [max(values) for values in spread] if thick else None,
    )


def _ends(what: str, curve: Curve, form: str = ".4g") -> str:
    first, last = curve.y[0], curve.y[-1]
    if len(curve.y) == 1:
        return f"{what}: {last:{form}} at step {curve.x[-1]:,}."
    return f"{what}: {first:{form}} at first and {last:{form}} at step {curve.x[-1]:,}."


def _loss(run: Run) -> Figure | None:
    lines = [line for line in run.steps if line.get("loss") is not None]
    if not lines:
        return None
    curve = _curve("loss", "keep", thinned(lines, POINTS), lambda line: number(line["loss"]))
    svg = curves("loss", [curve], "training loss", bottom=None)
    note = "Band: least and greatest where a point stands for several." if curve.low else ""
    return Figure("Training loss", svg, _ends("Training loss", curve), note)


def _fractions(run: Run) -> Figure:
    groups = thinned(run.steps, POINTS)
    drawn, said = [], []
    for key, paint in (("kept", "keep"), ("replayed", "replay")):
        columns = [[100 * value for value in block_means(group, key)] for group in groups]
        there = [[value for value in column if not math.isnan(value)] for column in columns]
        curve = Curve(
            key,
            paint,
            [group.step for group in groups],
            [mean(column) for column in there],
            [min(column, default=math.nan) for column in there],
            [max(column, default=math.nan) for column in there],
            dashed=key == "replayed",
        )
        drawn.append(curve)
        said.append(f"{mean(block_means(Group(run.steps), key)):.1%} {key}")
    svg = curves("fractions", drawn, "% of valid tokens", top=103)
    alt = f"Of the valid tokens, on average: {', '.join(said)}."
    note = "Line: mean of the blocks. Band: from the block with the least to that with the most."
    return Figure("Tokens kept and replayed", svg, alt, note)


def _heat_maps(run: Run) -> list[Figure]:
    groups = thinned(run.steps, COLUMNS)
    edges = [float(run.steps[0]["step"] - run.steps[0].get("steps", 1))]
    edges += [float(group.step) for group in groups]
    drawn = []
    for key, paint in (("kept", "keep"), ("replayed", "replay")):
        columns = [block_means(group, key) for group in groups]
        most = max((v for column in columns for v in column if not math.isnan(v)), default=0.0)
        # the next tenth, so that runs are compared by eye
        highest = min(1.0, max(0.1, math.ceil(most * 10 - 1e-9) / 10))
        svg = heat_map(f"heat-{key}", edges, columns, run.blocks, highest, paint)
        whole = zip(run.blocks, block_means(Group(run.steps), key), strict=True)
        ordered = sorted((value, name) for name, value in whole if not math.isnan(value))
        alt = f"Share of tokens {key}, by block."
        if ordered:
            (low, least), (high, greatest) = ordered[0], ordered[-1]
            alt = (
                f"Share of tokens {key} in {len(run.blocks)} blocks: on average from {low:.1%} in "
                f"{least} to {high:.1%} in {greatest}."
            )
        title = f"Tokens {key}, by block and step"
        drawn.append(Figure(title, svg, alt, ramp=(paint, f"{highest:.0%}")))
    return drawn


def _fidelity(run: Run) -> list[Figure]:
    if not run.fidelity:
        return []
    groups = thinned(run.fidelity, POINTS)
    cosine = _curve("cosine", "keep", groups, lambda line: number(line["cosine"]), band=False)
    ranges = [
        [number(pair[0]) for line in group.lines for pair in (line.get("blocks") or {}).values()]
        for group in groups
    ]
    ranges = [[value for value in values if not math.isnan(value)] for values in ranges]
    if any(ranges):
        low = [min(values, default=math.nan) for values in ranges]
        high = [max(values, default=math.nan) for values in ranges]
        cosine = Curve("cosine (band: blocks)", "keep", cosine.x, cosine.y, low, high)
    ratio = _curve("norm ratio", "third", groups, lambda line: number(line["norm_ratio"]), False)
    ratio = Curve(ratio.label, ratio.paint, ratio.x, ratio.y, dashed=True)
    rules = [
        (float(run.start[f"fidelity_{name}"]), name)
        for name in ("floor", "target")
        if run.start.get(f"fidelity_{name}")
    ]
    seen = [*cosine.y, *ratio.y, *(cosine.low or []), *(height for height, _ in rules)]
    least = min((value for value in seen if not math.isnan(value)), default=0.0)
    bottom = math.floor(10 * least - 0.5) / 10
    svg = curves("fidelity", [cosine, ratio], "sparse against dense", None, bottom, rules)
    drawn = [Figure("Gradient fidelity", svg, _ends("Cosine of the gradients", cosine, ".3f"))]
    last = run.fidelity[-1]
    of_blocks = last.get("blocks") or {}
    if of_blocks:
        values = [number((of_blocks.get(name) or [None])[0]) for name in run.blocks]
        svg = bars("fidelity-blocks", [("cosine", "keep", values)], run.blocks, "cosine")
        there = {n: v for n, v in zip(run.blocks, values, strict=True) if not math.isnan(v)}
        worst = min(there, key=lambda name: there[name], default="")
        alt = f"Lowest cosine: {there[worst]:.3f} in {worst}." if there else "No cosine is known."
        title = f"Gradient fidelity by block, at step {last['step']:,}"
        drawn.append(Figure(title, svg, alt))
    # one that never moved is the policy's
    if len({line.get("setting") for line in run.fidelity} - {None}) > 1:
        setting = _curve("setting", "replay", groups, lambda line: number(line.get("setting")))
        svg = curves("setting", [setting], "fraction")
        drawn.append(Figure("What the controller set", svg, _ends("Fraction", setting, ".3g")))
    return drawn


def _seconds(run: Run) -> Figure | None:
    times = [value for line in run.steps if not math.isnan(value := number(line["seconds"]))]
    if not times:
        return None
    curve = _curve("seconds", "keep", thinned(run.steps, POINTS), lambda x: number(x["seconds"]))
    usual, longest = median(times), max(times)
    top, note = None, ""
    if longest > OUTLIER * usual > 0:
        top = 2.0 * usual
        beyond = sum(value > top for value in times)
        note = (
            f"{beyond:,} of {len(times):,} beyond the axis, up to {longest:.3g} s: "
            "the first steps include the self-check and the dense count."
        )
    svg = curves("seconds", [curve], "seconds", top)
    return Figure("Time of a step", svg, f"Median of a step: {usual:.3g} s.", note)


def _held(run: Run) -> Figure:
    groups = thinned(run.steps, POINTS)
    cached = _curve("cached by SAGE", "keep", groups, lambda line: total(line["cached"]) / MIB)
    drawn = [cached]
    saved = [line for line in run.steps if line.get("saved") is not None]
    alt = _ends("Cached, MiB", cached)
    if saved:
        everything = _curve(
            "all that is saved", "dense", thinned(saved, POINTS), lambda x: number(x["saved"]) / MIB
        )
        drawn.append(everything)
        alt += " " + _ends("All that is saved for backward, MiB", everything)
    svg = curves("held", drawn, "MiB")
    return Figure("Held between forward and backward", svg, alt)


def _peak(run: Run) -> Figure | None:
    lines = [line for line in run.steps if line.get("peak")]
    if not lines:
        return None
    groups = thinned(lines, POINTS)
    phases = list(dict.fromkeys(phase for line in lines for phase in line["peak"]))
    paints = ("keep", "replay", "third", "dense", "ink", "soft")
    drawn = []
    for phase, paint in zip(phases, paints, strict=False):

        def of_phase(line: Line, phase: str = phase) -> float:
            return number(line["peak"].get(phase)) / MIB

        drawn.append(_curve(phase, paint, groups, of_phase, band=False))
    svg = curves("peak", drawn, "MiB")
    tops = [
        f"{c.label} {max((y for y in c.y if not math.isnan(y)), default=0):,.1f}" for c in drawn
    ]
    return Figure("Peak memory, by phase", svg, f"Highest, MiB: {', '.join(tops)}.")
