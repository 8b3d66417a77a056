"""Strategies on CUDA devices: one process here, and as many as there are devices by torchrun."""

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import zoo
from accuracy import assert_gradients_close
from lightning_sage import (
    SageCallback,
    SageModelParallelStrategy,
    SagePolicy,
    SageStrategy,
    TopMass,
)
from lightning_sage.resume import random_states, restore_random_states
from processes import free_port
from tasks import LIGHTNING_WARNINGS, QUIET, Task, wrapped

pytestmark = [pytest.mark.gpu, *LIGHTNING_WARNINGS]

POLICY = SagePolicy(keep=TopMass(0.5), replay=None, sinks=1)


@pytest.fixture(autouse=True)
def _group(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def fit(strategy, precision, callbacks=(), dtype=torch.float32):
    task = Task(zoo.build("llama", lora=True, dtype=dtype))
    data = [zoo.make_batch("llama", size=4, length=24, seed=seed) for seed in range(4)]
    trainer = L.Trainer(
        accelerator="gpu", devices=1, strategy=strategy, precision=precision, max_epochs=1,
        accumulate_grad_batches=2, gradient_clip_val=1.0, callbacks=list(callbacks), **QUIET,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(task, DataLoader(data, batch_size=None))
    weights = {n: p.detach() for n, p in task.named_parameters() if p.requires_grad}
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()}
    assert wrapped(task) == 0
    return {n: p.cpu() for n, p in whole.items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", [SageStrategy, SageModelParallelStrategy])
def test_one_rank_trains_as_a_single_device(kind, precision):
    """Balanced with itself, weighted by its own tokens: the window's mean is over tokens."""
    alone = fit("auto", precision, [SageCallback(POLICY)])
    found = fit(kind(POLICY), precision)
    assert_gradients_close(found, alone, 1e-5 if precision == "32-true" else 2e-2)
    fit(kind(POLICY, balance="mean", token_weighted=True), precision)


def test_the_devices_generator_comes_back():
    device = torch.device("cuda")
    states = random_states(device)
    first, _ = torch.rand(3, device=device), torch.rand(3, device=device)
    restore_random_states(states, device)
    assert torch.equal(torch.rand(3, device=device), first)


JOB = """
    import sys, warnings
    sys.path.insert(0, {tests!r})
    warnings.simplefilter("ignore")
    import lightning.pytorch as L, torch
    from torch.utils.data import DataLoader
    import zoo
    from lightning_sage import SageModelParallelStrategy, SageStrategy
    from tasks import Task, QUIET
    from test_gpu_strategies import POLICY
    kind = dict(ddp=SageStrategy, fsdp=SageModelParallelStrategy)[sys.argv[1]]
    trainer = L.Trainer(accelerator="gpu", devices=torch.cuda.device_count(), max_epochs=1,
                        strategy=kind(POLICY, balance="mean", token_weighted=True),
                        precision="bf16-mixed", use_distributed_sampler=False, **QUIET)
    task = Task(zoo.build("llama", lora=True, dtype=torch.float32))
    data = [zoo.make_batch("llama", size=4, length=20 + 2 * trainer.global_rank, seed=n)
            for n in range(6)]
    trainer.fit(task, DataLoader(data, batch_size=None))
    total = sum((p.full_tensor() if hasattr(p, "full_tensor") else p).double().sum()
                for p in task.parameters() if p.requires_grad)
    sys.stdout.write(f"weights {{total.item()}}\\n")
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_devices_end_with_the_same_weights(kind, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(JOB.format(tests=str(Path(__file__).parent))))
    count = torch.cuda.device_count()
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [sys.executable, *command, str(script), kind],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    sums = [line for line in done.stdout.splitlines() if line.startswith("weights")]
    assert len(sums) == count
    assert len(set(sums)) == 1
