"""A fit that was killed and resumed is the fit that was not, to the bit; checkpoints are plain."""

import functools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import zoo
from lightning_sage import (
    SageCallback,
    SageModelParallelStrategy,
    SagePolicy,
    SageStrategy,
    TopMass,
)
from lightning_sage.loader import ResumableLoader
from lightning_sage.resume import random_states, restore_random_states
from lightning_sage.strategies import sage_callback
from processes import free_port, ranks, whole
from tasks import LIGHTNING_WARNINGS, QUIET, Task, wrapped

ROOT = Path(__file__).parents[1]

pytestmark = LIGHTNING_WARNINGS

# drawn in the replay, counts that ranks agree on
POLICY = SagePolicy(keep=TopMass(0.6), sinks=1)
BATCHES, KILLED = 7, 4


class Dropping(Task):
    """Draws dropout in blocks and outside, and numbers of its own, and remembers its losses."""

    def __init__(self, killed=None):
        model = zoo.build("gpt2", dropout=0.1, attention_dropout=0.1, dtype=torch.float32)
        super().__init__(model)
        self.killed, self.losses = killed, []

    def training_step(self, batch, batch_idx):
        if batch_idx == self.killed and self.trainer.global_rank == self.trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = super().training_step(batch, batch_idx)
        noise = random.random() + np.random.random() + torch.rand(()).item()
        sage = sage_callback(self.trainer)
        # a look at the gradient is no step
        if sage is None or sage.installation.session.probe is None:
            self.losses.append((self.current_epoch, batch_idx, loss.item(), noise))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def rows(ranks_in_all):
    samples = [zoo.make_batch("gpt2", size=1, length=8 + n % 3, seed=n) for n in range(60)]
    samples = [{k: v[0] for k, v in sample.items()} for sample in samples]
    return samples[: 3 * BATCHES * ranks_in_all]


def collate(samples):
    longest = max(len(s["input_ids"]) for s in samples)
    fill = {"input_ids": zoo.PAD, "attention_mask": 0, "labels": -100}

    def padded(name):
        return torch.stack(
            [
                torch.nn.functional.pad(s[name], (0, longest - len(s[name])), value=fill[name])
                for s in samples
            ]
        )

    return {name: padded(name) for name in fill}


STRATEGIES = {
    "one process": ("auto", {}),
    "ddp with callback": ("ddp", {}),
    "ddp": (
        lambda: SageStrategy(POLICY, balance="mean", token_weighted=True),
        {"accumulate_grad_batches": 2},
    ),
    "ddp validating": ("ddp", {"val_check_interval": 2, "limit_val_batches": 2}),
    "fsdp to one file": (
        lambda: SageModelParallelStrategy(POLICY, save_distributed_checkpoint=False),
        {},
    ),
    "fsdp to many files": (
        lambda: SageModelParallelStrategy(POLICY, balance="max"),
        {"accumulate_grad_batches": 2},
    ),
}


def train(rank, name, folder, killed=None, resume=None, world=2, kind=ResumableLoader):
    """Losses and weights of two epochs, from a checkpoint where one is given."""
    warnings.simplefilter("ignore")
    strategy, settings = STRATEGIES[name]
    L.seed_everything(3, verbose=False)
    task = Dropping(killed)
    callbacks = [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")]
    if not callable(strategy):
        callbacks.append(SageCallback(POLICY, fidelity_every_n_steps=0))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy() if callable(strategy) else strategy,
        max_epochs=2,
        callbacks=callbacks,
        **{"limit_val_batches": 0, **QUIET, "enable_checkpointing": True, **settings},
    )
    loader = kind(rows(world), batch_size=3, shuffle=True, collate_fn=collate)
    # of its own generator, as the training's
    val = ResumableLoader(rows(world)[:12], batch_size=3, collate_fn=collate)
    trainer.fit(task, loader, val, ckpt_path=resume, weights_only=True)
    weights = {n: whole(p.detach()).clone() for n, p in task.named_parameters()}
    return task.losses, weights


def in_ranks(name, *args, **kwargs):
    if name == "one process":
        return ranks(1, functools.partial(train, world=1, **kwargs), name, *args, group=False)
    return ranks(2, functools.partial(train, **kwargs), name, *args, group=False)


def last_checkpoint(folder):
    # by step: the files of one that was killed while it wrote would be younger
    return max(folder.iterdir(), key=lambda path: int(path.stem.split("=")[1]))


@pytest.mark.parametrize("name", STRATEGIES)
def test_killed_and_resumed_is_as_if_nothing_had_been(name, tmp_path):
    whole_run = in_ranks(name, tmp_path / "whole")
    with pytest.raises(AssertionError, match=r"died|Connection|peer|reset"):
        in_ranks(name, tmp_path / "killed", killed=KILLED)
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint.is_dir() == (name == "fsdp to many files")
    resumed = in_ranks(name, tmp_path / "resumed", resume=checkpoint)
    for (losses, weights), (again, found) in zip(whole_run, resumed, strict=True):
        assert len(losses) == 2 * BATCHES
        assert again == losses[-len(again) :]
        # in the middle of the first epoch
        assert again[0][:2] == (0, KILLED)
        assert all(torch.equal(found[n], weights[n]) for n in weights)


def test_other_draws_would_be_seen(tmp_path, monkeypatch):
    """Without the states of the generators the resumed fit is another one."""
    [(losses, _)] = in_ranks("one process", tmp_path)
    monkeypatch.setattr(SageCallback, "load_state_dict", lambda *_: None)
    [(again, _)] = in_ranks("one process", tmp_path / "again", resume=tmp_path / "step=4.ckpt")
    assert again[0][:2] == losses[4][:2]
    assert again != losses[4:]


def test_resuming_with_other_ranks_says_what_is_lost(tmp_path):
    in_ranks("one process", tmp_path, kind=DataLoader)

    def on_two(rank):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            task = Dropping()
            trainer = L.Trainer(
                accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, **QUIET,
                callbacks=[SageCallback(POLICY, fidelity_every_n_steps=0)],
            )  # fmt: skip
            loader = DataLoader(rows(2), batch_size=3, collate_fn=collate)
            trainer.fit(task, loader, ckpt_path=tmp_path / "step=14.ckpt", weights_only=True)
        return len(task.losses), [str(w.message) for w in caught]

    for rank, (steps, said) in enumerate(ranks(2, on_two, group=False)):
        assert steps > 0
        heard = [text for text in said if "random states of 1 processes and this fit has 2" in text]
        assert len(heard) == (rank == 0)


def fit_one(task, callback, **settings):
    trainer = L.Trainer(accelerator="cpu", callbacks=[callback], **QUIET, **settings)
    trainer.fit(task, DataLoader(rows(1)[:6], batch_size=3, collate_fn=collate))
    return trainer


def test_states_that_were_loaded_go_nowhere_else():
    """Kept until the first batch, and of no use to another fit."""
    callback = SageCallback(POLICY, fidelity_every_n_steps=0)
    assert callback.state_dict() == {}
    loaded = {"ranks": [{"random": random_states(torch.device("cpu"))}]}
    callback.load_state_dict(loaded)
    assert callback.state_dict() == loaded
    torch.manual_seed(5)
    first = Dropping()
    fit_one(first, callback, max_steps=2)
    torch.manual_seed(5)
    other = Dropping()
    fit_one(other, SageCallback(POLICY, fidelity_every_n_steps=0), max_steps=2)
    assert [loss for *_, loss, _ in first.losses] == [loss for *_, loss, _ in other.losses]


class Within(Dropping):
    """Saves where a signal might."""

    def on_before_backward(self, loss):
        self.saved = self.trainer._checkpoint_connector.dump_checkpoint()["callbacks"]


def test_a_checkpoint_from_within_a_batch_asks_no_other_rank():
    def saved(rank):
        task = Within()
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=SageStrategy(POLICY), max_steps=1, **QUIET
        )
        # one rank alone: a collective would hang
        if rank == 1:
            task.on_before_backward = lambda loss: None
        trainer.fit(task, DataLoader(rows(2), batch_size=3, collate_fn=collate))
        return getattr(task, "saved", None)

    assert ranks(2, saved, group=False, timeout=60) == [{}, None]


def test_states_of_generators_come_back():
    device = torch.device("cpu")
    states = random_states(device)

    def draw():
        return random.random(), float(np.random.normal()), torch.rand(3).tolist()

    first, _ = draw(), draw()
    restore_random_states(states, device)
    assert draw() == first


WITHOUT = """
    import sys
    sys.modules["lightning_sage"] = None
    sys.path.insert(0, {tests!r})
    import warnings
    warnings.simplefilter("ignore")
    import torch
    import lightning.pytorch as L
    state = torch.load({path!r}, weights_only=True)
    model = torch.nn.Linear(1, 1)
    import zoo
    model = zoo.build("gpt2", dtype=torch.float32)
    model.load_state_dict({{k.removeprefix("model."): v for k, v in state["state_dict"].items()}})
    class Task(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model
        def training_step(self, batch, batch_idx):
            return self.model(**batch).loss
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)
    batches = [zoo.make_batch("gpt2", seed=n) for n in range(7)]
    trainer = L.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False,
                        enable_checkpointing=False)
    trainer.fit(Task(), torch.utils.data.DataLoader(batches, batch_size=None),
                ckpt_path={path!r}, weights_only=True)
    print("steps", trainer.global_step)
"""


@pytest.mark.parametrize("name", ["ddp with callback", "fsdp to one file"])
def test_a_checkpoint_loads_where_this_package_is_not(name, tmp_path):
    in_ranks(name, tmp_path, kind=DataLoader)
    path = last_checkpoint(tmp_path)
    script = textwrap.dedent(WITHOUT.format(tests=str(ROOT / "tests"), path=str(path)))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "steps 21" in done.stdout


def dense(rank, folder, resume=None, callback=None):
    warnings.simplefilter("ignore")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1 + bool(resume), **QUIET,
        callbacks=callback,
    )  # fmt: skip
    task = Dropping()
    loader = ResumableLoader(rows(2), batch_size=3, shuffle=True, collate_fn=collate)
    trainer.fit(task, loader, ckpt_path=resume, weights_only=True)
    if resume is None:
        trainer.save_checkpoint(folder / "dense.ckpt")
    return trainer.global_step, len(task.losses)


def test_a_checkpoint_made_without_it_goes_on_with_it(tmp_path):
    ranks(2, dense, tmp_path, group=False)
    found = ranks(
        2,
        dense,
        tmp_path,
        tmp_path / "dense.ckpt",
        SageCallback(POLICY, fidelity_every_n_steps=0),
        group=False,
    )
    assert found == [(2 * BATCHES, BATCHES)] * 2


class Sharding(Dropping):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def distributed(rank, folder, strategy, task, resume=None):
    warnings.simplefilter("ignore")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy(), max_epochs=1 + bool(resume), **QUIET
    )
    module = task()
    loader = ResumableLoader(rows(2), batch_size=3, shuffle=True, collate_fn=collate)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    if resume is None:
        trainer.save_checkpoint(folder / "many.ckpt")
    return trainer.global_step


@pytest.mark.parametrize("first", ["with", "without"])
def test_distributed_checkpoints_go_both_ways(first, tmp_path):
    kinds = {
        "with": (lambda: SageModelParallelStrategy(POLICY), Dropping),
        "without": (
            lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            Sharding,
        ),
    }
    other = "without" if first == "with" else "with"
    ranks(2, distributed, tmp_path, *kinds[first], group=False)
    found = ranks(2, distributed, tmp_path, *kinds[other], tmp_path / "many.ckpt", group=False)
    assert found == [2 * BATCHES] * 2


class Raising(Dropping):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.trainer.global_rank == 1:
            raise KeyError("rank one has had enough")
        return super().training_step(batch, batch_idx)


def failing(rank, strategy):
    """What a rank says, how long after the failure, and what is left in its model."""
    warnings.simplefilter("ignore")
    task = Raising()
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy(), max_epochs=1, **QUIET)
    loader = DataLoader(rows(2), batch_size=3, collate_fn=collate)
    started = time.monotonic()
    try:
        trainer.fit(task, loader)
    except Exception as error:
        if rank == 1 and dist.is_initialized():
            # as the end of the process would
            dist.destroy_process_group()
        return f"{type(error).__name__}: {error}", time.monotonic() - started, wrapped(task)
    return None


@pytest.mark.parametrize("kind", [SageStrategy, SageModelParallelStrategy])
def test_a_rank_that_raises_takes_the_others_along(kind):
    zero, one = ranks(2, failing, lambda: kind(POLICY), group=False)
    assert "rank one has had enough" in one[0]
    assert "KeyError" in one[0]
    # the other waits for gradients that never come, and is told
    assert "rank one" not in zero[0]
    assert max(zero[1], one[1]) < 25
    assert zero[2] == one[2] == 0


JOB = """
    import sys, warnings
    sys.path.insert(0, {tests!r})
    warnings.simplefilter("ignore")
    import lightning.pytorch as L
    from test_resume import DataLoader, Raising, collate, rows
    if __name__ == "__main__":
        trainer = L.Trainer(accelerator="cpu", devices=2, strategy="sage_ddp", max_epochs=1,
                            logger=False, enable_checkpointing=False, enable_progress_bar=False)
        loader = DataLoader(rows(2), batch_size=3, collate_fn=collate)
        trainer.fit(Raising(), loader)
"""


def test_a_job_ends_with_the_message_of_the_rank_that_raised(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(JOB.format(tests=str(ROOT / "tests"))))
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "rank one has had enough" in done.stderr
    assert time.monotonic() - started < 90
