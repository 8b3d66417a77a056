"""The loss of a causal language model without its logits: chunked linear cross-entropy.

The model's own forward runs, labels and all, so that hooks, adapters and wrappers see what they
always see. Only its output layer hands its input through, and its loss function computes the
cross-entropy from that input, the layer and the labels, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

Kernel = Literal["torch", "liger", "slices"]

# elements of the logits that exist at a time where no fused kernel decides it
LOGITS = 2**25


def chunked_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that ``model(**batch).loss`` is, without logits ``[B, T, V]``.

    Only rows that have a label enter the output layer, some at a time, and its gradient is the
    exact one. Where the layer is a plain `nn.Linear` and gradients are wanted, by torch's
    `linear_cross_entropy` from 2.13 on, else by Liger's on a GPU if `liger_kernel` is installed.
    Otherwise the layer, whatever it is, is called on slices, and again in the backward pass.

    Args:
        model: A causal language model of transformers, with or without PEFT's adapters, that
            passes :func:`check_chunked_loss`.
        batch: Keywords of its forward, `labels` among them.

    Raises:
        ValueError: The model has no output layer, or computes its loss by other means.
    """
    owner, head = _owner(model), output_layer(model)
    plain, forward = _plain(head), head.forward
    captured = called = False

    def hand_through(hidden: Tensor) -> Any:
        nonlocal captured
        # from the second call on it is the loss that calls, on slices
        if captured:
            return forward(hidden)
        captured = True
        # a copy, since FSDP2 warns of views among what a model returns
        return hidden.clone() if hidden._is_view() else hidden

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        nonlocal called
        called = True
        return _loss(head, plain, logits, _targets(labels, kwargs), vocab_size, kwargs)

    with _replaced(head, "forward", hand_through), _replaced(owner, "_loss_function", loss):
        value: Tensor = model(**batch).loss
    if not called:
        raise ValueError(_refusal(owner, "its forward calls no loss_function"))
    return value


def check_chunked_loss(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Compare the chunked loss with the model's own on a few tokens, without grad.

    The input of the output layer is scaled up for it: what is done to logits afterwards, a soft
    cap say, shows on large ones only.

    Raises:
        ValueError: They differ, and the loss is no cross-entropy of a linear function of what
            enters the output layer; there are no labels; FSDP2 gathers that layer in every slice.
    """
    owner, head = _owner(model), output_layer(model)
    if any(isinstance(part, FSDPModule) for part in head.modules()):
        raise ValueError(_refusal(owner, "its output layer is sharded apart from the model"))
    few = _few_tokens(batch)
    with torch.no_grad(), _in_evaluation(model):
        factor = max(1.0, 50 / max(_largest_logit(model, few), 1e-6))
        with _scaled_once(head, factor):
            expected = model(**few).loss.float()
        try:
            with _scaled_once(head, factor):
                found = chunked_loss(model, few).float()
        except (RuntimeError, TypeError, IndexError) as error:
            raise ValueError(_refusal(owner, f"it fails with {error!r}")) from error
    coarse = _dtype(head, expected.device).itemsize < 4
    if not torch.allclose(found, expected, rtol=1e-2 if coarse else 1e-3, equal_nan=True):
        reason = f"{found.item():.6g} where the model says {expected.item():.6g}"
        raise ValueError(_refusal(owner, reason))


def _largest_logit(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """Of the model's own forward, which has to call its loss function for the rest to make sense.

    Raises:
        ValueError: It does not.
    """
    owner = _owner(model)
    own, called = owner.loss_function, False

    def loss(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called = True
        return own(*args, **kwargs)

    with _replaced(owner, "_loss_function", loss):
        largest: float = model(**batch).logits.abs().max().item()
    if not called:
        raise ValueError(_refusal(owner, "its forward calls no loss_function"))
    return largest


def output_layer(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits, adapters included.

    Raises:
        ValueError: There is none.
    """
    find = getattr(_owner(model), "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Module):
        raise ValueError(_refusal(_owner(model), "it has no output layer"))
    return head


def kernel(model: nn.Module, device: torch.device) -> Kernel:
    """What :func:`chunked_loss` computes with when gradients are wanted."""
    head = output_layer(model)
    return _kernel(head, device) if _plain(head) else "slices"


def _dtype(head: nn.Module, device: torch.device) -> torch.dtype:
    """In what the output layer computes: autocast's dtype, else that of its weights."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtypes = (p.dtype for p in head.parameters() if p.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def _kernel(head: nn.Module, device: torch.device) -> Kernel:
    if hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions"):
        return "torch"
    # float16 gradients would underflow: Liger makes them before the loss is scaled
    liger = device.type == "cuda" and _dtype(head, device) != torch.float16
    return "liger" if liger and find_spec("liger_kernel") else "slices"


def _owner(model: nn.Module) -> Any:
    """The transformers model below any adapters."""
    find = getattr(model, "get_base_model", None)
    return model if find is None else find()


def _refusal(owner: nn.Module, reason: str) -> str:
    config = getattr(owner, "config", None)
    fields = config.to_dict().items() if config is not None else ()
    said = [f"{name}={value}" for name, value in fields if "logit" in name and value is not None]
    suspects = f" (its configuration says {', '.join(said)})" if said else ""
    return (
        f"{type(owner).__name__} has a loss that cannot be chunked: {reason}{suspects}; "
        "use loss='full'"
    )


def _plain(head: nn.Module) -> bool:
    """Whether the layer is its weight and bias, and nothing else happens when it is called."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    hooks = (head._forward_pre_hooks, head._forward_hooks, head._backward_hooks)
    return not any(hooks) and type(head.weight.data) is Tensor


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of this instance, for a while."""
    absent = object()
    before = vars(module).get(name, absent)
    vars(module)[name] = value
    try:
        yield
    finally:
        del vars(module)[name]
        if before is not absent:
            vars(module)[name] = before


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout, whose draws would differ, for a while."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _scaled_once(head: nn.Module, factor: float) -> Iterator[None]:
    """What enters the layer first, times a factor; slices of it are not scaled again."""

    def scale(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        handle.remove()
        return (args[0] * factor, *args[1:])

    handle = head.register_forward_pre_hook(scale)
    try:
        yield
    finally:
        handle.remove()


def _few_tokens(batch: Mapping[str, Any], count: int = 16) -> dict[str, Tensor]:
    """The first tokens of the first sample, all but one labelled, as if there were no padding."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise ValueError("a chunked loss needs labels [B, T] in the batch")
    few = {
        name: value[:1, :count]
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.shape[:2] == labels.shape
    }
    few.pop("attention_mask", None)
    few["labels"] = few["labels"].clamp(min=0)
    few["labels"][:, 2:3] = -100
    return few


def _targets(labels: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """The label that each row predicts, -100 where there is none."""
    shifted: Tensor | None = kwargs.get("shift_labels")
    if shifted is not None:
        return shifted
    return F.pad(labels[..., 1:], (0, 1), value=kwargs.get("ignore_index", -100))


def _loss(
    head: nn.Module,
    plain: bool,
    hidden: Tensor,
    targets: Tensor,
    vocabulary: int,
    kwargs: Mapping[str, Any],
) -> Tensor:
    """Mean over the labelled rows, or their sum over `num_items_in_batch`."""
    targets = targets.to(hidden.device).flatten()
    rows = targets != kwargs.get("ignore_index", -100)
    hidden, targets = hidden.flatten(0, -2)[rows], targets[rows]
    fused = plain and torch.is_grad_enabled() and len(targets) > 0
    with_kernel = _kernel(head, hidden.device) if fused else "slices"
    if with_kernel == "slices":
        summed = _in_slices(head, hidden, targets, max(1, LOGITS // vocabulary))
    else:
        summed = _fused(with_kernel, head, hidden, targets) * len(targets)
    items = kwargs.get("num_items_in_batch")
    if items is None:
        return summed / len(targets)
    return summed / (items.to(summed.device) if isinstance(items, Tensor) else items)


def _fused(with_kernel: Kernel, head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    dtype = _dtype(head, hidden.device)
    # autocast does not reach into either kernel
    weight = head.get_parameter("weight").to(dtype)
    bias = None if head.bias is None else head.get_parameter("bias").to(dtype)
    if with_kernel == "torch":
        compute = partial(F.linear_cross_entropy, options=nn.LinearCrossEntropyOptions())
        # its own mean is rounded to bfloat16 several times
        each = compute(hidden.to(dtype), weight, targets, linear_bias=bias, reduction="none")
        return _wide(each).mean()
    liger = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    result: Tensor = liger(hidden.to(dtype), weight, targets, bias=bias)
    return result


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _in_slices(head: nn.Module, hidden: Tensor, targets: Tensor, count: int) -> Tensor:
    """Summed loss of the rows, `count` at a time."""

    def summed(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(_wide(head(rows)), labels, reduction="sum")

    again = partial(checkpoint, summed, use_reentrant=False)
    compute = again if torch.is_grad_enabled() else summed
    # of no rows: 0, and still a function of them
    total = _wide(hidden[:0]).sum()
    for rows, labels in zip(hidden.split(count), targets.split(count), strict=True):
        total = total + compute(rows, labels)
    return total
