"""A DataLoader whose place in a shuffled epoch is kept in checkpoints and found again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that goes on, after a resume, with the batch after the last one handed out.

    Batches skipped are neither read nor collated, and workers' prefetching does not count. The
    state is small, plain, and the same on all ranks, which must have taken equally many batches.
    Iterating draws nothing from torch's default generator. Checkpoints of a Trainer hold the state;
    where it does not come back by itself, see :class:`ResumableData`.

    An epoch is that of its sampler, on which Lightning calls ``set_epoch``; read to its end, it is
    followed by the next one.

    Args:
        dataset: Rows by index.
        batch_size: Rows of a batch.
        shuffle: Whether each epoch has its own random order, all by one seed, which is drawn here
            from torch's default generator.
        sampler: In place of `shuffle`: a DistributedSampler, or what has its `seed`, `epoch`,
            `shuffle` and `set_epoch`.
        resume_from: What :meth:`state_dict` gave; taken up when iteration starts, since Lightning
            may build the loader anew with another sampler before.
        **options: As of DataLoader; `generator` is seeded anew in every epoch.

    Raises:
        ValueError: The data set or the sampler has no order that could be had again.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        *,
        resume_from: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"{type(dataset).__name__} has no rows by index: use a DataLoader")
        rows: Any = dataset
        # with a batch_sampler, that is the one with an order
        if sampler is None and options.get("batch_sampler") is None:
            sampler, shuffle = (_Shuffled if shuffle else _InOrder)(rows), False
        elif type(sampler) is SequentialSampler:
            sampler = _InOrder(rows)
        # the default one is the model's, too
        options["generator"] = options.get("generator") or torch.Generator()
        super().__init__(dataset, batch_size, shuffle, sampler, **options)
        if not hasattr(self._order, "set_epoch"):
            raise ValueError(
                f"{type(self._order).__name__} has no epochs, whose order could be had again: "
                "give shuffle=True or a DistributedSampler"
            )
        self.resume_from = resume_from
        self._epoch, self._handed_out = 0, 0
        self._resumed: Mapping[str, Any] | None = None

    @property
    def _order(self) -> Any:
        return getattr(self.batch_sampler, "sampler", self.sampler)

    @property
    def _index_sampler(self) -> Any:
        # what iterators of both kinds take their indices from
        return _Rest(self, super()._index_sampler)

    def __iter__(self) -> Any:
        if self.resume_from is not None:
            state, self.resume_from = self.resume_from, None
            self._take_up(state)
        return self._hand_out()

    def _hand_out(self) -> Iterator[Any]:
        # not in __iter__: Lightning sets the epoch only after that, workers start on it at once,
        # and an error there would be hidden by one of Lightning's teardown
        self._start_epoch()
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch
        self._order.set_epoch(self._epoch + 1)

    def _start_epoch(self) -> None:
        state, epoch = self._resumed, self._order.epoch
        if state is not None:
            self._check(state)
        # an epoch cut short, by a limit that only the Trainer knows, is followed by the next one
        if state is None or epoch != self._epoch:
            self._handed_out = 0
        self._epoch, self._resumed = epoch, None
        self.generator.manual_seed(self._order.seed + epoch)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches handed out, and what makes an order of batches."""
        if self.resume_from is not None:
            return dict(self.resume_from)
        return {"epoch": self._epoch, "batches": self._handed_out, **self._makeup()}

    def _makeup(self) -> dict[str, Any]:
        rows: Any = self.dataset
        return {
            "seed": self._order.seed,
            "shuffle": self._order.shuffle,
            "rows": len(rows),
            "batch_size": getattr(self.batch_sampler, "batch_size", self.batch_size),
            "ranks": getattr(self._order, "num_replicas", 1),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there with the next first batch.

        Raises:
            ValueError: With other rows, batches or ranks the rest of the epoch would be another.
        """
        self._check(state_dict)
        self.resume_from = None
        self._take_up(state_dict)

    def _check(self, state: Mapping[str, Any]) -> None:
        for name, own in self._makeup().items():
            if name != "seed" and state.get(name) != own:
                raise ValueError(
                    f"the checkpoint's data had {name}={state.get(name)} and this has "
                    f"{name}={own}, which makes other batches; set it back, or take the weights "
                    "alone with load_from_checkpoint and fit without ckpt_path"
                )

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._handed_out = state["epoch"], state["batches"]
        self._resumed = state
        alone = state["ranks"] > 1 or not dist.is_initialized() or dist.get_world_size() == 1
        if state["shuffle"] and self._order.seed != state["seed"] and not alone:
            warnings.warn(
                "a shuffled loader without DistributedSampler goes on in rank 0's order: orders of "
                "other ranks are in no checkpoint",
                stacklevel=2,
            )
        self._order.seed = state["seed"]
        self._order.set_epoch(self._epoch + (self._handed_out >= len(self)))


class ResumableData(LightningDataModule):
    """Keeps the state of its training loader, where that is a :class:`ResumableLoader`.

    Lightning gives the loader its state itself, but not if `configure_optimizers` has asked for the
    number of steps (Lightning #20550), nor at the end of an epoch. `train_dataloader` has to pass
    on what :meth:`resume_from` returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resume_from: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Forget the state that a failed fit was to go on from."""
        self._resume_from = None

    def resume_from(self) -> dict[str, Any] | None:
        """The state that this fit goes on from, once."""
        state, self._resume_from = self._resume_from, None
        return state

    def state_dict(self) -> dict[str, Any]:
        """That of the training loader, and whether Lightning counts its epoch as over."""
        loader = self._loader_in_use()
        if self.trainer is None or loader is None:
            return {}
        state, progress = loader.state_dict(), self.trainer.fit_loop.epoch_progress.state_dict()
        return {**state, "over": progress["current"]["processed"] > state["epoch"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the fit that is starting go on there."""
        # validating a checkpoint must not move the next fit
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        if state_dict["over"] and self.trainer.max_steps != -1:
            rank_zero_warn(
                "with max_steps Lightning takes an epoch that has ended for one to go on with "
                "(Lightning #19617), and this fit will see other batches than one that was never "
                "interrupted: give max_epochs instead, or a checkpoint from within an epoch, as by "
                "ModelCheckpoint(every_n_train_steps=...)"
            )
        # sharded strategies restore late, when there may be a loader
        loader = self._loader_in_use()
        if loader is None:
            self._resume_from = state_dict
        else:
            loader.load_state_dict(state_dict)

    def _loader_in_use(self) -> ResumableLoader | None:
        loader = None if self.trainer is None else self.trainer.train_dataloader
        return loader if isinstance(loader, ResumableLoader) else None


class _Rest:
    """Of a loader's batches, as indices, those of the epoch not handed out yet."""

    def __init__(self, loader: ResumableLoader, batches: Any) -> None:
        self.loader, self.batches = loader, batches

    def __iter__(self) -> Iterator[Any]:
        return islice(self.batches, self.loader._handed_out, None)

    def __len__(self) -> int:
        return len(self.batches)


class _Shuffled(RandomSampler):
    """As DistributedSampler's order on one rank, by a seed of its own."""

    shuffle = True

    def __init__(self, rows: Any) -> None:
        super().__init__(rows)
        self.seed, self.epoch = int(torch.randint(2**62, ())), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(len(self), generator=generator).tolist())


class _InOrder(SequentialSampler):
    """Rows as they come."""

    shuffle, seed, epoch = False, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
