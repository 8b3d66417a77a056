"""The command line: `lightning-sage fit --config configs/quickstart.yaml`."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from filelock import FileLock
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from rich.console import Console

# imported for its names: a configuration may say StdlibFunctions for the whole path
from lightning_sage import corpus  # noqa: F401
from lightning_sage.models import (
    CausalLM,
    HuggingFaceModule,
    Optimization,
    has_passing_processes,
)
from lightning_sage.saving import SavePretrained
from lightning_sage.selections import Selection

# what a user can do nothing about, or need not
NOISE = [
    r".*treespec, LeafSpec.* is deprecated",  # Lightning's use of torch
    r"`is_gradient_checkpointing` is deprecated",  # PEFT's use of transformers
    r".*does not have many workers",  # tokenising a batch takes less than a training step
]


_OTHERS = (
    "lightning-sage compare, estimate and report are commands of their own: see "
    "lightning-sage compare --help"
)


@dataclass(frozen=True)
class Pretraining:
    """A dense training from random weights, done once and kept, from which the fit starts.

    Args:
        data: What to train on.
        optimization: Optimizer and learning rate.
        trainer: Arguments of its Trainer.
        directory: Where the model is kept, in a folder named by a checksum of these settings.
    """

    data: LightningDataModule
    optimization: Optimization
    trainer: dict[str, Any]
    directory: str


class _Parser(LightningArgumentParser):
    """Writes the selections that are defaults of a policy as what a configuration can hold."""

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        text: str = super().dump(_named_selections(cfg.clone()), *args, **kwargs)
        return text


def accept_arguments_of_fit(parser: LightningArgumentParser) -> None:
    """Take the configuration that a fit has written, where nothing is run that wants these."""
    for name in ("--ckpt_path", "--weights_only"):
        parser.add_argument(name, default=None, help="Of `fit`; not used.")


class SageCLI(LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule, with those of this package.

    Args:
        args: Arguments in place of the command line's.
        run: False only builds `model`, `datamodule` and `trainer`, with no subcommand in `args`.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_class=_Parser,
            parser_kwargs={"prog": "lightning-sage", "epilog": _OTHERS},
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What this command line adds to Lightning's."""
        parser.add_argument(
            "--pretrain",
            type=Pretraining | None,
            default=None,
            help="A dense training of the model's `config` from random weights, done once.",
        )
        parser.add_argument(
            "--compare_validation",
            type=bool,
            default=False,
            help="Validate before and after the fit and print both losses.",
        )

    def before_fit(self) -> None:
        """Pre-train or find what was pre-trained, then validate what the fit starts from."""
        if self.pretraining is not None:
            self.start_from(self.pretrained())
        if has_passing_processes(self.trainer) and isinstance(self.model, HuggingFaceModule):
            self.model.configure_model()
        if self._get(self.config_init, "compare_validation"):
            self._loss_before = self._validation_loss()
            self._say(f"before fine-tuning: validation loss {self._loss_before:.4f}")

    def after_fit(self) -> None:
        """Validate again and print both losses."""
        if self._get(self.config_init, "compare_validation"):
            before, after = self._loss_before, self._validation_loss()
            self._say(f"validation loss: {before:.4f} before, {after:.4f} after fine-tuning")

    @property
    def pretraining(self) -> Pretraining | None:
        """What `pretrain` says, with its data built."""
        settings: Pretraining | None = self._get(self.config_init, "pretrain")
        return settings

    def pretrained(self) -> Path:
        """Folder of the pre-trained model; trains it where there is none yet."""
        settings = self.pretraining
        if settings is None:
            raise ValueError("the configuration has no `pretrain`")
        folder = Path(settings.directory) / self._pretraining_key()
        folder.parent.mkdir(parents=True, exist_ok=True)
        # torchrun and SLURM start all processes at once: one trains, the others wait for it
        with FileLock(f"{settings.directory}.lock"):
            if folder.is_dir():
                self._say(f"pre-trained model found in {folder}")
            else:
                self._pretrain_into(folder, settings)
        return folder

    def _pretrain_into(self, folder: Path, settings: Pretraining) -> None:
        # not only rank zero: whoever came first
        self._print("pre-training a dense model, kept for the next run")
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        started = perf_counter()
        metrics = self._pretrain(settings, unfinished)
        unfinished.rename(folder)
        figures = "".join(f", {name} {value:.4f}" for name, value in metrics.items())
        self._print(f"pre-trained in {perf_counter() - started:.0f} s{figures}; kept in {folder}")

    def _pretrain(self, settings: Pretraining, folder: Path) -> dict[str, float]:
        self._seed()
        module = CausalLM(config=self._module().config, optimization=settings.optimization)
        trainer = Trainer(
            **{
                "accelerator": self._get(self.config_init, "trainer")["accelerator"],
                "devices": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_model_summary": False,
                **settings.trainer,
            },
            callbacks=[SavePretrained(str(folder))],
        )
        trainer.fit(module, settings.data)
        metrics = trainer.callback_metrics.items()
        return {name: float(value) for name, value in metrics if name.startswith("val_")}

    def _pretraining_key(self) -> str:
        """Checksum of what decides the pre-trained weights; the text is the interpreter's own."""
        settings = self._get(self.config, "pretrain").clone()
        settings.pop("directory")
        parts = [
            settings.as_dict(),
            self._module().config,
            self._get(self.config, "seed_everything"),
        ]
        text = repr([*parts, sys.version_info[:3]])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def start_from(self, folder: Path) -> None:
        """Let the model to be fine-tuned load its weights from `folder`."""
        self._module().name_or_path = str(folder)
        # as if there had been no pre-training: a second run draws the same numbers
        self._seed()

    def _module(self) -> HuggingFaceModule:
        if not isinstance(self.model, HuggingFaceModule):
            raise TypeError(f"pretrain needs a model of lightning_sage.models, got {self.model!r}")
        return self.model

    def _seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is not False:
            seed_everything(seed, verbose=False)

    def _validation_loss(self) -> float:
        metrics = self.trainer.validate(self.model, self.datamodule, verbose=False)
        return float(metrics[0]["val_loss"])

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero:
            self._print(text)

    def _print(self, text: str) -> None:
        # made anew: spawned processes get a copy of all this, and a console has none
        Console().print(text, soft_wrap=True, highlight=False)


def _named_selections(value: Any) -> Any:
    """`value` with every selection replaced by its class path and arguments."""
    if isinstance(value, Selection):
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        return Namespace(class_path=path, init_args=Namespace(**vars(value)))
    if isinstance(value, list):
        return [_named_selections(item) for item in value]
    if isinstance(value, Namespace):
        for name, item in vars(value).items():
            value[name] = _named_selections(item)
    return value


def main(args: ArgsType = None) -> None:
    """Run the command line; `args` stands in for the process's own arguments."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    SageCLI(args)
