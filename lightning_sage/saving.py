"""SavePretrained: leaves a trained model where `from_pretrained` finds it, sharded or not."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


class SavePretrained(Callback):
    """Saves the model, or its adapters, and the tokenizer at the end of the fit.

    A model sharded by FSDP2 is gathered in the host memory of the first rank.

    Args:
        directory: Where `from_pretrained` will find them; overwritten.

    Raises:
        ValueError: FSDPStrategy shards the model, which only its own checkpoints can hold.
    """

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = directory

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model sharded by FSDP1 before it is trained."""
        if stage == "fit" and isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                f"SavePretrained cannot save a model sharded by {type(trainer.strategy).__name__}; "
                "use FSDP2 (strategy='sage_fsdp'), or leave it out and use the trainer's "
                "checkpoints"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save on the first rank, with the help of all where each has a part."""
        model: Any = pl_module.model
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        state = gathered_state(model) if sharded else None
        if not trainer.is_global_zero:
            return
        # adapters leave the vocabulary alone; finding that out would ask the hub
        options = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        model.save_pretrained(self.directory, state_dict=state, **options)
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(self.directory)
        rank_zero_info(f"saved to {self.directory}")


def gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors of a sharded model's `state_dict`, on the host; empty but on the first rank.

    Every rank has to call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    # weights that are tied came apart, and would be saved twice
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state:
            state[name] = state[first.setdefault(id(parameter), name)]
    return state
