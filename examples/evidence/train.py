"""One fine-tuning by one method: one record."""

from __future__ import annotations

import hashlib
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import chain, islice, repeat
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from measure import circumstances, plain
from methods import METHODS
from scenarios import Scenario
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils import logging as hub_logging

from lightning_sage import SageCallback, SagePolicy
from lightning_sage.cli import NOISE
from lightning_sage.models import Batch, HuggingFaceModule

# bf16 is emulated on many CPUs, and takes minutes a step there
PRECISION = "32-true"
# of a run's training losses, as many are recorded
_CURVE = 20

Record = dict[str, Any]


class Losses(Callback):
    """The training losses of a fit."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step's."""
        self.values.append(outputs["loss"].detach())


def quiet() -> None:
    """Leave out what a user can do nothing about; who runs many fits need not hear it of each."""
    for message in (*NOISE, r"GPU available but not used", r"You defined a `validation_step`"):
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    hub_logging.set_verbosity_error()
    hub_logging.disable_progress_bar()


@cache
def data_of(scenario: Scenario) -> LightningDataModule:
    """The scenario's data, read once in a process."""
    data = scenario.data()
    data.setup("fit")
    return data


@cache
def val_batches(scenario: Scenario) -> list[Batch]:
    """What its methods are judged by."""
    return list(islice(data_of(scenario).val_dataloader(), scenario.val_batches))


def train_batches(scenario: Scenario, seed: int, steps: int) -> list[Batch]:
    """All batches of a run, before it draws anything: the same for every method."""
    data = data_of(scenario)
    seed_everything(seed, verbose=False)
    epochs = repeat(data.train_dataloader())
    return list(islice(chain.from_iterable(epochs), steps))


def fit(
    scenario: Scenario,
    module: HuggingFaceModule,
    batches: Sequence[Batch],
    callbacks: Sequence[Callback],
    seed: int,
) -> Trainer:
    """Build the module and train it, a step a batch, from the draws of the seed."""
    trainer = _trainer(len(batches), callbacks)
    seed_everything(seed, verbose=False)
    # before any callback could draw: adapters and heads are the same for every method
    module.configure_model()
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


def _trainer(steps: int, callbacks: Sequence[Callback] = ()) -> Trainer:
    return Trainer(
        accelerator="cpu", max_steps=steps, precision=PRECISION,
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[*callbacks],
    )  # fmt: skip


def start(scenario: Scenario, seed: int) -> dict[str, float]:
    """Metrics of validation before any training."""
    module = scenario.module(0.0, False)
    seed_everything(seed, verbose=False)
    module.configure_model()
    return judge(scenario, module, _trainer(0))


def judge(scenario: Scenario, module: HuggingFaceModule, trainer: Trainer) -> dict[str, float]:
    """The module's metrics of validation."""
    loader = DataLoader(val_batches(scenario), batch_size=None)
    [metrics] = trainer.validate(module, loader, verbose=False)
    return {name: float(value) for name, value in metrics.items()}


def base_of(module: HuggingFaceModule) -> str | None:
    """A checksum of the weights that a module starts from; None where there are none."""
    files = sorted(Path(module.name_or_path).glob("*.safetensors")) if module.name_or_path else []
    found = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return found.hexdigest()[:12] if files else None


def run(scenario: Scenario, method: str, lr: float, seed: int, steps: int | None = None) -> Record:
    """Train; what went wrong is in the record as well, as its `error`."""
    steps = steps or scenario.steps
    record = {**about(scenario, method), "kind": "train", "lr": lr, "seed": seed, "steps": steps}
    losses, policy = Losses(), METHODS[method]
    sage = [] if policy is None else [_callback(policy)]
    started = perf_counter()
    try:
        module = scenario.module(lr, method == "checkpointing")
        record["base"] = base_of(module)
        if method == "dense":
            record["start"] = start(scenario, seed)
        batches = train_batches(scenario, seed, steps)
        started = perf_counter()
        trainer = fit(scenario, module, batches, [losses, *sage], seed)
        record["seconds"] = perf_counter() - started
        metrics = judge(scenario, module, trainer)
        record["metrics"] = {name: _finite(value) for name, value in metrics.items()}
    # whatever it is, it is a result
    except Exception as error:
        record["error"] = repr(error)
    curve = [_finite(value.item()) for value in losses.values]
    record["train_losses"] = curve[:: max(1, steps // _CURVE)]
    # the mean of a validation leaves out what is not
    if not record["error"] and None in (*record["metrics"].values(), *curve):
        record["error"] = "not finite"
    for callback in sage:
        for name in ("kept_fraction", "replayed_fraction", "cached_mib"):
            record[name] = callback.summary.get(name)
    return record | circumstances("cpu")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def about(scenario: Scenario, method: str) -> Record:
    """What a record of this method says first."""
    policy = METHODS[method]
    return {
        "scenario": scenario.name,
        "title": scenario.title,
        "judged": scenario.judged,
        "method": method,
        "policy": None if policy is None else plain(policy),
        "precision": PRECISION,
        "command": sys.argv,
        "error": None,
    }


def _callback(policy: SagePolicy) -> SageCallback:
    # what a look costs is no part of a method's time
    return SageCallback(policy, fidelity_every_n_steps=0, measure_dense=False, print_summary=False)
