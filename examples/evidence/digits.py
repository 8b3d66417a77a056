"""Images that scikit-learn brings along, and a classifier of images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification

from lightning_sage.data import Row
from lightning_sage.loader import ResumableData, ResumableLoader
from lightning_sage.models import Batch, SequenceClassifier

SIZE = 32
Task = Literal["digits", "rotations"]


class Digits(ResumableData):
    """Handwritten digits; `pixel_values` ``[B, 1, SIZE, SIZE]``, of mean 0 and deviation 1.

    The same third, with equal shares of each digit, is for validation in both tasks.

    Args:
        task: `digits` tells the digits apart, `rotations` the quarter turns, of which each image
            is there with all four; they need no labels, and so are for pre-training.
        batch_size: Images of a batch.
    """

    def __init__(self, task: Task = "digits", batch_size: int = 32) -> None:
        super().__init__()
        if task not in get_args(Task):
            raise ValueError(f"task must be one of {', '.join(get_args(Task))}, got {task!r}")
        self.task = task
        self.batch_size = batch_size
        self._rows: dict[str, Any] = {}

    @property
    def classes(self) -> int:
        """How many there are to tell apart, for the model's `num_labels`."""
        return {"digits": 10, "rotations": 4}[self.task]

    def setup(self, stage: str) -> None:
        """Read and enlarge the images, once for all stages."""
        super().setup(stage)
        if self._rows:
            return
        small, digits = load_digits(return_X_y=True)
        small = torch.tensor(small, dtype=torch.float32).view(-1, 1, 8, 8)
        images = interpolate(small, (SIZE, SIZE), mode="bilinear")
        train, val = train_test_split(
            range(len(digits)), test_size=1 / 3, stratify=digits, random_state=0
        )
        images = (images - images[train].mean()) / images[train].std()
        for split, places in {"train": train, "val": val}.items():
            self._rows[split] = self._labelled(images[places], digits[places].tolist())

    def _labelled(self, images: Tensor, digits: list[int]) -> list[Row]:
        if self.task == "digits":
            pairs: Iterable[tuple[Tensor, int]] = zip(images, digits, strict=True)
        else:
            pairs = ((image.rot90(turn, (1, 2)), turn) for image in images for turn in range(4))
        return [{"pixel_values": image, "labels": label} for image, label in pairs]

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in a new random order each epoch."""
        return ResumableLoader(
            self._rows["train"], self.batch_size, shuffle=True, resume_from=self.resume_from()
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches in a fixed order."""
        return ResumableLoader(self._rows["val"], self.batch_size, shuffle=False)


class ImageClassifier(SequenceClassifier):
    """One class for an image; trains all weights, from random or pre-trained ones.

    A pre-trained head for another number of classes than `num_labels` in `config` starts anew.
    """

    auto_class = AutoModelForImageClassification

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The batch's loss."""
        loss = self.compute_loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def _load(self) -> Any:
        if self.name_or_path is None:
            return super()._load()
        return self.auto_class.from_pretrained(
            self.name_or_path,
            config=self.pretrained_config(),
            dtype=self.dtype_name,
            ignore_mismatched_sizes=True,
        )
