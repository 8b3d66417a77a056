"""LightningModules round Hugging Face models: causal language models and sequence classifiers.

They know nothing of SAGE: the callback changes how they train from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    get_cosine_schedule_with_warmup,
)

from lightning_sage.cross_entropy import check_chunked_loss, chunked_loss

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on a frozen model, by PEFT.

    Args:
        r: Rank.
        alpha: The adapters' output is scaled by ``alpha / r``.
        dropout: On the adapters' input.
        targets: Names of the layers, or `all-linear`: all but the output layer.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"


@dataclass(frozen=True)
class Optimization:
    """AdamW with a linear warm-up and a cosine decay to zero over all steps of the fit.

    Args:
        lr: Learning rate after the warm-up.
        weight_decay: Decoupled weight decay, on every trainable parameter.
        warmup: Share of the steps.
        betas: Decay of the running means.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)


class HuggingFaceModule(LightningModule):
    """A Hugging Face model that computes its own loss from `labels`.

    Args:
        name_or_path: Pre-trained weights to start from; None for random weights.
        config: With a name, fields of its configuration to change; without, the whole
            configuration, `model_type` included.
        lora: Adapters to train in place of the model's own weights; None trains all weights.
        optimization: Optimizer and learning rate.
        dtype: Of the weights as loaded; `auto` is what they are stored in.
        gradient_checkpointing: Recompute every block in the backward pass, to compare with.

    Attributes:
        model: The model, from `configure_model` on.
    """

    auto_class: ClassVar[Any]
    task: ClassVar[str]

    def __init__(
        self,
        name_or_path: str | None = None,
        config: dict[str, Any] | None = None,
        lora: LoRA | None = None,
        optimization: Optimization | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if name_or_path is None and "model_type" not in (config or {}):
            raise ValueError("give name_or_path, or a config with its model_type")
        self.save_hyperparameters()
        # as mappings, which torch.load(weights_only=True) takes, and which may be given again
        given = {"lora": lora, "optimization": optimization}
        plain = {k: asdict(v) for k, v in given.items() if isinstance(v, LoRA | Optimization)}
        self.hparams.update(plain)
        self.name_or_path = name_or_path
        self.config = dict(config or {})
        self.lora = LoRA(**lora) if isinstance(lora, Mapping) else lora
        if isinstance(optimization, Mapping):
            optimization = Optimization(**optimization)
        self.optimization = optimization or Optimization()
        self.dtype_name = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.model: Any = None

    def configure_model(self) -> None:
        """Build the model, once."""
        if self.model is not None:
            return
        _warn_of_passing_processes(self)
        model = self._load()
        if self.gradient_checkpointing:
            # renamed in transformers; the older name warns where both exist
            renamed = getattr(model, "activation_checkpointing_enable", None)
            (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
        if self.lora is not None:
            model = get_peft_model(model, self._lora_config(self.lora))
        # from_pretrained returns a model in evaluation mode, and Lightning leaves it so
        self.model = model.train()

    def _load(self) -> Any:
        if self.name_or_path is None:
            dtype = None if self.dtype_name == "auto" else getattr(torch, self.dtype_name)
            return self.auto_class.from_config(AutoConfig.for_model(**self.config), dtype=dtype)
        return self.auto_class.from_pretrained(
            self.name_or_path, config=self.pretrained_config(), dtype=self.dtype_name
        )

    def pretrained_config(self) -> Any:
        """The configuration that goes with the pre-trained weights, with the changes to it."""
        changes = {name: value for name, value in self.config.items() if name != "model_type"}
        return AutoConfig.from_pretrained(self.name_or_path, **changes)

    def _lora_config(self, lora: LoRA) -> LoraConfig:
        return LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
            task_type=self.task,
        )

    def forward(self, **batch: Tensor) -> Any:
        """The model's own output."""
        return self.model(**batch)

    def compute_loss(self, batch: Batch) -> Tensor:
        """The model's own loss."""
        loss: Tensor = self(**batch).loss
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The batch's loss."""
        loss = self.compute_loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def on_validation_start(self) -> None:
        """Start a mean."""
        # a new one: the last may hold inference tensors, or was cast to bfloat16 with the module
        self.mean_loss = MeanMetric().to(self.device)

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all that was weighed."""
        # compute() is already over all ranks; sync_dist only tells Lightning
        self.log("val_loss", self.mean_loss.compute(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on what is trainable, and its schedule.

        Raises:
            ValueError: The number of steps is not known in advance.
        """
        settings = self.optimization
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("a cosine schedule needs an end: set trainer.max_steps or max_epochs")
        optimizer = torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad],
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        warmup = round(settings.warmup * steps)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def has_passing_processes(trainer: Trainer) -> bool:
    """Whether a fit forks or spawns its processes, which end with all that they build."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def _warn_of_passing_processes(module: LightningModule) -> None:
    """Where a fit has forked or spawned its processes, what they build is gone with them."""
    trainer = module._trainer
    if trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return
    if has_passing_processes(trainer):
        rank_zero_warn(
            "this fit's processes build the model and take it with them: to have its weights "
            "after the fit call configure_model() before it, or save them with SavePretrained"
        )


class CausalLM(HuggingFaceModule):
    """Predicts the next token; `val_loss` and `val_perplexity` are means over labelled tokens.

    Args:
        *args: As above.
        loss: `full` is the model's forward as it stands, with logits of every token; `chunked`
            is the same loss without ever holding those (see :func:`chunked_loss`).
        **kwargs: As above.

    Raises:
        ValueError: With `chunked`, at the first batch: the model's loss cannot be chunked.
    """

    auto_class = AutoModelForCausalLM
    task = "CAUSAL_LM"

    def __init__(
        self, *args: Any, loss: Literal["full", "chunked"] = "full", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if loss not in ("full", "chunked"):
            raise ValueError(f"loss must be 'full' or 'chunked', got {loss!r}")
        self.loss = loss
        self._loss_checked = False

    def compute_loss(self, batch: Batch) -> Tensor:
        """The model's own loss, with or without logits."""
        if self.loss == "full":
            return super().compute_loss(batch)
        if not self._loss_checked:
            check_chunked_loss(self.model, batch)
            self._loss_checked = True
        return chunked_loss(self.model, batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add to the mean loss, weighted by the number of tokens to predict."""
        targets = (batch["labels"][:, 1:] != -100).sum()
        self.mean_loss.update(self.compute_loss(batch), targets)

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity too."""
        self.log("val_perplexity", self.mean_loss.compute().exp(), sync_dist=True)
        super().on_validation_epoch_end()


class SequenceClassifier(HuggingFaceModule):
    """One class for a text; `config` says `num_labels`.

    Decoders read the last token that is not padding: give them `pad_token_id` in `config` where
    their own configuration has none.
    """

    auto_class = AutoModelForSequenceClassification
    task = "SEQ_CLS"

    def on_validation_start(self) -> None:
        """Start a mean and an accuracy."""
        super().on_validation_start()
        classes = self.model.config.num_labels
        self.accuracy = MulticlassAccuracy(classes, average="micro").to(self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add to mean loss and accuracy, weighted by the number of texts."""
        output = self(**batch)
        self.mean_loss.update(output.loss, len(batch["labels"]))
        self.accuracy.update(output.logits, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy too."""
        self.log("val_accuracy", self.accuracy.compute(), prog_bar=True, sync_dist=True)
        super().on_validation_epoch_end()
