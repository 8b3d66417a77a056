"""A user's script, for tests of launches: every rank writes down what its fits were.

`python launched.py FOLDER sage_ddp ddp ...` fits once with each of these strategies.
"""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

import zoo
from lightning_sage import SageCallback, SagePolicy
from tasks import QUIET, Task

POLICY = SagePolicy(keep=0.5, replay=None, sinks=1)


class Report(L.Callback):
    """Writes `PATH-RANK.pt`: weights before and after, and of each batch loss and rows by tokens.

    Args:
        path: Of the files, without rank and ending.
    """

    def __init__(self, path: str):
        self.path, self.replayed, self.losses, self.before = path, [], [], None

    def on_fit_start(self, trainer, pl_module):
        self.before = whole(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        [sage] = [c for c in trainer.callbacks if isinstance(c, SageCallback)]
        records = sage.installation.records
        self.replayed.append([r.rows.numel() / r.valid.sum().item() for r in records])
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer, pl_module):
        found = {"world": trainer.world_size, "before": self.before, "after": whole(pl_module)}
        found |= {"replayed": self.replayed, "losses": self.losses}
        torch.save(found, f"{self.path}-{trainer.global_rank}.pt")


def whole(module):
    state = module.state_dict().items()
    found = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state}
    return {name: x.detach().clone() for name, x in found.items()}


class Logging(Task):
    """Its loss is also for the process that asked for the fit."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        return loss


def fit(strategy, folder):
    """By its name; where it ends in a + with a SageCallback of ours."""
    torch.manual_seed(0)
    task = Logging(zoo.build("llama", dtype=torch.float32))
    report = Report(str(Path(folder) / strategy))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy.removesuffix("+"),
        max_epochs=1,
        log_every_n_steps=1,
        callbacks=[report, SageCallback(POLICY, fidelity_every_n_steps=0)]
        if strategy.endswith("+")
        else [report],
        **QUIET,
    )
    batch = zoo.make_batch("llama", size=8)
    rows = [{name: x[i] for name, x in batch.items()} for i in range(8)]
    trainer.fit(task, DataLoader(rows, batch_size=2, shuffle=True))
    return trainer, task


def main(folder, *strategies):
    warnings.simplefilter("ignore")
    for strategy in strategies:
        trainer, task = fit(strategy, folder)
        # what its user is left with
        metrics = {name: x.item() for name, x in trainer.callback_metrics.items()}
        found = {"after": whole(task), "metrics": metrics}
        torch.save(found, Path(folder) / f"{strategy}-user-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
