"""What follows a fit, on a CUDA device: peaks, a budget, looks at the gradient."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_sage import PeakMemory, SageCallback
from lightning_sage.memory import peak_bytes
from tasks import LIGHTNING_WARNINGS, Task, Witness, fit

pytestmark = [pytest.mark.gpu, *LIGHTNING_WARNINGS]
MIB = 2**20


def wide_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes, **heads))


def long_batches(count):
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(259, (8, 512), generator=draw) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


@pytest.mark.parametrize("reset", [False, True])
def test_a_phase_knows_its_peak(reset):
    metric = PeakMemory(reset=reset).to("cuda")
    metric.skip()
    before = torch.cuda.memory_allocated()
    held = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    metric.update("forward")
    # more than there ever was, so that it shows without a reset as well
    brief = torch.empty(2 * peak_bytes(held.device) + 64 * MIB, dtype=torch.uint8, device="cuda")
    size = brief.numel()
    del brief
    metric.update("backward")
    metric.update("optimizer")
    peaks = {name: int(value) - before for name, value in metric.compute().items()}
    assert peaks["forward"] == pytest.approx(64 * MIB, abs=MIB)
    assert peaks["backward"] == pytest.approx(64 * MIB + size, abs=MIB)
    assert peaks["optimizer"] == pytest.approx(64 * MIB, abs=MIB)
    assert peaks["step"] == peaks["backward"]


@pytest.mark.parametrize("mib", [400, 600, 1000])
def test_a_budget_holds_on_the_device(mib):
    peaks = []

    def look(trainer, task):
        peaks.append(int(callback.meters.peak))

    callback = SageCallback(memory_budget=f"{mib}MiB", print_summary=False)
    fit(Task(wide_llama()), callback, Witness(look), data=long_batches(12), accelerator="gpu")
    budget = callback._watch.steering.budget
    assert budget.on_device
    assert not budget.trying
    if budget.rung != budget.rungs[-1]:
        assert max(peaks[5:]) <= mib * MIB


def test_a_look_leaves_training_as_it_was():
    losses = []
    for every in (0, 2):
        seen = []
        task = Task(wide_llama())
        task.lr = 1e-3
        callback = SageCallback(
            fidelity_every_n_steps=every, fidelity_floor=0.0, print_summary=False
        )
        look = Witness(lambda t, m, s=seen: s.append(float(t.callback_metrics["loss"])))

        def step(batch, batch_idx, task=task):
            loss = task.model(**batch).loss
            task.log("loss", loss)
            return loss

        task.training_step = step
        fit(task, look, callback, data=long_batches(4), accelerator="gpu", precision="bf16-mixed")
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
