"""Float64 throughout, also where a model casts to float32 by itself."""

import contextlib
import functools
from unittest import mock

import torch
from torch.nn import functional as F

_NARROWER = (torch.float32, torch.float16, torch.bfloat16)
_finfo = torch.finfo


@contextlib.contextmanager
def in_double():
    """Let a float64 model compute in float64: what is float64 stays so, whatever it is cast to.

    Models cast norms, rotary angles, logits of routers and the eager softmax to float32 whatever
    they are given, and sums over rows would agree to 1e-7 only. Their masks hold the lowest number
    of the dtype, which two masks added, or a cast, turn into -inf: here it is that of float32.
    Numbers that a model makes from nothing are float64 too.

    (Patches and no TorchFunctionMode, which would not reach into backward.)
    """
    replaced = [(torch, "finfo", _finfo_of_float32), (torch.Tensor, "to", _to)]
    replaced += [(torch.Tensor, n, _no_cast(n)) for n in ("float", "half", "bfloat16", "type")]
    for name in ("softmax", "log_softmax", "sum", "mean", "cumsum", "prod"):
        for owner in (torch.Tensor, torch, F):
            if hasattr(owner, name):
                replaced.append((owner, name, _without_dtype(getattr(owner, name))))
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as patches:
        for owner, name, function in replaced:
            patches.enter_context(mock.patch.object(owner, name, function))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def _finfo_of_float32(dtype=torch.float32):
    return _finfo(torch.float32 if dtype == torch.float64 else dtype)


def _is_double(x):
    return isinstance(x, torch.Tensor) and x.dtype == torch.float64


def _to(x, *args, __to=torch.Tensor.to, **kwargs):
    if _is_double(x):
        args = tuple(torch.float64 if a in _NARROWER else a for a in args if not _is_narrower(a))
        kwargs = {k: v for k, v in kwargs.items() if k != "dtype" or v not in _NARROWER}
    return __to(x, *args, **kwargs) if args or kwargs else x


def _is_narrower(x):
    """Of a tensor that another's dtype is taken from."""
    return isinstance(x, torch.Tensor) and x.dtype in _NARROWER


def _no_cast(name):
    cast = getattr(torch.Tensor, name)

    @functools.wraps(cast)
    def cast_unless_double(x, *args, **kwargs):
        wider = args and args[0] not in _NARROWER
        return x if _is_double(x) and not wider else cast(x, *args, **kwargs)

    return cast_unless_double


def _without_dtype(function):
    # a watch for functions knows them by their names
    @functools.wraps(function)
    def without_dtype(x, *args, **kwargs):
        if _is_double(x) and kwargs.get("dtype") in _NARROWER:
            kwargs["dtype"] = None
        return function(x, *args, **kwargs)

    return without_dtype
