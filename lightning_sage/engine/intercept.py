"""Stands between a block and its attention and dropout, for the length of one forward or replay.

Attention is seen through transformers' `AttentionInterface.get_interface` (the model keeps its own
implementation; softcap and unrepeated keys arrive as arguments) and through
`F.scaled_dot_product_attention`, also inside of `nn.MultiheadAttention`; weights made by hand are
followed from softmax to product; dropout through `F.dropout`. Nothing is active outside `Tap`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_sage.engine.attention_call import AttentionCall, biased
from lightning_sage.engine.flash import FlashMask
from lightning_sage.engine.follow import SOFTMAX, Follower, Weigher
from lightning_sage.engine.positions import COUNTING, Counter
from lightning_sage.engine.torch_attention import FORWARD, multi_head_attention


class Handler(Weigher, Protocol):
    """What happens at an attention and at a dropout.

    Attributes:
        counter: Tells a replay where its tokens stand, for blocks that count them by themselves.
    """

    counter: Counter | None

    def attention(self, call: AttentionCall) -> Tensor:
        """Output of an attention, ``[B, H, T, Dv]``."""

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """`x` with elements dropped."""

    def draw(self, func: Callable[..., Tensor], args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Random numbers of a shape that the block names."""


# what draws from sizes alone; what draws by the shape of a tensor is refused by the self-check
_DRAWS = (torch.rand, torch.randn, torch.randint, torch.randperm)


class _Current(threading.local):
    tap: Tap | None = None


_current = _Current()
_lock = threading.Lock()
_patched = 0
_original: Any = None


class Tap(TorchFunctionMode):
    """Routes attention and dropout of the current thread to a handler while it is entered."""

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler
        self.follower = Follower(handler)
        self._shown: tuple[Tensor, Tensor, Tensor] | None = None
        self._inside = False

    def __enter__(self) -> Tap:
        self._outer, _current.tap = _current.tap, self
        self._routed = _patch_interface()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if self._routed:
            _unpatch_interface()
        _current.tap = self._outer
        if exc[0] is None:
            self.follower.finish()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, counter = kwargs or {}, self.handler.counter
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func is F.dropout:
            followed = self.follower.see(func, args, kwargs)
            return followed if followed is not NotImplemented else self._dropout(*args, **kwargs)
        if func is FORWARD:
            return self._in_sight(multi_head_attention, *args, **kwargs)
        if func in _DRAWS and not kwargs.keys() & {"generator", "out"}:
            return self.handler.draw(func, args, kwargs)
        if counter is not None and func in COUNTING:
            return counter.see(func, args, kwargs)
        # asked here and not there: most functions are neither, and there are many
        if (self.follower.known or func is F.softmax or func in SOFTMAX) and not self._inside:
            followed = self.follower.see(func, args, kwargs)
            if followed is not NotImplemented:
                return followed
        return func(*args, **kwargs)

    def _in_sight(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A function that torch hands over as one, with what it calls seen."""
        super().__enter__()
        try:
            return function(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        shown, self._shown = self._shown, None
        q, k, v = shown or (query, key, value)
        if q.shape != query.shape and attn_mask is not None and attn_mask.shape[1] > 1:
            attn_mask = attn_mask.reshape(len(q), q.shape[1], 1, -1)
        call = AttentionCall(q, k, v, attn_mask, is_causal, scale or q.shape[-1] ** -0.5)
        call.dropout = dropout_p
        if shown is not None:
            call.repeated = key, value
        out = self.handler.attention(call.prepared())
        # of a single token transformers folds the query heads into the token axis
        return out if q.shape == query.shape else out.reshape(*query.shape[:-1], -1)

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        out = self.handler.dropout(input, p)
        return out if not inplace else input.copy_(out)

    def interface(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """An attention function of transformers, seen by the handler."""

        def seen(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            if name == "sdpa":
                # F.scaled_dot_product_attention follows, perhaps with repeated keys
                self._shown = query, key, value
                try:
                    return function(module, query, key, value, *args, **kwargs)
                finally:
                    self._shown = None
            return self._eager(name, function, module, query, key, value, *args, **kwargs)

        return seen

    def _eager(
        self,
        name: str,
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        dropout = (kwargs.get("dropout") or 0.0) if module.training else 0.0
        if dropout:
            kwargs["dropout"] = 0.0
        weights: Any = None

        def run() -> Tensor:
            nonlocal weights
            out: Tensor
            self._inside = True
            try:
                out, weights = function(module, query, key, value, attention_mask, *args, **kwargs)
            finally:
                self._inside = False
            return out.transpose(1, 2)

        flash, mask = FlashMask.of(name, module, query, attention_mask, kwargs), None
        if attention_mask is not None and flash is None:
            mask = attention_mask[..., : key.shape[2]]
        call = AttentionCall(
            query,
            key,
            value,
            biased(kwargs.get("position_bias"), mask),
            False,
            kwargs.get("scaling") or query.shape[-1] ** -0.5,
            kwargs.get("softcap"),
            dropout,
            run,
            sinks=kwargs.get("s_aux"),
            flash=flash,
        )
        out = self.handler.attention(call.prepared())
        return out.transpose(1, 2), weights


def _patch_interface() -> bool:
    """Let transformers ask the current thread's tap; threads without one see no difference."""
    global _patched, _original
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return False
    with _lock:
        _patched += 1
        if _patched > 1:
            return True
        _original = modeling.AttentionInterface.get_interface

        def get_interface(self: Any, attn_implementation: str, default: Any) -> Any:
            function = _original(self, attn_implementation, default)
            tap = _current.tap
            return function if tap is None else tap.interface(attn_implementation, function)

        modeling.AttentionInterface.get_interface = get_interface
    return True


def _unpatch_interface() -> None:
    global _patched
    with _lock:
        _patched -= 1
        if _patched == 0:
            sys.modules["transformers.modeling_utils"].AttentionInterface.get_interface = _original
