"""What is trained: fine-tunings of real data, alike in all but the method.

Those of SmolLM2, a trained language model of 30 layers, decide; the small ones are a first look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import bases
from digits import Digits, ImageClassifier
from docstrings import CLASSES, Docstrings
from lightning import LightningDataModule
from sources import LongFunctions, PackageWindows
from texts import FunctionTexts, PackageNames, Task

from lightning_sage.corpus import StdlibFunctions
from lightning_sage.data import Loading
from lightning_sage.models import (
    CausalLM,
    HuggingFaceModule,
    LoRA,
    Optimization,
    SequenceClassifier,
)


@dataclass(frozen=True)
class Scenario:
    """A fine-tuning.

    Args:
        name: Names it on the command line and in records.
        title: Says what it is.
        judged: The metric that methods are compared by.
        steps: Optimizer steps.
        lrs: Learning rates that every method may choose from.
        module: Makes the model, not yet built, for a learning rate and with or without gradient
            checkpointing.
        data: Makes its data.
        val_batches: How many are judged; None is all.
    """

    name: str
    title: str
    judged: Literal["val_accuracy", "val_loss"]
    steps: int
    lrs: tuple[float, ...]
    module: Callable[[float, bool], HuggingFaceModule]
    data: Callable[[], LightningDataModule]
    val_batches: int | None = None


def _module(
    kind: type[HuggingFaceModule],
    base: Callable[[], str],
    config: dict[str, Any] | None = None,
    lora: LoRA | None = None,
) -> Callable[[float, bool], HuggingFaceModule]:
    def make(lr: float, checkpointing: bool) -> HuggingFaceModule:
        return kind(
            base(),
            config,
            lora,
            Optimization(lr=lr),
            gradient_checkpointing=checkpointing,
        )

    return make


_ADAPTERS = LoRA(r=16)
_SENTENCES = {
    "num_labels": len(CLASSES),
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _docstrings() -> Docstrings:
    loading = Loading(tokenizer=bases.minilm(), batch_size=8, max_tokens=128)
    return Docstrings(val_per_class=40, directory=str(bases.RUNS), loading=loading)


def _of_functions(task: Task, batch_size: int = 4, max_tokens: int = 192) -> Callable[[], Any]:
    def make() -> FunctionTexts:
        loading = Loading(bases.smollm2(), batch_size, max_tokens)
        return FunctionTexts(task, directory=str(bases.RUNS), loading=loading)

    return make


def _package_names() -> PackageNames:
    return PackageNames(directory=str(bases.RUNS), loading=Loading(bases.smollm2(), 4, 192))


def _windows() -> PackageWindows:
    return PackageWindows("sympy", Loading(bases.smollm2(), 4, 192))


def _smollm2(
    name: str,
    task: str,
    shape: str,
    steps: int,
    data: Callable[[], Any],
    val_batches: int,
    full: bool = False,
) -> Scenario:
    return Scenario(
        name=name,
        title=f"{task}; SmolLM2, {'full' if full else 'LoRA r=16'}, {shape}",
        judged="val_loss",
        steps=steps,
        lrs=(2e-5, 5e-5, 1e-4) if full else (2.5e-4, 5e-4, 1e-3),
        module=_module(CausalLM, bases.smollm2, None, None if full else _ADAPTERS),
        data=data,
        val_batches=val_batches,
    )


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        _smollm2(
            "smol-label",
            "The package of a docstring, to be written",
            "4 x 192 tokens",
            150,
            _package_names,
            16,
        ),
        _smollm2(
            "smol-short",
            "From source to a line on what it does",
            "4 x 192 tokens",
            150,
            _of_functions("summary"),
            12,
        ),
        _smollm2(
            "smol-third",
            "From docstring to body, a third of the rows",
            "4 x 192 tokens",
            150,
            _of_functions("body"),
            12,
        ),
        _smollm2(
            "smol-every", "SymPy's sources, loss on every token", "4 x 192 tokens", 60, _windows, 8
        ),
        _smollm2(
            "smol-long",
            "A function's body behind 2,048 tokens of its file",
            "batch 1",
            60,
            _of_functions("long", 1, 2048),
            16,
        ),
        _smollm2(
            "smol-short-full",
            "From source to a line on what it does",
            "4 x 192 tokens",
            150,
            _of_functions("summary"),
            12,
            full=True,
        ),
        _smollm2(
            "smol-every-full",
            "SymPy's sources, loss on every token",
            "4 x 192 tokens",
            60,
            _windows,
            8,
            full=True,
        ),
        Scenario(
            name="classify-lora",
            title="Which package is a docstring from? MiniLM, LoRA r=16, 8 x 128 tokens",
            judged="val_accuracy",
            steps=60,
            lrs=(5e-4, 1e-3, 2e-3),
            module=_module(SequenceClassifier, bases.minilm, _SENTENCES, _ADAPTERS),
            data=_docstrings,
        ),
        Scenario(
            name="classify-full",
            title="Which package is a docstring from? MiniLM, full, 8 x 128 tokens",
            judged="val_accuracy",
            steps=60,
            lrs=(1e-4, 2e-4, 4e-4),
            module=_module(SequenceClassifier, bases.minilm, _SENTENCES),
            data=_docstrings,
        ),
        Scenario(
            name="answer",
            title="From docstring to code, loss on the code; Llama, LoRA r=16, 8 x 256 bytes",
            judged="val_loss",
            steps=60,
            lrs=(5e-4, 1e-3, 2e-3, 4e-3),
            module=_module(CausalLM, bases.quickstart, None, _ADAPTERS),
            data=lambda: StdlibFunctions(loading=Loading(batch_size=8, max_tokens=256)),
            val_batches=16,
        ),
        Scenario(
            name="pretrain",
            title="On with pre-training on SymPy, loss on every token; Llama, full, 8 x 256 bytes",
            judged="val_loss",
            steps=60,
            lrs=(1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3),
            module=_module(CausalLM, bases.quickstart),
            data=lambda: PackageWindows("sympy", Loading(batch_size=8, max_tokens=256)),
            val_batches=16,
        ),
        Scenario(
            name="long",
            title="From a file to its next function, loss on it; Llama, LoRA r=16, 1 x 2048 bytes",
            judged="val_loss",
            steps=60,
            lrs=(5e-4, 1e-3, 2e-3),
            module=_module(CausalLM, bases.long, bases.LONG, _ADAPTERS),
            data=lambda: LongFunctions(loading=Loading(batch_size=1, max_tokens=2048)),
            val_batches=48,
        ),
        Scenario(
            name="vision",
            title="Which digit? ViT pre-trained on rotations, full, 32 x 65 patches",
            judged="val_accuracy",
            steps=120,
            lrs=(5e-4, 1e-3, 2e-3),
            module=_module(ImageClassifier, bases.rotations, {"num_labels": 10}),
            data=lambda: Digits(batch_size=32),
        ),
    )
}
