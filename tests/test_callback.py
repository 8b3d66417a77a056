import copy
import pickle

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging, LearningRateFinder
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaMLP

from lightning_sage import AllTokens, SagePolicy, install
from lightning_sage.callback import SageCallback
from tasks import (
    HALF,
    LIGHTNING_WARNINGS,
    PLAIN,
    QUIET,
    LateTask,
    Task,
    Witness,
    batches,
    fit,
    llama,
    traces,
    wrapped,
)
from zoo import PlainModel, make_batch

pytestmark = LIGHTNING_WARNINGS


@pytest.mark.parametrize("name", ["llama", "plain", "late"])
def test_trains_sparsely_and_leaves_no_trace(name):
    task = {
        "llama": lambda: Task(llama()),
        "plain": lambda: Task(PlainModel()),
        "late": LateTask,
    }[name]()
    before = traces(task.model) if task.model else None
    data = [{k: b[k] for k in ("input_ids", "labels")} for b in batches(padding=None)]
    seen = []

    def look(trainer, task):
        seen.append(
            (wrapped(task), [r.kept.float().mean().item() for r in callback.installation.records])
        )

    callback = SageCallback(PLAIN if name == "plain" else HALF)
    fit(task, callback, Witness(look), data=data)
    assert [count for count, _ in seen] == [2] * 4
    assert all(0 < kept < 0.7 for _, blocks in seen for kept in blocks)
    assert callback.installation is None
    assert wrapped(task) == 0
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in task.modules()]
    assert not any(hooks)
    if before is not None:
        assert traces(task.model) == before


def test_trains_as_dense_does_with_all_tokens():
    dense, sage = Task(llama()), Task(llama())
    fit(dense)
    fit(sage, SageCallback(SagePolicy(keep=AllTokens(), replay=None)))
    for (name, expected), actual in zip(dense.named_parameters(), sage.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, msg=name)


class Broken(Exception):
    pass


def fail(*_):
    raise Broken


class BrokenStep(Task):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return fail() if batch_idx else loss


class BrokenBackward(Task):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx:
            loss.register_hook(fail)
        return loss


class BrokenValidation(Task):
    def validation_step(self, batch, batch_idx):
        fail()


class BrokenOptimizer(Task):
    def configure_optimizers(self):
        fail()


@pytest.mark.parametrize("kind", [BrokenStep, BrokenBackward, BrokenValidation, BrokenOptimizer])
def test_leaves_no_trace_when_training_fails(kind):
    task, callback = kind(llama()), SageCallback(HALF)
    before = traces(task.model)
    with pytest.raises(Broken):
        fit(task, callback, val=batches(1), num_sanity_val_steps=0)
    assert callback.installation is None
    assert traces(task.model) == before


@pytest.mark.parametrize("in_replay", [False, True])
def test_leaves_no_trace_when_a_block_fails(monkeypatch, in_replay):
    task, callback = Task(llama()), SageCallback(HALF)
    before = traces(task.model)
    forward = LlamaMLP.forward

    def broken(self, x):
        if torch.is_grad_enabled() == in_replay and armed:
            raise Broken
        return forward(self, x)

    armed = []
    monkeypatch.setattr(LlamaMLP, "forward", broken)
    with pytest.raises(Broken):
        fit(task, callback, Witness(lambda *_: armed.append(True)))
    monkeypatch.undo()
    assert armed
    assert callback.installation is None
    assert traces(task.model) == before


def test_tolerates_what_a_broken_fit_left():
    class Swallows(L.Callback):
        def on_exception(self, *_):
            raise RuntimeError("no callback after this one hears of the exception")

    callback = SageCallback(HALF)
    task = BrokenStep(llama())
    with pytest.raises(RuntimeError, match="no callback after"):
        fit(task, Swallows(), callback)
    assert wrapped(task) == 2
    other = Task(llama())
    fit(other, callback)
    assert wrapped(task) == wrapped(other) == 0


def test_copies_and_pickles_in_the_middle_of_training():
    copies = []

    def look(trainer, task):
        copies.append((copy.deepcopy(callback), pickle.dumps(callback)))

    task, callback = Task(llama()), SageCallback(HALF)
    fit(task, callback, Witness(look))
    twin, pickled = copies[1]
    assert twin.installation is None
    assert twin.policy == HALF
    assert twin.meters is None
    # the model would be many times that
    assert len(pickled) < 10_000
    twin = pickle.loads(pickled)
    fit(task, twin)
    assert twin.meters.total.kept.update_count == 4


def test_validation_in_between_is_dense():
    kept = []

    class Validated(Task):
        def on_validation_end(self):
            kept.append([r.replayed is not None for r in callback.installation.records])

    task, callback = Validated(llama()), SageCallback(SagePolicy(keep=0.1, unselected="skip"))
    val = batches(1)
    trainer = fit(task, callback, val=val, val_check_interval=2)
    # nothing before training; later the records are those of the training step before
    assert kept == [[], [True, True], [True, True]]
    with torch.no_grad():
        expected = task.model(**val[0]).loss
    assert trainer.callback_metrics["val_loss"] == expected


def test_no_block_is_an_error_before_training():
    task = Task(PlainModel())
    before = traces(task.model)
    with pytest.raises(ValueError, match="no block found"):
        fit(task, SageCallback())
    assert traces(task.model) == before


def test_without_strict_a_block_that_cannot_be_replayed_trains_densely(monkeypatch):
    """By name, at the first step; the other blocks train sparsely, and nothing stays behind."""
    task, true, found = Task(llama()), LlamaMLP.forward, []
    first = task.model.model.layers[0].mlp
    monkeypatch.setattr(first, "forward", lambda x: true(first, x.roll(1, 1)))
    before = traces(task.model)

    def look(trainer, _):
        installation = trainer.callbacks[0].installation
        found.append((list(installation.refused), len(installation.records)))

    with pytest.warns(UserWarning, match=r"left dense: block 'model.model.layers.0' .*another"):
        fit(task, SageCallback(SagePolicy(keep=0.5), strict=False), Witness(look))
    assert found == [(["model.model.layers.0"], 1)] * 4
    assert traces(task.model) == before


def test_a_second_installation_is_an_error():
    task = Task(llama())
    # Lightning's own words: the state of one would overwrite the other's in a checkpoint
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit(task, SageCallback(), SageCallback())
    assert wrapped(task) == 0
    with (
        install(task.model, HALF),
        pytest.raises(ValueError, match="installed on this model already"),
    ):
        fit(task, SageCallback())
    assert wrapped(task) == 0


def test_the_other_lightning_package_is_an_error():
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        pass

    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False
    )
    for first, second in ((trainer, Task()), (L.Trainer(barebones=True), Other())):
        with pytest.raises(TypeError, match=r"comes from pytorch_lightning"):
            SageCallback().setup(first, second, "fit")


@pytest.mark.parametrize("task", [Task, LateTask])
def test_tuners_still_work(task, tmp_path):
    sparse, batch_sizes = [], []

    class Tuned(task):
        def training_step(self, batch, batch_idx):
            sparse.append(wrapped(self))
            batch_sizes.append(len(batch["input_ids"]))
            return super().training_step(batch, batch_idx)

        def train_dataloader(self):
            batch = make_batch("llama", None, size=64)
            samples = [{k: v[i] for k, v in batch.items()} for i in range(64)]
            return DataLoader(samples, batch_size=self.batch_size)

        val_dataloader = train_dataloader

    tuned, callback = Tuned(llama() if task is Task else None), SageCallback(HALF)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=[
            callback,
            BatchSizeFinder(max_trials=2, steps_per_trial=1),
            LearningRateFinder(num_training_steps=4),
        ],
        **QUIET,
    )
    trainer.fit(tuned)
    # a trial of a model that is not built before on_fit_start can only be dense
    assert sparse[-2:] == [2, 2]
    assert set(sparse) == ({2} if task is Task else {0, 2})
    assert batch_sizes[0] < batch_sizes[-1]
    assert callback.meters.total.kept.update_count == 2
    assert wrapped(tuned) == 0


@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_copies_the_model(first):
    averaging, callback = EMAWeightAveraging(decay=0.5), SageCallback(HALF)
    task = Task(llama())
    before = traces(task.model)
    fit(task, *([callback, averaging] if first else [averaging, callback]))
    assert callback.summary["kept_fraction"] < 0.7
    assert [(n, [k for k, _ in v]) for n, v in traces(task.model)] == [
        (n, [k for k, _ in v]) for n, v in before
    ]
