"""One method of a comparison, in a process of its own: the user's configuration for some steps."""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.cli import LightningArgumentParser

from lightning_sage.callback import SageCallback
from lightning_sage.cli import Pretraining, SageCLI, accept_arguments_of_fit
from lightning_sage.compare.callbacks import ContestMeter, Turns
from lightning_sage.compare.turns import Parent, Task
from lightning_sage.configured import as_list, policy_of, sage_among
from lightning_sage.models import HuggingFaceModule
from lightning_sage.policy import PRESETS, SagePolicy
from lightning_sage.saving import SavePretrained
from lightning_sage.watch.reporter import plain, versions

BASELINES = ("dense", "checkpointing")
_PACKAGES = ("lightning-sage", "torch", "lightning", "transformers", "peft", "triton")
# what needs a logger, a validation or an end of its own, tries steps, writes files, or is SAGE
_LEFT_OUT = (
    BatchSizeFinder,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    SageCallback,
    SavePretrained,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
)
_OWN_TRAINER: dict[str, Any] = {
    "num_nodes": 1,
    "strategy": "auto",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": -1,
    "max_time": None,
    "min_epochs": None,
    "min_steps": None,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "val_check_interval": None,
    "check_val_every_n_epoch": 1,
    "fast_dev_run": False,
    "barebones": False,
    "profiler": None,
}


class ContestCLI(SageCLI):
    """The user's model, data and trainer, with one method in it and nothing that gets in its way.

    Args:
        task: What is compared.
        parent: Who gives turns.

    Attributes:
        own: The configuration's own policy; None where it has no SAGE.
        policy: The method's; None for dense training and checkpointing.
        meter: What measures it.
        notes: What is not as the configuration says.
        pretrained_now: Whether a pre-training was not found but done.

    Raises:
        ValueError: The method is `yours` and the configuration has no SAGE.
    """

    def __init__(self, task: Task, parent: Parent) -> None:
        self.task, self.parent = task, parent
        self.own: SagePolicy | None = None
        self.policy: SagePolicy | None = None
        self.notes: list[str] = []
        self.pretrained_now = False
        super().__init__(task.args, run=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """A fit's own configuration is one to compare as well."""
        super().add_arguments_to_parser(parser)
        accept_arguments_of_fit(parser)

    @property
    def seed(self) -> int:
        """The configuration's, or 0."""
        seed = self._get(self.config, "seed_everything")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else 0

    @property
    def presets(self) -> dict[str, SagePolicy]:
        """For the blocks that the configuration names."""
        blocks = None if self.own is None else self.own.blocks
        return {name: replace(policy, blocks=blocks) for name, policy in PRESETS.items()}

    @property
    def yours(self) -> str | None:
        """The preset that the own policy is, else `yours`; None where there is none."""
        if self.own is None:
            return None
        return next((name for name, p in self.presets.items() if p == self.own), "yours")

    def before_instantiate_classes(self) -> None:
        """No configuration is written down: the record holds it."""
        self.save_config_callback = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """For one device and some steps, with the method's callback only."""
        given = self._get(self.config_init, "trainer")
        listed, brought = as_list(given["callbacks"]), as_list(self.model.configure_callbacks())
        own = sage_among([*listed, *brought])
        self.own = policy_of(given, own)
        self.policy = self._policy()
        sage = None if self.policy is None else self._sage(own)
        checkpoint = self.own or SagePolicy() if self.task.method == "checkpointing" else None
        self.meter = ContestMeter(self.task.steps, self.seed, sage, checkpoint)
        self.notes = _one_device(given) + _unmoved(own)
        kept = [c for c in listed if not isinstance(c, _LEFT_OUT)]
        mine = [c for c in brought if not isinstance(c, _LEFT_OUT)]
        self.model.configure_callbacks = lambda: mine
        turns = Turns(self.parent, self.meter, self.task.turn)
        callbacks = [turns, *kept, *([sage] if sage else []), self.meter]
        settings = {
            "devices": _first_device(given["devices"]),
            "max_steps": self.task.steps,
            "default_root_dir": self.task.folder,
            "callbacks": callbacks,
        }
        return super().instantiate_trainer(**_OWN_TRAINER, **settings, **kwargs)

    def _policy(self) -> SagePolicy | None:
        if self.task.method in BASELINES:
            return None
        if self.task.method != "yours":
            return self.presets[self.task.method]
        if self.own is None:
            raise ValueError(
                "method 'yours' is the policy of the configuration's SageCallback, and it has "
                "none: add one, or leave 'yours' out of --methods"
            )
        return self.own

    def _sage(self, own: SageCallback | None) -> SageCallback:
        return SageCallback(
            self.policy,
            fidelity_every_n_steps=max(1, self.task.steps // 5),
            # a low one stands in the table
            fidelity_floor=0.0,
            measure_dense=False,
            print_summary=False,
            check_gradients=own is None or own.check_gradients,
            allow_untested=own is not None and own.allow_untested,
        )

    def _pretrain_into(self, folder: Path, settings: Pretraining) -> None:
        self.pretrained_now = True
        super()._pretrain_into(folder, settings)

    def fit(self) -> None:
        """Run the steps."""
        if self.pretraining is not None:
            self.start_from(self.pretrained())
            if self.pretrained_now:
                return
        if isinstance(self.model, HuggingFaceModule):
            self.model.gradient_checkpointing = False
        # as every method does: model and order of batches are drawn from it
        seed_everything(self.seed, workers=True, verbose=False)
        self.trainer.fit(self.model, self.datamodule)

    def circumstances(self) -> dict[str, Any]:
        """What is known before the first step."""
        device, policy = self.trainer.strategy.root_device, self.policy
        cuda = device.type == "cuda"
        # written as JSON: tuples and paths become what a reader gets back
        config = json.loads(self.parser.dump(self.config, format="json", skip_check=True))
        return {
            "name": self.task.method,
            "own": self.yours,
            "policy": None if policy is None else plain(policy),
            "arguments": self.task.args,
            "config": config,
            "model": type(self.model).__name__,
            "steps": self.task.steps,
            "turn": self.task.turn,
            "seed": self.seed,
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "precision": str(self.trainer.precision),
            "device_type": device.type,
            "device": torch.cuda.get_device_name(device) if cuda else device.type,
            "threads": torch.get_num_threads(),
            "python": ".".join(map(str, sys.version_info[:3])),
            "versions": versions(_PACKAGES),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "notes": self.notes,
        }


def _unmoved(own: SageCallback | None) -> list[str]:
    """What moves policies during a fit is left out: it would be another method."""
    moving = [] if own is None else own.settings.moving
    return [f"without the configuration's {' and '.join(moving)}"] if moving else []


def _first_device(devices: Any) -> Any:
    if isinstance(devices, str) and "," in devices:
        devices = [int(part) for part in devices.split(",") if part.strip()]
    return devices[:1] if isinstance(devices, list) else 1


def _one_device(trainer: Any) -> list[str]:
    """Whether the configuration says anything else."""
    usual = {"devices": ("auto", 1, "1", -1, "-1"), "num_nodes": (1,), "strategy": ("auto",)}
    other = [
        f"{name}={_word(trainer[name])}"
        for name, values in usual.items()
        if isinstance(trainer[name], list) or trainer[name] not in values
    ]
    if trainer["devices"] in ("auto", -1, "-1") and torch.cuda.device_count() > 1:
        other.append(f"devices={trainer['devices']}")
    return [f"one device, not {', '.join(other)}"] if other else []


def _word(value: Any) -> str:
    return str(value) if isinstance(value, str | int | list) else type(value).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no room for a tensor."""
    # the host's allocator raises no class of its own
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def main() -> None:
    """Run the method that standard input asks for, and say on standard output how it went.

    What goes wrong while the configuration is read is left to the interpreter to tell, and so is
    what goes wrong before the first step of dense training: it has nothing to do with the method.
    """
    parent = Parent()
    cli = ContestCLI(parent.task(), parent)
    parent.tell("built", record=cli.circumstances())
    try:
        cli.fit()
        if cli.pretrained_now:
            parent.tell("again")
            return
        record = {"status": "ok", **cli.meter.result(cli.trainer.strategy.root_device)}
    except Exception as error:
        memory = is_out_of_memory(error)
        if cli.task.method == "dense" and not parent.turns and not memory:
            raise
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        record = {"status": "oom" if memory else "failed", "error": text}
    parent.tell("result", record={**record, "turns": parent.turns})


if __name__ == "__main__":
    main()
