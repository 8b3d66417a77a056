"""Both strategies through the Trainer: gradients, weights by tokens, balance, sharding, manners."""

import functools
import re
import warnings
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import zoo
from accuracy import assert_gradients_close
from lightning_sage import (
    SageCallback,
    SageModelParallelStrategy,
    SagePolicy,
    SageStrategy,
    TopMass,
    install,
)
from lightning_sage.tokens import count_tokens, labels_are_shifted, loss_tokens
from processes import ranks, whole
from tasks import LIGHTNING_WARNINGS, QUIET, Task, traces, wrapped

pytestmark = LIGHTNING_WARNINGS

HALF = SagePolicy(keep=0.5, replay=None, sinks=1)
ADAPTIVE = SagePolicy(keep=TopMass(0.3, min_tokens=1), replay=None, keep_loss_rows=False)
MICROS = 5


def batch_of(rank, micro):
    """Of other sizes and lengths on each rank; one of them has no label on rank 1."""
    batch = zoo.make_batch(
        "gpt2", size=3 + rank, length=12 + 4 * rank + micro, seed=9 * rank + micro
    )
    if (rank, micro) == (1, 2):
        batch["labels"].fill_(-100)
    return batch


def labelled(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


class Float64(Task):
    """The zoo's model as it is."""

    def __init__(self, model=None, manual=False):
        # Llama's norms are computed in float32
        super().__init__(zoo.build("gpt2") if model is None else model)
        self.automatic_optimization = not manual
        self.rows = []

    def loss(self, batch):
        # transformers' own is computed in float32
        logits, targets = self.model(**batch).logits[:, :-1], batch["labels"][:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def on_train_batch_end(self, *_):
        [sage] = [c for c in self.trainer.callbacks if isinstance(c, SageCallback)]
        self.rows.append([int(r.rows.numel()) for r in sage.installation.records])


class Sharded(Float64):
    """Shards its model itself: blocks and root, or also the linear layers inside of the blocks."""

    inner = False

    def configure_model(self):
        if isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.transformer.h:
            if self.inner:
                for part in (layer.attn.c_attn, layer.mlp.c_fc):
                    fully_shard(part, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class InnerSharded(Sharded):
    inner = True


def fitted(rank, strategy, callback=None, task=Float64, micros=MICROS, **settings):
    """Weights after a fit of one of two ranks, the task and its trainer."""
    warnings.simplefilter("ignore")
    settings = {"max_epochs": 1, **QUIET, **settings}
    module = task()
    callbacks = [] if callback is None else [callback]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if dist.is_initialized() else 2,
        strategy=strategy() if callable(strategy) else strategy,
        callbacks=callbacks,
        use_distributed_sampler=False,
        **settings,
    )
    data = [batch_of(rank, micro) for micro in range(micros)]
    trainer.fit(module, DataLoader(data, batch_size=None))
    weights = {name: whole(p.detach()).clone() for name, p in module.named_parameters()}
    return weights, module, trainer


def weights(rank, *args, **kwargs):
    return fitted(rank, *args, **kwargs)[0]


CLIPS = {
    None: lambda parameters: None,
    "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.3),
    "value": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.01),
}


@functools.cache
def expected(accumulate=1, clip=None, by_tokens=False, policy=HALF, micros=MICROS, among=None):
    """One process in the place of two."""
    among = tuple(range(micros)) if among is None else among
    task = Float64()
    parameters = list(task.parameters())
    with install(task, policy):
        for start in range(0, len(among), accumulate):
            window = among[start : start + accumulate]
            batches = [batch_of(rank, micro) for micro in window for rank in range(2)]
            total = sum(map(labelled, batches))
            task.zero_grad()
            for batch in batches:
                share = labelled(batch) / total if by_tokens else 1 / (2 * accumulate)
                # a mean over nothing is not a number
                if labelled(batch):
                    (task.loss(batch) * share).backward()
            CLIPS[clip](parameters)
            with torch.no_grad():
                for p in parameters:
                    p -= task.lr * p.grad
    return {name: p.detach() for name, p in task.named_parameters()}


def assert_all(found, want, tolerance=1e-10):
    for one in found:
        assert_gradients_close(one, want, tolerance)


def sage(**settings):
    return lambda: SageStrategy(HALF, **settings)


def fsdp(**settings):
    return lambda: SageModelParallelStrategy(HALF, **settings)


CELLS = {
    "callback under ddp": ("ddp", {}),
    "callback under fsdp2": (
        lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        {"task": Sharded},
    ),
    "ddp": (sage(), {}),
    "ddp unused": (sage(find_unused_parameters=True), {"accumulate_grad_batches": 2}),
    "ddp static view": (sage(static_graph=True, gradient_as_bucket_view=True), {}),
    "ddp buckets": (sage(bucket_cap_mb=0.001), {"accumulate_grad_batches": 2}),
    "ddp norm": (sage(), {"gradient_clip_val": 0.3}),
    "ddp value": (sage(), {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "ddp manual": (sage(), {"task": functools.partial(Float64, manual=True)}),
    "fsdp": (fsdp(), {}),
    "fsdp accumulate": (fsdp(), {"accumulate_grad_batches": 2}),
    "fsdp norm": (fsdp(), {"gradient_clip_val": 0.3}),
    "fsdp manual": (fsdp(), {"task": functools.partial(Float64, manual=True)}),
    "fsdp sharded by the user": (fsdp(), {"task": Sharded}),
    "fsdp sharded inside of blocks": (fsdp(), {"task": InnerSharded, "accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize("cell", CELLS)
def test_weights_are_those_of_the_mean_gradient(cell):
    strategy, settings = CELLS[cell]
    settings = {"micros": 2, **settings}
    callback = SageCallback(HALF) if cell.startswith("callback") else None
    clip = (
        settings.get("gradient_clip_algorithm", "norm") if "gradient_clip_val" in settings else None
    )
    found = ranks(2, functools.partial(weights, **settings), strategy, callback, group=False)
    assert_all(found, expected(settings.get("accumulate_grad_batches", 1), clip, micros=2))


def test_a_wrong_mean_would_be_seen():
    found = expected(micros=2)
    with pytest.raises(AssertionError, match="gradients are off"):
        assert_gradients_close(found, expected(2, micros=2), 1e-10)


TOKENS = {
    "ddp": (sage(token_weighted=True), {}),
    # two windows of two batches, one of one
    "ddp accumulate": (sage(token_weighted=True), {"accumulate_grad_batches": 2}),
    "ddp clip": (
        sage(token_weighted=True),
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
    ),
    "ddp counted by hand": (sage(token_weighted=labelled), {"accumulate_grad_batches": 3}),
    "ddp manual": (sage(token_weighted=True), {"task": functools.partial(Float64, manual=True)}),
    "fsdp": (fsdp(token_weighted=True), {"accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize("cell", TOKENS)
def test_weighted_by_tokens_it_is_the_mean_over_all_tokens(cell):
    strategy, settings = TOKENS[cell]
    found = ranks(2, functools.partial(weights, **settings), strategy, group=False)
    clip = "norm" if "gradient_clip_val" in settings else None
    want = expected(settings.get("accumulate_grad_batches", 1), clip, by_tokens=True)
    assert_all(found, want)


class Skips(Float64):
    """Steps at every second batch only, as Lightning's documentation shows it."""

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        if batch_idx % 2 == 0:
            closure()
        else:
            optimizer.step(closure)


class Leaves(Float64):
    """Ends each epoch in the middle of a window."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None


def test_weights_of_gradients_that_were_thrown_away_are_forgotten():
    """Lightning zeroes gradients at the start of a window, stepped or not."""
    run = functools.partial(weights, task=Skips, micros=4)
    found = ranks(2, run, sage(token_weighted=True), group=False)
    assert_all(found, expected(by_tokens=True, among=(1, 3)))
    run = functools.partial(weights, task=Leaves, max_epochs=2, accumulate_grad_batches=2)
    found = ranks(2, run, sage(token_weighted=True), group=False)
    assert_all(found, expected(2, by_tokens=True, among=(0, 1, 0, 1)))


def replayed(rank, strategy, **settings):
    return fitted(rank, strategy, **settings)[1].rows


@pytest.mark.parametrize("balance", ["none", "mean", "max"])
@pytest.mark.parametrize("kind", [SageStrategy, SageModelParallelStrategy])
def test_balanced_ranks_replay_alike(kind, balance):
    one, other = ranks(
        2, replayed, lambda: kind(ADAPTIVE, balance=balance, token_weighted=True), group=False
    )
    # the first batch is every rank's own
    spread = [
        abs(sum(a) - sum(b)) / (sum(a) + sum(b)) for a, b in zip(one[1:], other[1:], strict=True)
    ]
    assert (max(spread) <= 0.025) == (balance != "none")
    assert one[0] != other[0]


class Counted(TorchDispatchMode):
    """Counts operations, and collectives apart."""

    def __init__(self):
        super().__init__()
        self.operations = self.collectives = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        self.collectives += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def counted(rank, strategy, callback):
    """Operations and collectives of one step after the first."""
    found = []

    class Counting(Float64):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.counter = Counted()
                self.counter.__enter__()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 1:
                self.counter.__exit__(None, None, None)
                found.append((self.counter.operations, self.counter.collectives))

    fitted(rank, strategy, callback, Counting, micros=2)
    return found[0]


def test_the_strategy_costs_nothing_but_one_exchange():
    """Beside plain DDP with the same callback."""
    plain = ranks(2, counted, "ddp", SageCallback(ADAPTIVE), group=False)
    alone = ranks(2, counted, sage(), SageCallback(ADAPTIVE), group=False)
    assert alone == plain
    tokens = ranks(2, counted, sage(token_weighted=True), SageCallback(ADAPTIVE), group=False)
    level = ranks(2, counted, sage(balance="mean"), SageCallback(ADAPTIVE), group=False)
    for found, blocks in ((tokens, 0), (level, 2)):
        for (operations, collectives), (before, among) in zip(found, plain, strict=True):
            assert collectives == among + 1
            # a few numbers to exchange, and some to choose by in each block
            assert operations - before <= 30 + 25 * blocks


def twice(rank, *strategies):
    """Rows of fits of one callback, and what is left of what ranks agreed on."""
    callback, rows = SageCallback(ADAPTIVE), []
    for strategy in strategies:
        rows.append(fitted(rank, strategy, callback)[1].rows)
        assert callback.agreement is None
    return rows


def test_a_callback_forgets_what_the_ranks_of_another_fit_agreed_on():
    [[_, found], _] = ranks(2, twice, lambda: SageStrategy(balance="mean"), "ddp", group=False)
    [[fresh], _] = ranks(2, twice, "ddp", group=False)
    assert found == fresh


class Uneven(InnerSharded):
    """One rank sees another kind of batch than before, and the other does not."""

    def loss(self, batch):
        # from 12 tokens to 20 an argument's signature is another
        return super().loss({k: v[:, :8] for k, v in batch.items()} if self.short else batch)

    @property
    def short(self):
        return self.global_rank == 0 and self.trainer.global_step == 0


class Padding(InnerSharded):
    def loss(self, batch):
        if self.global_rank == 1:
            batch = batch | {"attention_mask": torch.zeros_like(batch["input_ids"])}
        return super().loss(batch)


def test_parts_of_blocks_are_gathered_by_all_ranks_together():
    one, other = ranks(2, functools.partial(weights, task=Uneven), fsdp(), group=False)
    assert_gradients_close(one, other, 1e-15)
    with pytest.raises(AssertionError, match=r"padding alone, or not finite.*shard it as a"):
        ranks(2, functools.partial(weights, task=Padding), fsdp(), group=False)


def test_words_of_a_trainer():
    names = {name: StrategyRegistry[name] for name in StrategyRegistry if name.startswith("sage")}
    assert names.keys() == {"sage_ddp", "sage_ddp_spawn", "sage_ddp_fork", "sage_fsdp"}
    for name, entry in names.items():
        kind = SageModelParallelStrategy if name == "sage_fsdp" else SageStrategy
        assert entry["strategy"] is kind
        kind.register_strategies(StrategyRegistry)
    # those of the parent are its own
    assert StrategyRegistry["ddp"]["strategy"] is DDPStrategy


def policies(rank, own, given):
    strategy = SageStrategy(own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = None if given is None else SageCallback(given)
        task, seen = Float64(), []
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, **QUIET,
            callbacks=[callback] if callback else [], use_distributed_sampler=False,
        )  # fmt: skip
        for _ in range(2):
            trainer.fit_loop.max_epochs += 1
            trainer.fit(task, DataLoader([batch_of(rank, 0)], batch_size=None))
            [found] = [c for c in trainer.callbacks if isinstance(c, SageCallback)]
            seen.append(found.policy)
        said = sum("the policy of SageCallback holds" in str(w.message) for w in caught)
    return seen, said


@pytest.mark.parametrize(
    ("own", "given", "used", "said"),
    [
        (None, None, SagePolicy.preset("balanced"), 0),
        ("speed", None, SagePolicy.preset("speed"), 0),
        ("speed", SagePolicy.preset("speed"), SagePolicy.preset("speed"), 0),
        (HALF, None, HALF, 0),
        (None, HALF, HALF, 0),
        (ADAPTIVE, HALF, HALF, 1),
        (HALF, HALF, HALF, 0),
    ],
)
def test_the_policy_of_a_callback_goes_first(own, given, used, said):
    first, other = ranks(2, policies, own, given, group=False)
    assert first == ([used] * 2, said)
    assert other == ([used] * 2, 0)


class Fails(Float64):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            assert wrapped(self) == 2
            raise KeyError("in the middle")
        return super().training_step(batch, batch_idx)


class Configures(Float64):
    """Brings a callback of its own, which Lightning puts in the place of the strategy's."""

    def configure_callbacks(self):
        return [SageCallback(ADAPTIVE)]


def manners(rank):
    """What is left behind: the same as after plain DDP."""
    left = {}
    for name, strategy, task in (
        ("plain", "ddp", Float64),
        ("fit", sage(), Float64),
        ("validated", sage(), Float64),
        ("failed", sage(), Fails),
    ):
        module = task()
        module.on_train_batch_end = lambda *_: None
        before = traces(module.model)
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu", devices=2, max_epochs=1, use_distributed_sampler=False, **QUIET,
            strategy=strategy() if callable(strategy) else strategy,
        )  # fmt: skip
        data = [batch_of(rank, micro) for micro in range(2)]
        val = DataLoader(data, batch_size=None) if name == "validated" else None
        try:
            trainer.fit(module, DataLoader(data, batch_size=None), val)
        except KeyError as error:
            left["error"] = str(error)
        keys = [(n, [k for k, _ in v]) for n, v in traces(module.model)]
        left[name] = keys == [(n, [k for k, _ in v]) for n, v in before] and wrapped(module) == 0
        if name == "validated":
            left["val_loss"] = "val_loss" in trainer.callback_metrics
    _, module, trainer = fitted(rank, sage(), task=Configures, micros=1)
    [found] = [c for c in trainer.callbacks if isinstance(c, SageCallback)]
    left["configured"] = found.policy == ADAPTIVE and wrapped(module) == 0
    return left


def test_nothing_is_left_behind():
    for left in ranks(2, manners, group=False):
        assert "in the middle" in left.pop("error")
        assert all(left.values()), left


def sharded(rank, task, strategy):
    """How a model is sharded during a fit, and what is left of it."""
    _, module, trainer = fitted(rank, strategy, task=task, micros=1)
    names = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    kinds = {str(p.dtype) for p in module.parameters()}
    configured = "configure_model" in vars(module)
    dtypes = module.model.seen if hasattr(module.model, "seen") else None
    return names, kinds, configured, wrapped(module), dtypes, type(trainer.strategy).__name__


class Wider(Float64):
    """With a head of its own, in a container, and something that has no parameters."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"head": nn.Linear(60, 2).double(), "none": nn.Identity()})

    def training_step(self, batch, batch_idx):
        out = self.model(**batch)
        return out.loss + self.parts["head"](out.logits.mean(1)[:, :60]).square().mean()


def test_a_model_is_sharded_block_by_block():
    blocks = ["model.transformer.h.0", "model.transformer.h.1"]
    for names, kinds, configured, left, _, strategy in ranks(
        2, sharded, Float64, fsdp(), group=False
    ):
        assert names == ["model", *blocks]
        assert kinds == {"torch.float64"}
        assert not configured
        assert left == 0
        assert strategy == "SageModelParallelStrategy"
    for names, *_ in ranks(2, sharded, Wider, fsdp(), group=False):
        assert names == ["model", *blocks, "parts.head"]


class Scaled(Float64):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def refused(rank, strategy, task=Float64, **settings):
    try:
        fitted(rank, strategy, task=task, micros=1, **settings)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def test_what_cannot_be_sharded_is_refused():
    for error in ranks(2, refused, fsdp(), Scaled, group=False):
        assert "scale of Scaled cannot be sharded" in error
    run = functools.partial(refused, precision="64-true")
    for error in ranks(2, run, "sage_fsdp", group=False):
        assert "does not support precision='64-true'" in error


class Tied(Float64):
    """A weight in two modules that are called apart."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 60, bias=False).double()
        self.head.weight = self.model.transformer.wte.weight


class TiedBlocks(Float64):
    def __init__(self):
        super().__init__()
        one, other = self.model.transformer.h
        one.mlp.c_fc.weight = other.mlp.c_fc.weight


def test_parameters_shared_between_parts_are_refused():
    for task, names in (
        (Tied, "'head' and 'model' share"),
        (TiedBlocks, r"h\.1' and .*h\.0' share"),
    ):
        for error in ranks(2, refused, fsdp(), task, group=False):
            assert re.search(names, error)
            assert "call fully_shard in configure_model" in error


def generated(rank, lora):
    task = Float64(zoo.build("gpt2", lora=lora))
    _, module, _ = fitted(rank, fsdp(), task=lambda: task, micros=1)
    ids = batch_of(0, 0)["input_ids"][:1, :4]
    with torch.no_grad():
        return module.model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
def test_a_sharded_model_generates(lora):
    one, other = ranks(2, generated, lora, group=False)
    assert torch.equal(one, other)
    assert one.shape == (1, 7)


class Watched(Float64):
    """Notes the type its attention computes in."""

    def __init__(self):
        super().__init__(zoo.build("gpt2", dtype=torch.float32))

    def on_train_start(self):
        self.model.seen = []
        attention = self.model.transformer.h[0].attn.c_attn
        attention.register_forward_hook(lambda _m, _a, out: self.model.seen.append(str(out.dtype)))


def test_activations_in_another_type():
    for _, kinds, _, _, dtypes, _ in ranks(
        2, sharded, Watched, fsdp(activation_dtype="bf16"), group=False
    ):
        assert kinds == {"torch.float32"}
        assert set(dtypes) == {"torch.bfloat16"}


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match=r"balance must be one of none, mean, max, got 'min'"):
        SageStrategy(balance="min")
    with pytest.raises(ValueError, match=r"activation_dtype must be bf16, fp16 or None"):
        SageModelParallelStrategy(activation_dtype="fp8")


class Unlabelled(Float64):
    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"]).logits.square().mean()


class Tuples(Float64):
    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0]).logits.square().mean()


def on_other_batches(rank, strategy, batch):
    warnings.simplefilter("ignore")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy(), max_epochs=1, **QUIET,
        use_distributed_sampler=False,
    )  # fmt: skip
    try:
        module = Tuples() if isinstance(batch, list) else Unlabelled()
        trainer.fit(module, DataLoader([batch], batch_size=None))
    except ValueError as error:
        return str(error)
    return None


def test_batches_that_cannot_be_counted_are_refused():
    ids = batch_of(0, 0)["input_ids"]
    for strategy, batch, message in (
        (sage(token_weighted=True), {"input_ids": ids}, "a dict with input_ids: give a function"),
        (sage(balance="mean"), [ids], "and this one is a list: use balance='none'"),
        (sage(token_weighted=lambda batch: 3), {"input_ids": ids}, None),
    ):
        for error in ranks(2, on_other_batches, strategy, batch, group=False):
            assert error is None if message is None else message in error


def test_labels_are_counted_as_the_loss_counts_them():
    def count(name):
        return int(loss_tokens(batch, labels_are_shifted(zoo.build(name))))

    batch = zoo.make_batch("llama")
    inside = batch["labels"] != -100
    batch["labels"][:, 0] = 5
    for name in ("llama", "gpt2", "plain"):
        assert count(name) == int(inside[:, 1:].sum())
    assert count("bert") == int((batch["labels"] != -100).sum())
    assert loss_tokens({"labels": torch.zeros(3)}, True) == 3
    seq2seq = nn.Module()
    seq2seq.config = SimpleNamespace(is_encoder_decoder=True)
    assert not labels_are_shifted(seq2seq)
    assert int(count_tokens(batch)) == int(batch["attention_mask"].sum())
    assert count_tokens({"input_ids": batch["input_ids"]}) == batch["input_ids"].numel()
