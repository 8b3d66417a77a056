"""Several processes: every gradient is the mean of what each rank alone, with its data, would have.

Ranks differ in their batches' size, length and padding, and in what they draw.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from accuracy import assert_gradients_close, cosine, parameter_gradients
from lightning_sage import AllTokens, ImportanceSampling, SagePolicy, TopMass, install
from lightning_sage.discovery import find_blocks
from lightning_sage.memory import saved_bytes
from processes import ranks, whole

STEPS = 3
TINY = 0.001  # MiB: every weight matrix fills a bucket

_HALF = {"keep": 0.5, "replay": None, "sinks": 1}
POLICIES = {
    "half": SagePolicy(**_HALF),
    "half-full": SagePolicy(**_HALF, attention="full"),
    "drawn": SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.25)),
    "drawn-salient": SagePolicy(
        keep=AllTokens(), replay=ImportanceSampling(0.5), attention="salient"
    ),
    "drawn-full": SagePolicy(
        keep=TopMass(0.8), replay=ImportanceSampling(0.3), attention="full", sinks=1
    ),
    "all": SagePolicy(keep=AllTokens(), replay=None),
}
SPARSE = ["half", "half-full", "drawn", "drawn-full"]


class Plain(zoo.PlainModel):
    """Returns a dict: of other containers DDP would not see the tensors."""

    def forward(self, input_ids, labels=None):
        return {"loss": super().forward(input_ids, labels).loss}


class Experts(zoo.PlainBlock):
    """One of three experts serves all tokens, another one on each rank."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.chosen = 0

    def forward(self, x):
        return super().forward(x) + self.experts[self.chosen](self.norm2(x))


def of_blocks(*kinds, order=(0, 1)):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, made = Plain(blocks=0), [kind() for kind in kinds]
    model.blocks = nn.ModuleList(made[i] for i in order)
    return model.double().train()


KINDS = {
    "lora": lambda: zoo.build("llama", lora=True),
    "llama": lambda: zoo.build("llama"),
    "gpt2": lambda: zoo.build("gpt2"),
    "plain": lambda: of_blocks(zoo.PlainBlock, zoo.PlainBlock),
    "tied": lambda: of_blocks(zoo.PlainBlock, zoo.PlainBlock, order=(0, 1, 0)),
    "experts": lambda: of_blocks(Experts, zoo.PlainBlock),
}
ZOO = {"lora": "llama", "llama": "llama", "gpt2": "gpt2"}


def policy_for(kind, policy):
    return replace(POLICIES[policy], blocks=None if kind in ZOO else ["blocks.*"])


def batch_of(kind, rank, step=0, micro=0):
    size, length = 2 + (rank + step + micro) % 3, 8 + 3 * rank + step + 2 * micro
    padding = None if kind not in ZOO else "left" if rank == 1 else "right"
    seed = 100 * rank + 10 * step + micro
    return zoo.make_batch(ZOO.get(kind, "plain"), padding, size=size, length=length, seed=seed)


def learn(model, kind, rank, step, micro=1, sync=lambda last: contextlib.nullcontext()):
    """Add up the gradients of some batches, as one rank does."""
    device = next(model.parameters()).device
    for module in model.modules():
        if isinstance(module, Experts):
            module.chosen = (rank + step) % 3
    for i in range(micro):
        torch.manual_seed(100 * rank + 10 * step + i)
        batch = {name: x.to(device) for name, x in batch_of(kind, rank, step, i).items()}
        with sync(i == micro - 1):
            model(**batch)["loss"].backward()


CLIPS = {
    None: lambda parameters: None,
    "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.5),
    "value": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.002),
}


def train(model, backward, clip=None):
    """Gradients by name of each of some steps of SGD; `backward(step)` leaves them in place."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, foreach=False)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(step)
        CLIPS[clip](trained)
        found.append({name: whole(g) for name, g in parameter_gradients(model).items()})
        optimizer.step()
    return found


@functools.cache
def averaged(kind, policy, world, micro=1, clip=None, device="cpu", dtype=torch.float64):
    """What one process makes of the shares of all ranks, in turn; dense where `policy` is None."""
    model = KINDS[kind]().to(device, dtype)

    def backward(step):
        shares = []
        for rank in range(world):
            model.zero_grad()
            learn(model, kind, rank, step, micro)
            shares.append(parameter_gradients(model))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = sum(share[name] for share in shares) / world

    installed = install(model, policy_for(kind, policy)) if policy else contextlib.nullcontext()
    with installed:
        return train(model, backward, clip)


def assert_averaged(found, kind, policy, micro=1, clip=None, tolerance=1e-10):
    """Each rank's gradients, in each step, against :func:`averaged`."""
    expected = averaged(kind, policy, len(found), micro, clip)
    for of_rank in found:
        for got, want in zip(of_rank, expected, strict=True):
            assert_gradients_close(got, want, tolerance)


def by_ddp(
    rank, kind, policy, micro=1, clip=None, *,
    outside=False, never=False, buckets=1, hook=None, device="cpu", dtype=torch.float64, **options,
):  # fmt: skip
    """`outside`: SAGE is installed on what DDP returns; `never`: no step synchronises."""
    model = KINDS[kind]().to(device, dtype)
    searching = options.get("find_unused_parameters")
    if searching:
        # without anything to find, DDP warns
        model.spare = nn.Parameter(torch.zeros(3, dtype=dtype, device=device))
    if not outside:
        install(model, policy_for(kind, policy))
    ddp = DistributedDataParallel(model, **options)
    if outside:
        install(ddp, policy_for(kind, policy))
    if hook is not None:
        ddp.register_comm_hook(None, hook)

    def sync(last):
        return contextlib.nullcontext() if last and not never else ddp.no_sync()

    found = train(model, lambda step: learn(ddp, kind, rank, step, micro, sync), clip)
    assert len(ddp.reducer._get_zeros_like_grad_buckets()) >= buckets
    if searching:
        assert model.spare.grad is None
        found = [{n: g for n, g in step.items() if n != "spare"} for step in found]
    return found


OPTIONS = {
    "default": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "buckets": {"bucket_cap_mb": TINY, "buckets": 5},
    "static-buckets": {"static_graph": True, "bucket_cap_mb": TINY, "buckets": 5},
    "unused-views-buckets": {
        "find_unused_parameters": True,
        "gradient_as_bucket_view": True,
        "bucket_cap_mb": TINY,
        "buckets": 5,
    },
}


def ddp_ranks(world, kind, policy, **options):
    return ranks(world, lambda rank: by_ddp(rank, kind, policy, **options), timeout=30)


@pytest.mark.parametrize("policy", ["half", "drawn-full"])
@pytest.mark.parametrize("kind", ["lora", "llama", "gpt2", "plain"])
@pytest.mark.parametrize("options", OPTIONS)
def test_ddp_averages(options, kind, policy):
    assert_averaged(ddp_ranks(2, kind, policy, **OPTIONS[options]), kind, policy)


@pytest.mark.parametrize("policy", SPARSE)
@pytest.mark.parametrize("kind", ["lora", "plain"])
def test_ddp_averages_over_three(kind, policy):
    options = OPTIONS["unused-views-buckets"]
    assert_averaged(ddp_ranks(3, kind, policy, **options), kind, policy)


@pytest.mark.parametrize("policy", ["half", "drawn"])
@pytest.mark.parametrize("kind", ["lora", "gpt2"])
def test_sage_may_be_installed_on_what_ddp_returns(kind, policy):
    found = ddp_ranks(2, kind, policy, outside=True, gradient_as_bucket_view=True)
    assert_averaged(found, kind, policy)


@pytest.mark.parametrize(("micro", "policy"), [(2, "half"), (3, "drawn-full")])
@pytest.mark.parametrize("kind", ["lora", "llama", "plain"])
@pytest.mark.parametrize("options", ["default", "unused", "unused-views-buckets"])
def test_ddp_accumulates(options, kind, micro, policy):
    found = ddp_ranks(2, kind, policy, micro=micro, **OPTIONS[options])
    assert_averaged(found, kind, policy, micro)


@pytest.mark.parametrize("clip", ["norm", "value"])
@pytest.mark.parametrize("kind", ["lora", "gpt2"])
def test_ddp_gradients_are_clipped_after_their_mean(kind, clip):
    found = ddp_ranks(2, kind, "drawn", clip=clip, micro=2, **OPTIONS["unused-views-buckets"])
    assert_averaged(found, kind, "drawn", 2, clip)
    with pytest.raises(AssertionError, match="gradients are off"):
        assert_averaged(found, kind, "drawn", 2)


@pytest.mark.parametrize("options", ["default", "unused", "static", "unused-views-buckets"])
@pytest.mark.parametrize("kind", ["lora", "tied", "experts"])
def test_ddp_with_all_tokens_is_dense(kind, options):
    """Against the model alone, in which an expert that is not used has a gradient of zero."""
    found = ddp_ranks(2, kind, "all", **OPTIONS[options])
    assert_averaged(found, kind, None)


@pytest.mark.parametrize("policy", ["half", "drawn-full"])
@pytest.mark.parametrize("options", ["default", "unused", "static", "static-buckets"])
@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_ddp_averages_blocks_used_twice_and_experts_used_on_one_rank(kind, options, policy):
    assert_averaged(ddp_ranks(2, kind, policy, **OPTIONS[options]), kind, policy)


@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_ddp_accumulates_blocks_used_twice_and_experts_used_on_one_rank(kind):
    assert_averaged(ddp_ranks(2, kind, "drawn", micro=2), kind, "drawn", 2)


@pytest.mark.parametrize("kind", ["lora", "plain", "experts"])
def test_gradients_that_are_not_averaged_are_seen(kind):
    found = ddp_ranks(2, kind, "half", never=True)
    with pytest.raises(AssertionError, match="gradients are off"):
        assert_averaged(found, kind, "half")


@pytest.mark.parametrize("policy", ["drawn", "drawn-full"])
def test_other_draws_are_seen(policy, monkeypatch):
    found = ddp_ranks(1, "lora", policy)
    assert_averaged(found, "lora", policy)
    seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seed(number + 1))
    found = ddp_ranks(1, "lora", policy)
    with pytest.raises(AssertionError, match="gradients are off"):
        assert_averaged(found, "lora", policy)


def shard(model, kind, parts=False, **options):
    """`parts`: what a block is made of is sharded by itself, too."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in find_blocks(model, policy_for(kind, "half")).values():
        for part in block.children() if parts else ():
            fully_shard(part, mesh=mesh, **options)
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def by_fsdp(rank, kind, policy, micro=1, clip=None, before=False, dtype=torch.float64, **options):
    model = KINDS[kind]().to(dtype)
    if before:
        install(model, policy_for(kind, policy))
    shard(model, kind, **options)
    if not before:
        install(model, policy_for(kind, policy))

    def sync(last):
        model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    return train(model, lambda step: learn(model, kind, rank, step, micro, sync), clip)


def fsdp_ranks(world, kind, policy, **options):
    return ranks(world, lambda rank: by_fsdp(rank, kind, policy, **options), timeout=30)


@pytest.mark.parametrize(
    ("policy", "before"),
    [("half", True), ("half-full", False), ("drawn", False), ("drawn-full", True)],
)
@pytest.mark.parametrize("kind", ["lora", "llama", "gpt2", "plain", "tied", "experts"])
def test_fsdp_averages(kind, policy, before):
    """SAGE is installed `before` the model is sharded, or on the sharded model."""
    assert_averaged(fsdp_ranks(2, kind, policy, before=before), kind, policy)


# a dense step warns, too
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
@pytest.mark.parametrize(
    ("micro", "policy"), [(1, "half"), (1, "drawn-full"), (2, "drawn-salient")]
)
@pytest.mark.parametrize("kind", ["lora", "llama", "gpt2"])
def test_fsdp_of_parts_of_blocks_averages(kind, micro, policy):
    found = fsdp_ranks(2, kind, policy, micro=micro, parts=True)
    assert_averaged(found, kind, policy, micro)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_fsdp_of_parts_of_blocks_used_twice_is_refused():
    """FSDP2 runs its hooks on a part once in a backward pass: what comes later would be lost."""
    with pytest.raises(AssertionError, match=r"'blocks\.0' is used twice in one backward pass"):
        fsdp_ranks(1, "tied", "all", parts=True)


@pytest.mark.parametrize("kind", ["lora", "llama", "plain", "experts"])
def test_fsdp_averages_over_three(kind):
    found = fsdp_ranks(3, kind, "drawn", reshard_after_forward=False)
    assert_averaged(found, kind, "drawn")


@pytest.mark.parametrize(("micro", "policy"), [(2, "half"), (3, "drawn-full")])
@pytest.mark.parametrize("kind", ["lora", "llama", "experts"])
def test_fsdp_accumulates(kind, micro, policy):
    assert_averaged(fsdp_ranks(2, kind, policy, micro=micro), kind, policy, micro)


@pytest.mark.parametrize("clip", ["norm", "value"])
@pytest.mark.parametrize("kind", ["lora", "llama"])
def test_fsdp_gradients_are_clipped_after_their_mean(kind, clip):
    assert_averaged(fsdp_ranks(2, kind, "drawn", clip=clip), kind, "drawn", 1, clip)


@pytest.mark.parametrize("kind", ["lora", "llama", "experts"])
def test_fsdp_with_all_tokens_is_dense(kind):
    assert_averaged(fsdp_ranks(2, kind, "all"), kind, None)


@pytest.mark.parametrize("policy", ["half", "drawn-salient"])
@pytest.mark.parametrize("kind", ["lora", "llama", "plain"])
def test_fsdp_in_mixed_precision_is_near(kind, policy):
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = fsdp_ranks(2, kind, policy, dtype=torch.float32, mp_policy=mixed)
    for of_rank in found:
        for got, want in zip(of_rank, averaged(kind, policy, 2), strict=True):
            assert {g.dtype for g in got.values()} == {torch.float32}
            assert cosine(got, want) > 0.98


@contextlib.contextmanager
def saved_between(first, last):
    """Yields what counts the bytes saved by the blocks from `first` to `last`, and by no other."""
    counting, counts = contextlib.ExitStack(), []

    def begin(*_):
        counts.append(counting.enter_context(saved_bytes()))

    handles = [
        first.register_forward_pre_hook(begin),
        last.register_forward_hook(lambda *_: counting.close()),
    ]
    yield lambda: counts[0]()
    for handle in handles:
        handle.remove()


def bytes_held(kind, policy, rank, wrap=lambda model: model):
    """Of the second step, whose forward only does what it has to: held, afterwards, recorded."""
    model = KINDS[kind]()
    blocks = list(find_blocks(model, policy_for(kind, "half")).values())
    installed = install(model, policy_for(kind, policy)) if policy else None
    called = wrap(model)
    for step in range(2):
        with saved_between(blocks[0], blocks[-1]) as held:
            loss = called(**batch_of(kind, rank, step))["loss"]
            between = held()
        loss.backward()
    return between, held(), [r.cached_bytes for r in installed.records] if installed else []


WRAPS = {
    "ddp": lambda kind: DistributedDataParallel,
    "fsdp": lambda kind: functools.partial(shard, kind=kind),
}


@pytest.mark.parametrize("kind", ["lora", "llama", "plain"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_rank_holds_for_backward_what_one_process_holds(wrap, kind):
    for policy in ("half", "half-full", "drawn"):
        of_ranks = ranks(
            2, lambda rank, p=policy: bytes_held(kind, p, rank, WRAPS[wrap](kind)), timeout=30
        )
        for rank, found in enumerate(of_ranks):
            assert found == bytes_held(kind, policy, rank)
            held, left, cached = found
            assert held >= sum(cached) > 0
            assert left == 0
            assert held < bytes_held(kind, None, rank)[0] / 4


class Collectives(TorchDispatchMode):
    """Notes collectives and their elements, also those that start inside of backward."""

    def __init__(self, events=None):
        super().__init__()
        self.events = [] if events is None else events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            elements = sum(x.numel() for x in leaves if isinstance(x, torch.Tensor))
            self.events.append((func.overloadpacket.__name__.strip("_"), elements))
        return func(*args, **(kwargs or {}))


def collectives(kind, policy, rank, wrap):
    """Of the last step: how many of each, and of how many elements."""
    model = KINDS[kind]()
    if policy:
        install(model, policy_for(kind, policy))
    called = wrap(model)
    for step in range(STEPS):
        with Collectives() as seen:
            learn(called, kind, rank, step)
    elements = Counter()
    for name, count in seen.events:
        elements[name] += count
    return Counter(name for name, _ in seen.events), elements


@pytest.mark.parametrize("kind", ["lora", "gpt2", "plain", "tied"])
@pytest.mark.parametrize("wrap", ["ddp", "each", "static", "fsdp"])
def test_a_step_has_the_collectives_of_a_dense_step(wrap, kind):
    options = {"each": {"bucket_cap_mb": 1e-6}, "static": {"static_graph": True}}.get(wrap, {})

    def both(rank):
        def wrapped(model):
            if wrap == "fsdp":
                return shard(model, kind)
            return DistributedDataParallel(model, **options)

        return [collectives(kind, policy, rank, wrapped) for policy in (None, "drawn")]

    for dense, sage in ranks(2, both, timeout=30):
        assert sage == dense
        assert "reduce_scatter_base" in sage[0] if wrap == "fsdp" else "allreduce" in sage[0]
        assert wrap != "each" or sage[0]["allreduce"] > 10


DEPTH = 4


def of_depth():
    """Sparse blocks, and the events to which each adds its replay (when it runs in a backward)."""
    model, events = of_blocks(*[zoo.PlainBlock] * DEPTH, order=range(DEPTH)), []
    install(model, policy_for("plain", "half"))
    for i, block in enumerate(model.blocks):
        block.up.register_forward_hook(lambda *_, i=i: events.append(("replay", i)))
    return model, events


def backward_events(called, rank, events):
    """Of the last step, when buckets are what they will be."""
    for step in range(STEPS):
        loss = called(**batch_of("plain", rank, step))["loss"]
        events.clear()
        loss.backward()
    return events


def overlap_of_ddp(rank, options):
    model, events = of_depth()
    ddp = DistributedDataParallel(model, **options)
    block_of = {id(p): -1 for p in model.embed.parameters()}
    block_of |= {id(p): DEPTH for p in model.head.parameters()}
    for i, block in enumerate(model.blocks):
        block_of |= {id(p): i for p in block.parameters()}

    def launch(_, bucket):
        events.append(("launch", min(block_of[id(p)] for p in bucket.parameters())))
        return default_hooks.allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, launch)
    return backward_events(ddp, rank, events)


@pytest.mark.parametrize("options", ["buckets", "unused-views-buckets", "static-buckets"])
def test_ddp_reduces_while_blocks_are_still_to_be_replayed(options):
    """A bucket of later blocks alone starts before an earlier block is replayed."""
    options = {name: value for name, value in OPTIONS[options].items() if name != "buckets"}
    for events in ranks(2, lambda rank: overlap_of_ddp(rank, options), timeout=30):
        for i in range(DEPTH):
            here = events.index(("replay", i))
            later = [k for k, (what, of) in enumerate(events) if what == "launch" and of > i]
            assert later
            assert max(later) < here
        assert sum(what == "launch" for what, _ in events) > 2 * DEPTH


def test_one_bucket_is_not_reduced_before_the_last_replay():
    """The test above owes its outcome to its small buckets."""
    for events in ranks(2, lambda rank: overlap_of_ddp(rank, {}), timeout=30):
        assert events == [*(("replay", i) for i in reversed(range(DEPTH))), ("launch", -1)]


def test_fsdp_gathers_and_reduces_between_replays():
    """Parameters are there a block ahead, gradients leave before the block that comes next."""

    def overlap(rank):
        model, events = of_depth()
        shard(model, "plain")
        with Collectives(events):
            return [what for what, _ in backward_events(model, rank, events)]

    for events in ranks(2, overlap, timeout=30):
        replays = [k for k, what in enumerate(events) if what == "replay"]
        assert len(replays) == DEPTH
        for done, here in enumerate(replays):
            before = Counter(events[:here])
            assert before["reduce_scatter_base"] == done
            assert before["allgather_base"] == min(done + 2, DEPTH)


def assert_compressed(found, expected):
    """Rounded to bfloat16, and no more than that; later steps start from rounded parameters."""
    assert_gradients_close(found[0], expected[0], 2**-6)
    with pytest.raises(AssertionError, match="gradients are off"):
        assert_gradients_close(found[0], expected[0], 2**-11)
    assert all(cosine(got, want) > 0.999 for got, want in zip(found, expected, strict=True))


def _compress(state, bucket):
    # under its own name, DDP refuses it on gloo
    return default_hooks.bf16_compress_hook(state, bucket)


@pytest.mark.parametrize("options", ["default", "unused-views-buckets"])
@pytest.mark.parametrize("kind", ["lora", "plain"])
def test_gradients_in_transit_may_be_bfloat16(kind, options):
    for of_rank in ddp_ranks(2, kind, "half", hook=_compress, **OPTIONS[options]):
        assert_compressed(of_rank, averaged(kind, "half", 2))


def _compressed_by_nccl(rank, world, store):
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for options in (OPTIONS["default"], OPTIONS["unused-views-buckets"]):
        found = by_ddp(
            rank, "llama", "half", hook=default_hooks.bf16_compress_hook,
            device=device, dtype=torch.float32, device_ids=[rank], **options,
        )  # fmt: skip
        expected = averaged("llama", "half", world, device=device, dtype=torch.float32)
        assert_compressed(found, expected)
    dist.destroy_process_group()


@pytest.mark.gpu
def test_gradients_in_transit_by_nccl_may_be_bfloat16(tmp_path):
    """Spawned, because a process with CUDA in use cannot be forked."""
    world = torch.cuda.device_count()
    spawned = torch.multiprocessing.spawn(
        _compressed_by_nccl, (world, f"file://{tmp_path / 'store'}"), nprocs=world, join=False
    )
    deadline = time.monotonic() + 300
    try:
        # raises what a process raised
        while not spawned.join(timeout=5):
            assert time.monotonic() < deadline, "ranks did not finish within 300 s"
    finally:
        for process in spawned.processes:
            process.kill()
            process.join()


def test_ranks_return_in_order():
    def told(rank, word):
        dist.barrier()
        return rank, word, dist.get_rank(), dist.get_world_size(), dist.get_backend()

    assert ranks(3, told, "x") == [(i, "x", i, 3, "gloo") for i in range(3)]
    assert not dist.is_initialized()


def test_ranks_without_a_group_have_the_environment_of_torchrun():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = dict(os.environ)
    found = ranks(
        2, lambda _: (dist.is_initialized(), *(os.environ[n] for n in names)), group=False
    )
    assert found == [(False, "0", "0", "2"), (False, "1", "1", "2")]
    assert dict(os.environ) == before


@pytest.fixture
def fails(tmp_path):
    """A function of ranks that must fail soon, with a message, and leave no process behind."""

    def check(function, match, world=2, within=10, **options):
        def noting(rank):
            (tmp_path / str(os.getpid())).touch()
            # a rank that is gone fails those that still connect to it
            dist.barrier()
            return function(rank)

        start = time.monotonic()
        with pytest.raises(AssertionError, match=match):
            ranks(world, noting, **options)
        assert time.monotonic() - start < within
        assert not multiprocessing.active_children()
        notes = list(tmp_path.iterdir())
        assert len(notes) == world
        for note in notes:
            with pytest.raises(ProcessLookupError):
                os.kill(int(note.name), 0)

    return check


def fault(bad, do):
    """One rank goes wrong, the others wait for it in a collective."""

    def work(rank):
        if rank == bad:
            do()
        dist.barrier()

    return work


def divide():
    return 1 / 0


def sleep():
    # not to be ended politely
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_raises_fails_with_its_traceback(bad, fails):
    match = f"rank {bad} raised:(.|\\n)*in divide(.|\\n)*ZeroDivisionError"
    fails(lambda rank: divide() if rank == bad else None, match)


def test_a_rank_that_raises_does_not_wait_for_the_others(fails):
    fails(fault(0, divide), "rank 0 raised:(.|\n)*ZeroDivisionError")


def test_a_result_that_cannot_be_sent_fails(fails):
    fails(lambda rank: lambda: rank, "rank . raised:(.|\n)*pickle")


@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_dies_fails(bad, fails):
    fails(lambda rank: die() if rank == bad else None, f"rank {bad} died")


@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_dies_fails_though_others_go_on(bad, fails):
    fails(lambda rank: die() if rank == bad else sleep(), f"rank {bad} died", timeout=2)


@pytest.mark.parametrize("work", [lambda _: sleep(), fault(1, sleep)], ids=["all", "one"])
def test_ranks_that_hang_fail(work, fails):
    fails(work, r"ranks \[0, 1\] did not finish within 2 s", timeout=2)


def test_the_rank_that_hangs_is_named(fails):
    fails(lambda rank: sleep() if rank == 1 else None, r"ranks \[1\] did not", timeout=2)
