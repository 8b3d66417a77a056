"""LightningDataModules for text of your own: prompts with answers, and labelled texts."""

from __future__ import annotations

import csv
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, ByT5Tokenizer

from lightning_sage.loader import ResumableData, ResumableLoader

# the label that cross entropy leaves out
IGNORED = -100

Split = Literal["train", "val"]
Row = Mapping[str, Any]
Example = dict[str, Any]


@dataclass(frozen=True)
class HubRows:
    """Rows of a Hugging Face data set; needs the extra `lightning-sage[data]`.

    Args:
        name: Name on the hub, or a local folder.
        split: Split, slices allowed: ``train[:1000]``.
        subset: Configuration of the data set, where it has several.
    """

    name: str
    split: str
    subset: str | None = None


@dataclass(frozen=True)
class Loading:
    """How text becomes batches.

    Args:
        tokenizer: Name or folder for AutoTokenizer; `bytes` is built in and needs no file.
        batch_size: Rows of a batch.
        max_tokens: Longer rows are cut.
        padding_side: Where a row shorter than the longest of its batch is filled.
        num_workers: Processes that tokenise ahead; 0 does it in the training process.
    """

    tokenizer: str = "bytes"
    batch_size: int = 8
    max_tokens: int = 256
    padding_side: Literal["right", "left"] = "right"
    num_workers: int = 0

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to predict."""
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, got {self.max_tokens}")
        if self.padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be right or left, got {self.padding_side!r}")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of this name or folder; `bytes` is ByT5's 256 bytes, padding and end."""
    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        # masked in attention and in labels, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_rows(source: str | HubRows, fields: Sequence[str]) -> list[Row]:
    """Rows of a .jsonl, .csv or .txt file (its lines, as `text`) or of a data set.

    Raises:
        ValueError: The file is of another kind, or a row lacks one of `fields`.
        ImportError: A data set is asked for and `datasets` is not installed.
    """
    rows = _hub_rows(source) if isinstance(source, HubRows) else _file_rows(Path(source))
    for number, row in enumerate(rows, 1):
        if missing := [field for field in fields if row.get(field) is None]:
            raise ValueError(
                f"row {number} of {source} has no {', '.join(missing)}; it has {', '.join(row)}"
            )
    return rows


def _file_rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        match path.suffix:
            case ".jsonl":
                return [json.loads(line) for line in file if line.strip()]
            case ".csv":
                return list(csv.DictReader(file))
            case ".txt":
                return [{"text": line.rstrip("\r\n")} for line in file if line.strip()]
    raise ValueError(
        f"{path}: expected a .jsonl, .csv or .txt file; a data set is given as name and split"
    )


def _hub_rows(source: HubRows) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{source.name} needs the datasets package: pip install 'lightning-sage[data]'"
        ) from error
    return list(load_dataset(source.name, source.subset, split=source.split))


def encode_answer(
    row: tuple[str, str], tokenizer: Any, max_tokens: int, loss_on: Literal["answer", "all"]
) -> Example:
    """Ids and labels of a (prompt, answer): begin token, prompt, answer, end token.

    Labels are the ids (models shift them), `IGNORED` up to the answer where `loss_on` says so. What
    is too long loses the start of the prompt and the end of the answer, which keeps at least
    half of `max_tokens`.
    """
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in row)
    begin = [t for t in [tokenizer.bos_token_id] if t is not None]
    answer = answer + [t for t in [tokenizer.eos_token_id] if t is not None]
    answer = answer[: max(max_tokens - len(begin) - len(prompt), max_tokens // 2)]
    room = max_tokens - len(begin) - len(answer)
    prompt = begin + prompt[max(len(prompt) - room, 0) :]
    ids = prompt + answer
    hidden = len(prompt) if loss_on == "answer" else 0
    return {"input_ids": ids, "labels": [IGNORED] * hidden + ids[hidden:]}


def pad(examples: Sequence[Example], pad_id: int, side: Literal["right", "left"]) -> Example:
    """A batch: `input_ids`, `attention_mask`, `labels`, each ``[B, T]``; class labels ``[B]``."""
    width = max(len(example["input_ids"]) for example in examples)
    columns = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    batch = {name: torch.full((len(examples), width), fill) for name, fill in columns.items()}
    for i, example in enumerate(examples):
        length = len(example["input_ids"])
        place = slice(width - length, width) if side == "left" else slice(length)
        batch["input_ids"][i, place] = torch.as_tensor(example["input_ids"])
        batch["attention_mask"][i, place] = 1
        if not isinstance(example["labels"], int):
            batch["labels"][i, place] = torch.as_tensor(example["labels"])
    if isinstance(examples[0]["labels"], int):
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    return batch


class TextModule(ResumableData):
    """Rows read once, tokenised and padded batch by batch.

    Args:
        loading: How text becomes batches.
    """

    def __init__(self, loading: Loading | None = None) -> None:
        super().__init__()
        self.loading = loading or Loading()
        self._rows: dict[str, Any] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded at first use."""
        return load_tokenizer(self.loading.tokenizer)

    @abstractmethod
    def rows(self, split: Split) -> Any:
        """A sequence of what :meth:`encode` takes, in an order of no meaning."""

    @abstractmethod
    def encode(self, row: Any) -> Example:
        """`input_ids` and `labels` of one row."""

    def setup(self, stage: str) -> None:
        """Read the rows, once for all stages."""
        super().setup(stage)
        splits: tuple[Split, ...] = ("train", "val")
        for split in splits:
            if split not in self._rows:
                self._rows[split] = self.rows(split)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in a new random order each epoch."""
        return self._loader("train", shuffle=True, resume_from=self.resume_from())

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches in a fixed order."""
        return self._loader("val", shuffle=False)

    def _loader(
        self, split: str, shuffle: bool, resume_from: dict[str, Any] | None = None
    ) -> DataLoader[Any]:
        return ResumableLoader(
            self._rows[split],
            batch_size=self.loading.batch_size,
            shuffle=shuffle,
            resume_from=resume_from,
            num_workers=self.loading.num_workers,
            persistent_workers=self.loading.num_workers > 0,
            collate_fn=self.collate,
        )

    def collate(self, rows: Sequence[Any]) -> Example:
        """A padded batch of these rows."""
        examples = [self.encode(row) for row in rows]
        return pad(examples, self.tokenizer.pad_token_id, self.loading.padding_side)


class AnswerData(TextModule):
    """Prompts with answers, or plain text, for causal language models.

    Args:
        train: A .jsonl, .csv or .txt file, or a data set.
        val: The same, for validation.
        prompt_field: Field with what is given; None where there is only text to be continued.
        answer_field: Field with what is to be written.
        loss_on: `answer` learns to write answers only, `all` the prompts too.
        loading: How text becomes batches.
    """

    def __init__(
        self,
        train: str | HubRows,
        val: str | HubRows,
        prompt_field: str | None = "prompt",
        answer_field: str = "answer",
        loss_on: Literal["answer", "all"] = "answer",
        loading: Loading | None = None,
    ) -> None:
        super().__init__(loading)
        self.sources = {"train": train, "val": val}
        self.prompt_field = prompt_field
        self.answer_field = answer_field
        self.loss_on = loss_on

    def rows(self, split: Split) -> list[Row]:
        """See :func:`TextModule.rows`."""
        fields = [field for field in (self.prompt_field, self.answer_field) if field is not None]
        return read_rows(self.sources[split], fields)

    def encode(self, row: Row) -> Example:
        """See :func:`encode_answer`."""
        prompt = "" if self.prompt_field is None else row[self.prompt_field]
        pair = (prompt, row[self.answer_field])
        return encode_answer(pair, self.tokenizer, self.loading.max_tokens, self.loss_on)


class LabelData(TextModule):
    """Labelled texts for sequence classification.

    Args:
        train: A .jsonl, .csv or .txt file, or a data set.
        val: The same, for validation.
        text_field: Field with the text.
        label_field: Field with the class, an integer from 0 or one of `classes`.
        classes: Names of the classes, in the order of their numbers, where the field holds names.
        loading: How text becomes batches.
    """

    def __init__(
        self,
        train: str | HubRows,
        val: str | HubRows,
        text_field: str = "text",
        label_field: str = "label",
        classes: list[str] | None = None,
        loading: Loading | None = None,
    ) -> None:
        super().__init__(loading)
        self.sources = {"train": train, "val": val}
        self.text_field = text_field
        self.label_field = label_field
        self.classes = classes

    def rows(self, split: Split) -> list[Row]:
        """See :func:`TextModule.rows`."""
        return read_rows(self.sources[split], [self.text_field, self.label_field])

    def encode(self, row: Row) -> Example:
        """The text's ids, with the tokenizer's own special tokens, and the number of its class."""
        text, label = row[self.text_field], row[self.label_field]
        ids = self.tokenizer(text, truncation=True, max_length=self.loading.max_tokens)["input_ids"]
        return {"input_ids": ids, "labels": self._class(label)}

    def _class(self, label: Any) -> int:
        if self.classes is None:
            return int(label)
        if label not in self.classes:
            raise ValueError(f"label {label!r} is none of the classes {', '.join(self.classes)}")
        return self.classes.index(label)
