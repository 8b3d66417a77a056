import copy
import doctest
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lightning_sage.memory
import lightning_sage.metrics
from lightning_sage.memory import saved_bytes
from lightning_sage.metrics import SageUsage


def record(valid, kept, replayed=None, cached_bytes=0, device="cpu"):
    """A record of B samples of 4 tokens, of which the first so many are marked."""

    def mask(counts):
        counts = torch.tensor(counts, device=device)
        return torch.arange(4, device=device) < counts[:, None]

    return SimpleNamespace(
        valid=mask(valid),
        kept=mask(kept),
        replayed=None if replayed is None else mask(replayed),
        cached_bytes=cached_bytes,
    )


def values(usage):
    return {name: value.item() for name, value in usage.compute().items()}


@pytest.mark.parametrize("module", [lightning_sage.memory, lightning_sage.metrics])
def test_doctests(module):
    tried = doctest.testmod(module)
    assert tried.attempted
    assert not tried.failed


def test_counts_over_blocks_and_steps():
    usage = SageUsage()
    usage.update([record([4, 2], [3, 1], [1, 0], 2**20), record([4, 2], [1, 1], [1, 1], 2**20)])
    # another batch size and length in the next step
    usage.update([record([4], [4], [2], 2**20), record([4], [0], [0], 2**20)])
    assert values(usage) == {
        "kept_fraction": pytest.approx(10 / 20),
        "replayed_fraction": pytest.approx(5 / 20),
        "cached_mib": 2.0,
    }


def test_a_block_without_backward_replayed_nothing():
    usage = SageUsage()
    usage.update([record([4], [2], None), record([4], [2], [2])])
    assert values(usage)["replayed_fraction"] == pytest.approx(2 / 8)


def test_a_step_without_blocks_or_tokens():
    usage = SageUsage()
    usage.update([])
    usage.update([record([0], [0], [0])])
    assert values(usage) == {"kept_fraction": 0.0, "replayed_fraction": 0.0, "cached_mib": 0.0}


def test_ranks_are_summed():
    def both_ranks(state, group=None):
        return [state, state + 4]

    usage = SageUsage(distributed_available_fn=lambda: True, dist_sync_fn=both_ranks)
    usage.update([record([4], [1], [0], cached_bytes=2**20)])
    # valid 4 + 8, kept 1 + 5, replayed 0 + 4, bytes 2**20 + (2**20 + 4), steps 1 + 5
    assert values(usage) == {
        "kept_fraction": pytest.approx(6 / 12),
        "replayed_fraction": pytest.approx(4 / 12),
        "cached_mib": pytest.approx((2 * 2**20 + 4) / 6 / 2**20),
    }
    assert usage.kept == 1, "compute() must leave the rank's own counts in place"


def test_counting_reads_nothing_from_the_device():
    # a meta tensor has no values: whatever waits for one raises
    usage = SageUsage().to("meta")
    usage.update([record([4], [2], [1], 8, device="meta")] * 3)
    assert usage.kept.is_meta


def test_survives_the_cast_of_its_module():
    module = nn.Linear(1, 1)
    module.usage = SageUsage()
    module.usage.update([record([4], [1])] * 75)
    module.to(torch.bfloat16)
    module.usage.update([record([4], [1])])
    assert module.usage.valid == 304


def test_reset_copy_and_pickle():
    usage = SageUsage()
    usage.update([record([4], [1], [1], 4)])
    before = values(usage)
    assert values(copy.deepcopy(usage)) == values(pickle.loads(pickle.dumps(usage))) == before
    usage.reset()
    assert usage.valid == usage.steps == 0


def test_saved_bytes_counts_storages_once():
    w, x = torch.ones(4, 4, requires_grad=True), torch.ones(2, 4)
    with saved_bytes(exclude=[w]) as held:
        y = x @ w
        assert held() == x.nbytes
        z = x[:1] @ w  # a view: its base is held already
        assert held() == x.nbytes
        (y.exp().sum() + z.sum()).backward()
    assert held() == 0, "the backward pass frees what the graph held"


def test_saved_bytes_counts_the_whole_of_a_view():
    x = torch.ones(100, 4)
    w = torch.ones(4, requires_grad=True)
    with saved_bytes() as held:
        y = x[:1] * w
        assert held() == x.nbytes
    del y
    assert held() == 0
