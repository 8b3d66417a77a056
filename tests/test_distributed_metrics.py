"""Metrics over two ranks: the values of one process that saw all batches."""

import sys

import pytest
import torch
import torch.distributed as dist

from lightning_sage import (
    BlockRecord,
    CachedBytes,
    GradientFidelity,
    KeptTokens,
    PeakMemory,
    ReplayedTokens,
    SavedBytes,
)
from lightning_sage.memory import current_bytes
from processes import ranks, resident

BLOCKS = ["layers.0", "layers.1", "layers.2"]
STEPS = 6


def records(step):
    """Of one step; lengths, and in some steps the blocks, differ."""
    generator = torch.Generator().manual_seed(step)
    T = 5 + step
    valid = torch.arange(T) < torch.randint(2, T + 1, (3, 1), generator=generator)
    made = []
    for i, name in enumerate(BLOCKS):
        kept = valid & (torch.rand(3, T, generator=generator) < 0.6)
        rows = kept.flatten().nonzero().flatten()[i::2]
        made.append(BlockRecord(name, valid, kept, 2**33 + 7 * step + i, rows=rows))
    return made[1:] if step == 2 else made


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    names = BLOCKS[1:] if step == 2 else BLOCKS
    sparse, dense = (
        {name: [torch.randn(50, generator=generator), None] for name in names} for _ in range(2)
    )
    return {n: [x[0] + dense[n][0], None] for n, x in sparse.items()}, dense


def fed(make, steps):
    metric = make()
    for step in steps:
        if isinstance(metric, GradientFidelity):
            metric.update(*gradients(step))
        else:
            metric.update(2**34 + step if isinstance(metric, SavedBytes) else records(step))
    return metric


def listed(found):
    return {k: v.item() for k, v in found.items()} if isinstance(found, dict) else found.item()


MAKERS = [
    kind if blocks is None else (lambda kind=kind: kind(BLOCKS))
    for kind in (KeptTokens, ReplayedTokens, CachedBytes, GradientFidelity)
    for blocks in (None, BLOCKS)
] + [SavedBytes]


def test_two_ranks_have_the_values_of_one_process():
    def work(rank):
        results = []
        for make in MAKERS:
            metric = fed(make, range(rank, STEPS, dist.get_world_size()))
            first = listed(metric.compute())
            # reading the ranks' sum must leave the rank's own counts in place
            metric._computed = None
            results.append((first, listed(metric.compute())))
        return results

    [alone], both = ranks(1, work), ranks(2, work)
    assert both[0] == both[1] == alone
    for once, again in alone:
        assert once == again


def test_counts_are_exact_beyond_float32():
    metric = fed(CachedBytes, range(2))
    assert metric.compute().item() == 3 * 2**33 + 3 + 3 * 7 / 2
    assert fed(SavedBytes, range(2)).compute().item() == 2**34 + 0.5


def test_a_rank_without_a_gradient_leaves_it_to_the_other():
    def work(rank):
        metric = GradientFidelity()
        metric.update(*(gradients(0) if rank == 0 else ({}, {})))
        return listed(metric.compute())

    expected = listed(fed(GradientFidelity, [0]).compute())
    assert ranks(2, work) == [expected, expected]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_that_of_the_larger_rank():
    size = 200 * 2**20

    def work(rank):
        metric = PeakMemory(reset=True)
        base = current_bytes(torch.device("cpu"))
        held = resident(size if rank else 1)
        del held
        metric.update("forward")
        metric.update("backward")
        return base, listed(metric.compute())

    (_, first), (base, second) = ranks(2, work)
    assert first == second
    assert first["forward"] == first["step"] == pytest.approx(base + size, abs=size / 4)
    assert first["backward"] < first["forward"] - size / 2
