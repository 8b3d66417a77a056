"""Is the sparse gradient the right one? Its cosine with the dense one, and what training gains.

On the quickstart's pre-trained model and the standard library's text; pre-trains it first where
that has not been done. Prints two tables and appends one line of JSON a row:

    python examples/fidelity.py
    python examples/fidelity.py gradients    # the first table alone
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, circumstances, write
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from lightning_sage import AllTokens, ImportanceSampling, SagePolicy, install
from lightning_sage.cli import SageCLI
from lightning_sage.corpus import StdlibFunctions, StdlibWindows
from lightning_sage.data import Loading, TextModule

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
LENGTH, BATCH = 256, 8
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A training to compare methods on.

    Args:
        data: Where its batches come from.
        rank: Of LoRA on all linear layers; 0 trains every parameter.
        lr: AdamW's, after a warm-up of a tenth of the steps and before a linear decay to 0.
        steps: Training steps.
    """

    data: TextModule
    rank: int
    lr: float
    steps: int = 100


def labelled(ids: Tensor, loss: str) -> Batch:
    """A batch of windows with loss on some of the tokens."""
    first = {"last-quarter": LENGTH * 3 // 4, "last-token": LENGTH - 1, "all": 0}[loss]
    return {"input_ids": ids, "labels": torch.where(torch.arange(LENGTH) < first, -100, ids)}


def block_gradient(model: nn.Module, batch: Batch) -> Tensor:
    """Gradient of all block parameters, as one vector."""
    model.zero_grad()
    model(**batch).loss.backward()
    layers = model.get_submodule("model.layers")
    return torch.cat([p.grad.flatten() for p in layers.parameters() if p.grad is not None])


def cosines(model: nn.Module, batches: int = 8) -> Iterator[dict[str, Any]]:
    """Sparse against dense gradients, over validation windows."""
    rows = StdlibWindows(Loading(batch_size=BATCH, max_tokens=LENGTH)).rows("val")
    windows = rows[: batches * BATCH].split(BATCH)
    everything = AllTokens()
    for loss, policy in (
        ("last-quarter", SagePolicy(keep=0.25, replay=None)),
        ("last-quarter", SagePolicy(keep=0.25, replay=None, attention="full")),
        ("last-quarter", SagePolicy(keep=0.25, replay=None, cache_dtype="int8")),
        ("last-quarter", SagePolicy(keep=0.25, replay=None, cache_dtype="fp8")),
        ("last-quarter", SagePolicy(keep=0.25, replay=None, attention="full", cache_dtype="int8")),
        ("last-quarter", SagePolicy(keep=everything, replay=None, cache_dtype="int8")),
        ("last-quarter", SagePolicy(keep=everything, replay=None, cache_dtype="fp8")),
        ("last-quarter", SagePolicy(keep=everything, replay=0.25)),
        ("last-quarter", SagePolicy(keep=everything, replay=0.25, attention="full")),
        ("last-quarter", SagePolicy()),
        ("last-token", SagePolicy(keep=0.125, replay=None)),
        ("last-token", SagePolicy()),
        ("all", SagePolicy(keep=everything, replay=0.25)),
        ("all", SagePolicy(keep=everything, replay=ImportanceSampling(0.5))),
    ):
        found, kept, replayed, norms = [], [], [], []
        for ids in track(windows, f"{loss} {policy.keep!r}", transient=True):
            batch = labelled(ids, loss)
            dense = block_gradient(model, batch)
            with install(model, policy) as installed:
                sparse = block_gradient(model, batch)
                kept += [r.kept.float().mean().item() for r in installed.records]
                replayed += [r.replayed.float().mean().item() for r in installed.records]
            found.append(torch.cosine_similarity(sparse.double(), dense.double(), dim=0).item())
            norms.append((sparse.norm() / dense.norm()).item())
        held = "" if policy.cache_dtype is None else f", {policy.cache_dtype}"
        yield {
            "experiment": "cosine",
            "loss": loss,
            "policy": f"keep={policy.keep!r}, replay={policy.replay!r}, {policy.attention}{held}",
            "cosine": sum(found) / len(found),
            "worst_cosine": min(found),
            "norm_ratio": sum(norms) / len(norms),
            "kept": sum(kept) / len(kept),
            "replayed": sum(replayed) / len(replayed),
            "batches": batches,
        }


@torch.no_grad()
def validation_loss(model: nn.Module, batches: list[Batch]) -> float:
    """Mean over labelled tokens."""
    total = count = 0.0
    for batch in batches:
        labels = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * labels
        count += labels
    return total / count


def train(model: nn.Module, task: Task, policy: SagePolicy | None, name: str) -> float:
    """Validation loss after the task's steps; the same batches and draws for every method."""
    torch.manual_seed(0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=task.lr, weight_decay=0.0)
    rise = task.steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rise, (task.steps - step) / (task.steps - rise)),
    )
    loader = islice(cycle(task.data.train_dataloader()), task.steps)
    installed = None if policy is None else install(model, policy)
    try:
        for batch in track(loader, name, total=task.steps, transient=True):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
    finally:
        if installed is not None:
            installed.remove()
    return validation_loss(model, list(islice(task.data.val_dataloader(), 16)))


def gains(base: nn.Module) -> Iterator[dict[str, Any]]:
    """Validation loss after training, by method."""
    loading = Loading(batch_size=BATCH, max_tokens=LENGTH)
    everything = AllTokens()
    tasks = {
        "every token, full fine-tuning": (
            Task(StdlibFunctions("all", loading), rank=0, lr=3e-4),
            (
                None,
                SagePolicy(keep=everything, replay=ImportanceSampling(0.5)),
                SagePolicy(keep=everything, replay=ImportanceSampling(0.25)),
                SagePolicy(),
            ),
        ),
        "answer only, LoRA": (
            Task(StdlibFunctions(loading=loading), rank=16, lr=2e-3),
            (None, SagePolicy()),
        ),
    }
    for name, (task, policies) in tasks.items():
        task.data.setup("fit")
        start = validation_loss(base, list(islice(task.data.val_dataloader(), 16)))
        dense_gain = 0.0
        for policy in policies:
            model = copy.deepcopy(base)
            if task.rank:
                torch.manual_seed(0)
                lora = LoraConfig(r=task.rank, lora_alpha=32, target_modules="all-linear")
                model = get_peft_model(model, lora)
            shown = "dense"
            if policy is not None:
                shown = f"keep={policy.keep!r}, replay={policy.replay!r}"
            end = train(model, task, policy, f"{name}: {shown}")
            if policy is None:
                dense_gain = start - end
            yield {
                "experiment": "training",
                "task": name,
                "method": shown,
                "default": policy == SagePolicy(),
                "start": start,
                "end": end,
                "gain_of_dense": (start - end) / dense_gain,
                "lr": task.lr,
                "steps": task.steps,
            }


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """A table of records."""
    hidden = ("experiment", "batches", "lr", "steps", "default")
    columns = [name for name in rows[0] if name not in hidden]
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        values = (row[name] for name in columns)
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


def main() -> None:
    """Run both experiments."""
    console = Console(width=140)
    # Lightning's command line would take them for its own
    names, sys.argv[1:] = sys.argv[1:], []
    folder = SageCLI(["--config", str(QUICKSTART)], run=False).pretrained()
    base = AutoModelForCausalLM.from_pretrained(folder).train()
    parameters = sum(p.numel() for p in base.parameters())
    about = {"parameters": parameters, "batch": BATCH, "length": LENGTH} | circumstances("cpu")
    experiments = {"gradients": ("Gradients", cosines), "training": ("Training", gains)}
    for name in names or experiments:
        title, experiment = experiments[name]
        rows = list(experiment(base))
        write([row | about for row in rows], RESULTS / "fidelity.jsonl")
        show(console, title, rows)


if __name__ == "__main__":
    main()
