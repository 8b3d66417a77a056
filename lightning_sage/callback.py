"""SageCallback: installs SAGE when a fit starts, removes it at its end, reports in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from statistics import median
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from lightning_sage.balance import Agreement
from lightning_sage.install import Installation, install
from lightning_sage.memory import MIB
from lightning_sage.metrics import SageUsage
from lightning_sage.policy import SagePolicy
from lightning_sage.resume import gathered, place, random_states, restore_random_states
from lightning_sage.summary import summary_table
from lightning_sage.support import check_trainer, refuse_other_package
from lightning_sage.tokens import Window


class SageCallback(Callback):
    """Fine-tunes with sparse backward passes; the model is as before when the fit is over.

    Logs `sage/kept_fraction` and `sage/replayed_fraction` (of the valid tokens) and
    `sage/cached_mib` (a step), each over the steps since it was last logged, and prints one table
    at the end of the fit. Evaluation, checkpoints and `state_dict` do not notice it.

    Args:
        policy: Which tokens are kept and replayed; None is `SagePolicy()`.
        measure_dense: Count, on the first batch, what a dense step would have saved for backward.
        print_summary: Print the table at the end of the fit.
        check_gradients: Check at the first step that every trainable parameter of a block that
            was replayed got a gradient; switch it off where experts may go without tokens.
        allow_untested: Try what is known not to go with SAGE, or not known to, with a warning.

    Attributes:
        agreement: What ranks tell one another, given by a strategy of this package.
        installation: What is installed in the model; None outside of a fit.
        usage: The metric, over all steps of the latest fit.
        summary: The numbers of the table, from the end of the latest fit.

    Checkpoints hold the states of the random generators of every rank as they are between two
    batches, so that a resumed fit draws (selections, dropout) what the uninterrupted one would have
    drawn; loaders that draw from torch's default generator, as a plain DataLoader does when it is
    iterated, shift that (see :class:`lightning_sage.loader.ResumableLoader`).

    In processes that a fit has forked or spawned, `usage` and `summary` stay with them;
    `trainer.callback_metrics` comes back.

    Raises:
        ValueError: When the fit starts: a strategy, plugin or setting does not go with SAGE.
        ReplayError: At the first step: a block cannot be replayed, or its parameters were reached
            by the backward pass and got no gradient.
    """

    def __init__(
        self,
        policy: SagePolicy | None = None,
        measure_dense: bool = True,
        print_summary: bool = True,
        check_gradients: bool = True,
        allow_untested: bool = False,
    ) -> None:
        super().__init__()
        self.policy = policy or SagePolicy()
        self.measure_dense = measure_dense
        self.print_summary = print_summary
        self.check_gradients = check_gradients
        self.allow_untested = allow_untested
        self.agreement: Agreement | None = None
        self.installation: Installation | None = None
        self.usage = SageUsage()
        self.summary: dict[str, float] = {}
        self._recent = SageUsage()
        self._resumed: list[dict[str, Any]] = []
        self._start_fit()

    def _start_fit(self) -> None:
        self.usage.reset()
        self._recent.reset()
        self.summary = {}
        self._first_cached_bytes = 0
        self._seconds: deque[float] = deque(maxlen=1000)
        self._batch_started = 0.0
        self._in_batch = False
        self._logged_step = 0
        self._mode_checked = False
        self._gradients_checked = False

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
        self.attach(trainer, pl_module)
        self._start_fit()
        self.usage.to(trainer.strategy.root_device)
        self._recent.to(trainer.strategy.root_device)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install, in place of what was installed before."""
        self.detach()
        measure_dense = self.measure_dense and not trainer.barebones
        self.installation = install(
            pl_module,
            self.policy,
            measure_dense=measure_dense,
            allow_untested=self._allows_untested(trainer),
        )
        self.installation.agreement = self.agreement

    def _allows_untested(self, trainer: Trainer) -> bool:
        """As this callback says, or a strategy of this package."""
        strategy: Any = trainer.strategy
        return self.allow_untested or getattr(strategy, "allow_untested", False)

    def detach(self) -> None:
        """Remove; again is no error."""
        if self.installation is not None:
            self.installation.remove()
            self.installation = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove."""
        self.detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove: the Trainer calls no teardown after an exception."""
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Random states and demand of all ranks; asked on all of them, between batches."""
        if self._resumed:
            return {"ranks": self._resumed}
        # after an exception, or when a signal comes within a batch, the other ranks may not be
        # there to answer
        if self.installation is None or self._in_batch:
            return {}
        own: dict[str, Any] = {"random": random_states(self.usage.device)}
        if self.agreement is not None:
            own["demand"] = self.agreement.demand()
        return {"ranks": gathered(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember it until the first batch: what comes before draws numbers of its own."""
        self._resumed = state_dict.get("ranks", [])

    def _resume(self) -> None:
        rank, world = place()
        if self._resumed and len(self._resumed) != world:
            rank_zero_warn(
                f"the checkpoint holds random states of {len(self._resumed)} processes and this "
                f"fit has {world}: it goes on with other random numbers"
            )
        elif self._resumed:
            own = self._resumed[rank]
            restore_random_states(own["random"], self.usage.device)
            if self.agreement is not None:
                self.agreement.resume(own.get("demand"))
        self._resumed = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from where a resumed fit continues."""
        self._logged_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show the batch's labels and padding to the installation, in case the model is not."""
        assert self.installation is not None
        self._resume()
        if not self._mode_checked:
            self._mode_checked = True
            _warn_of_eval_mode(self.installation)
        self.installation.observe(batch if isinstance(batch, Mapping) else None)
        self._batch_started = perf_counter()
        self._in_batch = True

    def on_before_zero_grad(self, *_: Any) -> None:
        """What was accumulated is thrown away, and so are its weights."""
        if self.agreement is not None:
            self.agreement.window = Window()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check once, before the first optimizer step, that no gradient was lost."""
        assert self.installation is not None
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
        if trainer.barebones:
            return
        self._seconds.append(perf_counter() - self._batch_started)
        records = self.installation.records
        if self.usage.update_count == 0:
            self._first_cached_bytes = sum(record.cached_bytes for record in records)
        self.usage.update(records)
        self._recent.update(records)
        # set by a part of the Trainer that its type does not show
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step // every > self._logged_step // every:
            self._logged_step = trainer.global_step
            self._log(pl_module, on_step=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the steps that no interval covered."""
        # the epoch may have been ended at the start of a batch
        self._in_batch = False
        if self._recent.update_called:
            self._log(pl_module, on_step=False)

    def _log(self, pl_module: LightningModule, on_step: bool) -> None:
        values = {f"sage/{name}": value for name, value in self._recent.compute().items()}
        # never the metric itself: Lightning wants logged metrics to be the module's own.
        # compute() is over all ranks already; sync_dist only tells Lightning
        pl_module.log_dict(
            values, on_step=on_step, on_epoch=not on_step, batch_size=1, sync_dist=not on_step
        )
        self._recent.reset()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up, on every rank, while the ranks can still talk to each other."""
        if not self.usage.update_called:
            return
        assert self.installation is not None
        self.summary = {name: value.item() for name, value in self.usage.compute().items()}
        if self.installation.dense_saved_bytes:
            self.summary["dense_mib"] = self.installation.dense_saved_bytes / MIB
            self.summary["ratio"] = self._first_cached_bytes / self.installation.dense_saved_bytes
        # the first step includes the self-check and the dense count
        seconds = list(self._seconds)[1:] or list(self._seconds)
        self.summary["seconds"] = median(seconds)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, below the progress bar."""
        if self.print_summary and self.summary and trainer.is_global_zero:
            Console().print(summary_table(self.summary))


def _warn_of_eval_mode(installation: Installation) -> None:
    idle = [name for name, block in installation.blocks.items() if not block.training]
    if idle:
        rank_zero_warn(
            f"{len(idle)} of {len(installation.blocks)} blocks train in eval mode ({idle[0]} is "
            "the first): from_pretrained returns it and Lightning leaves it. SAGE works in either, "
            "but dropout is off; call train() on the model in on_train_start to have it on."
        )
