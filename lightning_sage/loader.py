"""A DataLoader whose place in a shuffled epoch can be kept in a checkpoint and found again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
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
    Iterating draws nothing from torch's default generator.

    An epoch is that of its sampler, on which Lightning calls ``set_epoch``; read to its end, it is
    followed by the next one.

    Args:
        dataset: Rows by index.
        batch_size: Rows of a batch.
        shuffle: Whether each epoch has its own random order, all by one seed, which is drawn here
            from torch's default generator.
        sampler: In place of `shuffle`: a DistributedSampler, or what has its `seed`, `epoch`,
            `shuffle` and `set_epoch`.
        resume_from: What :meth:`state_dict` gave; loaded when iteration starts, since Lightning
            may first build the loader anew with another sampler.
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
        # with a batch_sampler, that is the one with an order
        if sampler is None and options.get("batch_sampler") is None:
            sampler, shuffle = (_Shuffled if shuffle else _InOrder)(dataset), False
        elif type(sampler) is SequentialSampler:
            sampler = _InOrder(dataset)
        # the default one is the model's, too
        options["generator"] = options.get("generator") or torch.Generator()
        super().__init__(dataset, batch_size, shuffle, sampler, **options)
        if not hasattr(self._order, "set_epoch"):
            raise ValueError(
                f"{type(self._order).__name__} has no epochs, whose order could be had again: "
                "give shuffle=True or a DistributedSampler"
            )
        self.resume_from = resume_from
        self._epoch, self._handed_out, self._resumed = 0, 0, False

    @property
    def _order(self) -> Any:
        return getattr(self.batch_sampler, "sampler", self.sampler)

    @property
    def _index_sampler(self) -> Any:
        # what iterators of both kinds take their indices from
        return _Rest(self, super()._index_sampler)

    def __iter__(self) -> Any:
        if self.resume_from is not None:
            self.load_state_dict(self.resume_from)
        return self._hand_out()

    def _hand_out(self) -> Iterator[Any]:
        # not in __iter__: Lightning sets the epoch only after that, and workers start on it at once
        self._start_epoch()
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch
        self._order.set_epoch(self._epoch + 1)

    def _start_epoch(self) -> None:
        epoch = self._order.epoch
        if self._resumed and epoch not in (self._epoch, self._epoch + 1):
            raise ValueError(
                f"the data was left in epoch {self._epoch} and is taken up in epoch {epoch}: give "
                "the fit the checkpoint that the data's state is from"
            )
        # an epoch cut short, by a limit that only the Trainer knows, is followed by the next one
        if not self._resumed or epoch != self._epoch:
            self._handed_out = 0
        self._epoch, self._resumed = epoch, False
        self.generator.manual_seed(self._order.seed + epoch)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches handed out, and what makes an order of batches."""
        return {"epoch": self._epoch, "batches": self._handed_out, **self._makeup()}

    def _makeup(self) -> dict[str, Any]:
        return {
            "seed": self._order.seed,
            "shuffle": self._order.shuffle,
            "rows": len(self.dataset),  # type: ignore[arg-type]
            "batch_size": getattr(self.batch_sampler, "batch_size", self.batch_size),
            "ranks": getattr(self._order, "num_replicas", 1),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there with the next first batch.

        Raises:
            ValueError: With other rows, batches or ranks the rest of the epoch would be another.
        """
        for name, own in self._makeup().items():
            if name != "seed" and state_dict.get(name) != own:
                raise ValueError(
                    f"the checkpoint's data had {name}={state_dict.get(name)} and this has "
                    f"{name}={own}, which makes other batches; set it back, or take the weights "
                    "alone with load_from_checkpoint and fit without ckpt_path"
                )
        self.resume_from = None
        self._epoch, self._handed_out = state_dict["epoch"], state_dict["batches"]
        self._resumed = True
        self._order.seed = state_dict["seed"]
        self._order.set_epoch(self._epoch + (self._handed_out >= len(self)))


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
