"""Hugging Face modules sharded by FSDP2: what is saved, and a loss without logits."""

import filecmp
import functools
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from peft import PeftModel
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import processes
from accuracy import assert_gradients_close
from lightning_sage import SageModelParallelStrategy, SagePolicy, cross_entropy
from lightning_sage.data import AnswerData, Loading
from lightning_sage.models import CausalLM, LoRA, Optimization
from lightning_sage.saving import SavePretrained
from tasks import LLAMA, QUIET

POLICY = SagePolicy(keep=0.5, replay=None)

ranks = functools.partial(processes.ranks, group=False)


def fitted(rank, folder, task, **settings):
    """Weights and metrics of one of two ranks, after the model was saved to `folder`."""
    warnings.simplefilter("ignore")
    # it would be one's own fault
    warnings.filterwarnings("error", ".*returned a view tensor")
    seed_everything(0, verbose=False)
    module = task()
    # batches of one row, whose answers all differ in length, from rank to rank as well
    rows = Path(folder) / "rows.jsonl"
    data = AnswerData(str(rows), str(rows), loading=Loading(batch_size=1))
    settings = {"strategy": SageModelParallelStrategy(POLICY), "devices": 2, **settings}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[SavePretrained(str(Path(folder) / "saved"))],
        **QUIET,
        **settings,
    )
    trainer.fit(module, data)
    whole = {
        name: x.full_tensor() if hasattr(x, "full_tensor") else x
        for name, x in module.model.state_dict().items()
    }
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return whole, metrics


def causal(**settings):
    return functools.partial(CausalLM, optimization=Optimization(lr=0.01), **settings)


@pytest.fixture
def folder(tmp_path):
    lines = [f'{{"prompt": "{"p" * (6 - n)}", "answer": "{"ab" * n}"}}\n' for n in range(1, 6)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_files_are_those_of_a_whole_model(folder, lora, tied):
    base = CausalLM(config={**LLAMA, "tie_word_embeddings": tied})
    base.configure_model()
    base.model.save_pretrained(folder / "base")
    task = causal(name_or_path=str(folder / "base"), lora=lora)
    (weights, _), (other, _) = ranks(2, fitted, folder, task)
    whole = task()
    whole.configure_model()
    untrained = {name: x.clone() for name, x in whole.model.state_dict().items()}
    assert weights.keys() == other.keys() == untrained.keys()
    assert any(not torch.equal(x, untrained[name]) for name, x in weights.items())
    whole.model.load_state_dict(weights)
    whole.model.save_pretrained(folder / "whole", save_embedding_layers=False)

    files = [path.name for path in (folder / "whole").iterdir()]
    assert ("adapter_model.safetensors" in files) == (lora is not None)
    saved = folder / "saved"
    assert filecmp.cmpfiles(folder / "whole", saved, files, shallow=False) == (files, [], [])
    assert (saved / "tokenizer_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(saved if lora is None else folder / "base")
    if lora is not None:
        loaded = PeftModel.from_pretrained(loaded, saved)
    for name, x in loaded.state_dict().items():
        assert torch.equal(x, weights[name]), name


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_chunked_loss_trains_as_the_full_one(folder, monkeypatch, lora, tied):
    # four rows at a time: ranks call the output layer different numbers of times
    monkeypatch.setattr(cross_entropy, "LOGITS", 4 * LLAMA["vocab_size"])
    task = functools.partial(causal, config={**LLAMA, "tie_word_embeddings": tied}, lora=lora)
    [full, _], [chunked, _] = (
        ranks(2, fitted, folder, task(loss=loss)) for loss in ("full", "chunked")
    )
    for name in ("train_loss", "val_loss"):
        assert chunked[1][name] == pytest.approx(full[1][name], rel=1e-5)
    assert_gradients_close(chunked[0], full[0], 1e-4)


class ShardedHead(CausalLM):
    """Gathers its output layer apart from the rest."""

    def configure_model(self):
        if self.model is None:
            super().configure_model()
            for part in (self.model.lm_head, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def refused(rank, folder):
    with pytest.raises(ValueError, match="cannot be chunked: its output layer is sharded apart"):
        fitted(rank, folder, functools.partial(ShardedHead, config=LLAMA, loss="chunked"))


def test_an_output_layer_that_is_sharded_apart_is_not_chunked(folder):
    ranks(2, refused, folder)
