"""What a fit tells: to loggers, to the progress bar, to the history; and what that costs."""

import csv
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from lightning_sage import AllTokens, SageCallback, SagePolicy, install
from lightning_sage.corpus import StdlibFunctions
from lightning_sage.memory import saved_bytes
from lightning_sage.watch.history import NAME, read
from lightning_sage.watch.reporter import texts
from processes import ranks
from tasks import HALF, LIGHTNING_WARNINGS, LLAMA, Task, Witness, batches, fit, llama
from zoo import build

pytestmark = LIGHTNING_WARNINGS


def csv_logger(folder):
    return CSVLogger(folder, name="", version="")


def logged(folder):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["sage/kept_fraction"]]


def test_an_interval_of_its_own(tmp_path):
    callback = SageCallback(HALF, log_every_n_steps=3)
    fit(Task(llama()), callback, data=batches(7), logger=csv_logger(tmp_path))
    # every third step, and what is left at the end of the epoch
    assert [int(row["step"]) for row in logged(tmp_path)] == [2, 5, 6]
    [run] = read(tmp_path / NAME)
    assert [(line["step"], line["steps"]) for line in run.steps] == [(3, 3), (6, 3), (7, 1)]


def test_nothing_is_logged_where_nobody_wants_it(tmp_path):
    callback = SageCallback(HALF, log_every_n_steps=0)
    fit(Task(llama()), callback, logger=csv_logger(tmp_path), log_every_n_steps=1)
    assert not (tmp_path / NAME).exists()
    assert callback.summary["kept_fraction"] > 0
    quiet = SageCallback(HALF, log_every_n_steps=0, print_summary=False)
    fit(Task(llama()), quiet)
    assert quiet.meters is None


@pytest.mark.parametrize("settings", [{"barebones": True}, {"fast_dev_run": 2}])
def test_trial_runs_write_nothing(tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = {} if "barebones" in settings else {"logger": csv_logger(tmp_path)}
    callback = SageCallback(HALF, fidelity_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*barebones=True")
        fit(Task(llama()), callback, **settings, **extra)
    assert callback.meters is None
    assert callback._watch.steering.monitor._due_at == -1
    assert not list(tmp_path.rglob(NAME))


def test_a_trainer_without_logger_keeps_its_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = fit(Task(llama()), SageCallback(HALF, fidelity_every_n_steps=2))
    assert trainer.callback_metrics["sage/kept_fraction"] > 0
    assert trainer.callback_metrics["sage/fidelity_cosine"] > 0
    assert not list(tmp_path.rglob(NAME))


def test_a_store_is_no_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Remote(CSVLogger):
        log_dir = "memory://bucket/run"

        def log_hyperparams(self, params=None):
            pass

        def log_metrics(self, metrics, step=None):
            pass

        def save(self):
            pass

    fit(Task(llama()), SageCallback(HALF), logger=Remote(tmp_path), log_every_n_steps=1)
    assert not list(tmp_path.rglob(NAME))


def test_a_step_without_the_model_keeps_nothing():
    class Skips(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx == 0 else None

    callbacks = [SageCallback(HALF, print_summary=False) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned `None`")
        fit(Skips(llama()), callbacks[0], data=batches(4))
    fit(Task(llama()), callbacks[1], data=batches(1))
    skipping, one = (callback.summary["cached_mib"] for callback in callbacks)
    assert skipping == pytest.approx(one / 4)


def test_the_progress_bar_shows_two():
    class Bar(ProgressBar):
        shown = ()

        def on_train_batch_end(self, trainer, pl_module, *args):
            metrics = self.get_metrics(trainer, pl_module)
            self.shown = sorted(name for name in metrics if name.startswith("sage/"))

    bar = Bar()
    fit(Task(llama()), SageCallback(HALF), bar, log_every_n_steps=1, enable_progress_bar=True)
    assert bar.shown == ["sage/cached_mib", "sage/kept_fraction"]


def test_the_history_holds_what_the_records_held(tmp_path):
    seen, callback = [], SageCallback(SagePolicy(keep=AllTokens(), replay=0.3))

    def look(trainer, task):
        seen.append(callback.installation.records)

    task = Task(llama())
    fit(task, callback, Witness(look), data=batches(4), logger=csv_logger(tmp_path),
        log_every_n_steps=2)  # fmt: skip
    [run] = read(tmp_path / NAME)
    assert run.start["model"] == "LlamaForCausalLM"
    assert run.start["trainable"] == sum(p.numel() for p in task.parameters())
    assert run.start["policy"]["replay"] == 0.3
    assert run.blocks == ["model.model.layers.0", "model.model.layers.1"]
    assert sum(run.dense) == pytest.approx(callback.summary["dense_mib"] * 2**20)
    for line, part in zip(run.steps, (seen[:2], seen[2:]), strict=True):
        for i in range(2):
            records = [step[i] for step in part]
            valid = sum(int(r.valid.sum()) for r in records)
            assert line["kept"][i] == pytest.approx(sum(int(r.kept.sum()) for r in records) / valid)
            replayed = sum(int(r.replayed.sum()) for r in records)
            assert line["replayed"][i] == pytest.approx(replayed / valid, rel=1e-5)
            assert line["cached"][i] == sum(r.cached_bytes for r in records) / 2
        assert line["peak"]["backward"] > 0
        assert line["loss"] > 0
        assert line["valid"] == sum(int(step[0].valid.sum()) for step in part) / 2
    for line, records in zip(run.tokens, (seen[1], seen[3]), strict=True):
        assert line["kept"] == ["".join("01"[x] for x in r.kept[0]) for r in records]
        assert line["replayed"] == ["".join("01"[x] for x in r.replayed[0]) for r in records]
    assert run.summary["kept_fraction"] == pytest.approx(1.0)


def test_adapters_are_not_the_model_and_trials_not_the_policy(tmp_path):
    task = Task(build("llama", lora=True, dtype=torch.float32))
    callback = SageCallback(SagePolicy(keep=0.9), memory_budget="1GiB")
    fit(task, callback, logger=csv_logger(tmp_path), log_every_n_steps=2)
    [run] = read(tmp_path / NAME)
    assert run.start["model"] == "LlamaForCausalLM"
    assert run.start["policy"]["keep"] == 0.9
    assert run.start["memory_budget"] == "1GiB"


def test_saved_bytes_are_those_of_the_first_steps(tmp_path):
    data, task = batches(5), Task(llama())
    callback = SageCallback(SagePolicy(keep=AllTokens(), replay=0.3))
    fit(task, callback, data=data, logger=csv_logger(tmp_path), log_every_n_steps=1)
    [run] = read(tmp_path / NAME)
    assert [line["saved"] is not None for line in run.steps] == [True, True, True, False, False]
    there = [*task.parameters(), *task.buffers(), *data[0].values()]
    with install(task, callback.policy), saved_bytes(there) as held:
        loss = task.model(**data[0]).loss
        assert run.steps[0]["saved"] == held()
    assert loss > 0


def test_the_hook_that_counts_is_gone_after_an_exception():
    class Fails(Task):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        fit(Fails(llama()), SageCallback(HALF))
    # there is none to take away
    with pytest.raises(RuntimeError, match=r"stack\.empty"):
        torch._C._autograd._pop_saved_tensors_default_hooks()


def test_another_librarys_tokenizer_shows_numbers(tmp_path):
    class Knows(Witness):
        def on_train_start(self, trainer, pl_module):
            trainer.datamodule = SimpleNamespace(tokenizer=object())

        def on_train_end(self, trainer, pl_module):
            trainer.datamodule = None

    fit(Task(llama()), Knows(lambda *_: None), SageCallback(HALF), data=batches(1),
        logger=csv_logger(tmp_path), log_every_n_steps=1)  # fmt: skip
    [run] = read(tmp_path / NAME)
    assert run.tokens[0]["text"][0].strip().isdigit()


def test_tokens_are_told_as_text(tmp_path):
    data = StdlibFunctions()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    tokenizer = data.tokenizer
    config = LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    task = Task(LlamaForCausalLM(config))

    class Knows(Witness):
        def on_train_start(self, trainer, pl_module):
            trainer.datamodule = SimpleNamespace(tokenizer=tokenizer)

        def on_train_end(self, trainer, pl_module):
            trainer.datamodule = None

    fit(task, Knows(lambda *_: None), SageCallback(HALF), data=[batch] * 2,
        logger=csv_logger(tmp_path), log_every_n_steps=1)  # fmt: skip
    [run] = read(tmp_path / NAME)
    first = run.tokens[0]
    valid = int(batch["attention_mask"][0].sum())
    assert "".join(first["text"][: valid - 1]).startswith("def ")
    assert len(first["text"]) == len(first["labels"]) == batch["input_ids"].shape[1]
    assert first["labels"].count("1") == int((batch["labels"][0] != -100).sum())


class SentencePieces:
    pieces = ("\u2581Hello", "\u2581world", "!", "\n")

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] for i in ids]

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids).replace("\u2581", " ").lstrip(" ")


def test_spaces_before_words_are_kept():
    assert texts(SentencePieces(), [0, 1, 2, 3]) == [" Hello", " world", "!", "\n"]
    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert "".join(texts(tokenizer, tokenizer("a b\n").input_ids[:-1])) == "a b\n"
    assert texts(None, [7, 8]) == [" 7", " 8"]


def test_one_process_and_two_log_the_same(tmp_path):
    data, policy = batches(4, padding=None), SagePolicy(keep=AllTokens(), replay=0.4)

    def numbers(*args, folder, **settings):
        callback = SageCallback(policy, fidelity_every_n_steps=1, print_summary=False)
        task = Task(llama())
        task.lr = 0.0
        fit(task, callback, logger=csv_logger(folder), log_every_n_steps=99, **settings)
        return {k: v for k, v in callback.summary.items() if k != "seconds" and "peak" not in k}

    alone = numbers(data=data, folder=tmp_path / "one")

    def train(rank):
        settings = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        return numbers(data=data[rank::2], folder=tmp_path / "two", **settings)

    first, second = ranks(2, train, group=False)
    assert first == second
    for name in (
        "kept_fraction",
        "replayed_fraction",
        "cached_mib",
        "fidelity_cosine",
        "saved_mib",
    ):
        assert first[name] == pytest.approx(alone[name], rel=1e-5), name
    [run] = read(tmp_path / "two" / NAME)
    assert run.start["world"] == 2


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(callback, steps):
    """Operations of a fit of a Llama with 12 blocks."""
    fields = {k: v for k, v in LLAMA.items() if k != "model_type"} | {"num_hidden_layers": 12}
    torch.manual_seed(0)
    task = Task(LlamaForCausalLM(LlamaConfig(**fields)))
    with Operations() as operations:
        fit(task, callback, data=batches(1) * steps, log_every_n_steps=50)
    return operations.count


def test_what_it_costs_in_operations():
    def step(**settings):
        """Operations of one of the later steps."""
        fits = [
            operations(SageCallback(HALF, measure_dense=False, print_summary=False, **settings), n)
            for n in (5, 9)
        ]
        return (fits[1] - fits[0]) / 4

    bare, quiet = step(log_every_n_steps=0), step()
    assert bare > 1000
    assert quiet <= 1.01 * bare
    look = operations(SageCallback(HALF, fidelity_every_n_steps=100), 5)
    look -= operations(SageCallback(HALF), 5)
    assert 0 < look / 100 <= 0.04 * bare
