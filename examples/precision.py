"""Do the loss curves of SAGE in half and mixed precision stay with those of dense float32?

A byte-level Llama of about a million parameters is pre-trained on source code, densely and in
float32, once for each of two seeds. Then it learns to write function bodies, every weight trained,
on the same batches in every run. Prints a table and appends one line of JSON a run:

    python examples/precision.py

Three differences are told apart: what the method does (SAGE less dense in 32-true), what the
precision does (either method less itself in 32-true), and what another seed does to dense
training in 32-true: the noise they are held against. Validation is in float32 for all. Float16 is
most of the time it takes: few CPUs can multiply it.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, Literal

import lightning.pytorch as L
import torch
from fidelity import Batch, validation_loss
from jsonargparse import auto_cli
from lightning.pytorch.plugins import MixedPrecision
from measure import RESULTS, circumstances, write
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_sage import SageCallback
from lightning_sage.corpus import StdlibFunctions, StdlibWindows
from lightning_sage.data import Loading
from lightning_sage.models import CausalLM, Optimization

Precision = Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class Command:
    """What every run shares.

    Args:
        pretraining: Optimizer steps on windows of source code, one batch each.
        steps: The same, on functions.
        batch: Windows or functions in a batch.
        length: Tokens of a window, and of the longest function.
        width: Of the hidden states.
        blocks: Number of blocks.
        pretraining_lr: AdamW's, after a warm-up of a tenth of the steps and before a cosine decay
            to 0.
        lr: The same, on functions.
        last: Steps whose mean is the final loss.
        validation: Batches to validate on.
        out: File to append the JSON lines to.
    """

    pretraining: int = 150
    steps: int = 80
    batch: int = 4
    length: int = 256
    width: int = 128
    blocks: int = 4
    pretraining_lr: float = 2e-3
    lr: float = 1e-3
    last: int = 20
    validation: int = 32
    out: str = str(RESULTS / "precision.jsonl")


@dataclass(frozen=True)
class Run:
    """One training; the seed is that of its weights before pre-training, and of SAGE's draws."""

    method: Literal["dense", "sage"]
    precision: Precision
    seed: int = 0


RUNS = (
    Run("dense", "32-true"),
    Run("dense", "32-true", seed=1),
    Run("sage", "32-true"),
    Run("sage", "32-true", seed=1),
    Run("dense", "bf16-true"),
    Run("sage", "bf16-true"),
    Run("dense", "bf16-mixed"),
    Run("sage", "bf16-mixed"),
    Run("dense", "16-mixed"),
    Run("sage", "16-mixed"),
)


class Curve(L.Callback):
    """The loss of every step, and how often the loss scale had to come down."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.skipped = 0
        self._scale = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Read them."""
        self.losses.append(outputs["loss"].item())
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.skipped += scaler.get_scale() < self._scale
            self._scale = scaler.get_scale()


@dataclass(frozen=True)
class Data:
    """Batches to pre-train on, to train on and to validate on."""

    windows: list[Batch]
    training: list[Batch]
    validation: list[Batch]


def load(command: Command) -> Data:
    """The same for every run."""
    loading = Loading(batch_size=command.batch, max_tokens=command.length)
    windows, functions = StdlibWindows(loading), StdlibFunctions(loading=loading)
    torch.manual_seed(0)
    for data in (windows, functions):
        data.setup("fit")
    return Data(
        list(islice(windows.train_dataloader(), command.pretraining)),
        list(islice(functions.train_dataloader(), command.steps)),
        list(islice(functions.val_dataloader(), command.validation)),
    )


def build(command: Command, seed: int, lr: float) -> CausalLM:
    """The model, its weights drawn in float32 whatever it is trained in."""
    config = {
        "model_type": "llama",
        "vocab_size": 259,
        "hidden_size": command.width,
        "intermediate_size": 3 * command.width,
        "num_hidden_layers": command.blocks,
        "num_attention_heads": command.width // 32,
        "num_key_value_heads": command.width // 64,
        "max_position_embeddings": command.length,
        "initializer_range": command.width**-0.5,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    module = CausalLM(config=config, optimization=Optimization(lr=lr, warmup=0.1))
    module.configure_model()
    return module


def settings(precision: Precision) -> dict[str, Any]:
    """Of the Trainer."""
    if precision == "16-mixed":
        # asked by name, Lightning takes bfloat16 on a CPU
        scaler = torch.amp.GradScaler("cpu")
        return {"plugins": [MixedPrecision(precision, "cpu", scaler)]}
    return {"precision": precision}


def fit(
    module: CausalLM, batches: list[Batch], name: str, callbacks: list[L.Callback], **options: Any
) -> None:
    """One pass over the batches."""
    quiet = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=len(batches),
        gradient_clip_val=1.0,
        callbacks=callbacks,
        **dict.fromkeys(quiet, False),
        **options,
    )
    trainer.fit(module, track(batches, name, transient=True))


def pretrained(seed: int, command: Command, data: Data) -> dict[str, Tensor]:
    """Weights that runs of this seed start from."""
    module = build(command, seed, command.pretraining_lr)
    fit(module, data.windows, f"pre-training, seed {seed}", [])
    return module.state_dict()


def train(run: Run, command: Command, data: Data, start: dict[str, Tensor]) -> dict[str, Any]:
    """The record of a run."""
    module, curve = build(command, run.seed, command.lr), Curve()
    module.load_state_dict(start)
    loss_before = validation_loss(module.model, data.validation)
    sage = SageCallback(measure_dense=False, print_summary=False)
    callbacks = [curve] if run.method == "dense" else [curve, sage]
    torch.manual_seed(run.seed)
    name, started = f"{run.method} {run.precision}, seed {run.seed}", perf_counter()
    fit(module, data.training, name, callbacks, **settings(run.precision))
    seconds = perf_counter() - started
    return {
        "experiment": "precision",
        **asdict(run),
        **{name: value for name, value in asdict(command).items() if name != "out"},
        "parameters": sum(p.numel() for p in module.parameters()),
        "policy": repr(sage.policy) if run.method == "sage" else None,
        "final_loss": fmean(curve.losses[-command.last :]),
        "validation_loss": validation_loss(module.model.float(), data.validation),
        "validation_loss_before": loss_before,
        "skipped_steps": curve.skipped,
        "kept_fraction": sage.summary.get("kept_fraction"),
        "replayed_fraction": sage.summary.get("replayed_fraction"),
        "seconds": seconds,
        "losses": curve.losses,
        **circumstances("cpu"),
        "lightning": version("lightning"),
    }


def differences(records: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Of each record to dense training in 32-true, seed 0, and to its own method in 32-true.

    Returns:
        For either: `curve`, the mean distance of the losses of a step; `final` and `validation`,
        how much higher the loss is.
    """
    known = {(r["method"], r["precision"], r["seed"]): r for r in records}
    found = []
    for record in records:
        of: dict[str, float] = {}
        for name, method in (("dense", "dense"), ("single", record["method"])):
            base = known[method, "32-true", 0]
            pairs = zip(record["losses"], base["losses"], strict=True)
            of[f"{name}_curve"] = fmean(abs(x - y) for x, y in pairs)
            of[f"{name}_final"] = record["final_loss"] - base["final_loss"]
            of[f"{name}_validation"] = record["validation_loss"] - base["validation_loss"]
        found.append(of)
    return found


def show(records: Sequence[dict[str, Any]]) -> Table:
    """The table."""
    table = Table(
        *("method", "precision", "seed", "last\nsteps", "vali-\ndation"),
        *("off dense:\na step", "last\nsteps", "vali-\ndation"),
        *("off itself:\na step", "last\nsteps", "vali-\ndation"),
        *("steps\nskipped", "s a\nstep"),
        title="Losses, and how far off dense training, and off the same method, in 32-true",
        caption="a step: mean distance; the second row, another seed, is the noise",
        title_justify="left",
        caption_justify="left",
    )
    for record, of in zip(records, differences(records), strict=True):
        table.add_row(
            *(record["method"], record["precision"], str(record["seed"])),
            *(f"{record[name]:.3f}" for name in ("final_loss", "validation_loss")),
            *(f"{value:.3f}" if "curve" in name else f"{value:+.3f}" for name, value in of.items()),
            str(record["skipped_steps"]),
            f"{record['seconds'] / record['steps']:.2f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all, append the records, print the table."""
    command = auto_cli(Command, as_positional=False, args=arguments)
    # which accelerators there are not, once a run
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data, records = load(command), []
    starts = {seed: pretrained(seed, command, data) for seed in sorted({run.seed for run in RUNS})}
    for run in RUNS:
        records.append(train(run, command, data, starts[run.seed]))
        write(records[-1:], Path(command.out))
    Console(width=140).print(show(records))


if __name__ == "__main__":
    main()
