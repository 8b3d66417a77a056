"""What is refused before the model is touched, what is warned of, and what lets one through."""

import functools
import warnings
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import TransformerEnginePrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceXLAStrategy,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import zoo
from accuracy import assert_gradients_close, parameter_gradients
from lightning_sage import (
    AllTokens,
    ReplayError,
    SageCallback,
    SagePolicy,
    SageStrategy,
    install,
)
from lightning_sage.support import check_trainer
from processes import ranks
from steps import policy_of
from tasks import HALF, LIGHTNING_WARNINGS, QUIET, Task, batches, fit, llama, traces, wrapped

pytestmark = LIGHTNING_WARNINGS

PLAIN = policy_of(keep=AllTokens(), blocks=["blocks.*"])


def without_init(kind, **attributes):
    """An object of a class whose package is not installed here."""
    made = object.__new__(kind)
    vars(made).update(attributes)
    return made


def trainer_with(strategy=None, precision=None, accumulate=1, callbacks=()):
    """A trainer as far as the check looks at it."""
    real = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **QUIET)
    return SimpleNamespace(
        strategy=strategy or real.strategy,
        precision_plugin=precision or real.precision_plugin,
        accelerator=real.accelerator,
        accumulate_grad_batches=accumulate,
        callbacks=real.callbacks,
        barebones=True,
    )


def zero(stage):
    return without_init(DeepSpeedStrategy, config={"zero_optimization": {"stage": stage}})


static = functools.partial(DDPStrategy, static_graph=True)
fp8 = functools.partial(without_init, TransformerEnginePrecision, precision="transformer-engine")
CONFLICTS = {
    "ZeRO stage 3": lambda: trainer_with(zero(3)),
    "fixed shapes": lambda: trainer_with(without_init(SingleDeviceXLAStrategy)),
    "fp8 scales": lambda: trainer_with(precision=fp8()),
    "accumulated over 2 batches": lambda: trainer_with(static(), accumulate=2),
    "accumulated over 4 batches": lambda: trainer_with(
        static(), callbacks=[GradientAccumulationScheduler({0: 1, 3: 4})]
    ),
}


@pytest.mark.parametrize("reason", CONFLICTS)
def test_conflicts_are_refused_with_a_way_out(reason):
    trainer = CONFLICTS[reason]()
    with pytest.raises(ValueError, match=rf"{reason}.*: use .*allow_untested=True"):
        check_trainer(trainer, allow_untested=False)
    with pytest.warns(UserWarning, match=f"because of allow_untested=True.*{reason}"):
        check_trainer(trainer, allow_untested=True)


@pytest.mark.parametrize(
    "trainer",
    [
        lambda: trainer_with(),
        lambda: trainer_with(static()),
        lambda: trainer_with(DDPStrategy(), accumulate=4),
        lambda: trainer_with(SageStrategy(), accumulate=4),
    ],
)
def test_what_is_tested_is_silent(trainer):
    check_trainer(trainer(), allow_untested=False)


def test_all_reasons_are_said_at_once():
    with pytest.raises(ValueError, match=r"ZeRO stage 3.*; .*fp8 scales"):
        check_trainer(trainer_with(zero(3), fp8()), allow_untested=False)


@pytest.mark.parametrize("strategy", [lambda: zero(2), lambda: without_init(FSDPStrategy)])
def test_what_nobody_has_tried_is_said(strategy):
    with pytest.warns(UserWarning, match=r"has not been tested with SAGE"):
        check_trainer(trainer_with(strategy()), allow_untested=False)


def untouched(rank):
    task = Task(llama())
    before = traces(task.model)
    with pytest.raises(ValueError, match="static_graph=True"):
        fit(task, SageCallback(), strategy=static(), devices=1, accumulate_grad_batches=2)
    return traces(task.model) == before


def test_a_refused_model_is_not_touched():
    assert ranks(1, untouched, group=False) == [True]


def allowed(rank):
    strategy = SageStrategy(allow_untested=True, static_graph=True)
    callback, trainer = SageCallback(), trainer_with(strategy, accumulate=2)
    with pytest.warns(UserWarning, match="because of allow_untested=True"):
        callback.setup(trainer, Task(), "fit")


def test_a_strategy_may_allow_it_for_a_callback():
    ranks(1, allowed, group=False)


class Checkpointed(zoo.PlainModel):
    """Runs its blocks in checkpoints."""

    def __init__(self, reentrant, around=1):
        super().__init__(blocks=2, dropout=0.2)
        self.reentrant, self.around = reentrant, around

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for i in range(0, 2, self.around):
            run = nn.Sequential(*self.blocks[i : i + self.around])
            x = checkpoint(run, x, use_reentrant=self.reentrant)
        return self.head(x).square().mean()


@pytest.mark.parametrize("around", [1, 2])
def test_blocks_inside_of_checkpoints(around):
    """SAGE's caches are then made in the backward pass, and the gradients are the same."""
    ids, found = torch.randint(3, 60, (2, 9)), []
    plain = zoo.PlainModel(blocks=2, dropout=0.2).double()
    for model in (plain, Checkpointed(False, around).double(), Checkpointed(True, around).double()):
        model.load_state_dict(plain.state_dict())
        with install(model, PLAIN):
            for _ in range(2):
                model.zero_grad()
                torch.manual_seed(1)
                if model is plain:
                    x = model.embed(ids)
                    for block in model.blocks:
                        x = block(x)
                    model.head(x).square().mean().backward()
                elif model.reentrant:
                    with pytest.raises(ReplayError, match="use use_reentrant=False"):
                        model(ids).backward()
                else:
                    model(ids).backward()
            found.append(parameter_gradients(model))
    assert_gradients_close(found[1], found[0], 1e-10)


def test_wrappers_that_checkpoint_reentrantly_are_refused():
    for wrap in (lambda m: m.blocks, lambda m: m.blocks[0]._modules):
        model = zoo.PlainModel()
        places = wrap(model)
        key = "norm1" if isinstance(places, dict) else 1
        places[key] = checkpoint_wrapper(places[key], checkpoint_impl=CheckpointImpl.REENTRANT)
        before = traces(model)
        policy = SagePolicy(blocks=lambda module, name: isinstance(module, zoo.PlainBlock))
        with pytest.raises(ValueError, match=r"use_reentrant=True .* dense_blocks"):
            install(model, policy)
        assert traces(model) == before
        with pytest.warns(UserWarning, match=r"because of allow_untested=True: .*use_reentrant"):
            install(model, policy, allow_untested=True).remove()
        assert traces(model) == before
        places[key] = checkpoint_wrapper(places[key]._checkpoint_wrapped_module)
        with install(model, policy):
            model(torch.randint(3, 60, (2, 9))).logits.square().mean().backward()


class Feed(nn.Module):
    """A block whose layers tensor parallelism knows how to split."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Feeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Feed() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def split(rank, sequence):
    """Gradients of a split model's first bias, or what was said against it."""
    torch.manual_seed(0)
    model, x = Feeds().double(), torch.randn(2, 6, 8, dtype=torch.float64)
    alone = Feeds().double()
    alone.load_state_dict(model.state_dict())
    alone(x).square().sum().backward()
    mesh = init_device_mesh("cpu", (2,))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan | ({"norm": SequenceParallel()} if sequence else {}))
    try:
        with install(model, PLAIN):
            model(x).square().sum().backward()
    except ValueError as error:
        return str(error)
    found = parameter_gradients(model)
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
    assert_gradients_close(whole, parameter_gradients(alone), 1e-10)
    return None


def test_tensor_parallel_yes_sequence_parallel_no():
    assert ranks(2, split, False) == [None, None]
    for error in ranks(2, split, True):
        assert "'blocks.0.norm' runs under SequenceParallel" in error
        assert "sage_fsdp" in error


class Unused(zoo.PlainBlock):
    """Has an expert that no token is sent to."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(32, 32)


class UnusedTask(Task):
    def __init__(self):
        super().__init__(zoo.PlainModel())
        self.model.blocks[1] = Unused()


def test_parameters_without_a_gradient_are_named_at_the_first_step():
    policy = SagePolicy(keep=0.5, blocks=["model.blocks.*"])
    data = [zoo.make_batch("plain", None, seed=n) for n in range(2)]
    with pytest.raises(ReplayError, match=r"reached model\.blocks\.1\.idle\.bias, .*idle\.weight"):
        fit(UnusedTask(), SageCallback(policy), data=data)
    with warnings.catch_warnings():
        task, callback = UnusedTask(), SageCallback(policy, check_gradients=False)
        fit(task, callback, data=data)
    assert callback.summary
    assert wrapped(task) == 0


def test_an_expert_used_later_is_no_lost_parameter():
    model, batch = zoo.build("llama"), batches(1)[0]
    with install(model, HALF) as installed:
        assert installed.unreached == []
        model(**batch).loss.backward()
        assert installed.unreached == []
