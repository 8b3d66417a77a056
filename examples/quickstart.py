"""A model, a Trainer, real text, and sparse backward passes by one line: SageCallback()."""

import torch
from lightning import LightningModule, Trainer
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_sage import SageCallback
from lightning_sage.corpus import StdlibFunctions


class FineTuning(LightningModule):
    """Any LightningModule round any Hugging Face transformer; nothing in it knows of SAGE."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes, **heads))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss on the answers: everything else is labelled -100."""
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Every weight is trained."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    data = StdlibFunctions()
    data.setup("fit")
    trainer = Trainer(max_steps=30, logger=False, callbacks=[SageCallback()])
    trainer.fit(FineTuning(), data.train_dataloader())
