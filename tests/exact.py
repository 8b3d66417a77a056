"""Float64 throughout, also where a model casts to float32 by itself."""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NARROWER = (torch.float32, torch.float16, torch.bfloat16)
_finfo = torch.finfo


@contextlib.contextmanager
def in_double():
    """Let a float64 model compute in float64: nothing that is narrower is made inside.

    Models cast norms, rotary angles, logits of routers and the eager softmax to float32 whatever
    they are given, and sums over rows would agree to 1e-7 only. Their masks hold the lowest number
    of the dtype, which two masks added, or a cast, turn into -inf: here it is that of float32.

    What Python calls stays what it was: SAGE knows functions by their identity.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch, "finfo", _finfo_of_float32), _Double():
            yield
    finally:
        torch.set_default_dtype(default)


def _finfo_of_float32(dtype=torch.float32):
    return _finfo(torch.float32 if dtype == torch.float64 else dtype)


class _Double(TorchDispatchMode):
    """Below autograd, so that it is in force in the backward pass too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("dtype") in _NARROWER:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)
