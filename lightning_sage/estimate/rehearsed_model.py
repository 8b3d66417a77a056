"""A model as a training step would find it, of fake tensors: precision, batch, loss, optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from lightning_sage.engine.wrapped import ATTRIBUTE
from lightning_sage.estimate.fakes import Known, fake_copy, lifted
from lightning_sage.models import CausalLM, HuggingFaceModule

CPU = torch.device("cpu")
# Trainer's names: dtype of autocast, dtype of the weights
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32-true": (None, None),
    "bf16-mixed": (torch.bfloat16, None),
    "16-mixed": (torch.float16, None),
    "bf16-true": (None, torch.bfloat16),
    "16-true": (None, torch.float16),
    "64-true": (None, torch.float64),
}
_OTHER_NAMES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}

Inputs = Callable[[int, int], Mapping[str, Any]]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def precision_of(name: str | int | None) -> str:
    """The Trainer's `precision`, by its whole name.

    Raises:
        ValueError: It is not one that can be estimated.
    """
    whole = "32-true" if name is None else _OTHER_NAMES.get(str(name), str(name))
    if whole not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    return whole


class RehearsedModel:
    """A training step of a model whose tensors are fake.

    Make and use it inside :func:`lightning_sage.estimate.fakes.without_memory`.

    Args:
        model: A module, real or on the meta device, or what builds one.
        precision: A key of `PRECISIONS`.
        known: Knows values.

    Raises:
        ValueError: SAGE is installed on it, or its configuration is not on this machine.
    """

    def __init__(
        self, model: nn.Module | Callable[[], nn.Module], precision: str, known: Known
    ) -> None:
        self.known = known
        self.autocast, dtype = PRECISIONS[precision]
        if isinstance(model, nn.Module):
            if any(ATTRIBUTE in vars(m) for m in model.modules()):
                raise ValueError("SAGE is installed on this model: remove() it, then estimate")
            module = fake_copy(model, CPU)
        else:
            module = known.built(model)
        if isinstance(module, LightningModule):
            _configure(module, known)
        for part in module.modules():
            if getattr(part, "gradient_checkpointing", False) is True:
                setattr(part, "gradient_checkpointing", False)  # noqa: B010 - of unknown type
        self.module = module if dtype is None else fake_copy(module, CPU, dtype)
        self.dtype = dtype or torch.get_default_dtype()

    def _configs(self) -> Iterator[tuple[nn.Module, Any]]:
        for part in self.module.modules():
            config = getattr(part, "config", None)
            if hasattr(config, "to_dict"):
                yield part, config

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence; None where the model does not say."""
        found = (getattr(c, "max_position_embeddings", None) for _, c in self._configs())
        return next((n for n in found if isinstance(n, int)), None)

    def trainable(self) -> list[nn.Parameter]:
        """What gets gradients."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def weights(self) -> int:
        """Bytes of parameters and buffers, each storage once."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
        return sum(sizes.values())

    def optimizer_bytes(self, optimizer: MakeOptimizer | None) -> int:
        """Bytes of the optimizer's state after a step.

        Args:
            optimizer: Makes it; None asks a LightningModule, or takes AdamW.

        Raises:
            ValueError: Nothing is trained, or the optimizer cannot be run without values.
        """
        parameters = self.trainable()
        if not parameters:
            raise ValueError("no parameter requires grad: there is nothing to train")
        optimizers = [optimizer(parameters)] if optimizer else self._own_optimizers()
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        try:
            for one in optimizers:
                one.step()
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{type(one).__name__} cannot be run on tensors without values ({error}): pass "
                "optimizer=..., which makes another with as large a state"
            ) from error
        finally:
            for parameter in parameters:
                parameter.grad = None
        held = pytree.tree_leaves([list(one.state.values()) for one in optimizers])
        return sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor))

    def _own_optimizers(self) -> list[torch.optim.Optimizer]:
        """The module's own, where it can say without a Trainer; else AdamW."""
        module = self.module
        if isinstance(module, LightningModule) and not isinstance(module, HuggingFaceModule):
            try:
                leaves = pytree.tree_leaves(module.configure_optimizers())
            except Exception:
                # asks its Trainer, which there is not
                leaves = []
            found = [x for x in leaves if isinstance(x, torch.optim.Optimizer)]
            if found:
                return found
        return [torch.optim.AdamW(self.trainable())]

    def batch(self, batch: int, length: int, loss_tokens: float, inputs: Inputs | None) -> Any:
        """Keywords of the forward: what `inputs` gives, or ids and labels without padding."""
        with _disable_current_modes():
            given = inputs(batch, length) if inputs else self._text(batch, length, loss_tokens)
        return lifted(self.known, given, CPU)

    def _text(self, batch: int, length: int, loss_tokens: float) -> dict[str, Tensor]:
        configs = list(self._configs())
        pad = next((getattr(c, "pad_token_id", None) for _, c in configs), None)
        # any token that is no padding
        ids = torch.full((batch, length), 1 if pad is None or pad != 1 else 0)
        if any("SequenceClassification" in type(part).__name__ for part, _ in configs):
            return {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.int64)}
        labels = torch.full_like(ids, -100)
        count = max(1, round(loss_tokens * length))
        labels[:, length - count :] = ids[:, length - count :]
        return {"input_ids": ids, "labels": labels}

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """A forward pass in this precision.

        Raises:
            ValueError: The model returns no loss.
        """
        with self._surroundings():
            if isinstance(self.module, LightningModule):
                out: Any = self._training_step(batch)
            else:
                out = self.module(**batch)
        found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", out)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{type(self.module).__name__} returned no loss for {', '.join(batch)}: pass "
                "inputs=(batch, length) -> keywords with labels, or a LightningModule"
            )
        return found

    def _training_step(self, batch: Mapping[str, Any]) -> Any:
        try:
            return self.module.training_step(batch, 0)  # type: ignore[operator]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"training_step of {type(self.module).__name__} does not take a batch that is a "
                f"mapping of {' and '.join(batch)} ({type(error).__name__}: {error}): call "
                "lightning_sage.estimate.estimate(..., inputs=...) with a batch of its own"
            ) from error

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # of logging without a Trainer
            warnings.simplefilter("ignore")
            if self.autocast is not None:
                stack.enter_context(torch.autocast("cpu", dtype=self.autocast))
            torch.set_default_dtype(self.dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(before)


def _configure(module: LightningModule, known: Known) -> None:
    """Build what is built when a fit starts."""
    if isinstance(module, HuggingFaceModule):
        module.gradient_checkpointing = False
        if module.name_or_path is not None:
            vars(module)["_load"] = partial(_from_config, module)
    if isinstance(module, CausalLM):
        # by comparing values, which there are not
        module._loss_checked = True
    known.built(module.configure_model)


def _from_config(module: HuggingFaceModule) -> nn.Module:
    """What `from_pretrained` would return, but for its values."""
    try:
        config = module.pretrained_config()
    except OSError as error:
        raise ValueError(
            f"the configuration of {module.name_or_path} is not on this machine: give the folder "
            "of a model, download its config.json, or describe the model by `config` alone"
        ) from error
    dtype = None if module.dtype_name == "auto" else getattr(torch, module.dtype_name)
    found: nn.Module = module.auto_class.from_config(config, dtype=dtype)
    return found
