"""A budget finds what fits, keeps to it, and goes down when a step runs out of memory."""

import copy
import gc
import random
import weakref
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric

from lightning_sage import (
    AllTokens,
    GradientMass,
    ImportanceSampling,
    LossFirst,
    RandomTokens,
    SageCallback,
    SagePolicy,
    Selection,
    TopFraction,
    TopMass,
)
from lightning_sage.watch.history import NAME, read
from lightning_sage.watch.memory_budget import MARGIN, MemoryBudget, Rung, Use, ladder, limited
from lightning_sage.watch.retry import StepRetry
from processes import ranks
from tasks import LIGHTNING_WARNINGS, Task, Witness, batches, fit, llama, traces
from zoo import build

pytestmark = LIGHTNING_WARNINGS
EVERYTHING = SagePolicy(keep=AllTokens(), replay=None)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("selection", "less"),
    [
        (AllTokens(), LossFirst(0.25)),
        (LossFirst(0.5), LossFirst(0.25)),
        (TopFraction(0.5), TopFraction(0.25)),
        (TopFraction(0.1), TopFraction(0.1)),
        (TopMass(0.8), TopMass(0.8, max_fraction=0.25)),
        (TopMass(0.8, max_fraction=0.1), TopMass(0.8, max_fraction=0.1)),
        (RandomTokens(0.5), RandomTokens(0.25)),
        (GradientMass(0.9), GradientMass(0.9, max_fraction=0.25)),
        (ImportanceSampling(0.5), ImportanceSampling(0.25)),
    ],
    ids=repr,
)
def test_selections_are_limited(selection, less):
    before = copy.copy(selection)
    assert limited(selection, 0.25) == less
    assert selection == before


def test_a_rung_only_ever_takes_away():
    rung = Rung(0.25, 0.125, "int8")
    assert rung.of(EVERYTHING) == SagePolicy(
        keep=LossFirst(0.25), replay=ImportanceSampling(0.125), cache_dtype="int8"
    )
    own = SagePolicy(keep=0.1, replay=0.05, cache_dtype="fp8", attention="full")
    assert vars(rung.of(own))["cache_dtype"] == "fp8"
    assert rung.of(own).keeper == TopFraction(0.1)
    assert rung.of(own).replayer == TopFraction(0.05)
    assert Rung(1.0, 1.0, None).of(SagePolicy()) == SagePolicy()


@pytest.mark.parametrize("policy", [EVERYTHING, SagePolicy(), SagePolicy(cache_dtype="bf16")])
def test_the_ladder_goes_down_and_begins_with_the_policy_itself(policy):
    rungs = ladder(policy)
    assert rungs[0].of(policy) == policy
    most = getattr(policy.replayer, "fraction", 1.0)
    replayed = [min(rung.replay, most) for rung in rungs]
    assert replayed == sorted(replayed, reverse=True)
    assert len(set(rungs)) == len(rungs)
    assert all(rung.replay <= rung.keep for rung in rungs)
    assert {rung.cache_dtype for rung in rungs} <= {None, "int8"}


class Machine:
    """A made-up device: what a step takes there, by rung."""

    def __init__(self, base, row, replay, always=0, tokens=10_000, int8=0.27):
        self.base, self.row, self.replay, self.always = base, row, replay, always
        self.tokens, self.int8 = tokens, int8

    def use(self, rung):
        kept, replayed = (int(share * self.tokens) for share in (rung.keep, rung.replay))
        bits = 1 if rung.cache_dtype is None else self.int8
        cached = int(bits * (self.row * kept + self.always))
        peak = self.base + cached + self.replay * replayed
        return Use(peak, cached, self.tokens, kept, replayed)

    def settle(self, limit, policy=EVERYTHING):
        budget = MemoryBudget(limit, policy)
        budget.start(CUDA, 0)
        told = None
        while budget.trying:
            # the first step is a larger one: self-check, optimizer state
            told = budget.note(self.use(budget.rung))
        return budget, told


@pytest.mark.parametrize("always", [0, 5_000_000])
@pytest.mark.parametrize("limit", [2**25, 2**26, 2**27, 2**28, 2**30])
def test_the_best_rung_that_fits_is_found(limit, always):
    machine = Machine(base=2**24, row=20_000, replay=3_000, always=always)
    budget, told = machine.settle(limit)
    fits = [r for r in budget.rungs if machine.use(r).bytes <= limit * (1 - MARGIN)]
    if not fits:
        assert "is not enough" in told
        assert machine.use(budget.rung).bytes == min(machine.use(r).bytes for r in budget.rungs)
        return
    # to the rounding of rows
    assert budget.rung == fits[0]
    assert told == f"memory budget of {limit / 2**20:.2f} MiB: {budget.rung}" or limit >= 2**30
    assert budget.note(machine.use(budget.rung)) is None


def test_a_longer_batch_lowers_it_for_good():
    machine = Machine(base=2**24, row=20_000, replay=3_000)
    budget, _ = machine.settle(2**27)
    before = budget.rung
    assert budget.note(machine.use(before)._replace(bytes=int(2**27 * 1.2))).startswith("memory")
    assert budget.rung != before
    assert machine.use(budget.rung).bytes < machine.use(before).bytes
    after = budget.rung
    assert budget.note(machine.use(after)) is None
    assert budget.rung == after


def test_it_can_be_lowered_down_to_the_last_rung_and_no_further():
    machine = Machine(base=2**24, row=20_000, replay=3_000)
    budget, _ = machine.settle(2**30)
    taken = [machine.use(budget.rung).bytes]
    while budget.lower():
        taken.append(machine.use(budget.rung).bytes)
    assert len(taken) > 4
    assert taken == sorted(set(taken), reverse=True)
    assert budget.rung.cache_dtype == "int8"


def test_memory_runs_out_while_it_still_tries():
    budget = MemoryBudget("1GiB", EVERYTHING)
    budget.start(CUDA, 0)
    before = budget.rung
    assert budget.lower() is not None
    assert not budget.trying
    # by a step, and not to the end at once
    assert budget.rung != budget.rungs[-1]
    assert budget.rung.keep <= before.keep
    while budget.lower():
        pass
    assert budget.rung.keep == budget.rungs[-1].keep


def test_a_resumed_budget_goes_on_from_its_rung_and_knows_its_costs():
    machine = Machine(base=2**24, row=20_000, replay=3_000)
    budget, _ = machine.settle(2**27)
    again = MemoryBudget(2**27, EVERYTHING)
    again.start(CUDA, 0)
    again.resume(budget.state())
    assert not again.trying
    assert again.rung == budget.rung
    over = machine.use(budget.rung)._replace(bytes=int(2**27 * 1.2))
    assert again.note(over) == budget.note(over)
    assert again.rung == budget.rung


def test_trials_are_whole_steps_of_the_optimizer():
    tried = []

    def look(trainer, task):
        tried.append(callback._watch.steering.budget.trying)

    callback = SageCallback(memory_budget="1GiB", print_summary=False)
    fit(Task(llama()), callback, Witness(look), data=batches(16), accumulate_grad_batches=3)
    # four steps of three batches; a callback looks before ours has
    assert tried.index(False) in (11, 12)


@pytest.mark.parametrize("budget", [0.9, "0.9", "90%", " 90 %"])
def test_shares_in_any_writing(budget):
    assert MemoryBudget(budget, EVERYTHING).share == pytest.approx(0.9)


def test_the_summary_is_of_the_steps_after_the_trials():
    callback = SageCallback(EVERYTHING, memory_budget="1GiB", print_summary=False)
    fit(Task(llama()), callback, data=batches(9))
    assert callback.summary["kept_fraction"] == 1
    assert callback.summary["replayed_fraction"] == 1


@pytest.mark.parametrize("budget", ["much", "20 parsecs", -3, 0.0, True])
def test_what_is_no_size_is_refused(budget):
    with pytest.raises(ValueError, match="is no size of memory"):
        SageCallback(memory_budget=budget)


def test_a_selection_that_cannot_be_limited_is_refused():
    class Own(Selection):
        def keep(self, scores, valid, priority, noise):
            raise NotImplementedError

    with pytest.raises(ValueError, match="neither a fraction nor a max_fraction"):
        SageCallback(SagePolicy(keep=Own()), memory_budget="1GiB")


def test_weights_above_the_budget_are_refused_before_the_first_step():
    budget = MemoryBudget("100MiB", EVERYTHING)
    with pytest.raises(ValueError, match=r"100\.00 MiB is below what weights and gradients need"):
        budget.start(CUDA, 95 * 2**20)
    budget.start(CPU, 95 * 2**20)


def test_a_share_of_a_device_needs_one():
    task = Task(llama())
    before = traces(task.model)
    with pytest.raises(ValueError, match=r"memory_budget=0\.5 is a share of a device's memory"):
        fit(task, SageCallback(memory_budget=0.5))
    assert traces(task.model) == before


def test_a_share_is_one_of_the_devices_memory(monkeypatch):
    class Device:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Device)
    budget = MemoryBudget(0.5, EVERYTHING)
    budget.start(CUDA, 0)
    assert budget.limit == 40 * 2**30


@pytest.mark.parametrize("kib", [40, 80, 120, 1000])
@pytest.mark.parametrize("attention", ["salient", "full"])
def test_a_fit_on_a_cpu_caches_what_it_may(kib, attention, tmp_path):
    cached, limit = [], kib * 1024

    def look(trainer, task):
        cached.append(sum(r.cached_bytes for r in callback.installation.records))

    policy = SagePolicy(keep=AllTokens(), replay=None, attention=attention)
    callback = SageCallback(policy, memory_budget=f"{kib}KiB", print_summary=False)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Task(llama()), callback, Witness(look), data=batches(12, length=64), logger=logger)
    [run] = read(tmp_path / NAME)
    [event] = [event["text"] for event in run.events]
    held = cached[4:]
    assert max(held) == min(held)
    if "is not enough" in event:
        assert held[0] == min(cached)
        return
    # the next rungs are a third to a half larger
    assert held[0] <= limit
    assert held[0] > 0.4 * limit or "100% kept" in event


def test_the_gradient_is_looked_at_when_the_budget_has_settled(tmp_path):
    callback = SageCallback(memory_budget="1GiB", fidelity_every_n_steps=3, print_summary=False)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Task(llama()), callback, data=batches(8), logger=logger, log_every_n_steps=2)
    [run] = read(tmp_path / NAME)
    # the looks of steps 0 and 3 wait for the four trials
    assert [look["step"] for look in run.fidelity] == [4, 6]
    assert "ratio" not in callback.summary
    assert callback.summary["dense_mib"] > 0


def test_a_policy_of_none_starts_from_every_token():
    assert SageCallback(memory_budget="1GiB").policy == SagePolicy(keep=AllTokens())
    assert SageCallback().policy == SagePolicy.preset("balanced")


class Short(Task):
    """Runs out of memory in some calls, in the forward or late in the backward."""

    def __init__(self, model, calls, where):
        super().__init__(model)
        self.calls, self.where, self.count, self.batches = set(calls), where, 0, []
        self.norm, self.mean = torch.nn.BatchNorm1d(1, affine=False), MeanMetric()

    def fail(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    def training_step(self, batch, batch_idx):
        self.count += 1
        self.batches.append(batch_idx)
        random.random()
        bad = self.count in self.calls
        self.norm(batch["input_ids"].double().mean(1, keepdim=True).float())
        self.mean.update(float(batch_idx))
        if bad and self.where == "forward":
            self.fail()
        embedded = self.model.get_input_embeddings()(batch["input_ids"])
        if bad:
            # when the blocks' gradients have been added already
            embedded.register_hook(self.fail)
        rest = {name: x for name, x in batch.items() if name != "input_ids"}
        return self.model(inputs_embeds=embedded, **rest).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def retried(where, calls, accumulate):
    """Weights after a fit in which some calls failed."""

    class Retries(Witness):
        def on_train_start(self, trainer, pl_module):
            self.retry = StepRetry(trainer, lambda: True)

        def on_train_end(self, trainer, pl_module):
            self.retry.remove()
            assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)

    torch.manual_seed(0)
    random.seed(0)
    model = build("gpt2", dropout=0.1, attention_dropout=0.1, dtype=torch.float32)
    task = Short(model, calls, where)
    trainer = fit(
        task, Retries(lambda *_: None), data=batches(6), accumulate_grad_batches=accumulate
    )
    assert trainer.global_step == 6 // accumulate
    return task, torch.rand(()), random.random()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_taken_again_loses_nothing(where, accumulate):
    plain, *drawn = retried(where, (), accumulate)
    # the second call, the one after it, and one in the middle of a window
    again, *drawn_again = retried(where, (2, 3, 7), accumulate)
    assert plain.count == 6
    assert again.count == 9
    assert again.batches == [0, 1, 1, 1, 2, 3, 4, 4, 5]
    assert drawn == drawn_again
    assert again.norm.num_batches_tracked == 6
    assert again.mean._update_count == 6
    assert plain.mean.compute() == again.mean.compute() == 2.5
    for name, value in plain.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_nothing_is_left_of_the_budget_after_a_failure():
    task = Short(llama(), (2,), "forward")
    loops = []

    def look(trainer, task):
        loops.append(trainer.fit_loop.epoch_loop.automatic_optimization)
        if task.count == 1:
            task.training_step = None

    before = traces(task.model)
    with pytest.raises(TypeError):
        fit(task, SageCallback(memory_budget="1GiB"), Witness(look))
    assert traces(task.model) == before
    assert "_make_closure" not in vars(loops[0])


def test_a_fit_that_runs_out_of_memory_goes_on_with_less(tmp_path):
    task, kept = Short(llama(), (7,), "backward"), []

    def look(trainer, task):
        kept.append(sum(r.cached_bytes for r in callback.installation.records))

    callback = SageCallback(memory_budget="1GiB", print_summary=False)
    logger = CSVLogger(tmp_path, name="", version="")
    data = batches(9, length=64)
    trainer = fit(task, callback, Witness(look), data=data, logger=logger)
    assert trainer.global_step == 9
    assert task.batches == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8]
    assert kept[4] == kept[5] > kept[6] == kept[8]
    [run] = read(tmp_path / NAME)
    assert run.events[0]["text"].startswith("memory budget of 1.00 GiB: at most 100%")
    assert "ran out of memory and is taken again" in run.events[1]["text"]


def test_a_failed_try_lowers_the_budget_once(monkeypatch):
    class Account(NamedTuple):
        current: int
        peak: int

    mib = 2**20
    task = Short(llama(), (6,), "forward")
    # what the device would say: the failed try took all there is, other steps a quarter
    seen = lambda _: Account(0, (4096 if task.count in (6, 7) else 1024) * mib)  # noqa: E731
    monkeypatch.setattr("lightning_sage.metrics.in_use", seen)
    callback = SageCallback(memory_budget="2GiB", print_summary=False)

    def pretend(trainer, task):
        callback._watch.steering.budget.on_device = True

    events = []
    monkeypatch.setattr(
        "lightning_sage.watch.steering.rank_zero_info", lambda text: events.append(text)
    )
    fit(task, callback, Witness(pretend), data=batches(30, length=64))
    assert sum("lowered" in text for text in events) == 1


def test_no_batch_outlives_its_step():
    made, alive = [], []

    def look(trainer, task):
        alive.append(sum(ids() is not None for ids in made))

    def given():
        for seed in range(8):
            [batch] = batches(1, every_token=bool(seed % 2))
            made.append(weakref.ref(batch["input_ids"]))
            yield batch

    callback = SageCallback(memory_budget="1GiB", log_every_n_steps=0)
    gc.collect()
    gc.disable()
    try:
        fit(Task(llama()), callback, Witness(look), data=Stream(given))
    finally:
        gc.enable()
    # the one under way, the next, and one that is being fetched
    assert len(alive) == 8
    assert max(alive) <= 3


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, given):
        self.given = given

    def __iter__(self):
        return self.given()


def test_a_step_that_can_keep_no_less_ends_the_fit():
    task = Short(llama(), range(1, 99), "forward")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        fit(task, SageCallback(memory_budget="1GiB"))
    # less and less, until there is nothing below
    assert 2 < task.count < 20


def test_without_a_budget_a_failure_is_a_failure():
    task = Short(llama(), (2,), "forward")
    with pytest.raises(torch.OutOfMemoryError):
        fit(task, SageCallback())
    assert task.count == 2


def test_ranks_agree_on_a_rung_and_a_failure_says_what_to_do():
    def train(rank):
        # one rank's batches are three times as long
        data = batches(7, length=64 if rank else 20)
        callback = SageCallback(EVERYTHING, memory_budget="60KiB", print_summary=False)
        seen = []
        look = Witness(lambda *_: seen.append(callback._watch.steering.budget.rung))
        settings = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        fit(Task(llama()), callback, look, data=data, **settings)
        task = Short(llama(), (2,), "forward")
        with pytest.raises(torch.OutOfMemoryError) as raised:
            fit(task, SageCallback(memory_budget="1GiB"), **settings)
        return seen, raised.value.__notes__

    (a, _), (b, notes) = ranks(2, train, group=False)
    assert a == b
    assert a[-1].cache_dtype == "int8"
    assert "smaller memory_budget" in notes[0]
