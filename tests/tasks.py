"""What tests of the callback train: tiny models in a LightningModule, and what is left behind."""

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_sage import SagePolicy
from lightning_sage.engine.wrapped import ATTRIBUTE
from zoo import build, make_batch

LIGHTNING_WARNINGS = [
    # Lightning asks torch's pytree in the old way
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    # advice for longer runs than these
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
# the smallest that the byte tokenizer's ids fit
LLAMA = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
HALF = SagePolicy(keep=0.5, sinks=0)
PLAIN = SagePolicy(keep=0.5, sinks=0, blocks=["model.blocks.*"])
QUIET = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
)


class Task(L.LightningModule):
    """Trains any model that returns a loss."""

    def __init__(self, model=None):
        super().__init__()
        self.model, self.lr, self.batch_size = model, 0.1, 2

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self):
        return DataLoader(batches(), batch_size=None)


class LateTask(Task):
    """Builds its model when Lightning says so."""

    def configure_model(self):
        if self.model is None:
            self.model = llama()


class Witness(L.Callback):
    """Calls a function of (trainer, task) at the end of every batch."""

    def __init__(self, look):
        self.look = look

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.look(trainer, pl_module)


def llama():
    return build("llama", dtype=torch.float32)


def batches(count=4, **settings):
    return [make_batch("llama", size=3, seed=seed, **settings) for seed in range(count)]


def fit(task, *callbacks, data=None, val=None, **settings):
    quiet = {} if settings.get("barebones") else QUIET
    settings = {"max_epochs": 1, "accelerator": "cpu", **quiet, **settings}
    trainer = L.Trainer(callbacks=list(callbacks), **settings)
    loaders = [DataLoader(x, batch_size=None) for x in (data or batches(), val) if x is not None]
    trainer.fit(task, *loaders)
    return trainer


def traces(model):
    """All that an installation could leave behind; the order of keys as well."""

    def of(module):
        items = [(k, dict(v) if isinstance(v, dict) else v) for k, v in vars(module).items()]
        # Lightning leaves a failed validation in eval mode
        return [(key, value) for key, value in items if key != "training"]

    return [(name, of(module)) for name, module in model.named_modules()]


def wrapped(model):
    return sum(ATTRIBUTE in vars(module) for module in model.modules())
