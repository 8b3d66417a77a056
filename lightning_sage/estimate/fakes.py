"""Models without memory: fake tensors, beside which small integers and masks have their values."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

# bytes of a tensor whose values are computed: masks of 8192 tokens, ids of any batch
LARGEST = 2**26
# the same for floats made from nothing: constants, and no activations
LARGEST_CONSTANT = 2**14

# make tensors without values; integers among them count as zeros
_UNSET = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class Known(TorchDispatchMode):
    """Computes, beside fake tensors, the values of what depends on token ids and constants alone.

    So a model may ask how many labels there are, or whether a mask is causal, while activations
    and weights have no values and take no memory. Enter it inside a `FakeTensorMode`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._building = False
        self._values = WeakTensorKeyDictionary()
        # by storage, values that were written to with what is not known; held, so that no other
        # takes its place
        self._lost: dict[int, Tensor] = {}

    def lift(self, value: Tensor, device: torch.device) -> Tensor:
        """A fake of `value`, a real tensor, whose values are known unless they are floats."""
        fake = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        if not value.is_floating_point():
            with _disable_current_modes():
                self._values[fake] = value.detach().cpu().clone()
        return fake

    def built(self, build: Callable[[], Any]) -> Any:
        """What `build` returns, with parameters on the CPU.

        What it asks of values that are not known, as drawing weights may, is answered by 0.
        """
        self._building = True
        try:
            with torch.device("cpu"), _parameters_replaced():
                return build()
        finally:
            self._building = False

    def value(self, x: Tensor) -> Tensor | None:
        """What is in `x`; None where it is not known."""
        value: Tensor | None = self._values.get(x) if isinstance(x, FakeTensor) else x
        if value is None or value.untyped_storage()._cdata in self._lost:
            return None
        return value

    def _real(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """The call on values, on the CPU; None where one is not known."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        found = []
        for x in leaves:
            value = self.value(x) if isinstance(x, Tensor) else x
            if value is None and x is not None:
                return None
            found.append(torch.device("cpu") if isinstance(x, torch.device) else value)
        args, kwargs = pytree.tree_unflatten(found, spec)
        return args, kwargs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        call = self._real(args, kwargs)
        if call is None:
            self._forget(func, args)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._answer(func, args, kwargs, call)
        if call is not None and self._worth(func, out, args, kwargs):
            with unset_fake_temporarily():
                real = func(*call[0], **call[1])
                if func in _UNSET:
                    real.zero_()
            self._note(out, real)
        return out

    def _forget(self, func: Any, args: tuple[Any, ...]) -> None:
        for declared, x in zip(func._schema.arguments, args, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                for one in x if isinstance(x, list | tuple) else (x,):
                    value = self._values.get(one) if isinstance(one, Tensor) else None
                    if value is not None:
                        self._lost[value.untyped_storage()._cdata] = value

    def _worth(self, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether values are few, and are not all that an activation's would be."""
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        floats = any(x.is_floating_point() for x in made)
        # weights start from constants too, and are not looked at
        if floats and (self._building or func in _UNSET):
            return False
        given = any(isinstance(x, Tensor) for x in pytree.tree_leaves((args, kwargs)))
        most = LARGEST if given or not floats else LARGEST_CONSTANT
        return all(x.numel() * x.element_size() <= most for x in made)

    def _note(self, out: Any, real: Any) -> None:
        fakes, values = pytree.tree_leaves(out), pytree.tree_leaves(real)
        for fake, value in zip(fakes, values, strict=True):
            if isinstance(fake, FakeTensor):
                self._values[fake] = value

    def _answer(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: _Call | None
    ) -> Any:
        """What depends on values.

        Raises:
            DataDependentOutputException: These are not known.
            DynamicOutputShapeException: These are not known.
        """
        if call is not None:
            with unset_fake_temporarily():
                real = func(*call[0], **call[1])
            if not isinstance(real, Tensor):
                return real
            device = next(x.device for x in pytree.tree_leaves(args) if isinstance(x, Tensor))
            out = torch.empty(real.shape, dtype=real.dtype, device=device)
            self._note(out, real)
            return out
        if func is torch.ops.aten.index.Tensor:
            places = [part for x in args[1] for part in self._places(x)]
            if all(x is None or x.dtype not in (torch.bool, torch.uint8) for x in places):
                return func(args[0], places, **kwargs)
        if self._building and func is torch.ops.aten._local_scalar_dense.default:
            return 0
        return func(*args, **kwargs)

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """An index by numbers for one by flags, where these are known."""
        value = None if index is None else self.value(index)
        if index is None or value is None or value.dtype not in (torch.bool, torch.uint8):
            return [index]
        with unset_fake_temporarily():
            found = value.nonzero().unbind(1)
        return [self.lift(one, index.device) for one in found]


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for child in self.children() if recurse else ():
        child._apply(fn)
    held: list[dict[str, Any]] = [self._parameters, self._buffers]
    for tensors in held:
        for name, x in tensors.items():
            if x is None:
                continue
            with torch.no_grad():
                new = fn(x)
            # what nothing was done to stays the tensor that others may share
            if (new.dtype, new.device) != (x.dtype, x.device):
                parameter = isinstance(x, nn.Parameter)
                tensors[name] = nn.Parameter(new, x.requires_grad) if parameter else new
    return self


@contextmanager
def _parameters_replaced() -> Iterator[None]:
    """Modules convert parameters by making others: fake ones cannot be swapped, as torch would."""
    before = nn.Module._apply
    setattr(nn.Module, "_apply", _apply)  # noqa: B010 - a method
    try:
        yield
    finally:
        setattr(nn.Module, "_apply", before)  # noqa: B010


@contextmanager
def without_memory() -> Iterator[Known]:
    """Tensors made inside are fake; yields what knows their values."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.random.fork_rng(), warnings.catch_warnings(), fake, Known() as known:
        # copying a module asks whether its tensors have storage
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield known


def fake_copy(
    model: nn.Module, device: torch.device, dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of a model, real, fake or on the meta device, with fake parameters and buffers.

    Call inside :func:`without_memory`.

    Args:
        model: The model.
        device: Of the copy.
        dtype: Of its floating point numbers; None leaves them as they are.
    """
    memo: dict[int, Any] = {}
    for x in chain(model.parameters(), model.buffers()):
        local = getattr(x, "_local_tensor", x)
        kind = dtype if dtype is not None and x.is_floating_point() else x.dtype
        fake = torch.empty_strided(local.size(), local.stride(), dtype=kind, device=device)
        parameter = isinstance(x, nn.Parameter)
        memo[id(x)] = nn.Parameter(fake, requires_grad=x.requires_grad) if parameter else fake
    trainer = getattr(model, "_trainer", None)
    if trainer is not None:
        memo[id(trainer)] = None
    # tensors that are neither parameters nor buffers are few, and stay real
    with _disable_current_modes():
        return copy.deepcopy(model, memo)


def lifted(known: Known, batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of fake tensors; of integers and bools the values are known."""
    return {
        name: known.lift(value, device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
