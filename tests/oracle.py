"""The gradient that lightning-sage promises, by brute force on the dense model.

Every block of a dense copy is wrapped. With S the rows of the block that take part in the backward
pass, w 1 in S and 0 outside, K the rows that learn as keys and values (S, or with
``attention="kept"`` all rows that were kept), H what enters and H' what leaves the block:

* H, keys and values (but with ``attention="full"``: values, and the logits of the key columns) are
  detached outside K, so that parameters and other rows learn nothing through them;
* the output becomes ``H' detached + w (H' - H' detached) + (1 - w) (H - H detached)``, which has
  the value of H' and hands on w times its gradient to the block and 1 - w times to H: inside S that
  is the block's own gradient, outside S the identity;
* where rows were drawn, which is at the first block that the backward pass reaches, dL/dH' is first
  multiplied row by row by d: 1/p for a row drawn with probability p, 0 for one that was not drawn.

All else in a block acts row by row. Attention is a plain softmax over all keys, no fused kernel.
What follows from this for what attention may be more than that:

* a sink is one more logit of each query, of which no row is the key: it is never detached, and
  learns from the queries in S;
* a learned bias of pairs belongs to its query. It learns from the logits that have a gradient: of
  the queries in S, with ``attention="salient"`` to the keys in S, with "full" to all keys. A bias
  that a block makes and hands on as a further output keeps its gradient from where it is used: in
  each block from that block's pairs. Outputs besides the hidden states are never detached;
* keys and values that are not made of the block's hidden states (cross-attention) are inputs like
  any other: nothing of them is detached, and all of them get their gradient from the queries in S.
  Where a call has such keys behind the block's own, the first columns are the block's own;
* attention written out by hand is known by a softmax over keys. Its logits' columns are detached
  outside S, and its values where the weights meet them. Its keys cannot be told from there: it is
  defined with ``attention="salient"`` only.
"""

import itertools
import math
import types
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Rows:
    """What one block replayed: weights [B, T], 0 where it did not, and the seed of its dropout.

    `others` [B, T] are rows that learned as keys and values alone; `drawn` [B, T] is what the
    gradient behind the block was multiplied by, None for 1.
    """

    name: str
    weights: torch.Tensor
    seed: int | None = None
    others: torch.Tensor | None = None
    drawn: torch.Tensor | None = None

    @property
    def keys(self):
        """Rows whose keys and values are no constants."""
        return (self.weights > 0) if self.others is None else (self.weights > 0) | self.others


def replayed(records):
    """`Rows` of an installation's records, after a backward pass."""
    return [Rows(r.name, _weights(r), r.seed, _others(r), r.drawn) for r in records]


def _others(record):
    if record.keys is None:
        return None
    others = torch.zeros_like(record.kept)
    others.view(-1)[record.keys] = True
    return others


def _weights(record):
    # a block that the backward pass did not reach replayed nothing
    weights = torch.zeros(record.kept.shape) if record.replayed is None else record.replayed
    return weights.double()


@contextmanager
def oracle(model, rows, attention):
    """Give `model`, inside, the gradient over `rows`: of a block, one `Rows` for each call."""
    watch, calls = _Watch(attention), {}
    for r in rows:
        calls.setdefault(r.name, []).append(r)
    blocks = {name: model.get_submodule(name) for name in calls}
    for name, block in blocks.items():
        sparse = _sparse(block.forward, itertools.cycle(calls[name]), watch)
        block.forward = types.MethodType(sparse, block)
    try:
        with _transformers_attention(watch), watch:
            yield model
    finally:
        for block in blocks.values():
            del block.forward


def _sparse(forward, calls, watch):
    def sparse(_block, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        rows = next(calls)
        hidden = args[0] if args else kwargs["hidden_states"]
        weights = rows.weights.to(hidden.device)
        # a wide row a token, or one for each of several streams
        by_stream = hidden.dim() == 4 and hidden.shape[:2] == weights.shape
        keys = rows.keys.to(hidden.device)
        by_token, keys = (
            x[..., None, None] if by_stream else x[..., None] for x in (weights, keys)
        )
        frozen = frozen_outside(hidden, keys)
        if args:
            args = (frozen, *args[1:])
        else:
            kwargs["hidden_states"] = frozen
        with watch.inside(rows, frozen):
            output = forward(*args, **kwargs)
        several = isinstance(output, tuple | list)
        first = output[0] if several else output
        first = _identity_outside(hidden, first, by_token.to(first.dtype))
        if rows.drawn is not None:
            drawn = rows.drawn.to(first.device, first.dtype)
            drawn = drawn[..., None, None] if by_stream else drawn[..., None]
            first = first.detach() + drawn * (first - first.detach())
        return type(output)([first, *output[1:]]) if several else first

    return sparse


def frozen_outside(x, inside):
    """`x`, constant where `inside` is False."""
    return torch.where(inside, x, x.detach())


def _identity_outside(hidden, output, weight):
    through_block = weight * (output - output.detach())
    past_it = (1 - weight) * (hidden - hidden.detach()).to(output.dtype)
    return output.detach() + through_block + past_it


class _Tags:
    """Which tensors of a block's forward are made of what; they are held so that ids stay theirs.

    Attributes:
        own: Made of the block's hidden states.
        scores: Made of a product of two that are: logits of the block's own keys.
        shares: Weights of attention over the block's own keys.
    """

    def __init__(self):
        self.own, self.scores, self.shares = {}, {}, {}

    def follow(self, name, given, out):
        """Tag what a function made of the tensors it was given."""
        # an assignment changes what it is given first
        made = [given[0]] if out is None and given else pytree.tree_leaves(out)
        product = name in _PRODUCTS
        own = [x for x in given if id(x) in self.own]
        shares = any(id(x) in self.shares for x in given)
        if product:
            scores, shares = len(own) > 1 and not shares, False
        else:
            scores = any(id(x) in self.scores for x in given)
        for x in made:
            if isinstance(x, torch.Tensor):
                for tagged, wanted in (
                    (self.own, own),
                    (self.scores, scores and name != "softmax"),
                    (self.shares, shares),
                ):
                    if wanted:
                        tagged[id(x)] = x


_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")


class _Watch(TorchFunctionMode):
    """Sees attention and dropout inside blocks, and knows which block is running."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.rows, self.dropouts, self.tags = attention, None, 0, None
        self.attending, self.draws = False, 0

    @contextmanager
    def inside(self, rows, hidden):
        self.rows, self.dropouts, self.draws, self.tags = rows, 0, 0, _Tags()
        self.tags.own[id(hidden)] = hidden
        try:
            yield
        finally:
            self.rows = self.tags = None

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            out = self._sdpa(*args, **kwargs)
        elif self.rows is None or self.attending:
            return func(*args, **kwargs)
        elif func is F.dropout:
            out = self._dropout(*args, **kwargs)
        elif func in (torch.rand, torch.randint, torch.randperm):
            return self._draw(func, *args, **kwargs)
        else:
            name = getattr(func, "__name__", "")
            if name == "softmax":
                out = self._softmax(func, *args, **kwargs)
            elif name in _PRODUCTS and any(id(x) in self.tags.shares for x in args):
                out = func(*self._with_values(name, args), **kwargs)
            else:
                out = func(*args, **kwargs)
        if self.rows is not None:
            given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.tags.follow(getattr(func, "__name__", ""), given, out)
        return out

    def _draw(self, func, *args, **kwargs):
        """Numbers for no token in particular: those of the draw's number in the block."""
        from lightning_sage.engine.drops import numbered

        self.draws += 1
        generator = numbered(self.rows.seed, self.draws - 1, torch.device("cpu"))
        return func(*args, **kwargs, generator=generator)

    def _softmax(self, func, logits, *args, **kwargs):
        """A softmax over the block's own keys, constant in the columns outside the rows."""
        B, T = self.rows.weights.shape
        if tuple(logits.shape[-2:]) != (T, T) or id(logits) not in self.tags.scores:
            return func(logits, *args, **kwargs)
        assert self.attention != "full", "attention by hand is not defined for 'full'"
        inside = self.rows.keys.to(logits.device)[:, None, None]
        by_sample = logits.reshape(B, -1, T, T)
        logits = frozen_outside(by_sample, inside).view(logits.shape)
        shares = func(logits, *args, **kwargs)
        self.tags.shares[id(shares)] = shares
        return shares

    def _with_values(self, name, args):
        """Arguments of a product of weights and values, these frozen."""
        assert id(args[0]) in self.tags.shares, f"weights do not come first in {name}"
        values, (B, T) = args[1], self.rows.weights.shape
        inside = self.rows.keys.to(values.device)[:, None, :, None]
        by_sample = values.reshape(B, -1, T, values.shape[-1])
        values = frozen_outside(by_sample, inside).view(values.shape)
        return (args[0], values, *args[2:])

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

    def attend(self, q, k, v, mask, scale, dropout=0.0, **more):
        """Attention of q [B, H, T, D] over k, v [B, G, K, D], constant outside the rows.

        A mask hides where it is False, or is added; `softcap`, `position_bias` [B | 1, H, T, K] and
        the sinks `s_aux` [H] are the keywords of transformers' attention interface.
        """
        # what is made of the hidden states is this block's own, as many keys as there are rows
        own = self.rows is not None and id(k) in self.tags.own
        self.attending = True
        try:
            out = self._attend(q, k, v, mask, scale, dropout, own, **more)
        finally:
            self.attending = False
        if self.rows is not None:
            self.tags.own[id(out)] = out
        return out

    def _attend(
        self, q, k, v, mask, scale, dropout, own, softcap=None, position_bias=None, s_aux=None
    ):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        if own:
            inside = self._inside(k)
            v = frozen_outside(v, inside)
            if self.attention == "full":
                k = frozen_outside(k, inside)
        logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if position_bias is not None:
            logits = logits + position_bias
        if mask is not None and mask.dtype != torch.bool:
            logits, mask = logits + mask, None
        if own and self.attention != "full":
            logits = frozen_outside(logits, inside.transpose(-1, -2))
        return self._dropped(_softmax(logits, mask, s_aux), dropout).to(v.dtype) @ v

    def _inside(self, k):
        """The keys ``[B, 1, K, 1]`` that are in the rows, or not of this block."""
        inside = self.rows.keys.to(k.device)
        others = k.shape[2] - inside.shape[1]
        return F.pad(inside, (0, others), value=True)[:, None, :, None]


def _softmax(logits, mask, sinks):
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], dim=-1)
        mask = mask if mask is None else F.pad(mask, (0, 1), value=True)
        return _softmax(logits, mask, None)[..., :-1]
    if mask is None:
        return logits.softmax(-1)
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
        module, q, k, v, attention_mask=None, dropout=0.0, scaling=None, is_causal=None, **kwargs
    ):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = attention_mask
        if mask is None and causal:
            mask = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        known = {n: kwargs.get(n) for n in ("softcap", "position_bias", "s_aux")}
        y = watch.attend(q, k, v, mask, scaling, dropout, **known)
        return y.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.get_interface = lambda *_args, **_kwargs: attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface
