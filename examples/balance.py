"""Ranks with texts of uneven length: how far apart their replays are, and what levelling costs.

Two processes fine-tune the quickstart's pre-trained model (pre-trained first where that has not
been done) with each kind of `balance`; prints a table and appends one line of JSON a row:

    python examples/balance.py
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from fidelity import QUICKSTART, show
from lightning.pytorch import Callback, LightningModule, Trainer
from measure import RESULTS, circumstances, write
from rich.console import Console
from rich.progress import track

from lightning_sage import SagePolicy, SageStrategy
from lightning_sage.callback import SageCallback
from lightning_sage.cli import SageCLI
from lightning_sage.corpus import StdlibFunctions
from lightning_sage.data import Loading
from lightning_sage.models import CausalLM, LoRA, Optimization

WORLD, STEPS, BATCH, LENGTH = 2, 60, 2, 512
KINDS: tuple[tuple[str, bool], ...] = (
    ("none", False),
    ("none", True),
    ("mean", True),
    ("max", True),
)


class Notes(Callback):
    """Writes what a rank's blocks kept and replayed in each step.

    Args:
        folder: One file a rank.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.started = perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Count rows, of a block on average."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        sage = next(c for c in callbacks if isinstance(c, SageCallback))
        assert sage.installation is not None
        records = sage.installation.records
        replayed = [record.replayed for record in records]
        self.steps.append(
            {
                "tokens": int(records[0].valid.sum()),
                "replayed": fmean(int(x.sum()) for x in replayed if x is not None),
                "seconds": perf_counter() - self.started,
            }
        )

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave it to the process that started the others."""
        text = json.dumps(self.steps)
        (self.folder / f"{trainer.global_rank}.json").write_text(text)


def train(folder: Path, kind: str, token_weighted: bool) -> dict[str, Any]:
    """One fit of all ranks."""
    module = CausalLM(str(folder), lora=LoRA(), optimization=Optimization(lr=2e-3))
    data = StdlibFunctions(loading=Loading(batch_size=BATCH, max_tokens=LENGTH))
    strategy = SageStrategy(
        SagePolicy(), balance=kind, token_weighted=token_weighted, start_method="fork"
    )
    with tempfile.TemporaryDirectory() as notes, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu", devices=WORLD, strategy=strategy, max_steps=STEPS,
            limit_val_batches=50, num_sanity_val_steps=0, val_check_interval=STEPS,
            gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[Notes(Path(notes))],
        )  # fmt: skip
        trainer.fit(module, data)
        files = (Path(notes) / f"{rank}.json" for rank in range(WORLD))
        by_rank = [json.loads(file.read_text()) for file in files]
    loss = float(trainer.callback_metrics["val_loss"])
    # the first step is not balanced, and checks
    steps = list(zip(*by_rank, strict=True))[1:]
    return {
        "experiment": "balance",
        "balance": kind,
        "by tokens": token_weighted,
        "spread of tokens": fmean(_spread(step, "tokens") for step in steps),
        "spread of rows": fmean(_spread(step, "replayed") for step in steps),
        "largest": max(_spread(step, "replayed") for step in steps),
        "replayed": fmean(fmean(x["replayed"] / x["tokens"] for x in step) for step in steps),
        "seconds": fmean(max(x["seconds"] for x in step) for step in steps),
        "val_loss": loss,
    }


def _spread(step: Any, name: str) -> float:
    """Largest less smallest of the ranks, over their mean."""
    values = [rank[name] for rank in step]
    return (max(values) - min(values)) / fmean(values)


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """One for each kind of balance."""
    for kind, token_weighted in track(KINDS, description="fits", console=Console(stderr=True)):
        yield train(folder, kind, token_weighted)


def main() -> None:
    """Run them all."""
    # Lightning's command line would take them for its own
    sys.argv[1:] = []
    folder = SageCLI(["--config", str(QUICKSTART)], run=False).pretrained()
    found = list(rows(folder))
    about = {"ranks": WORLD, "batch": BATCH, "length": LENGTH, "steps": STEPS}
    write([row | about | circumstances("cpu") for row in found], RESULTS / "balance.jsonl")
    show(Console(width=140), "Two ranks, texts of uneven length", found)


if __name__ == "__main__":
    main()
