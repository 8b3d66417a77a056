"""What does SAGE save on a vision-language model, and does it learn as well?

A small LLaVA (SigLIP tower, Llama, all of it trained) is shown pieces of a photograph and asked
which row or column of it they are from. It answers in a word, which alone bears loss: almost all
tokens are of pictures. The photograph comes with matplotlib. The model learns it densely first;
then the photograph is turned upside down, and each method fine-tunes the same weights by the same
batches. Every result is printed and appended as a line of JSON:

    python examples/vision_language.py
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import numpy
import torch
from jsonargparse import auto_cli
from lightning import LightningModule, Trainer, seed_everything
from matplotlib.cbook import get_sample_data
from measure import RESULTS, circumstances, write
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from lightning_sage import (
    AllTokens,
    ImportanceSampling,
    RandomTokens,
    SageCallback,
    SagePolicy,
    install,
)
from lightning_sage.compare.checkpointing import switch_on
from lightning_sage.memory import MIB, saved_bytes
from lightning_sage.metrics import KeptTokens

WORDS = ["<pad>", "<image>", "which", "row", "column", "?", "first", "second", "third"]
IMAGE, WHICH, ROW, FIRST, ASKED = 1, 2, 3, 6, 5
POLICIES = {
    "dense": None,
    "sage default": SagePolicy(),
    "sage keep=0.25": SagePolicy(keep=0.25),
}
# whose gradients are compared with the dense one, besides
CHOICES = {
    "keep=0.25, replay=None": SagePolicy(keep=0.25, replay=None),
    "the same, no sinks": SagePolicy(keep=0.25, replay=None, sinks=0, keep_last=False),
    "random": SagePolicy(keep=RandomTokens(0.25), replay=None),
    "replay=0.25": SagePolicy(keep=AllTokens(), replay=0.25),
    "drawn": SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.25)),
}


@dataclass(frozen=True)
class Command:
    """What is measured.

    Args:
        seeds: How many times each method trains.
        pretraining: Dense steps before; with 0, methods start from random weights.
        steps: Of a fine-tuning.
        rounds: Steps that are timed, of each method in turn.
        batch: Pieces in a batch.
        piece: Side of a piece in pixels; 8 by 8 of them are a token.
        width: Of the language model.
        judged: Pieces, none of them trained on, that the answers are counted on.
        lr: The highest learning rate.
        out: File to append the lines of JSON to.
    """

    seeds: int = 3
    pretraining: int = 400
    steps: int = 150
    rounds: int = 8
    batch: int = 8
    piece: int = 64
    width: int = 128
    judged: int = 512
    lr: float = 1e-3
    out: str = str(RESULTS / "vision_language.jsonl")


class Pieces(IterableDataset[dict[str, Tensor]]):
    """Batches of pieces of a photograph, each with a question and its answer.

    One place in five is never trained on, and is what the model is judged by.
    """

    def __init__(
        self, command: Command, seed: int, *, turned: bool = True, held_out: bool = False
    ) -> None:
        self.batch, self.piece = command.batch, command.piece
        self.seed, self.held_out = seed, held_out
        with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as photograph:
            shown = photograph.convert("RGB").resize((160, 188))
        upright = torch.from_numpy(numpy.array(shown)).permute(2, 0, 1) / 127.5 - 1
        self.photograph = upright.flip(1, 2) if turned else upright

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches without end."""
        draw = torch.Generator().manual_seed(self.seed)
        while True:
            yield self._asked(self._places(draw), draw)

    def _places(self, draw: torch.Generator) -> Tensor:
        """Upper left corners, ``[batch, 2]``."""
        room = torch.tensor(self.photograph.shape[1:]) - self.piece
        drawn = (torch.rand(16 * self.batch, 2, generator=draw) * room).long()
        apart = (drawn // 4).sum(1) % 5 == 0
        return drawn[apart == self.held_out][: self.batch]

    def _asked(self, places: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        size, count = self.piece, (self.piece // 8) ** 2
        pieces = [self.photograph[:, y : y + size, x : x + size] for y, x in places.tolist()]
        room = torch.tensor(self.photograph.shape[1:]) - size
        kind = torch.randint(2, (len(places), 1), generator=draw)
        answer = FIRST + (3 * places // room).gather(1, kind)
        asked = torch.full((len(places), count), IMAGE), torch.full_like(kind, WHICH), ROW + kind
        ids = torch.cat([*asked, torch.full_like(kind, ASKED), answer], dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, -1:] = answer
        return {"input_ids": ids, "labels": labels, "pixel_values": torch.stack(pieces)}


class VisionLanguage(LightningModule):
    """A LLaVA; nothing in it knows of SAGE."""

    def __init__(self, command: Command, steps: int) -> None:
        super().__init__()
        self.lr, self.steps = command.lr, steps
        tower = SiglipVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            image_size=command.piece, patch_size=8, vision_use_head=False,
        )  # fmt: skip
        text = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=command.width, intermediate_size=3 * command.width,
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=tower, text_config=text, image_token_id=IMAGE,
            vision_feature_layer=-1, vision_feature_select_strategy="full",
        )  # fmt: skip
        self.model = LlavaForConditionalGeneration(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss on the answers: everything else is labelled -100."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        """Every weight is trained, the tower's too."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.steps, pct_start=0.2
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    @torch.no_grad()
    def accuracy(self, batches: Sequence[dict[str, Tensor]]) -> float:
        """Share of the answers that are right."""
        self.eval()
        right = [
            self.model(**batch).logits[:, -2].argmax(-1) == batch["labels"][:, -1]
            for batch in batches
        ]
        return torch.cat(right).float().mean().item()


def some(pieces: Pieces, count: int) -> list[dict[str, Tensor]]:
    """The first batches."""
    return list(islice(pieces, count))


def fit(module: VisionLanguage, pieces: Pieces, policy: SagePolicy | None) -> dict[str, float]:
    """Train a module; returns what SAGE says of it at the end."""
    if not module.steps:
        return {}
    sage = [] if policy is None else [SageCallback(policy, print_summary=False)]
    trainer = Trainer(
        accelerator="cpu", max_steps=module.steps, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*sage],
    )  # fmt: skip
    trainer.fit(module, DataLoader(pieces, batch_size=None))
    return sage[0].summary if sage else {}


def pretrained(command: Command) -> VisionLanguage:
    """The model that knows the photograph as it is."""
    seed_everything(0, verbose=False)
    module = VisionLanguage(command, command.pretraining)
    fit(module, Pieces(command, 3000, turned=False), None)
    return module


def train(
    command: Command, base: VisionLanguage, name: str, seed: int
) -> tuple[dict[str, Any], VisionLanguage]:
    """One fine-tuning, and how well its model answers, before and after."""
    seed_everything(seed, verbose=False)
    module, policy = VisionLanguage(command, command.steps), POLICIES[name]
    if command.pretraining:
        module.load_state_dict(base.state_dict())
    unseen = some(Pieces(command, 1000, held_out=True), -(-command.judged // command.batch))
    before = module.accuracy(unseen)
    module.train()
    told = fit(module, Pieces(command, seed), policy)
    record = {
        "experiment": "training",
        "method": name,
        "seed": seed,
        "accuracy before": before,
        "accuracy": module.accuracy(unseen),
        "kept": told.get("kept_fraction"),
        "replayed": told.get("replayed_fraction"),
    }
    return record, module


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the tower's blocks and of the language model's, each as one vector."""
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    parts = {"tower": "vision_tower.encoder.layers", "text": "language_model.layers"}
    found = {
        part: [p.grad.flatten() for n, p in model.named_parameters() if where in n]
        for part, where in parts.items()
    }
    return {part: torch.cat(vectors) for part, vectors in found.items()}


def truth(command: Command, base: VisionLanguage) -> list[dict[str, Any]]:
    """Cosine between sparse and dense gradient where fine-tuning starts, mean of some batches."""
    model, batches = base.model.train(), some(Pieces(command, 4000), 8)
    dense = [gradients(model, batch) for batch in batches]
    rows = []
    policies = {name: policy for name, policy in POLICIES.items() if policy} | CHOICES
    for name, policy in policies.items():
        with install(model, policy):
            sparse = [gradients(model, batch) for batch in batches]
        pairs = list(zip(sparse, dense, strict=True))
        cosines = {
            part: fmean(cosine_similarity(x[part], y[part], dim=0).item() for x, y in pairs)
            for part in dense[0]
        }
        rows.append({"experiment": "gradients", "method": name} | cosines)
    return rows


def costs(command: Command, module: VisionLanguage, frozen: bool) -> list[dict[str, Any]]:
    """Bytes saved for backward, and seconds of a step, by each method in turn.

    Args:
        command: What is measured.
        module: A trained one: attention of random weights is flat, and keeps more.
        frozen: Whether the tower is.
    """
    module.train()
    for parameter in module.model.model.vision_tower.parameters():
        parameter.requires_grad_(not frozen)
    models = {name: deepcopy(module.model) for name in ("checkpointing", *POLICIES)}
    switch_on(models["checkpointing"], SagePolicy())
    installed = {n: install(models[n], policy) for n, policy in POLICIES.items() if policy}
    [batch] = some(Pieces(command, 2000), 1)
    saved, seconds, kept = {}, {name: [] for name in models}, {}
    for turn in range(1 + command.rounds):
        for name, model in models.items():
            started = perf_counter()
            there = [*model.parameters(), *model.buffers(), *batch.values()]
            # the first turn, off the clock, counts; it also checks the blocks
            with saved_bytes(there) if turn == 0 else nullcontext() as held:
                loss = model(**batch).loss
                if held is not None:
                    saved[name] = held() / MIB
            loss.backward()
            if turn:
                seconds[name].append(perf_counter() - started)
            model.zero_grad(set_to_none=True)
    for name, installation in installed.items():
        metric = KeptTokens()
        metric.update(installation.records)
        kept[name] = metric.compute().item()
    return [
        {
            "experiment": "costs",
            "tower": "frozen" if frozen else "trained",
            "method": name,
            "saved MiB": saved[name],
            "saved / dense": saved[name] / saved["dense"],
            "step s": median(seconds[name]),
            "step / dense": median(seconds[name]) / median(seconds["dense"]),
            "kept": kept.get(name),
        }
        for name in ("dense", "checkpointing", *installed)
    ]


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table of records."""
    columns = [name for name in rows[0] if name != "experiment"]
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        values = ("" if row[name] is None else row[name] for name in columns)
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train by each method with each seed, then measure a step of a trained model."""
    command = auto_cli(Command, as_positional=False, args=arguments)
    tokens = (command.piece // 8) ** 2
    about = {k: v for k, v in asdict(command).items() if k not in ("seeds", "out")}
    about |= {"image tokens": tokens, "text tokens": 4} | circumstances("cpu")
    trained, module, base = [], None, pretrained(command)
    rows = truth(command, base)
    write([row | about for row in rows], Path(command.out))
    show("Cosine of the gradient with the dense one", rows)
    for seed, name in product(range(command.seeds), POLICIES):
        record, last = train(command, base, name, seed)
        module = last if module is None else module
        trained.append(record)
        write([record | about], Path(command.out))
    show("Answers about pieces that were not trained on", trained)
    assert module is not None
    for frozen in (False, True):
        rows = costs(command, module, frozen)
        write([row | about for row in rows], Path(command.out))
        show(f"A step with the tower {'frozen' if frozen else 'trained'}", rows)


if __name__ == "__main__":
    main()
