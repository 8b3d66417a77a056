"""Reporter: tells loggers, the progress bar and the run's history what a fit does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sage.install import Installation
from lightning_sage.policy import SagePolicy
from lightning_sage.records import BlockRecord
from lightning_sage.watch.dial import setting
from lightning_sage.watch.history import NAME, VERSION, History
from lightning_sage.watch.meters import Meters
from lightning_sage.watch.monitor import Reading

# what is worth a look while it trains
_ON_PROGRESS_BAR = ("sage/kept_fraction", "sage/cached_mib")
_PACKAGES = ("lightning-sage", "torch", "transformers", "lightning")
# of the one sample whose tokens are written down
_MOST_TOKENS = 4096


class Reporter:
    """Writes to the loggers that the Trainer has, and to `sage.jsonl` in the first one's folder.

    Every rank has one, and all of them have to be told the same things; rank 0 writes.

    Args:
        trainer: The trainer; without a logger only the progress bar and `callback_metrics` are
            told.
        module: Its module.
        installation: SAGE on it.
        settings: What else the history's first line says.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        installation: Installation,
        settings: Mapping[str, Any],
    ) -> None:
        self._trainer, self._module, self._installation = trainer, module, installation
        # asked on all ranks: it is broadcast
        folder = trainer.log_dir if trainer.loggers else None
        # as a path, the address of a store would be a folder here
        here = folder is not None and "://" not in str(folder) and trainer.is_global_zero
        self._history = History(Path(str(folder)) / NAME) if here else None
        self._next_tokens = 0
        self._write("start", version=VERSION, **{**self._about(), **settings})

    def _about(self) -> dict[str, Any]:
        installation, parameters = self._installation, list(self._module.parameters())
        return {
            "blocks": list(installation.blocks),
            "world": self._trainer.world_size,
            "device": self._trainer.strategy.root_device.type,
            "precision": str(self._trainer.precision),
            "versions": versions(_PACKAGES),
            "model": _model_name(self._module),
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        }

    def _write(self, kind: str, **values: Any) -> None:
        if self._history is not None:
            self._history.write(kind, **values)

    def dense(self, measured: Mapping[tuple[int, int], int]) -> None:
        """What a dense step saves in each block, by its place and the number of its call."""
        by_block = Counter[int]()
        for (place, _), size in measured.items():
            by_block[place] += size
        if len(by_block) == len(self._installation.blocks):
            self._write("dense", bytes=[by_block[i] for i in sorted(by_block)])

    def readings(self, meters: Meters, on_step: bool = True) -> None:
        """Read the meters, and log what the steps since the last time did.

        Args:
            meters: What has counted them.
            on_step: Whether this is the end of a batch, and not of an epoch.
        """
        steps, readings = meters.steps, meters.read()
        self.log(readings.to_log(), on_step)
        self._write(
            "step",
            step=self._trainer.global_step,
            steps=steps,
            seconds=readings.seconds,
            loss=readings.loss,
            kept=readings.kept[1],
            replayed=readings.replayed[1],
            cached=readings.cached[1],
            saved=readings.saved,
            valid=readings.valid,
            peak={name: value for name, value in readings.peak.items() if name != "step"},
        )

    def fidelity(self, reading: Reading) -> None:
        """Log what a look at the gradient has shown."""
        self.log({f"fidelity_{name}": value for name, value in reading.values.items()})
        found = reading.values
        self._write(
            "fidelity",
            step=self._trainer.global_step,
            cosine=found["cosine"],
            norm_ratio=found["norm_ratio"],
            blocks={
                name: [found[f"cosine/{name}"], found[f"norm_ratio/{name}"]]
                for name in self._installation.blocks
                if f"cosine/{name}" in found
            },
            samples=reading.samples,
            setting=_setting(self._installation.policy),
        )

    def event(self, text: str) -> None:
        """Write down a decision."""
        self._write("event", step=self._trainer.global_step, text=text)

    def end(self, summary: Mapping[str, float]) -> None:
        """Write down the summary."""
        self._write("end", summary=dict(summary))

    def log(self, values: Mapping[str, float], on_step: bool = True) -> None:
        """Give numbers, the same on all ranks, to loggers, progress bar and `callback_metrics`."""
        named = {f"sage/{name}": value for name, value in values.items()}
        for shown in (True, False):
            part = {n: v for n, v in named.items() if (n in _ON_PROGRESS_BAR) == shown}
            # never the metric itself: Lightning wants logged metrics to be the module's own.
            # sync_dist only tells Lightning that it need not advise it
            self._module.log_dict(
                part, prog_bar=shown, logger=False, on_step=on_step, on_epoch=not on_step,
                batch_size=1, sync_dist=not on_step,
            )  # fmt: skip
        # past Lightning's own interval, as its ThroughputMonitor does
        # at the end of an epoch it is one ahead, for which Lightning makes up as well
        step = self._trainer.fit_loop.epoch_loop._batches_that_stepped - (not on_step)
        connector: Any = self._trainer._logger_connector
        connector.log_metrics(named, step=step)

    def tokens(self, batch: Any, records: Sequence[BlockRecord]) -> None:
        """Write down which tokens of a batch's first sample were kept, in ever fewer steps."""
        step = self._trainer.global_step
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        fits = isinstance(ids, Tensor) and ids.dim() == 2 and records
        if self._history is None or step < self._next_tokens or not fits:
            return
        assert isinstance(ids, Tensor)
        if any(r.replayed is None or r.kept.shape != ids.shape for r in records):
            return
        self._next_tokens = 2 * max(step, 1)
        labels = batch.get("labels")
        labelled = isinstance(labels, Tensor) and labels.shape == ids.shape
        tokenizer = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        shown = ids[0, :_MOST_TOKENS].tolist()
        try:
            text = texts(tokenizer, shown)
        except Exception:
            # of a library that we do not know
            text = texts(None, shown)
        self._write(
            "tokens",
            step=step,
            text=text,
            labels=_marks(labels != -100) if labelled else None,
            valid=_marks(records[0].valid),
            kept=[_marks(record.kept) for record in records],
            replayed=[_marks(r.replayed) for r in records if r.replayed is not None],
        )


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def plain(policy: SagePolicy) -> dict[str, Any]:
    """A policy's fields as what JSON can hold."""
    values = {f.name: getattr(policy, f.name) for f in fields(policy)}
    return {
        name: value if isinstance(value, str | int | float | bool | None) else repr(value)
        for name, value in values.items()
    }


def texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Text of each token by itself; numbers where there is no tokenizer."""
    if tokenizer is None:
        return [f" {i}" for i in ids]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    # a space before a word is lost where SentencePiece decodes the word alone
    return [
        (" " if isinstance(piece, str) and piece.startswith("\u2581") else "")
        + tokenizer.decode([i]).removeprefix(" " if str(piece).startswith("\u2581") else "")
        for i, piece in zip(ids, pieces, strict=True)
    ]


def _marks(mask: Tensor) -> str:
    """The first sample of a mask ``[B, T]``, a character a token."""
    return "".join("01"[value] for value in mask[0, :_MOST_TOKENS].tolist())


def _setting(policy: SagePolicy) -> float | None:
    """The number that fidelity_target moves, of `keep` before that of `replay`."""
    for selection in (policy.keeper, policy.replayer):
        if name := setting(selection):
            found: float = getattr(selection, name)
            return found
    return None


def _model_name(module: nn.Module) -> str:
    """The first part that can be saved as a model of its own, adapters aside; else the module."""
    found = (type(m) for m in module.modules() if hasattr(m, "save_pretrained"))
    models = (kind for kind in found if not kind.__module__.startswith("peft."))
    return next(models, type(module)).__name__
