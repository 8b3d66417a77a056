"""`lightning-sage estimate`: the memory that a configuration will need."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from lightning_sage.cli import NOISE, SageCLI, accept_arguments_of_fit
from lightning_sage.configured import as_list, policy_of, sage_among
from lightning_sage.estimate.prediction import TOKENS, YOURS, Estimate, Footprint, estimate

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class _EstimateCLI(SageCLI):
    """Reads a configuration; of what it names it builds neither Trainer nor weights."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        accept_arguments_of_fit(parser)
        parser.add_argument(
            "--memory",
            type=str | None,
            default=None,
            help="Size of the card, as 24GiB; by default this machine's GPU, if it has one.",
        )
        parser.add_argument(
            "--batch", type=int | None, default=None, help="Samples; by default the data's."
        )
        parser.add_argument(
            "--length",
            type=int | None,
            default=None,
            help="Tokens of a sample; by default the data's max_tokens.",
        )
        parser.add_argument(
            "--loss_tokens", type=float, default=1.0, help="Share of the tokens that bear loss."
        )
        parser.add_argument(
            "--kept",
            type=float | None,
            default=None,
            help="Share of the tokens kept, in place of what the policies say.",
        )
        parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")

    def instantiate_classes(self) -> None:
        """All but the Trainer, which would ask for the devices of the configuration."""
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model = self._get(self.config_init, "model")
        self.datamodule = self._get(self.config_init, "data")

    def setting(self, name: str) -> Any:
        """What the configuration or the command line says."""
        return self._get(self.config_init, name)


def main(argv: list[str]) -> None:
    """Print what a configuration needs.

    Args:
        argv: Arguments after `lightning-sage estimate`.
    """
    # the last is Lightning's, of its own use of itself
    for message in (*NOISE, r"LightningCLI's args parameter"):
        warnings.filterwarnings("ignore", message)
    cli = _EstimateCLI(argv, run=False)
    trainer = cli.setting("trainer")
    brought = as_list(cli.model.configure_callbacks())
    loading = getattr(cli.datamodule, "loading", None)
    batch, length = cli.setting("batch"), cli.setting("length")
    batch = getattr(loading, "batch_size", None) if batch is None else batch
    length = getattr(loading, "max_tokens", None) if length is None else length
    try:
        if batch is None or length is None:
            raise ValueError(
                "the data does not say how large a batch is: give --batch and --length"
            )
        found = estimate(
            cli.model,
            batch,
            length,
            policy_of(trainer, sage_among([*as_list(trainer["callbacks"]), *brought])),
            precision=trainer["precision"],
            memory=cli.setting("memory") or _card(),
            loss_tokens=cli.setting("loss_tokens"),
            kept=cli.setting("kept"),
        )
    except ValueError as error:
        sys.exit(f"lightning-sage estimate: {error}")
    console = Console()
    if cli.setting("json"):
        print(json.dumps(found.as_dict()))  # noqa: T201 - what was asked for
        return
    console.print(estimate_table(found))
    for note in notes(found):
        console.print(note, highlight=False)


def _card() -> int | None:
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def size_text(size: int) -> str:
    """Bytes as people read them: three digits and a unit.

    Example:
        >>> size_text(3 * 2**29)
        '1.5 GiB'
    """
    value, unit = float(size), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {UNITS[unit]}"


def estimate_table(found: Estimate) -> Table:
    """One line for each method; what is the same for all stands above."""
    first = next(iter(found.footprints.values()))
    parts = ("weights", "gradients", "optimizer")
    same = ", ".join(f"{name} {size_text(getattr(first, name))}" for name in parts)
    table = Table(
        title=f"{found.batch} x {found.length} tokens, {found.precision}\n{same}",
        title_justify="left",
    )
    table.add_column("method", no_wrap=True)
    heads = ["kept", "saved for\nbackward", "replay", "total"]
    if found.memory is not None:
        heads += ["largest\nbatch", "largest\nlength"]
    for head in heads:
        table.add_column(head, justify="right")
    for one in found.footprints.values():
        cells = [_kept(one), *map(size_text, (one.saved, one.replay, one.total))]
        if found.memory is not None:
            most = max(TOKENS // found.length, 1), max(TOKENS // found.batch, 1)
            cells.append(_largest(one.largest_batch, most[0], None))
            cells.append(_largest(one.largest_length, most[1], found.positions))
        table.add_row(one.method, *cells)
    return table


def _kept(one: Footprint) -> str:
    if one.kept is None:
        return ""
    return f"{one.kept:.0%}{' *' if one.kept_by == 'flat attention' else ''}"


def _largest(size: int | None, most: int, positions: int | None) -> str:
    if not size:
        return "does not fit"
    # as long as the model takes; or nobody looked further
    return f"{size:,}{' #' if size == positions else '+' if size == most else ''}"


def notes(found: Estimate) -> list[str]:
    """What a reader of the table has to know."""
    said = []
    if any(one.kept_by == "flat attention" for one in found.footprints.values()):
        said.append(
            "* at most: depends on the attention of the model; --kept gives a share you measured"
        )
    if found.memory is not None:
        said.append(
            f"largest batch at {found.length} tokens, largest length at batch {found.batch}, on "
            f"{size_text(found.memory)} with nothing left for anything else"
        )
        lengths = [one.largest_length for one in found.footprints.values()]
        if found.positions is not None and found.positions in lengths:
            said.append("# as long as the model takes")
    if YOURS in found.footprints:
        said.append("yours: the policy of the configuration")
    return said
