"""A judge: how often a GPU would have been waited for, seen on any device."""

import sys
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# functions that hand a tensor's values to Python, or copy Python's to a device
_ASKING = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
_MAKING = {torch.tensor, torch.as_tensor}
# ops that hand over a number, or whose result has a size that only the device knows
_DYNAMIC = {
    "local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "unique",
    "unique2",
    "bincount",
    "repeat_interleave",
}


class _Asked(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # a model's own constants are its own affair
        made = func in _MAKING and "lightning_sage" in sys._getframe(1).f_code.co_filename
        if func in _ASKING or made:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Dynamic(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        by_mask = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for indices in args
            if isinstance(indices, list | tuple)
            for x in indices
        )
        if name in _DYNAMIC or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def syncs():
    """Yields a list of what asked, by name; nothing outside of PyTorch is seen."""
    found = []
    with _Asked(found), _Dynamic(found):
        yield found
