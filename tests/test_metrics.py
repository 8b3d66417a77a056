import copy
import doctest
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection

import lightning_sage.fidelity
import lightning_sage.memory
import lightning_sage.metrics
from lightning_sage import (
    BlockRecord,
    CachedBytes,
    GradientFidelity,
    KeptTokens,
    PeakMemory,
    ReplayedTokens,
    SavedBytes,
)
from lightning_sage.memory import saved_bytes, tensors_in

BLOCKS = ["a", "b", "c"]
TOKENS = [KeptTokens, ReplayedTokens, CachedBytes]


def record(name, valid, kept, replayed=None, cached_bytes=0, device="cpu"):
    """A record of B samples of 4 tokens, of which the first so many are marked."""

    def mask(counts):
        counts = torch.tensor(counts, device=device)
        return torch.arange(4, device=device) < counts[:, None]

    # how many, a meta tensor could not tell
    rows = None if replayed is None else torch.arange(sum(replayed), device=device)
    return BlockRecord(name, mask(valid), mask(kept), cached_bytes, rows=rows)


def values(metric):
    found = metric.compute()
    return (
        {k: v.item() for k, v in found.items()}
        if isinstance(found, dict)
        else round(found.item(), 9)
    )


def fed(metric):
    """The metric, with one update."""
    if isinstance(metric, GradientFidelity):
        metric.update({"a": [torch.tensor([3.0, 0.0])]}, {"a": [torch.tensor([3.0, 4.0])]})
    elif isinstance(metric, PeakMemory):
        metric.update("forward")
    else:
        metric.update(1000 if isinstance(metric, SavedBytes) else [record("a", [4], [1], [1], 300)])
    return metric


ALL = [*TOKENS, SavedBytes, PeakMemory, GradientFidelity]
MAKERS = [*ALL, *(lambda kind=kind: kind(BLOCKS) for kind in [*TOKENS, GradientFidelity])]


@pytest.mark.parametrize(
    "module", [lightning_sage.memory, lightning_sage.metrics, lightning_sage.fidelity]
)
def test_doctests(module):
    tried = doctest.testmod(module)
    assert tried.attempted
    assert not tried.failed


STEPS = [
    [record("a", [4, 2], [3, 1], [1, 0], 100), record("b", [4, 2], [1, 1], [1, 1], 200)],
    # another batch size in the next step, and one block alone
    [record("b", [4], [4], [2], 500)],
]


@pytest.mark.parametrize(
    ("kind", "overall", "a", "b"),
    [
        (KeptTokens, 10 / 16, 4 / 6, 6 / 10),
        (ReplayedTokens, 5 / 16, 1 / 6, 4 / 10),
        (CachedBytes, 400.0, 50.0, 350.0),
    ],
)
def test_counts_over_blocks_and_steps(kind, overall, a, b):
    alone, each = kind(), kind(BLOCKS)
    for records in STEPS:
        alone.update(records)
        each.update(records)
    assert values(alone) == pytest.approx(overall)
    assert values(each) == pytest.approx({"overall": overall, "a": a, "b": b, "c": 0.0})


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1], [2, 1]])
@pytest.mark.parametrize("shared", [True, False])
def test_records_are_told_by_name_whatever_their_order(order, shared):
    valid = torch.ones(2, 4, dtype=torch.bool)
    records = [record(name, [4, 4], [i, 1], [i, 2], i) for i, name in enumerate(BLOCKS)]
    for one in records:
        one.valid = valid if shared else valid.clone()
    for kind, per_block in [
        (KeptTokens, [1 / 8, 2 / 8, 3 / 8]),
        (ReplayedTokens, [2 / 8, 3 / 8, 4 / 8]),
        (CachedBytes, [0.0, 1.0, 2.0]),
    ]:
        metric = kind(BLOCKS)
        metric.update([records[i] for i in order])
        ran = {BLOCKS[i]: per_block[i] if i in order else 0.0 for i in range(3)}
        found = values(metric)
        del found["overall"]
        assert found == ran


def test_blocks_that_see_batches_of_different_shapes():
    metric = KeptTokens(BLOCKS)
    metric.update([record("a", [4, 4], [1, 1]), record("b", [4], [1]), record("c", [2], [2])])
    assert values(metric) == {"overall": 5 / 14, "a": 0.25, "b": 0.25, "c": 1.0}


@pytest.mark.parametrize("kind", TOKENS)
def test_an_unknown_block_is_named(kind):
    metric = kind(BLOCKS)
    with pytest.raises(ValueError, match=r"block 'z' is none of blocks=\['a', 'b', 'c'\]"):
        metric.update([record("a", [4], [1]), record("z", [4], [1])])
    with pytest.raises(ValueError, match="stands twice"):
        kind(["a", "a"])


def test_a_block_without_backward_replayed_nothing():
    metric = ReplayedTokens()
    metric.update([record("a", [4], [2], None), record("b", [4], [2], [2])])
    assert values(metric) == 2 / 8


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("blocks", [None, [], ["a"]])
def test_a_step_without_blocks_or_tokens(kind, blocks):
    metric = kind(blocks)
    metric.update([])
    metric.update([record("a", [0], [0], [0])] if blocks != [] else [])
    found = values(metric)
    assert found == (0.0 if blocks is None else dict.fromkeys(["overall", *blocks], 0.0))


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("blocks", [None, BLOCKS, BLOCKS[::-1]])
def test_counting_reads_nothing_from_the_device(kind, blocks):
    # a meta tensor has no values: whatever waits for one raises
    metric = kind(blocks).to("meta")
    metric.update([record(name, [4], [2], [1], 8, device="meta") for name in BLOCKS])
    metric.update([record("b", [4], [2], [1], 8, device="meta")])
    assert all(getattr(metric, state).is_meta for state in metric._defaults)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("blocks", [None, [f"{i}" for i in range(32)]])
def test_the_work_of_an_update_does_not_grow_with_the_blocks(blocks):
    views = {"detach", "expand", "view", "_unsafe_view", "alias", "lift_fresh", "_to_copy"}
    valid = torch.ones(2, 4, dtype=torch.bool)
    records = [
        BlockRecord(f"{i}", valid, valid.clone(), 8, rows=torch.arange(3)) for i in range(32)
    ]
    metrics = [kind(blocks) for kind in TOKENS]
    with Calls() as calls:
        for metric in metrics:
            metric.update(records)
    kernels = [name for name in calls.names if name not in views]
    assert len(kernels) < 20, kernels


@pytest.mark.parametrize("make", MAKERS)
def test_survives_the_cast_of_its_module(make):
    module = nn.Linear(1, 1)
    module.metric = fed(make())
    before = module.metric.compute()
    module.to(torch.bfloat16)
    after = module.metric.compute()
    assert str(after) == str(before), "values that were computed before are cast neither"
    for state in module.metric._defaults:
        assert getattr(module.metric, state).dtype == torch.long
    for _ in range(300):
        fed(module.metric)
    steps = "seen" if isinstance(module.metric, GradientFidelity) else "steps"
    if hasattr(module.metric, steps):
        assert getattr(module.metric, steps).max() == 301


@pytest.mark.parametrize("make", MAKERS)
def test_reset_copy_and_pickle(make):
    metric = fed(make())
    before = str(metric.compute())
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert str(other.compute()) == before
        fed(other)
    assert str(metric.compute()) == before, "copies share no states"
    metric.reset()
    assert all(not getattr(metric, state).any() for state in metric._defaults)


@pytest.mark.parametrize("make", [m for m in MAKERS if m is not PeakMemory])
def test_forward_gives_the_batch_and_counts_it(make):
    metric, batch, ran = make(), make(), {}
    ran["update"] = metric.update
    for size in (1, 3):
        if isinstance(metric, GradientFidelity):
            given = ({"a": [torch.tensor([1.0])]}, {"a": [torch.tensor([float(size)])]})
        elif isinstance(metric, SavedBytes):
            given = (size,)
        else:
            given = ([record("a", [4], [size], [size], size)],)
        batch.reset()
        batch.update(*given)
        assert str(metric(*given)) == str(batch.compute())
    found = values(metric)
    found = found.get("overall", found.get("norm_ratio")) if isinstance(found, dict) else found
    # tokens and gradients, or bytes
    expected = {KeptTokens: 0.5, ReplayedTokens: 0.5, GradientFidelity: 2 / 3}
    assert found == pytest.approx(expected.get(type(metric), 2.0))


def test_forward_notes_the_peak_of_its_phase(monkeypatch):
    use = iter([(5, 5), (7, 9), (1, 9)])
    monkeypatch.setattr(
        lightning_sage.metrics, "in_use", lambda device: lightning_sage.memory.InUse(*next(use))
    )
    metric = PeakMemory()
    assert metric("forward")["step"] == 9
    assert metric("backward")["forward"] == 0
    assert values(metric) == {"forward": 9, "backward": 7, "optimizer": 0, "step": 9}


def test_a_collection_keeps_equal_counts_apart():
    together = MetricCollection([kind(BLOCKS) for kind in TOKENS])
    together.update([record(name, [4], [2], [2], 7) for name in BLOCKS])
    # kept and replayed are the same here, and must not be taken for one metric for good
    together.update([record(name, [4], [4], [0], 9) for name in BLOCKS])
    found = together.compute()
    assert found["KeptTokens_overall"] == 6 / 8
    assert found["ReplayedTokens_a"] == 2 / 8
    assert found["CachedBytes_c"] == 8


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("several", [False, True])
def test_plots(make, several):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    metric = fed(make())
    figure, axes = metric.plot([metric.compute(), metric.compute()] if several else None)
    figure.canvas.draw()
    drawn = axes if not hasattr(axes, "ravel") else axes.ravel()[0]
    assert drawn.lines
    plt.close(figure)


def test_tensors_of_a_batch():
    one, two = torch.ones(1), torch.ones(2)
    sparse = torch.eye(2).to_sparse()
    batch = {"a": one, "b": [(two, "text", 3)], "c": record("x", [1], [1]), "d": sparse}
    found = list(tensors_in(batch))
    assert found[0] is one
    assert found[1] is two
    assert len(found) == 4
    assert not list(tensors_in(None))


def test_saved_bytes_counts_storages_once():
    w, x = torch.ones(4, 4, requires_grad=True), torch.ones(2, 4)
    with saved_bytes(exclude=[w]) as held:
        y = x @ w
        assert held() == x.nbytes
        z = x[:1] @ w  # a view: its base is held already
        assert held() == x.nbytes
        (y.exp().sum() + z.sum()).backward()
    assert held() == 0, "the backward pass frees what the graph held"


def test_sparse_tensors_are_left_out_of_a_count():
    graph = torch.eye(3).to_sparse()
    x = torch.ones(3, 2, requires_grad=True)
    with saved_bytes(exclude=[graph]) as held:
        y = torch.sparse.mm(graph, x).exp()
        assert held() == y.nbytes
        y.sum().backward()
    assert x.grad is not None


def test_saved_bytes_counts_the_whole_of_a_view():
    x = torch.ones(100, 4)
    w = torch.ones(4, requires_grad=True)
    with saved_bytes() as held:
        y = x[:1] * w
        assert held() == x.nbytes
    del y
    assert held() == 0
