"""SageStrategy and SageModelParallelStrategy: SAGE on several processes, one word in a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from lightning_sage.balance import Agreement, Mode
from lightning_sage.callback import SageCallback
from lightning_sage.discovery import find_blocks, left_dense_blocks
from lightning_sage.policy import Preset, SagePolicy, as_policy
from lightning_sage.sharding import shard
from lightning_sage.support import callbacks_of, configured
from lightning_sage.tokens import Window, count_tokens, labels_are_shifted, loss_tokens

LossTokens = Callable[[Any], int]


def sage_callback(trainer: Trainer) -> SageCallback | None:
    """The Trainer's, if it has one."""
    return next((c for c in callbacks_of(trainer) if isinstance(c, SageCallback)), None)


class _SageMixin(ParallelStrategy):
    """What both strategies add: the callback, budgets that ranks agree on, weighted losses."""

    policy: SagePolicy | None
    balance: Mode
    token_weighted: bool | LossTokens
    allow_untested: bool
    agreement: Agreement | None = None
    _callback: SageCallback | None = None
    _shifted = False
    _told = False

    def _configure(
        self,
        policy: SagePolicy | Preset | None,
        balance: Mode,
        token_weighted: bool | LossTokens,
        allow_untested: bool,
    ) -> None:
        if balance not in ("none", "mean", "max"):
            raise ValueError(f"balance must be one of none, mean, max, got {balance!r}")
        self.policy, self.balance = None if policy is None else as_policy(policy), balance
        self.token_weighted, self.allow_untested = token_weighted, allow_untested

    @property
    def _module(self) -> LightningModule:
        module = self.lightning_module
        assert module is not None
        return module

    def connect(self, model: LightningModule) -> None:
        """Add a SageCallback where the Trainer has none."""
        super().connect(model)
        if model.trainer.state.fn == TrainerFn.FITTING:
            self._find_callback(model.trainer)

    def _find_callback(self, trainer: Trainer) -> SageCallback:
        given = sage_callback(trainer)
        if given is None:
            given = SageCallback(self.policy, allow_untested=self.allow_untested)
            callbacks_of(trainer).insert(0, given)
        elif self.policy not in (None, given.policy) and not self._told:
            self._told = True
            rank_zero_warn(
                f"the policy of SageCallback holds, and that of {type(self).__name__} does not: "
                "give one of them only"
            )
        return given

    def setup(self, trainer: Trainer) -> None:
        """Install once the model is built, converted, moved and wrapped or sharded."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        # again: a module may bring callbacks of its own, which take the place of ours
        self._callback = self._find_callback(trainer)
        self.agreement = None
        if self.balance != "none" or self.token_weighted:
            self.agreement = Agreement(self.balance, self.root_device)
        self._shifted = self.token_weighted is True and labels_are_shifted(self._module)
        self._callback.agreement = self.agreement
        self._callback.attach(trainer, self._module)

    def teardown(self) -> None:
        """Remove SAGE first; also called after an exception."""
        if self._callback is not None:
            self._callback.detach()
            self._callback.agreement = None
        super().teardown()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the other ranks of the batch, then run the step."""
        if self.agreement is not None:
            batch = args[0] if args else next(iter(kwargs.values()), None)
            tokens = 0 if self.balance == "none" else count_tokens(batch)
            self.agreement.start(tokens, self._loss_tokens(batch))
        return super().training_step(*args, **kwargs)

    def _loss_tokens(self, batch: Any) -> Tensor | int:
        if callable(self.token_weighted):
            return self.token_weighted(batch)
        return loss_tokens(batch, self._shifted) if self.token_weighted else 0

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Weight the loss by its tokens, then go backward."""
        if self.token_weighted:
            assert self.agreement is not None
            if not self._module.automatic_optimization:
                # who steps by hand also says how batches add up
                self.agreement.window = Window()
            own, everyone = self.agreement.loss_tokens()
            weight = self.agreement.window.weight(own * self.world_size, everyone)
            closure_loss = closure_loss * weight
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Make accumulated gradients the mean over all their tokens, before they are clipped."""
        if self.token_weighted and self._module.automatic_optimization:
            closure = partial(self._rescaled, optimizer, closure)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def _rescaled(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        result = closure()
        assert self.agreement is not None
        factor = self.agreement.window.factor(self._module.trainer.accumulate_grad_batches)
        if factor != 1:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
        return result


class SageStrategy(_SageMixin, DDPStrategy):
    """DistributedDataParallel with sparse backward passes; `strategy="sage_ddp"` in a Trainer.

    A Trainer without a SageCallback gets one. Gradients are the mean over the ranks of what each
    rank's own sparse backward pass gives; buckets are reduced while earlier blocks are replayed.

    Args:
        policy: Which tokens are kept and replayed; None is the callback's own default.
            The policy of a SageCallback in the same Trainer goes first.
        balance: How many rows a rank replays. `none`: as many as its policy says, and ranks wait
            for the one with most. `mean`: every block of every rank replays what the ranks want on
            average. `max`: what the one wants that wants most. Where ranks have fewer valid tokens
            than that they replay all; `AllTokens` is never cut. The first batch is not balanced:
            nothing is known yet.
        token_weighted: Make gradients those of the mean over all loss-bearing tokens of all ranks
            and of all accumulated batches, where the module's loss is the mean over its own batch.
            True counts `labels`; a function of the batch counts otherwise. In manual optimization
            every backward pass is that of the mean over its own batch's tokens of all ranks. Of a
            rank without any the loss may be NaN, but not its gradient, as in `F.cross_entropy`.
        allow_untested: See :class:`SageCallback`.
        **kwargs: Of :class:`lightning.pytorch.strategies.DDPStrategy`.

    Raises:
        ValueError: An argument is out of range; in the first step, a batch has no tokens or labels
            to be counted.
    """

    def __init__(
        self,
        policy: SagePolicy | Preset | None = None,
        balance: Mode = "none",
        token_weighted: bool | LossTokens = False,
        allow_untested: bool = False,
        **kwargs: Any,
    ) -> None:
        self._configure(policy, balance, token_weighted, allow_untested)
        super().__init__(**kwargs)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register `sage_ddp`, `sage_ddp_spawn` and `sage_ddp_fork`."""
        for name, method in (
            ("sage_ddp", "popen"),
            ("sage_ddp_spawn", "spawn"),
            ("sage_ddp_fork", "fork"),
        ):
            text = f"DDP with SAGE's sparse backward passes; processes by {method}"
            # not once more where the package is imported again
            if name not in strategy_registry:
                strategy_registry.register(name, cls, description=text, start_method=method)


class SageModelParallelStrategy(_SageMixin, ModelParallelStrategy):
    """FSDP2 with sparse backward passes; `strategy="sage_fsdp"` in a Trainer.

    Where the module has not called `fully_shard` itself, every block that SAGE finds is sharded
    over the data-parallel ranks, then what is around the blocks. The module stays sharded after
    the fit, as with :class:`lightning.pytorch.strategies.ModelParallelStrategy`.

    Args:
        policy: As for :class:`SageStrategy`.
        balance: Likewise.
        token_weighted: Likewise.
        activation_dtype: Gather parameters, and compute, in this type; gradients are reduced in
            float32. None computes in the parameters' own or in the Trainer's precision.
        data_parallel_size: Ranks that a parameter is sharded over; `auto` is all that tensor
            parallelism leaves.
        tensor_parallel_size: Ranks that split a layer; the module's `configure_model` has to do it.
        allow_untested: As for :class:`SageStrategy`.
        **kwargs: Of :class:`lightning.pytorch.strategies.ModelParallelStrategy`.

    Raises:
        ValueError: An argument is out of range; when the fit starts, the Trainer's precision is not
            supported, or parameters lie where they cannot be sharded.
    """

    def __init__(
        self,
        policy: SagePolicy | Preset | None = None,
        balance: Mode = "none",
        token_weighted: bool | LossTokens = False,
        activation_dtype: Literal["bf16", "fp16"] | None = None,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        allow_untested: bool = False,
        **kwargs: Any,
    ) -> None:
        self._configure(policy, balance, token_weighted, allow_untested)
        if activation_dtype not in (None, "bf16", "fp16"):
            raise ValueError(
                f"activation_dtype must be bf16, fp16 or None, got {activation_dtype!r}"
            )
        self.activation_dtype = activation_dtype
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            **kwargs,
        )

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register `sage_fsdp`."""
        if "sage_fsdp" not in strategy_registry:
            strategy_registry.register(
                "sage_fsdp", cls, description="FSDP2 with SAGE's sparse backward passes"
            )

    def setup_environment(self) -> None:
        """Shard over all processes, where nothing else is said."""
        if self._data_parallel_size == "auto" and self._tensor_parallel_size != "auto":
            processes = self.num_nodes * self.num_processes
            self._data_parallel_size = processes // self._tensor_parallel_size
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard what is not sharded, then set up as usual."""
        module = self._module
        self._refuse_precision()
        callback = sage_callback(trainer)
        policy = callback.policy if callback is not None else as_policy(self.policy)
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}
        dtype = dtypes[self.activation_dtype]
        shard(
            module,
            find_blocks(module, policy) | left_dense_blocks(module, policy),
            self.device_mesh["data_parallel"],
            MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32),
        )
        with configured(module):
            super().setup(trainer)

    def _refuse_precision(self) -> None:
        # Lightning checks it for a strategy that is given as an object only
        supported = ("32-true", "bf16-mixed", "bf16-true", "16-true")
        if self.precision_plugin.precision not in supported:
            raise ValueError(
                f"{type(self).__name__} does not support precision="
                f"{self.precision_plugin.precision!r}; choose among {', '.join(supported)}"
            )


for _strategy in (SageStrategy, SageModelParallelStrategy):
    _strategy.register_strategies(StrategyRegistry)
