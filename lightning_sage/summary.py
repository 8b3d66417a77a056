"""The table that is printed at the end of a fit."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table


def summary_table(summary: Mapping[str, float]) -> Table:
    """One line for each number of `SageCallback.summary`."""
    table = Table("", "SAGE", title="SAGE: memory for the backward pass", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("tokens kept", f"{summary['kept_fraction']:.1%}")
    table.add_row("tokens replayed", f"{summary['replayed_fraction']:.1%}")
    if "fidelity_cosine" in summary:
        table.add_row("gradient's cosine with the dense one", f"{summary['fidelity_cosine']:.3f}")
        table.add_row("its norm over the dense one's", f"{summary['fidelity_norm_ratio']:.3f}")
    table.add_row("cached a step", _mib(summary["cached_mib"]))
    if "dense_mib" in summary:
        table.add_row("a dense step saves (first batch)", _mib(summary["dense_mib"]))
    if "ratio" in summary:
        table.add_row("cached / dense (first batch)", f"{summary['ratio']:.3f}")
    if "saved_mib" in summary:
        table.add_row("saved for backward, with head and loss", _mib(summary["saved_mib"]))
    table.add_row("peak memory", _mib(summary["peak_mib"]))
    table.add_row("seconds a step (median)", f"{summary['seconds']:.3g}")
    return table


def _mib(value: float) -> str:
    return f"{value:,.1f} MiB" if value >= 100 else f"{value:.3g} MiB"
