"""Looks at the gradient in the middle of a fit: what they show, and that nothing else does."""

import copy
import warnings

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

import zoo
from accuracy import cosine, parameter_gradients
from lightning_sage import (
    AllTokens,
    ImportanceSampling,
    ReplayError,
    SageCallback,
    SagePolicy,
    install,
)
from lightning_sage.watch.dial import advice
from lightning_sage.watch.history import NAME, read
from processes import ranks
from tasks import HALF, LIGHTNING_WARNINGS, QUIET, Task, Witness, batches, fit, llama, traces

pytestmark = LIGHTNING_WARNINGS


def monitored(policy=HALF, every=1, **settings):
    return SageCallback(policy, fidelity_every_n_steps=every, print_summary=False, **settings)


def looks(folder):
    [run] = read(folder / NAME)
    return run.fidelity


def gradients(model, batch, policy=None):
    model.zero_grad()
    if policy is None:
        model(**batch).loss.backward()
    else:
        with install(model, policy):
            model(**batch).loss.backward()
    found = parameter_gradients(model.model.layers)
    model.zero_grad(set_to_none=True)
    return found


def test_it_shows_the_cosine_of_the_step_that_follows(tmp_path):
    task, data = Task(llama()), batches(3)
    task.lr = 0.0
    policy = SagePolicy(keep=0.4, replay=None, sinks=0)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = fit(task, monitored(policy, every=2), data=data, logger=logger)
    seen = looks(tmp_path)
    assert [look["step"] for look in seen] == [0, 2]
    for look in seen:
        batch = data[look["step"]]
        sparse, dense = gradients(task.model, batch, policy), gradients(task.model, batch)
        assert look["cosine"] == pytest.approx(cosine(sparse, dense), abs=2e-5)
        for i, (name, (found, _)) in enumerate(look["blocks"].items()):
            assert name == f"model.model.layers.{i}"
            own = [{k: v for k, v in g.items() if k.startswith(f"{i}.")} for g in (sparse, dense)]
            assert found == pytest.approx(cosine(*own), abs=2e-5)
        assert look["samples"] == 3
    logged = trainer.callback_metrics
    assert logged["sage/fidelity_cosine"] == pytest.approx(seen[-1]["cosine"], abs=1e-5)
    assert "sage/fidelity_cosine/model.model.layers.1" in logged
    assert "sage/fidelity_norm_ratio" in logged


class Busy(Task):
    """Has all that a look could disturb: dropout, a buffer, a metric, logs, random numbers."""

    def __init__(self, model):
        super().__init__(model)
        self.register_buffer("calls", torch.zeros(()))
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.calls += 1
        self.mean.update(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss * (1 + 0.1 * torch.rand(()))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_bitwise_the_same_with_it(accumulate):
    base = zoo.build("gpt2", dropout=0.1, attention_dropout=0.1, dtype=torch.float32)
    policy = SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.4))
    results = []
    for every in (0, 1):
        torch.manual_seed(0)
        task = Busy(copy.deepcopy(base))
        seen = []
        callback = monitored(policy, every)
        look = Witness(lambda t, m, seen=seen, c=callback: seen.append(c.installation.records))
        trainer = fit(task, callback, look, data=batches(4), accumulate_grad_batches=accumulate)
        loss = trainer.callback_metrics["train_loss_epoch"]
        results.append((task.state_dict(), loss, task.mean.compute(), seen, torch.rand(())))
        assert (len(callback.summary) > 0) == ("fidelity_cosine" in callback.summary or not every)
    (before, *plain), (after, *watched) = results
    assert before["calls"] == 4
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert plain[0] == watched[0]
    assert plain[1] == watched[1]
    assert plain[3] == watched[3]
    for one, other in zip(plain[2], watched[2], strict=True):
        assert all(torch.equal(a.replayed, b.replayed) for a, b in zip(one, other, strict=True))


def test_it_looks_once_a_step_however_many_batches(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Task(llama()), monitored(), data=batches(6), logger=logger, accumulate_grad_batches=3)
    assert [look["step"] for look in looks(tmp_path)] == [0, 1]


def test_float16_with_a_scaler_shows_the_same(tmp_path):
    class Scaled(L.Callback):
        def setup(self, trainer, pl_module, stage):
            # what MixedPrecision has on a GPU
            trainer.precision_plugin.scaler = type("Scaler", (), {"get_scale": lambda _: 2.0**10})()

    cosines = []
    for extra in ([], [Scaled()]):
        callback = monitored(every=4)
        fit(Task(llama()), callback, *extra, logger=False)
        cosines.append(callback.summary["fidelity_cosine"])
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-5)


class OutOfMemory(Task):
    """Does not fit with more than so many samples, outside of the step itself."""

    def __init__(self, most):
        super().__init__(llama())
        self.most, self.seen = most, []

    def training_step(self, batch, batch_idx):
        count = len(batch["input_ids"])
        self.seen.append(count)
        # as where the step fits by keeping few tokens
        if "log" in vars(self) and count > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 byte")
        return super().training_step(batch, batch_idx)


def test_a_batch_that_does_not_fit_is_looked_at_in_part(tmp_path):
    task, logger = OutOfMemory(1), CSVLogger(tmp_path, name="", version="")
    fit(task, monitored(), data=batches(2), logger=logger)
    # three, then one densely and sparsely, then the step; then no more than one
    assert task.seen == [3, 1, 1, 3, 1, 1, 3]
    assert [look["samples"] for look in looks(tmp_path)] == [1, 1]


def test_a_sample_that_does_not_fit_ends_the_looking_and_not_the_training(tmp_path):
    task, logger = OutOfMemory(0), CSVLogger(tmp_path, name="", version="")
    with pytest.warns(UserWarning, match="not measured any more.*no part of the batch fits"):
        fit(task, monitored(), data=batches(3), logger=logger)
    assert task.seen == [3, 1, 3, 3, 3]
    assert not looks(tmp_path)


@pytest.mark.parametrize("target", [None, 0.9])
def test_memory_that_runs_out_in_the_sparse_pass_does_not_end_the_training(target):
    class Late(Task):
        passes = 0

        def training_step(self, batch, batch_idx):
            self.passes += "log" in vars(self)
            # the dense pass fits, and so does the sparse one where a search is to fail
            if "log" in vars(self) and self.passes > (1 if target is None else 2):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().training_step(batch, batch_idx)

    callback = monitored(fidelity_target=target)
    with pytest.warns(UserWarning, match="not measured any more"):
        trainer = fit(Late(llama()), callback, data=batches(3))
    assert trainer.global_step == 3


class Masks(Task):
    """Changes its batch, in place and by name."""

    def training_step(self, batch, batch_idx):
        hidden = torch.rand(batch["input_ids"].shape) < 0.2
        batch["input_ids"][hidden] = 3
        labels = batch.pop("labels")
        return self.model(**batch, labels=labels).loss


def test_a_step_that_changes_its_batch_gets_it_as_it_came():
    found = []
    for every in (0, 1):
        torch.manual_seed(0)
        task = Masks(llama())
        fit(task, monitored(every=every), data=batches(3))
        found.append(task.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_parameters_that_a_step_changes_in_place_end_the_looking():
    class Averages(Task):
        def __init__(self, model):
            super().__init__(model)
            self.mean = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

        def training_step(self, batch, batch_idx):
            self.mean.mul_(0.5).add_(0.5)
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="not measured any more.*changes parameters in place"):
        fit(Averages(llama()), monitored())


def test_a_look_at_part_of_a_batch_does_not_count_for_the_dense_step():
    found = []
    for every, most in ((0, 9), (1, 1)):
        callback = monitored(every=every)
        fit(OutOfMemory(most), callback, data=batches(1))
        found.append(callback.summary["dense_mib"])
    assert found[0] == found[1]


def test_frozen_blocks_have_no_cosine(tmp_path):
    task = Task(llama())
    task.model.model.layers[0].requires_grad_(False)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(task, monitored(check_gradients=False), data=batches(1), logger=logger)
    [look] = looks(tmp_path)
    assert list(look["blocks"]) == ["model.model.layers.1"]


def test_a_step_that_cannot_be_run_twice_ends_the_looking_and_not_the_training():
    class Once(Task):
        def training_step(self, batch, batch_idx):
            if "log" in vars(self):
                raise KeyError("iterator is used up")
            return super().training_step(batch, batch_idx)

    task = Once(llama())
    with pytest.warns(UserWarning, match="not measured any more.*KeyError.*used up"):
        fit(task, monitored(), data=batches(3))
    assert "log" not in vars(task)


def test_manual_optimization_is_trained_without():
    class Manual(Task):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.model(**batch).loss)
            optimizer.step()

    task = Manual(llama())
    with pytest.warns(UserWarning, match="manual optimization"):
        trainer = fit(task, monitored())
    assert trainer.global_step == 4


def test_a_loss_that_is_not_finite_is_no_reading(tmp_path):
    class Bad(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx else 1.0)

    logger = CSVLogger(tmp_path, name="", version="")
    fit(Bad(llama()), monitored(), data=batches(2), logger=logger)
    assert [look["step"] for look in looks(tmp_path)] == [0]


def warned(policy, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Task(llama()), monitored(policy, **settings), data=batches(4))
    return [str(w.message) for w in caught if "fidelity" in str(w.message)]


def test_a_low_cosine_is_warned_of_once_with_the_knob_to_turn():
    [text] = warned(SagePolicy(keep=0.3, sinks=0), fidelity_floor=0.99)
    assert "at step 0 with SagePolicy(keep=0.3, sinks=0) the gradient's cosine" in text
    assert "below fidelity_floor=0.99" in text
    assert "raise keep, now TopFraction(fraction=0.3)" in text
    assert "say to TopFraction(fraction=0.54)" in text
    [text] = warned(SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.2)), fidelity_floor=1)
    assert "raise replay, now ImportanceSampling(fraction=0.2" in text
    assert "noise and no bias" in text
    assert warned(SagePolicy(keep=AllTokens(), replay=None), fidelity_floor=0.999) == []


def test_without_being_asked_it_looks_once_after_the_first_steps(tmp_path):
    data = batches(14)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Task(llama()), SageCallback(HALF, print_summary=False), data=data, logger=logger)
    assert [look["step"] for look in looks(tmp_path)] == [10]


@pytest.mark.parametrize(("every", "steps"), [(0, 14), (None, 10)])
def test_it_does_not_look_at_short_fits_or_where_it_is_told_not_to(every, steps):
    callback = monitored(HALF, every)
    fit(Task(llama()), callback, data=batches(steps))
    assert "fidelity_cosine" not in callback.summary


class ByHand(Task):
    def __init__(self, model):
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model(**batch).loss)
        optimizer.step()


def test_what_nobody_asked_for_and_cannot_be_had_is_no_warning():
    # warnings are errors here
    callback = monitored(HALF, None)
    fit(ByHand(llama()), callback, data=batches(12))
    assert "fidelity_cosine" not in callback.summary


def test_a_norm_out_of_bounds_is_warned_of_by_the_name_of_the_policy(monkeypatch):
    monkeypatch.setattr("lightning_sage.watch.monitor.NORMS", (1.1, 1.5))
    [text] = warned(None, fidelity_floor=1e-3)
    assert "with preset 'balanced' the gradient's norm is" in text
    assert "of the dense one, not 1.1 to 1.5" in text
    assert "fidelity_every_n_steps=0 does not look" in text


def test_advice_where_nothing_can_be_raised():
    with install(llama(), SagePolicy(keep=AllTokens(), replay=None, cache_dtype="int8")) as done:
        assert "attention='full' and fewer bits" not in advice(SagePolicy(keep=0.2), done.records)
        assert "cache_dtype" in advice(done.policy, done.records)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fidelity_every_n_steps": -1}, "fidelity_every_n_steps must be"),
        ({"fidelity_floor": 1.5}, "fidelity_floor must be a cosine"),
        ({"fidelity_target": 0.9}, "set fidelity_every_n_steps too"),
        ({"fidelity_target": 1.0, "fidelity_every_n_steps": 1}, "fidelity_target must lie in"),
        ({"log_every_n_steps": -1}, "log_every_n_steps must be"),
    ],
)
def test_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        SageCallback(**settings)


def test_a_target_moves_the_policy_and_the_records_follow(tmp_path):
    kept = []
    callback = monitored(SagePolicy(keep=0.2, sinks=0), fidelity_target=0.98)

    def look(trainer, task):
        kept.append(float(callback.installation.records[0].kept.float().mean()))

    logger = CSVLogger(tmp_path, name="", version="")
    task = Task(llama())
    before = traces(task.model)
    fit(task, callback, Witness(look), data=batches(8, length=33), logger=logger)
    assert traces(task.model) == before
    assert kept[0] > 0.4
    seen = looks(tmp_path)
    assert seen[0]["cosine"] < 0.9
    assert all(look["cosine"] > 0.93 for look in seen[1:])
    assert callback.policy.keep == 0.2


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_fit_goes_on_from_where_the_dial_stood(tmp_path):
    shifts = []

    def look(trainer, task):
        shifts.append(callback._watch.steering.control.shift)

    for path in (None, tmp_path / "step=2.ckpt"):
        callback = monitored(SagePolicy(keep=0.2, sinks=0), fidelity_target=0.97)
        saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
        trainer = L.Trainer(
            accelerator="cpu",
            callbacks=[callback, Witness(look), saving],
            max_epochs=2,
            **{**QUIET, "enable_checkpointing": True},
        )
        trainer.fit(Task(llama()), DataLoader(batches(2), batch_size=None), ckpt_path=path)
    assert len(shifts) == 6
    assert shifts[4:] == shifts[2:4]
    assert len(set(shifts)) == 4


def test_two_ranks_show_the_mean_of_theirs():
    data, policy = batches(2), SagePolicy(keep=0.4, replay=None, sinks=0)

    def train(rank):
        callback = monitored(policy, every=4)
        task = Task(llama())
        task.lr = 0.0
        mine = [data[rank]]
        trainer = fit(
            task, callback, data=mine, devices=2, strategy="ddp", use_distributed_sampler=False
        )
        return trainer.callback_metrics["sage/fidelity_cosine"]

    both = ranks(2, train, group=False)
    model = llama()
    alone = [cosine(gradients(model, b, policy), gradients(model, b)) for b in data]
    assert both[0] == both[1]
    assert both[0] == pytest.approx(sum(alone) / 2, abs=1e-4)


def test_two_ranks_move_their_dials_alike_even_if_one_cannot_look():
    def train(rank):
        task = OutOfMemory(0 if rank else 9)
        callback = monitored(SagePolicy(keep=0.2, sinks=0), fidelity_target=0.98)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(task, callback, data=batches(3), devices=2, strategy="ddp",
                use_distributed_sampler=False)  # fmt: skip
        said = [w for w in caught if "not measured any more" in str(w.message)]
        return callback._watch.steering.control.shift, len(said), task.state_dict()

    (a, quiet, left), (b, said, right) = ranks(2, train, group=False)
    assert a == b > 0
    assert (quiet, said) == (0, 1)
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sharded_blocks_are_looked_at_and_train_the_same(precision):
    def train(rank):
        results = []
        for every in (0, 1):
            torch.manual_seed(0)
            task, callback = Task(llama()), monitored(SagePolicy(keep=0.4, sinks=0), every)
            fit(task, callback, data=batches(2), devices=2, strategy="sage_fsdp",
                precision=precision, use_distributed_sampler=False)  # fmt: skip
            values = [p.to_local().detach().clone() for p in task.parameters()]
            results.append((values, callback.summary.get("fidelity_cosine")))
        return results

    for (plain, _), (watched, seen) in ranks(2, train, group=False):
        assert 0.3 < seen < 1
        assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


@pytest.mark.filterwarnings("ignore:gradient fidelity is not measured")
def test_a_block_that_cannot_be_replayed_still_ends_the_fit():
    class Noisy(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 0.1 * torch.rand_like(x)

    model = llama()
    model.model.layers[1].mlp = Noisy(model.model.layers[1].mlp)
    with pytest.raises(ReplayError, match="random"):
        fit(Task(model), monitored())
