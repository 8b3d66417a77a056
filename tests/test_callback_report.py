import copy
import csv
import warnings
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_sage import AllTokens, ReplayError, SagePolicy
from lightning_sage.callback import SageCallback
from tasks import HALF, LIGHTNING_WARNINGS, PLAIN, Task, Witness, batches, fit, llama, traces
from zoo import PlainModel

pytestmark = LIGHTNING_WARNINGS


def rows_of(path):
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row["sage/kept_fraction"]]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logs_what_the_blocks_did_since_the_last_time(tmp_path, accumulate):
    steps, callback = [], SageCallback(SagePolicy(keep=AllTokens(), replay=0.25))

    def look(trainer, task):
        records = callback.installation.records
        count = [
            sum(int(getattr(r, k).sum()) for r in records) for k in ("valid", "kept", "replayed")
        ]
        steps.append([*count, sum(r.cached_bytes for r in records)])

    # two optimizer steps between logs, one step left for the end of the epoch
    data = batches(2 * accumulate) + batches(3 * accumulate, length=16)
    logger = CSVLogger(tmp_path, name="", version="")
    settings = {"log_every_n_steps": 2, "accumulate_grad_batches": accumulate}
    trainer = fit(Task(llama()), callback, Witness(look), data=data, logger=logger, **settings)
    logged = rows_of(tmp_path / "metrics.csv")
    parts = [steps[i : i + 2 * accumulate] for i in range(0, len(steps), 2 * accumulate)]
    assert [int(row["step"]) for row in logged] == [1, 3, 4]
    for row, part in zip(logged, parts, strict=True):
        valid, kept, replayed, cached = (sum(column) for column in zip(*part, strict=True))
        assert float(row["sage/kept_fraction"]) == pytest.approx(kept / valid) == 1
        assert float(row["sage/replayed_fraction"]) == pytest.approx(replayed / valid, rel=1e-6)
        assert float(row["sage/cached_mib"]) == pytest.approx(cached / len(part) / 2**20)
    assert 0.2 < trainer.callback_metrics["sage/replayed_fraction"] < 0.4


def test_table_is_printed_once(capsys):
    callback = SageCallback(HALF, fidelity_every_n_steps=4)
    fit(Task(llama()), callback, val=batches(1), max_epochs=2)
    shown = capsys.readouterr().out
    assert shown.count("tokens kept") == 1
    for key, form in (
        ("kept_fraction", "{:.1%}"),
        ("cached_mib", "{:.3g} MiB"),
        ("ratio", "{:.3f}"),
        ("fidelity_cosine", "{:.3f}"),
        ("saved_mib", "{:.3g} MiB"),
        ("peak_mib", "{:,.1f} MiB"),
    ):
        assert form.format(callback.summary[key]) in shown
    assert "seconds a step" in shown
    assert 0 < callback.summary["ratio"] < 1
    assert callback.meters.total.kept.update_count == 8


def test_table_can_be_switched_off(capsys):
    callback = SageCallback(HALF, measure_dense=False, print_summary=False)
    fit(Task(llama()), callback)
    assert capsys.readouterr().out == ""
    assert "dense_mib" not in callback.summary
    assert callback.summary["cached_mib"] > 0


def test_a_fit_with_nothing_to_do(capsys):
    task, callback = Task(llama()), SageCallback(HALF)
    before = traces(task.model)
    fit(task, callback, max_epochs=0)
    assert capsys.readouterr().out == ""
    assert traces(task.model) == before


@pytest.mark.filterwarnings("ignore:Found .* module\\(s\\) in eval mode")  # Lightning says so too
def test_works_in_eval_mode_and_says_so_once():
    task = Task(llama().eval())
    callback = SageCallback(HALF)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(task, callback, max_epochs=2)
    said = [str(w.message) for w in caught if "blocks train in eval mode" in str(w.message)]
    assert len(said) == 1
    assert "2 of 2 blocks" in said[0]
    assert 0 < callback.summary["replayed_fraction"] < 0.7
    assert not task.model.training


def test_two_fits_count_separately():
    task, callback = Task(llama()), SageCallback(HALF)
    before = traces(task.model)
    fit(task, callback)
    assert callback.meters.total.kept.update_count == 4
    fit(task, callback, data=batches(2))
    assert callback.meters.total.kept.update_count == 2
    assert traces(task.model) == before


def test_labels_of_the_batch_are_seen_when_the_model_is_not_given_them():
    class OwnLoss(Task):
        def training_step(self, batch, batch_idx):
            logits = self.model(input_ids=batch["input_ids"]).logits
            labels = batch["labels"][:, 1:].flatten()
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)

    def look(trainer, task):
        records, batch = callback.installation.records, data[trainer.global_step - 1]
        bears = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
        assert all((record.kept | ~bears).all() for record in records)
        assert all(torch.equal(record.valid, batch["attention_mask"] != 0) for record in records)

    data = batches()
    callback = SageCallback(SagePolicy(keep=0.6, sinks=0))
    fit(OwnLoss(llama()), callback, Witness(look), data=data)


@pytest.mark.parametrize("settings", [{"barebones": True}, {"fast_dev_run": 2}])
def test_short_and_bare_runs(settings, capsys):
    task, callback = Task(llama()), SageCallback(HALF)
    before = traces(task.model)
    with warnings.catch_warnings():
        # barebones says what it leaves out, and would warn of anything logged
        warnings.filterwarnings("ignore", message="You are running in `Trainer\\(barebones=True\\)")
        warnings.filterwarnings("ignore", message="`Trainer\\(barebones=True\\)` started running")
        fit(task, callback, **settings)
    assert "tokens kept" not in capsys.readouterr().out
    assert callback.summary == {}
    assert traces(task.model) == before


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_lost_gradient_is_an_error_before_the_optimizer_steps(accumulate):
    class Loses(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            pl_module.model.model.layers[1].mlp.up_proj.weight.grad = None

    task = Task(llama())
    before = copy.deepcopy(task.state_dict())
    with pytest.raises(ReplayError, match=r"model\.model\.layers\.1\.mlp\.up_proj\.weight"):
        fit(task, Loses(), SageCallback(HALF), accumulate_grad_batches=accumulate)
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_block_without_part_in_the_loss_is_no_error():
    class Early(PlainModel):
        def forward(self, input_ids, labels):
            x = self.blocks[0](self.embed(input_ids))
            self.blocks[1](x)
            loss = torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
            return SimpleNamespace(loss=loss)

    data = [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in batches(padding=None)]
    callback = SageCallback(PLAIN)
    fit(Task(Early()), callback, data=data)
    assert 0 < callback.summary["replayed_fraction"] < callback.summary["kept_fraction"]
