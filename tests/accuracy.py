"""The judges: how far a result is from another, and what is held for a backward pass."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def assert_as_accurate(kernel, eager, exact, factor=2.0, floor=1e-6):
    """`kernel` may err from `exact` at most `factor` times as far as `eager` does."""
    err = (kernel.double() - exact).abs().max()
    allowed = factor * (eager.double() - exact).abs().max() + floor
    assert err <= allowed, f"error {err:.2e}, eager PyTorch in the same dtype allows {allowed:.2e}"


def relative_error(actual, expected):
    """Largest difference, relative to the largest entry of `expected`."""
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp_min(1e-300)).item()


def sqnr_db(actual, expected):
    """Signal to quantisation noise: what is meant, over what differs from it, in decibels."""
    noise = (actual.double() - expected.double()).norm()
    return (20 * torch.log10(expected.double().norm() / noise)).item()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that anything inside makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


def cosine(actual, expected):
    """Cosine of the angle between two dicts of gradients, each taken as one vector."""
    assert actual.keys() == expected.keys()
    a = torch.cat([actual[name].double().flatten() for name in expected])
    b = torch.cat([expected[name].double().flatten() for name in expected])
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def scales(expected):
    """What each gradient is judged by: its largest entry.

    Some gradients are zero but for rounding (a key's bias shifts all logits of a query alike),
    so the scale is not let below a thousandth of the largest gradient of all.
    """
    largest = {name: grad.double().abs().max() for name, grad in expected.items()}
    floor = 1e-3 * max(largest.values())
    return {name: torch.maximum(value, floor) for name, value in largest.items()}


def one_vector(gradients, scale):
    """Gradients brought to one scale (see :func:`scales`) and flattened into one vector."""
    return torch.cat([(gradients[name].double() / scale[name]).flatten() for name in scale])


def assert_gradients_close(actual, expected, tolerance):
    """Every gradient within `tolerance` of the expected one, relative to its scale."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    scale = scales(expected)
    errors = {
        name: ((actual[name].double() - expected[name].double()).abs().max() / scale[name]).item()
        for name in expected
    }
    # "not <=" rather than ">": a NaN is wrong too
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    worst = sorted(wrong, key=wrong.get, reverse=True)[:4]
    listed = ", ".join(f"{name} by {wrong[name]:.1e}" for name in worst)
    assert not wrong, f"{len(wrong)} of {len(errors)} gradients are off: {listed}"


def loss_and_gradients(model, batch):
    """One backward pass: the loss, and gradients by parameter name; "inputs" is the embedding's.

    A trainable parameter without gradient counts as one with a gradient of zero.
    """
    inputs = []

    def watch(_module, _args, output):
        # under LoRA the embedding is frozen; its output is asked all the same
        output.requires_grad_(True)
        output.retain_grad()
        inputs.append(output)

    model.zero_grad(set_to_none=True)
    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        loss = model(**batch).loss
        loss.backward()
    finally:
        handle.remove()
    return loss.detach(), parameter_gradients(model) | {"inputs": inputs[0].grad}


def parameter_gradients(model):
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
