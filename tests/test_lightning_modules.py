import ast
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import FSDPStrategy
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lightning_sage import SageCallback, SagePolicy
from lightning_sage.data import AnswerData, LabelData, Loading
from lightning_sage.models import CausalLM, LoRA, Optimization, SequenceClassifier
from lightning_sage.saving import SavePretrained
from tasks import LLAMA

PACKAGE = Path(__file__).parents[1] / "lightning_sage"

pytestmark = [
    # two cores do not profit from worker processes, and Lightning advises them whatever the data
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    # Lightning's own use of torch's pytree
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
]


@pytest.fixture
def answers(tmp_path):
    """Five rows of unequal answers, so that batches of two weigh differently."""
    path = tmp_path / "rows.jsonl"
    lines = [f'{{"prompt": "{"p" * (6 - n)}", "answer": "{"ab" * n}"}}\n' for n in range(1, 6)]
    path.write_text("".join(lines))
    return AnswerData(str(path), str(path), loading=Loading(batch_size=2))


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{'ab'[n % 2] * 6},{n % 2}\n" for n in range(7)))
    return LabelData(str(path), str(path), loading=Loading(batch_size=2))


def trainer(**changes):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"accelerator": "cpu", "max_steps": 3, "enable_model_summary": False}
    return Trainer(**{**quiet, **settings, **changes})


def validation_loss(module, data, **changes):
    return trainer(**changes).validate(module, data, verbose=False)[0]


@pytest.mark.parametrize("name", ["models", "saving", "cross_entropy", "data", "loader"])
def test_knows_nothing_of_sage(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in imported if name.startswith("lightning_sage")}
    assert ours <= {"lightning_sage.cross_entropy", "lightning_sage.loader"}


def test_refuses_a_model_without_origin():
    with pytest.raises(ValueError, match="give name_or_path, or a config with its model_type"):
        CausalLM(config={"hidden_size": 16})


def test_builds_once():
    module = CausalLM(config=LLAMA)
    assert module.model is None
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model
    assert isinstance(model, LlamaForCausalLM)
    assert model.training


def test_loads_pretrained_in_training_mode_with_changes(tmp_path):
    first = CausalLM(config=LLAMA)
    first.configure_model()
    first.model.save_pretrained(tmp_path)
    second = CausalLM(str(tmp_path), config={"attention_dropout": 0.5}, dtype="bfloat16")
    second.configure_model()
    assert all(module.training for module in second.modules())
    assert second.model.config.attention_dropout == 0.5
    assert second.model.dtype == torch.bfloat16
    expected = first.model.lm_head.weight.bfloat16()
    assert torch.equal(second.model.lm_head.weight, expected)


def test_lora_trains_adapters_on_every_inner_linear_layer():
    module = CausalLM(config=LLAMA, lora=LoRA(r=3, alpha=6, dropout=0.1))
    module.configure_model()
    assert module.model.training
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    # 7 linear layers in each of 2 blocks, 2 matrices each; the output layer has none
    assert len(trainable) == 28
    assert not any("lm_head" in name for name in trainable)
    layer = module.model.base_model.model.model.layers[0].mlp.up_proj
    assert (layer.r["default"], layer.scaling["default"]) == (3, 2.0)
    assert layer.lora_dropout["default"].p == 0.1


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_gradient_checkpointing_recomputes(answers, lora):
    module = CausalLM(config=LLAMA, lora=lora, gradient_checkpointing=True)
    module.configure_model()
    forwards = []
    for layer in module.model.get_base_model().model.layers if lora else module.model.model.layers:
        # before: recomputation stops as soon as all is there, inside of the last module
        layer.mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    trainer(max_steps=1, limit_val_batches=0).fit(module, answers)
    assert len(forwards) == 4


def test_validation_loss_is_the_mean_over_answer_tokens(answers):
    module = CausalLM(config=LLAMA)
    metrics = validation_loss(module, answers)
    losses = []
    for batch in answers.val_dataloader():
        with torch.no_grad():
            logits = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
            )[batch["labels"][:, 1:].flatten() != -100]
        )
    expected = torch.cat(losses).mean()
    # per row: the answer and the end token
    assert torch.cat(losses).numel() == sum(2 * n + 1 for n in range(1, 6))
    torch.testing.assert_close(torch.tensor(metrics["val_loss"]), expected)
    torch.testing.assert_close(torch.tensor(metrics["val_perplexity"]), expected.exp())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_chunked_loss_is_the_full_one(answers, lora, precision):
    def metrics(loss):
        seed_everything(0, verbose=False)
        optimization = Optimization(lr=1e-2, warmup=0.0)
        module = CausalLM(config=LLAMA, lora=lora, loss=loss, optimization=optimization)
        run = trainer(max_steps=6, precision=precision)
        run.fit(module, answers)
        trained = run.callback_metrics["train_loss"].item()
        return trained, run.validate(module, answers, verbose=False)[0]

    (full, validated), (chunked, validated_in_chunks) = metrics("full"), metrics("chunked")
    tolerance = 1e-5 if precision == "32-true" else 1e-2
    assert chunked == pytest.approx(full, rel=tolerance)
    assert validated_in_chunks == pytest.approx(validated, rel=tolerance)


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_chunked_loss_makes_no_logits_of_a_batch(answers, loss):
    module = CausalLM(config=LLAMA, loss=loss)
    module.configure_model()
    made = []
    module.model.lm_head.register_forward_hook(lambda _, args, out: made.append(tuple(out.shape)))
    trainer(max_steps=2, limit_val_batches=0).fit(module, answers)
    # the first batch's check makes some, of one sample
    assert any(shape[0] == 2 and shape[-1] == 259 for shape in made) == (loss == "full")


def test_a_loss_that_cannot_be_chunked_stops_the_fit(answers):
    capped = {**LLAMA, "model_type": "gemma2", "head_dim": 8}
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM.*final_logit_softcapping"):
        trainer().fit(CausalLM(config=capped, loss="chunked"), answers)
    with pytest.raises(ValueError, match="loss must be 'full' or 'chunked', got 'half'"):
        CausalLM(config=LLAMA, loss="half")


class Kept(Callback):
    """Rows that each block kept of the first batch."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        [sage] = [c for c in trainer.callbacks if isinstance(c, SageCallback)]
        self.rows = torch.stack([record.kept for record in sage.installation.records])


def test_sage_learns_the_same_loss_rows_from_either_loss(answers):
    def kept(loss, **changes):
        seed_everything(0, verbose=False)
        policy = SagePolicy(keep=0.4, sinks=0, keep_last=False, **changes)
        callbacks = [SageCallback(policy, print_summary=False), seen := Kept()]
        module = CausalLM(config=LLAMA, lora=LoRA(r=2), loss=loss)
        trainer(callbacks=callbacks, max_steps=1, limit_val_batches=0).fit(module, answers)
        return seen.rows

    full = kept("full")
    assert torch.equal(kept("chunked"), full)
    # other rows would have been kept, had the labels not been seen
    assert not torch.equal(kept("full", queries="all"), full)


def test_validation_loss_is_summed_in_float32(answers):
    module = CausalLM(config=LLAMA)
    validation_loss(module, answers, precision="bf16-true")
    assert module.model.dtype == torch.bfloat16
    assert module.mean_loss.mean_value.dtype == torch.float32


def test_one_trainer_validates_fits_and_validates(answers):
    seed_everything(0, verbose=False)
    module = CausalLM(
        config={**LLAMA, "initializer_range": 0.2}, optimization=Optimization(lr=1e-2, warmup=0.0)
    )
    run = trainer(max_steps=20)
    before = run.validate(module, answers, verbose=False)[0]["val_loss"]
    run.fit(module, answers)
    after = run.validate(module, answers, verbose=False)[0]["val_loss"]
    assert after < before - 0.5


def test_classifier_learns_and_reports_accuracy(labelled):
    seed_everything(0, verbose=False)
    optimization = Optimization(lr=1e-2, warmup=0.0)
    module = SequenceClassifier(config={**LLAMA, "num_labels": 2}, optimization=optimization)
    run = trainer(max_steps=20)
    run.validate(module, labelled, verbose=False)
    run.fit(module, labelled)
    metrics = run.validate(module, labelled, verbose=False)[0]
    right = total = 0
    for batch in labelled.val_dataloader():
        with torch.no_grad():
            right += (module(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
        total += len(batch["labels"])
    assert metrics["val_accuracy"] == pytest.approx(right / total)
    assert metrics["val_accuracy"] == 1
    assert metrics["val_loss"] < 0.3


def test_learning_rate_warms_up_and_decays_to_zero(answers):
    module = CausalLM(config=LLAMA, optimization=Optimization(lr=1.0, warmup=0.2))
    run = trainer(max_steps=10, limit_val_batches=0)
    run.fit(module, answers)
    schedule = run.lr_scheduler_configs[0].scheduler
    rates = [schedule.lr_lambdas[0](step) for step in range(11)]
    assert rates[:3] == [0, 0.5, 1]
    assert sorted(rates[2:], reverse=True) == rates[2:]
    assert rates[10] == pytest.approx(0)
    assert schedule.get_last_lr() == [pytest.approx(0)]


def test_refuses_a_schedule_without_end(answers):
    endless = trainer(max_steps=-1, max_epochs=-1)
    with pytest.raises(ValueError, match=r"set trainer\.max_steps or max_epochs"):
        endless.fit(CausalLM(config=LLAMA), answers)


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_saved_model_is_found_by_from_pretrained(answers, tmp_path, lora):
    base = CausalLM(config=LLAMA)
    base.configure_model()
    base.model.save_pretrained(tmp_path / "base")
    module = CausalLM(str(tmp_path / "base"), lora=lora)
    save = SavePretrained(str(tmp_path / "tuned"))
    trainer(callbacks=[save], limit_val_batches=0).fit(module, answers)
    if lora is None:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(loaded, tmp_path / "tuned")
    ids = torch.tensor([[5, 6, 7]])
    expected = module.model.eval()(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert not torch.allclose(base.model(ids).logits, expected)
    assert (tmp_path / "tuned" / "tokenizer_config.json").exists()


def test_refuses_to_save_a_model_sharded_by_fsdp1(answers, tmp_path):
    run = trainer()
    run.strategy.__class__ = type("Sharded", (FSDPStrategy,), {})
    with pytest.raises(ValueError, match="cannot save a model sharded by Sharded"):
        SavePretrained(str(tmp_path)).setup(run, CausalLM(config=LLAMA), "fit")


def test_checkpoint_resumes_and_loads(answers, tmp_path):
    settings = {"lora": LoRA(r=2), "optimization": Optimization(lr=1e-3), "loss": "chunked"}
    module = CausalLM(config=LLAMA, **settings)
    first = trainer(max_epochs=1, max_steps=-1, limit_val_batches=0)
    first.fit(module, answers)
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = CausalLM(config=LLAMA, **settings)
    second = trainer(max_epochs=2, max_steps=-1, limit_val_batches=0)
    second.fit(resumed, answers, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert second.global_step == 2 * first.global_step
    loaded = CausalLM.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert {name: getattr(loaded, name) for name in settings} == settings
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, module.get_parameter(name))
