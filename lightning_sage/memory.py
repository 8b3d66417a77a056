"""Bytes: what a graph holds for its backward pass, counted exactly; what a device has in use."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIB = 2**20

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class _Held:
    """Stands in a graph for a saved tensor, and lives as long as the graph needs it."""

    def __init__(self, tensor: Tensor) -> None:
        # a saved output must not hold the node that holds it
        self.tensor = tensor.detach()


@contextmanager
def saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Count what the graph built inside holds for backward: whole storages, each once.

    Sparse tensors, which have no one storage, are not counted.

    Args:
        exclude: Tensors that are there anyway: parameters, buffers, the batch.

    Yields:
        A function that gives the bytes held at the time of the call.

    Example:
        >>> import torch
        >>> x = torch.ones(8, requires_grad=True)
        >>> with saved_bytes(exclude=[x]) as held:
        ...     y = x.exp().sin()
        ...     held()
        32
    """
    excluded = {storage.data_ptr() for x in exclude if (storage := _storage(x)) is not None}
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor)
        alive.add(held)
        return held

    def count() -> int:
        storages = [_storage(held.tensor) for held in alive]
        sizes = {(s.device, s.data_ptr()): s.nbytes() for s in storages if s is not None}
        return sum(size for (_, pointer), size in sizes.items() if pointer not in excluded)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        yield count


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    # a distributed tensor has its rank's part
    local = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage() if local.layout == torch.strided else None


def tensors_in(batch: object) -> Iterator[Tensor]:
    """Dense tensors in a batch, however deep in mappings, lists, tuples and dataclasses.

    Example:
        >>> [tensor.shape[0] for tensor in tensors_in({"x": [torch.ones(2)], "y": torch.ones(3)})]
        [2, 3]
    """
    if isinstance(batch, Tensor):
        # others have no storage that could be told apart
        if batch.layout == torch.strided:
            yield batch
        return
    inside: Iterable[object] = ()
    if isinstance(batch, Mapping):
        inside = batch.values()
    elif isinstance(batch, list | tuple):
        inside = batch
    elif is_dataclass(batch) and not isinstance(batch, type):
        inside = vars(batch).values()
    for part in inside:
        yield from tensors_in(part)


class InUse(NamedTuple):
    """Bytes in use on a device.

    Attributes:
        current: Now.
        peak: The most there has been since the peak was last reset, by whomever.
    """

    current: int
    peak: int


def in_use(device: torch.device) -> InUse:
    """What torch's allocator has handed out on `device`, in bytes; this does not wait for it.

    Where torch keeps no such account (CPU, MPS) it is the resident memory of this process. Without
    Linux's /proc only its peak is known and given as both; without `resource` (Windows) 0 is.
    """
    allocator = _allocator(device)
    if allocator is not None:
        stats = allocator.memory_stats(device)
        prefix = "allocated_bytes.all."
        return InUse(stats.get(f"{prefix}current", 0), stats.get(f"{prefix}peak", 0))
    try:
        lines = (line.split() for line in _STATUS.read_text().splitlines() if line[:2] == "Vm")
        kib = {line[0]: int(line[1]) for line in lines}
        return InUse(kib["VmRSS:"] * 1024, kib["VmHWM:"] * 1024)
    except (OSError, KeyError):
        peak = _peak_of_process()
        return InUse(peak, peak)


def current_bytes(device: torch.device) -> int:
    """Bytes in use now; see :func:`in_use`."""
    return in_use(device).current


def peak_bytes(device: torch.device) -> int:
    """The most bytes that were in use since the peak was last reset; see :func:`in_use`."""
    return in_use(device).peak


def reset_peak(device: torch.device) -> bool:
    """Let the peak begin anew, for everybody in this process who reads it.

    Returns:
        Whether that was possible: the resident memory's peak takes Linux and a writable /proc.
    """
    allocator = _allocator(device)
    if allocator is not None:
        allocator.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def free_unused() -> None:
    """Give back what a step that ran out of memory has left, cycles included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _allocator(device: torch.device) -> Any:
    """Torch's module for the device, where it accounts for its memory; else None."""
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        return None
    return module if hasattr(module, "reset_peak_memory_stats") else None


def _peak_of_process() -> int:
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
