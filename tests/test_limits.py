"""What fits in a budget of GPU memory, found by trying; here without a GPU."""

import gc
import json
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import limits

    # every try collects garbage; the imported libraries are none
    gc.freeze()
    yield limits
    gc.unfreeze()


class Memory:
    """Fits up to a size, and remembers what was tried."""

    def __init__(self, most):
        self.most, self.tried = most, []

    def __call__(self, size):
        self.tried.append(size)
        return size <= self.most


@pytest.mark.parametrize("most", [1, 2, 3, 31, 32, 33, 63])
def test_a_small_limit_is_found_exactly(limits, most):
    memory = Memory(most)
    limit = limits.find_limit(memory)
    assert (limit.fits, limit.fails) == (most, most + 1)
    assert limit.tries == len(memory.tried) == len(set(memory.tried))


@pytest.mark.parametrize("most", [100, 777, 4096, 99_999])
def test_a_large_limit_is_found_to_a_thirty_second_in_few_tries(limits, most):
    memory = Memory(most)
    limit = limits.find_limit(memory)
    assert limit.fits <= most < limit.fails
    assert limit.fails - limit.fits <= limit.fits / 32
    # doublings, and five halvings of the last gap
    assert limit.tries <= most.bit_length() + 1 + 5
    # never more than twice what is known to fit
    fitted = 0
    for size in memory.tried:
        assert size <= max(1, 2 * fitted)
        fitted = max(fitted, size) if size <= most else fitted


def test_sizes_are_multiples_of_the_unit(limits):
    memory = Memory(40_000)
    limit = limits.find_limit(memory, unit=1024)
    assert all(size % 1024 == 0 for size in memory.tried)
    assert limit.fits <= 40_000 < limit.fails
    assert limit.fails - limit.fits == 1024


def test_nothing_fits(limits):
    memory = Memory(5)
    limit = limits.find_limit(memory, unit=10)
    assert (limit.fits, limit.fails, limit.tries, memory.tried) == (0, 10, 1, [10])


def test_a_search_that_runs_out_of_time_leaves_its_limit_open(limits, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(limits, "perf_counter", lambda: clock[0])

    def fits(size):
        clock[0] += size
        return size <= 20

    # 1 + 2 + 4 + 8 seconds are over; sixteen would end in time, but might not
    assert limits.find_limit(fits, deadline=30) == limits.Limit(8, None, 4)
    clock[0] = 0.0
    assert limits.find_limit(fits, deadline=130) == limits.Limit(16, 24, 7)


def test_every_method_grows_batch_and_context(limits):
    asked, removed = [], []

    @contextmanager
    def contend(setting):
        def attempt(grown):
            asked.append(grown)
            assert grown.method == setting.method
            factor = {"dense": 1, "checkpointing": 5, "sage": 13}[setting.method]
            return grown.batch * grown.length <= factor * 10_000

        yield attempt
        removed.append(setting.method)

    base = limits.Setting(shape="tiny")
    settings = limits.contestants(base)
    records = list(limits.measure_limits(settings, ["batch", "context"], 1000.0, contend))
    assert [record["name"] for record in records] == ["dense", "checkpointing", "sage keep=0.25"]
    assert removed == ["dense", "checkpointing", "sage"]
    assert [record["batch"]["fits"] for record in records] == [4, 24, 63]
    contexts = [record["context"]["fits"] for record in records]
    assert contexts == [39 * 256, 192 * 256, 504 * 256]
    assert all(s.length == limits.BATCH_LENGTH or s.batch == 1 for s in asked)


def test_time_that_one_search_leaves_is_the_others(limits, monkeypatch):
    deadlines = []

    def find_limit(fits, unit, deadline):
        deadlines.append(deadline)
        return limits.Limit(1, None, 1)

    monkeypatch.setattr(limits, "find_limit", find_limit)
    monkeypatch.setattr(limits, "perf_counter", lambda: 0.0)
    settings = limits.contestants(limits.Setting())
    list(limits.measure_limits(settings, ["batch", "context"], 600, lambda _: nullcontext()))
    assert deadlines == [100, 120, 150, 200, 300, 600]


@pytest.mark.parametrize("head", ["none", "chunked"])
def test_a_try_is_a_training_step_that_survives_lack_of_memory(limits, monkeypatch, head):
    base = limits.Setting(device="cpu", shape="tiny", rank=4, head=head)
    model = limits.build(base)
    before = {name: p.clone() for name, p in model.named_parameters()}
    steps, twins = [], []
    counting = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    prepare, loss = limits.prepare, limits.Contender.loss

    def watched(setting, model):
        contender = prepare(setting, model)
        twins.append(weakref.ref(contender.model))
        return contender

    def too_much(self, batch):
        value = loss(self, batch)
        if batch["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError
        return value

    monkeypatch.setattr(limits, "prepare", watched)
    monkeypatch.setattr(limits.Contender, "loss", too_much)
    for setting in limits.contestants(base):
        sizes = [replace(setting, batch=batch, length=24) for batch in (1, 2, 8, 4)]
        with limits.contending(setting, model) as attempt:
            assert [attempt(sized) for sized in sizes] == [True, True, False, True]
        for name, parameter in model.named_parameters():
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
    counting.remove()
    # one of each method makes the optimizer's state
    assert len(steps) == 3 * (1 + 3)
    # each try was a fresh start, of which nothing is left
    assert len(twins) == 3 * (1 + 4)
    assert not any(twin() for twin in twins)


def test_prints_a_line_for_each_method_and_a_table(limits, monkeypatch, capsys, tmp_path):
    """The whole script, on a machine whose memory ends at some number of tokens."""
    asked = iter([True])
    # once: torch asks too
    monkeypatch.setattr(torch.cuda, "is_available", lambda: next(asked, False))
    total = SimpleNamespace(total_memory=96 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    fractions = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(limits, "circumstances", lambda _: {"device": "none", "torch": "2"})
    setting = limits.Setting
    monkeypatch.setattr(limits, "Setting", lambda **given: setting(**{**given, "device": "cpu"}))
    monkeypatch.setattr(limits, "BATCH_LENGTH", 32)

    def loss(self, batch):
        enough = {"dense": 100, "checkpointing": 300, "sage": 1300}[self.setting.method]
        if batch["input_ids"].numel() > enough:
            raise torch.OutOfMemoryError
        parameters = (p for p in self.model.parameters() if p.requires_grad)
        return sum(p.float().sum() for p in parameters)

    monkeypatch.setattr(limits.Contender, "loss", loss)
    out = tmp_path / "limits.jsonl"
    limits.main(["--shape", "tiny", "--rank", "2", "--out", str(out)])
    assert fractions == [0.25]
    *lines, title, _, _, _, _, _, last = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [json.loads(line) for line in lines if line.startswith("{")] == records
    assert [record["batch"]["fits"] for record in records] == [3, 9, 40]
    assert [record["context"]["fits"] for record in records] == [0, 256, 1280]
    assert "24 GiB" in title
    assert [cell.strip() for cell in last.split("|")[1:-1]] == [
        *("sage keep=0.25", "40 (< 41)", "13.33", "4.44", "1,280 (< 1,536)", "5.00"),
    ]


def test_without_cuda_it_says_so(limits, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        limits.main(["--shape", "tiny"])
    assert stop.value.code == 2
    assert "needs CUDA" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(limits, capsys, tmp_path):
    out = tmp_path / "limits.jsonl"
    arguments = ["--shape", "tiny", "--rank", "4", "--only", "batch", "--budget_gib", "0.5"]
    try:
        limits.main([*arguments, "--seconds", "60", "--out", str(out)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    dense, checkpointing, sage = (record["batch"]["fits"] for record in records)
    assert 0 < dense < checkpointing
    assert dense < sage
    assert "0.5 GiB" in capsys.readouterr().out
