"""The gradient that lightning-sage promises, by brute force on the dense model.

Every block of a dense copy is wrapped. With S the rows of the block that take part in the backward
pass, w their weights (1/p for a row drawn with probability p, else 1; 0 outside S), H what enters
and H' what leaves the block:

* H, keys and values (with ``attention="salient"``: values, and the logits of the key columns) are
  detached outside S, so that parameters and other rows learn nothing through them;
* the output becomes ``H' detached + w (H' - H' detached) + (1 - w) (H - H detached)``, which has
  the value of H' and hands on w times its gradient to the block and 1 - w times to H. Inside S with
  w = 1 that is the block's own gradient, outside S the identity, and else
  ``dL/dH = dL/dH' + (vjp(w dL/dH') - w dL/dH')``: the branches weighted, the residual path not.

All else in a block acts row by row. Attention is a plain softmax over all keys, no fused kernel.
"""

import math
import types
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Rows:
    """What one block replayed: weights [B, T], 0 where it did not, and the seed of its dropout."""

    name: str
    weights: torch.Tensor
    seed: int | None = None


def replayed(records):
    """`Rows` of an installation's records, after a backward pass."""
    return [Rows(r.name, _weights(r), r.seed) for r in records]


def _weights(record):
    weights = getattr(record, "weights", None)
    return record.replayed.double() if weights is None else weights.double()


@contextmanager
def oracle(model, rows, attention):
    """Give `model`, inside, the gradient over `rows` (one `Rows` per block, by module name)."""
    watch = _Watch(attention)
    blocks = {r.name: model.get_submodule(r.name) for r in rows}
    for r in rows:
        block = blocks[r.name]
        block.forward = types.MethodType(_sparse(block.forward, r, watch), block)
    try:
        with _transformers_attention(watch), watch:
            yield model
    finally:
        for block in blocks.values():
            del block.forward


def _sparse(forward, rows, watch):
    def sparse(_block, hidden, *args, **kwargs):
        weights = rows.weights.to(hidden.device)
        inside = (weights > 0)[..., None]
        with watch.inside(rows):
            output = forward(frozen_outside(hidden, inside), *args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        first = _identity_outside(hidden, first, weights.to(first.dtype)[..., None])
        return (first, *output[1:]) if isinstance(output, tuple) else first

    return sparse


def frozen_outside(x, inside):
    """`x`, constant where `inside` is False."""
    return torch.where(inside, x, x.detach())


def _identity_outside(hidden, output, weight):
    through_block = weight * (output - output.detach())
    past_it = (1 - weight) * (hidden - hidden.detach()).to(output.dtype)
    return output.detach() + through_block + past_it


class _Watch(TorchFunctionMode):
    """Sees SDPA of plain PyTorch and dropout, and knows which block is running."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.rows, self.dropouts, self.draws = attention, None, 0, 0

    @contextmanager
    def inside(self, rows):
        self.rows, self.dropouts, self.draws = rows, 0, 0
        try:
            yield
        finally:
            self.rows = None

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **(kwargs or {}))
        if func is F.dropout and self.rows is not None:
            return self._dropout(*args, **(kwargs or {}))
        if func in (torch.rand, torch.randint, torch.randperm) and self.rows is not None:
            from lightning_sage.drops import numbered

            self.draws += 1
            generator = numbered(self.rows.seed, self.draws - 1, torch.device("cpu"))
            return func(*args, **(kwargs or {}), generator=generator)
        return func(*args, **(kwargs or {}))

    def _sdpa(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        if is_causal:
            attn_mask = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        return self.attend(q, k, v, attn_mask, scale, dropout=dropout_p)

    def _dropout(self, x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        from lightning_sage.ops.reference import dropout_mask

        tokens, width = self.rows.weights.numel(), x.shape[-1]
        assert x.numel() == tokens * width, f"dropout on {tuple(x.shape)} is not by row"
        index = torch.arange(tokens, device=x.device)
        kept = dropout_mask(self.rows.seed, self.dropouts, index, width, p)
        self.dropouts += 1
        return x * kept.view(x.shape).to(x.dtype) / (1 - p)

    def _dropped(self, weights, p):
        """Attention weights [B, H, T, T], each dropped by its sample, head, query and key."""
        if p == 0 or self.rows is None:
            return weights
        from lightning_sage.ops.reference import dropout_mask

        index = torch.arange(weights.shape[:3].numel(), device=weights.device)
        kept = dropout_mask(self.rows.seed, self.dropouts, index, weights.shape[3], p)
        self.dropouts += 1
        return weights * kept.view(weights.shape) / (1 - p)

    def attend(self, q, k, v, mask, scale, softcap=None, dropout=0.0):
        """Softmax attention of q [B, H, T, D] over k, v [B, G, T, D], constant outside the rows."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        inside = None
        if self.rows is not None:
            inside = (self.rows.weights > 0).to(q.device)[:, None, :, None]
            v = frozen_outside(v, inside)
            if self.attention == "full":
                k = frozen_outside(k, inside)
        logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if inside is not None and self.attention == "salient":
            logits = frozen_outside(logits, inside.transpose(-1, -2))
        return self._dropped(_softmax(logits, mask), dropout).to(v.dtype) @ v


def _softmax(logits, mask):
    if mask is None:
        return logits.softmax(-1)
    if mask.dtype != torch.bool:
        return (logits + mask).softmax(-1)
    # a query that may attend to nothing (padding) attends to nothing, as in SDPA: no NaN
    logits = logits.masked_fill(~mask, -math.inf).masked_fill(~mask.any(-1, keepdim=True), 0)
    return logits.softmax(-1) * mask


@contextmanager
def _transformers_attention(watch):
    """Let every transformers model attend through `watch`, whatever it is configured to use.

    The implementation's name stays: it decides which masks a model builds.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module, q, k, v, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
    ):
        mask = attention_mask
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if mask is None and causal:
            mask = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        y = watch.attend(q, k, v, mask, scaling, kwargs.get("softcap"), dropout)
        return y.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.get_interface = lambda *_args, **_kwargs: attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface
