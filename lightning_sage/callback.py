"""SageCallback: installs SAGE when a fit starts, removes it at its end, reports in between."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from lightning_sage.balance import Agreement
from lightning_sage.install import Installation, install
from lightning_sage.policy import Preset, SagePolicy, as_policy
from lightning_sage.resume import gathered, place, random_states, restore_random_states
from lightning_sage.selections import AllTokens
from lightning_sage.summary import summary_table
from lightning_sage.support import check_trainer, refuse_other_package
from lightning_sage.tokens import Window
from lightning_sage.watch.meters import Meters
from lightning_sage.watch.monitor import Step
from lightning_sage.watch.watch import Watch, Watching, is_quiet


class SageCallback(Callback):
    """Fine-tunes with sparse backward passes; the model is as before when the fit is over.

    Logs `sage/kept_fraction` and `sage/replayed_fraction` (of the valid tokens), `sage/cached_mib`
    (a step), `sage/peak_mib` and, of the first steps, `sage/saved_mib`, each over the steps since
    it was last logged; writes them block by block to `sage.jsonl` in the logger's folder, for
    `lightning-sage report`; and prints one table at the end of the fit. Under `fast_dev_run` and
    `barebones` it says nothing. Evaluation, checkpoints and `state_dict` do not notice it.

    Args:
        policy: Which tokens are kept and replayed; a name is one of `SagePolicy.preset`.
            None is `balanced`, or with a `memory_budget` every token, as many as fit.
        log_every_n_steps: Optimizer steps between two logs; None is the Trainer's, 0 logs nothing.
        fidelity_every_n_steps: Optimizer steps between two looks at the gradient: the batch is run
            twice more, densely and sparsely, and `sage/fidelity_cosine` (also by block) and
            `sage/fidelity_norm_ratio` are logged. None looks once, at the eleventh step; 0 never.
        fidelity_floor: Cosine to warn below, as of norms out of 0.5 to 1.5; 0 warns of neither.
        fidelity_target: A cosine to hold, by moving the fractions or masses of `keep` and `replay`.
        memory_budget: A size (`20GiB`), or a share of the device's memory (0.9), that a step has
            to fit in; on a CPU, of the bytes that SAGE caches. The first four steps find the best
            that fits; a step that runs out of memory nevertheless is taken again with less.
        measure_dense: Count, on the first batch, what a dense step would have saved for backward,
            and on the first three what SAGE's steps save.
        print_summary: Print the table at the end of the fit.
        check_gradients: Check at the first step that every trainable parameter of a block that
            was replayed got a gradient; switch it off where experts may go without tokens.
        allow_untested: Try what is known not to go with SAGE, or not known to, with a warning.
        strict: Whether a block that cannot be replayed ends the fit; else it is left dense.

    Attributes:
        agreement: What ranks tell one another, given by a strategy of this package.
        installation: What is installed in the model; None outside of a fit.
        settings: What is measured, told and steered.

    Checkpoints hold the states of the random generators of every rank as they are between two
    batches, so that a resumed fit draws (selections, dropout) what the uninterrupted one would have
    drawn; loaders that draw from torch's default generator, as a plain DataLoader does, shift that
    (see :class:`lightning_sage.loader.ResumableLoader`).

    In processes that a fit has forked or spawned, `meters` and `summary` stay with them;
    `trainer.callback_metrics` comes back.

    Raises:
        ValueError: An argument is out of range; when the fit starts: a strategy, plugin or setting
            does not go with SAGE, or the weights alone are above the budget.
        ReplayError: At the first step: a block cannot be replayed, or its parameters were reached
            by the backward pass and got no gradient.
    """

    def __init__(
        self,
        policy: SagePolicy | Preset | None = None,
        log_every_n_steps: int | None = None,
        fidelity_every_n_steps: int | None = None,
        fidelity_floor: float = 0.7,
        fidelity_target: float | None = None,
        memory_budget: str | float | None = None,
        measure_dense: bool = True,
        print_summary: bool = True,
        check_gradients: bool = True,
        allow_untested: bool = False,
        strict: bool = True,
    ) -> None:
        super().__init__()
        every = None if memory_budget is None else SagePolicy(keep=AllTokens())
        policy = as_policy(every if policy is None else policy)
        self.settings = Watching(
            policy,
            log_every_n_steps,
            fidelity_every_n_steps,
            fidelity_floor,
            fidelity_target,
            memory_budget,
            measure_dense,
            print_summary,
        )
        self.policy, self.check_gradients = policy, check_gradients
        self.allow_untested, self.strict = allow_untested, strict
        self.agreement: Agreement | None = None
        self.installation: Installation | None = None
        self._device = torch.device("cpu")
        self._resumed: list[dict[str, Any]] = []
        self._start_fit()

    def _start_fit(self) -> None:
        self._watch = Watch(self.settings)
        self._in_batch = self._mode_checked = self._gradients_checked = False

    @property
    def meters(self) -> Meters | None:
        """The metrics of the latest fit; None before the first, or where nobody asks for them."""
        return self._watch.meters

    @property
    def summary(self) -> dict[str, float]:
        """The numbers of the table, from the end of the latest fit."""
        return self._watch.summary

    def __getstate__(self) -> dict[str, Any]:
        """All but what leads to the model: copying the callback must not copy that."""
        state = {**self.__dict__, "installation": None, "agreement": None}
        # Lightning puts the module's bound methods here
        state.pop("log", None)
        state.pop("log_dict", None)
        return state

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install where the blocks exist already, so that a tuner's trial steps are sparse too."""
        refuse_other_package(trainer, pl_module)
        if stage == "fit":
            # of a resumed fit that ended before its first batch
            self._resumed = []
            check_trainer(trainer, self._allows_untested(trainer))
            # blocks may be built later, in configure_model: on_fit_start raises what is left
            with suppress(ValueError):
                self.attach(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install anew, now that adapters, precision and sharding are in place."""
        self._start_fit()
        self._device = trainer.strategy.root_device
        self.attach(trainer, pl_module)
        assert self.installation is not None
        self._watch.steering.start(trainer, pl_module, self.installation)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install, in place of what was installed before."""
        self.detach()
        self.installation = install(
            pl_module,
            self.policy,
            measure_dense=self.settings.measure_dense and not trainer.barebones,
            allow_untested=self._allows_untested(trainer),
            strict=self.strict,
        )
        self.installation.agreement = self.agreement
        self.installation.policy = self._watch.steering.policy

    def _allows_untested(self, trainer: Trainer) -> bool:
        """As this callback says, or a strategy of this package."""
        strategy: Any = trainer.strategy
        return self.allow_untested or getattr(strategy, "allow_untested", False)

    def detach(self) -> None:
        """Remove; again is no error."""
        self._watch.stop()
        if self.installation is not None:
            self.installation.remove()
            self.installation = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove."""
        self.detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove: the Trainer calls no teardown then."""
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Random states and demand of all ranks; asked on all of them, between batches."""
        if self._resumed:
            return {"ranks": self._resumed}
        # after an exception, or when a signal comes within a batch, the other ranks may not be
        # there to answer
        if self.installation is None or self._in_batch:
            return {}
        own: dict[str, Any] = {"random": random_states(self._device)}
        own |= self._watch.steering.state()
        if self.agreement is not None:
            own["demand"] = self.agreement.demand()
        return {"ranks": gathered(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember it until the first batch: what comes before draws numbers of its own."""
        self._resumed = state_dict.get("ranks", [])

    def _resume(self) -> None:
        rank, world = place()
        if self._resumed and self.installation is not None:
            self._watch.steering.resume(self._resumed[0], self.installation)
        if self._resumed and len(self._resumed) != world:
            rank_zero_warn(
                f"the checkpoint holds random states of {len(self._resumed)} processes and this "
                f"fit has {world}: it goes on with other random numbers"
            )
        elif self._resumed:
            own = self._resumed[rank]
            restore_random_states(own["random"], self._device)
            if self.agreement is not None:
                self.agreement.resume(own.get("demand"))
        self._resumed = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure."""
        assert self.installation is not None
        self._watch.start(trainer, pl_module, self.installation)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the gradient where that is due, and begin to measure the step."""
        assert self.installation is not None
        self._resume()
        if not self._mode_checked:
            self._mode_checked = True
            _warn_of_eval_mode(self.installation)
        self._watch.before_step(Step(trainer, pl_module, self.installation, batch, batch_idx))
        self.installation.observe(batch if isinstance(batch, Mapping) else None)
        self._in_batch = True

    def on_before_backward(self, *_: Any) -> None:
        """The forward is done."""
        if self.meters is not None:
            self.meters.before_backward()

    def on_before_zero_grad(self, *_: Any) -> None:
        """What was accumulated is thrown away, and so are its weights."""
        if self.agreement is not None:
            self.agreement.window = Window()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check once, before the first optimizer step, that no gradient was lost."""
        assert self.installation is not None
        if self.meters is not None:
            self.meters.after_backward()
        if self.check_gradients and not self._gradients_checked:
            # DeepSpeed keeps gradients in buffers of its own
            kept = not isinstance(trainer.strategy, DeepSpeedStrategy)
            self._gradients_checked = self.installation.check_gradients(kept)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the step, and log where it is due."""
        assert self.installation is not None
        self._in_batch = False
        self.installation.observe(None)
        step = Step(trainer, pl_module, self.installation, batch, batch_idx)
        self._watch.after_step(step, outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the steps that no interval covered."""
        # the epoch may have been ended at the start of a batch
        self._in_batch = False
        self._watch.epoch_end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up."""
        assert self.installation is not None
        self._watch.end(self.installation)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, below the progress bar."""
        told = self.summary and self.settings.print_summary and not is_quiet(trainer)
        if told and trainer.is_global_zero:
            Console().print(summary_table(self.summary))


def _warn_of_eval_mode(installation: Installation) -> None:
    idle = [name for name, block in installation.blocks.items() if not block.training]
    if idle:
        rank_zero_warn(
            f"{len(idle)} of {len(installation.blocks)} blocks train in eval mode ({idle[0]} is "
            "the first): from_pretrained returns it and Lightning leaves it. SAGE works in either, "
            "but dropout is off; call train() on the model in on_train_start to have it on."
        )
