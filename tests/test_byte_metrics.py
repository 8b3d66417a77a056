"""SavedBytes, PeakMemory, and what they read; the process's memory is that of a forked child."""

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_sage.memory
from lightning_sage import PeakMemory, SavedBytes
from lightning_sage.memory import current_bytes, in_use, peak_bytes, reset_peak
from processes import ranks, resident

CPU = torch.device("cpu")
SIZE = 200 * 2**20
# what else a process may take and give back meanwhile
SLACK = 40 * 2**20

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Allocator:
    """A device module as torch has them, with counters that a test moves."""

    def __init__(self):
        self.current = self.peak = self.resets = 0

    def hold(self, *sizes):
        for size in sizes:
            self.current = size
            self.peak = max(self.peak, size)

    def memory_stats(self, device):
        prefix = "allocated_bytes.all."
        return {f"{prefix}current": self.current, f"{prefix}peak": self.peak}

    def reset_peak_memory_stats(self, device=None):
        self.resets += 1
        self.peak = self.current


@pytest.fixture
def allocator(monkeypatch):
    fake = Allocator()
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    return fake


def found(metric):
    return [value.item() for value in metric.compute().values()]


def test_every_phase_is_exact_with_resets(allocator):
    allocator.hold(10, 1000, 20)
    metric = PeakMemory(reset=True)
    allocator.hold(90, 50)
    metric.update("forward")
    allocator.hold(70, 30)
    metric.update("backward")
    allocator.hold(40)
    metric.update("optimizer")
    assert found(metric) == [90, 70, 40, 90]
    # the next step peaks lower, but for its backward
    for phase, peak in (("forward", 60), ("backward", 80), ("optimizer", 40)):
        allocator.hold(peak, 40)
        metric.update(phase)
    assert found(metric) == [90, 80, 40, 90]


def test_without_resets_a_phase_is_exact_where_it_goes_higher(allocator):
    allocator.hold(10, 100, 20)
    metric = PeakMemory()
    allocator.hold(90, 50)
    metric.update("forward")  # 90 is hidden below 100: its ends were 20 and 50
    allocator.hold(150, 30)
    metric.update("backward")
    allocator.hold(140, 25)
    metric.update("optimizer")
    assert found(metric) == [50, 150, 30, 150]
    assert allocator.resets == 0


def test_a_reset_by_somebody_else_is_seen(allocator):
    allocator.hold(1000, 20)
    metric = PeakMemory()
    allocator.reset_peak_memory_stats()
    allocator.hold(90, 50)
    metric.update("forward")
    assert found(metric)[0] == 90


@pytest.mark.parametrize("reset", [False, True])
def test_what_is_skipped_does_not_count(allocator, reset):
    metric = PeakMemory(reset=reset)
    allocator.hold(10)
    metric.update("forward")
    allocator.hold(500, 10)
    metric.skip()
    allocator.hold(30)
    metric.update("backward")
    assert found(metric) == [10, 30, 0, 30]
    assert (allocator.resets > 0) == reset


def test_a_reset_of_the_metric_does_not_move_the_beginning_of_a_phase(allocator):
    metric = PeakMemory()
    allocator.hold(500, 10)
    metric.update("forward")
    allocator.hold(600, 10)
    metric.reset()
    metric.update("backward")
    assert found(metric) == [0, 600, 0, 600]


def test_a_move_begins_anew(allocator):
    metric = PeakMemory()
    allocator.hold(500, 10)
    metric.to("meta").to(torch.bfloat16)
    metric._mark = metric._mark._replace(current=7)
    metric.to("meta")
    assert metric._mark == (7, 500, False)


def test_phases_have_names():
    with pytest.raises(ValueError, match=r"'step' is none of \['forward', 'backward', 'opt"):
        PeakMemory().update("step")
    metric = PeakMemory(phases=["all"])
    metric.update("all")
    assert list(metric.compute()) == ["all", "step"]


@on_linux
@pytest.mark.parametrize("reset", [False, True])
def test_a_process_is_seen_to_hold_and_to_let_go(reset):
    def child(rank):
        metric = PeakMemory(reset=reset)
        base = current_bytes(CPU)
        held = resident(SIZE)
        metric.update("forward")
        del held
        metric.update("backward")
        metric.update("optimizer")
        held = resident(SIZE // 2)
        del held
        metric.skip()
        again = PeakMemory(reset=reset)
        held = resident(SIZE // 2)
        del held
        again.update("forward")
        return base, found(metric), found(again)[0]

    [(base, (forward, backward, optimizer, step), again)] = ranks(1, child)
    assert forward == pytest.approx(base + SIZE, abs=SLACK)
    assert backward == pytest.approx(base + SIZE, abs=SLACK), "it was held when backward began"
    assert optimizer == pytest.approx(base, abs=SLACK)
    assert step == max(forward, backward)
    # half as much, and let go again: only a peak that was reset shows it
    assert again == pytest.approx(base + (SIZE // 2 if reset else 0), abs=SLACK)


@on_linux
def test_without_resets_the_peak_of_the_process_stays():
    def child(rank):
        held = resident(SIZE)
        del held
        before = peak_bytes(CPU)
        metric = PeakMemory()
        metric.update("forward")
        metric.skip()
        kept = peak_bytes(CPU) >= before
        return kept, reset_peak(CPU), peak_bytes(CPU) < before - SIZE + SLACK

    assert ranks(1, child) == [(True, True, True)]


@on_linux
def test_where_the_peak_cannot_be_reset_it_is_as_if_nobody_had_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(lightning_sage.memory, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
    assert not reset_peak(CPU)
    metric = PeakMemory(reset=True)
    assert not metric._mark.fresh
    metric.update("forward")
    assert abs(found(metric)[0] - current_bytes(CPU)) < SLACK


@pytest.mark.skipif(sys.platform == "win32", reason="has no resource")
@pytest.mark.parametrize("status", [None, "Name: python\nVmRSS:  4 kB\n"])
def test_without_proc_the_peak_is_what_the_system_counts(monkeypatch, tmp_path, status):
    real, path = peak_bytes(CPU), tmp_path / "status"
    if status is not None:
        path.write_text(status)
    monkeypatch.setattr(lightning_sage.memory, "_STATUS", path)
    use = in_use(CPU)
    # of all there has been, resets or not
    assert use.current == use.peak >= real - SLACK
    assert use.peak < 100 * real, "bytes, not their multiple"


@on_linux
def test_proc_is_read_in_bytes(monkeypatch, tmp_path):
    path = tmp_path / "status"
    path.write_text("Name:\tVm\n\nVmHWM:\t    3060 kB\nVmRSS:\t    1736 kB\nThreads:\t1\n")
    monkeypatch.setattr(lightning_sage.memory, "_STATUS", path)
    assert in_use(CPU) == (1736 * 1024, 3060 * 1024)
    assert in_use(torch.device("meta")) == in_use(CPU)
    assert Path("/proc/self/status").exists()


def model_and_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return model, {"x": torch.ones(3, 4), "more": [{"y": torch.ones(3, 2)}]}


def step(model, batch):
    return ((model(batch["x"]) * batch["more"][0]["y"]) ** 2).sum()


# None where tensors are saved as they are
top_hooks = torch._C._autograd._top_saved_tensors_default_hooks

# tanh's output (also the second layer's input) and the base of the square
HELD = 4 * (3 * 8 + 3 * 2)


def test_saved_bytes_of_a_model_by_hand():
    model, batch = model_and_batch()
    metric = SavedBytes()
    with metric.counting(model, batch) as count:
        loss = step(model, batch)
        assert count() == HELD
    loss.backward()
    assert count() == 0
    with metric.counting(model) as count:
        loss = step(model, batch)
    # the product keeps its factor, the first layer its input
    assert count() == HELD + 4 * (3 * 4 + 3 * 2)
    assert metric.compute() == HELD + 4 * (3 * 4 + 3 * 2) / 2
    del loss


def test_an_exception_counts_no_step_and_leaves_no_hooks():
    model, batch = model_and_batch()
    metric = SavedBytes()
    with pytest.raises(RuntimeError, match="shapes"), metric.counting(model, batch):
        step(model, {**batch, "x": torch.ones(3, 5)})
    assert not metric.update_called
    assert top_hooks(True) is None
    with metric.counting(model, batch):
        loss = step(model, batch)
        assert top_hooks(True) is not None
    assert top_hooks(True) is None
    assert metric.compute() == HELD
    loss.backward()


def test_counting_is_opened_and_closed_in_different_hooks():
    model, batch = model_and_batch()
    metric, stack = SavedBytes(), ExitStack()
    stack.enter_context(metric.counting(model, batch))
    loss = step(model, batch)
    stack.close()
    loss.backward()
    stack.close()
    assert metric.compute() == HELD
    assert metric.update_count == 1
    # what an exception handler does
    stack.enter_context(metric.counting(model, batch))
    error = ValueError("of the training step")
    assert not stack.__exit__(type(error), error, None)
    assert metric.update_count == 1
    assert top_hooks(True) is None
