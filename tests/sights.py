"""Who sees whom: a case of every kind, and attention of packed rows by its definition."""

import torch

from lightning_sage import ops
from lightning_sage.ops import Rows, Sight, Visibility


def _some(B, T, share=0.6):
    """Random rows, their counts unequal; never none at all."""
    chosen = torch.rand(B, T) < share * torch.linspace(1, 0.3, B)[:, None]
    chosen[-1, -1] = True
    return Rows.of(chosen)


def _every(B, T):
    return Rows.every(B, T, torch.device("cpu"))


def _only(B, T, tokens, samples=None):
    chosen = torch.zeros(B, T, dtype=torch.bool)
    chosen[torch.arange(B) if samples is None else samples, torch.tensor(tokens)[:, None]] = True
    return Rows.of(chosen)


def _own(rows, causal):
    return Sight(rows, rows, Visibility(causal))


def _window(T, back, ahead=None):
    token = torch.arange(T)[None]
    stop = None if ahead is None else (token + ahead + 1).clamp(max=T)
    return Visibility(ahead is None, (token - back).clamp(min=0), stop)


def _documents(B, T, causal):
    """Each sample cut at places of its own."""
    starts = torch.rand(B, T) < 5 / T
    starts[:, 0] = True
    number = starts.cumsum(1)
    first = torch.searchsorted(number, number)
    stop = None if causal else torch.searchsorted(number, number, right=True)
    return Visibility(causal, first, stop)


def _prefix(B, T):
    """Tokens of a prefix see all of it, those behind it all that is before them."""
    length = torch.randint(0, T + 1, (B, 1))
    return Visibility(False, None, torch.maximum(torch.arange(1, T + 1), length))


def _padded(B, T, side, visible):
    """Rows among the valid tokens; keys are the valid ones."""
    count = torch.randint((T + 1) // 2, T + 1, (B, 1))
    order = torch.arange(T) if side == "right" else torch.arange(T - 1, -1, -1)
    valid = order < count
    rows = torch.rand(B, T) < 0.6
    rows[:, T // 2] = True
    return Sight(Rows.of(rows & valid), Rows.of(valid), visible)


def _superset(B, T, visible):
    rows = torch.rand(B, T) < 0.4
    rows[-1, -1] = True
    return Sight(Rows.of(rows), Rows.of(rows | (torch.rand(B, T) < 0.4)), visible)


def _missing(B, T, part):
    """The first sample has no query row, or no key row, which leaves its queries blind."""
    chosen = torch.rand(B, T) < 0.6
    chosen[-1, -1] = True
    others = chosen.clone()
    others[0] = False
    rows, keys = (others, chosen) if part == "rows" else (chosen, others)
    return Sight(Rows.of(rows), Rows.of(keys), Visibility(True))


def _gaps(B, T):
    """A narrow window over few keys: some queries see none."""
    return Sight(_some(B, T), _some(B, T, 0.3), _window(T, 2))


NOTHING = Rows(torch.empty(0, dtype=torch.int64), 0, 0)

# by name: of B samples of T tokens, a sight
CASES = {
    "all-causal": lambda B, T: _own(_every(B, T), True),
    "all-full": lambda B, T: _own(_every(B, T), False),
    "own-causal": lambda B, T: _own(_some(B, T), True),
    "own-full": lambda B, T: _own(_some(B, T), False),
    "over-all-causal": lambda B, T: Sight(_some(B, T), _every(B, T), Visibility(True)),
    "over-all-full": lambda B, T: Sight(_some(B, T), _every(B, T), Visibility(False)),
    "superset-causal": lambda B, T: _superset(B, T, Visibility(True)),
    "superset-full": lambda B, T: _superset(B, T, Visibility(False)),
    "window": lambda B, T: Sight(_some(B, T), _every(B, T), _window(T, 5)),
    "window-both": lambda B, T: Sight(rows := _some(B, T), rows, _window(T, 4, 3)),
    "gaps": _gaps,
    "documents-causal": lambda B, T: _superset(B, T, _documents(B, T, True)),
    "documents-full": lambda B, T: Sight(_some(B, T), _every(B, T), _documents(B, T, False)),
    "prefix": lambda B, T: Sight(_some(B, T), _every(B, T), _prefix(B, T)),
    "left-padded": lambda B, T: _padded(B, T, "left", Visibility(True)),
    "right-padded": lambda B, T: _padded(B, T, "right", Visibility(False)),
    "padded-window": lambda B, T: _padded(B, T, "left", _window(T, 7)),
    "sample-without-rows": lambda B, T: _missing(B, T, "rows"),
    "sample-without-keys": lambda B, T: _missing(B, T, "keys"),
    "no-rows": lambda B, T: Sight(Rows(NOTHING.index, B, T), _every(B, T), Visibility(True)),
    "no-keys": lambda B, T: Sight(_every(B, T), Rows(NOTHING.index, B, T), Visibility(True)),
    "nothing": lambda B, T: _own(Rows(NOTHING.index, B, T), True),
    "one-row": lambda B, T: Sight(_only(B, T, [T - 1], [0]), _every(B, T), Visibility(True)),
    "one-own-row": lambda B, T: _own(_only(B, T, [T // 2], [B - 1]), True),
    "last-rows": lambda B, T: Sight(_only(B, T, [T - 1]), _every(B, T), Visibility(True)),
    "edges": lambda B, T: Sight(_only(B, T, [0, T - 1]), _every(B, T), Visibility(True)),
    "own-edges": lambda B, T: _own(_only(B, T, [0, T - 1]), False),
}


def build(name, B, T, device="cpu"):
    return to(CASES[name](B, T), device)


def to(sight, device):
    def moved(x):
        return None if x is None else x.to(device)

    rows = Rows(moved(sight.rows.index), sight.rows.B, sight.rows.T)
    keys = rows
    if sight.keys is not sight.rows:
        keys = Rows(moved(sight.keys.index), sight.keys.B, sight.keys.T)
    fields = vars(sight.visible)
    visible = {name: x if name == "causal" else moved(x) for name, x in fields.items()}
    return Sight(rows, keys, Visibility(**visible))


def half(sight):
    """The sight of the same rows on some of its keys only, and which they are, ``[M]`` bool."""
    inside = torch.arange(len(sight.keys), device=sight.keys.index.device) % 3 != 1
    keys = Rows(sight.keys.index[inside], sight.keys.B, sight.keys.T)
    return Sight(sight.rows, keys, sight.visible), inside


def seen(sight):
    """Which key each row sees, by their tokens: ``[H | 1, N, M]``, bool or additive."""
    rows, keys, visible = sight.rows, sight.keys, sight.visible
    together = (rows.sample[:, None] == keys.sample)[None]
    if visible.mask is not None:
        mask = visible.mask.expand(rows.B, -1, rows.T, rows.T)
        mask = mask[rows.sample[:, None], :, rows.token[:, None], keys.token].movedim(2, 0)
        return mask & together if mask.dtype == torch.bool else mask.where(together, -torch.inf)
    token = rows.token[:, None]
    if visible.first is not None:
        first = visible.first.expand(rows.B, -1)[rows.sample, rows.token]
        together = together & (keys.token >= first[:, None])
    if visible.stop is not None:
        stop = visible.stop.expand(rows.B, -1)[rows.sample, rows.token]
        return together & (keys.token < stop[:, None])
    return together & (keys.token <= token) if visible.causal else together


def as_mask(sight):
    """The same sight, said by a mask of all tokens."""
    every = Rows.every(sight.rows.B, sight.rows.T, sight.rows.index.device)
    mask = seen(Sight(every, every, sight.visible))
    B, T = sight.rows.B, sight.rows.T
    blocks = mask.view(-1, B, T, B, T).diagonal(dim1=1, dim2=3).movedim(3, 0)
    return Sight(sight.rows, sight.keys, Visibility(sight.visible.causal, mask=blocks))


def kept_weights(sight, how, H):
    """Which attention weights a dropout keeps, ``[H, N, M]``."""
    p, seed, call = how.dropout
    rows, keys = sight.rows, sight.keys
    heads = rows.sample * H + torch.arange(H, device=rows.index.device)[:, None]
    index = heads * rows.T + rows.token
    mask = ops.dropout_mask(seed, call, index.flatten(), rows.T, p)
    return mask.view(H, len(rows), rows.T)[:, :, keys.token]


def logits_of(q, k, sight, how, inside=None):
    """``[H, N, M]``; columns where `inside` is False are constants."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.transpose(0, 1) @ k.permute(1, 2, 0) * how.scale
    if how.softcap is not None:
        logits = how.softcap * (logits / how.softcap).tanh()
    if inside is not None:
        logits = logits.where(inside, logits.detach())
    allowed = seen(sight)
    if allowed.dtype == torch.bool:
        return logits.masked_fill(~allowed, -torch.inf)
    return logits + allowed.to(logits.dtype)


def attention(q, k, v, sight, how, inside=None, exact_queries=False):
    """Output ``[N, H, E]`` and log-sum-exp ``[N, H]`` by the definition, for autograd.

    Keys where `inside` is False are constants: in their own gradient alone where `exact_queries`,
    else their logits and values altogether.
    """
    R = q.shape[1] // k.shape[1]
    if inside is not None:
        v = v.where(inside[:, None, None], v.detach())
        if exact_queries:
            k, inside = k.where(inside[:, None, None], k.detach()), None
    logits = logits_of(q, k, sight, how, inside)
    lse = logits.logsumexp(-1)
    # a row that sees nothing has no weights
    blind = (lse == -torch.inf)[..., None]
    weights = logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    if how.dropout is not None:
        weights = weights * kept_weights(sight, how, q.shape[1])
        weights = weights / max(1 - how.dropout.p, 1e-30)
    out = weights @ v.repeat_interleave(R, 1).transpose(0, 1)
    return out.transpose(0, 1), lse.t()


class Eager:
    """Attention in plain matrix products of the working dtype, as eager PyTorch has it.

    The softmax is computed in float32 or better and rounded, as PyTorch's own is. Every method
    takes what the op of its name takes.
    """

    @staticmethod
    def _weights(q, k, lse, sight, how):
        logits = logits_of(q, k, sight, how)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        weights = (wide - lse.t()[..., None]).exp().nan_to_num(0.0, posinf=0.0)
        return weights.to(q.dtype)

    @staticmethod
    def _dropped(x, sight, how):
        if how.dropout is None:
            return x
        return x * kept_weights(sight, how, len(x)) / max(1 - how.dropout.p, 1e-30)

    @staticmethod
    def _shared(x, G):
        """The sum over query heads that share a key head, ``[M, G, D]``."""
        return x.unflatten(0, (G, -1)).sum(1).transpose(0, 1)

    @classmethod
    def attention_forward(cls, q, k, v, sight, how):
        lse = cls.attention_lse(q, k, sight, how)
        weights = cls._dropped(cls._weights(q, k, lse, sight, how), sight, how)
        wide_v = v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(0, 1)
        return (weights @ wide_v).transpose(0, 1), lse

    @staticmethod
    def attention_lse(q, k, sight, how):
        logits = logits_of(q, k, sight, how)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.logsumexp(-1).t()

    @classmethod
    def attention_received(cls, q, k, lse, weights, sight, how):
        shares = cls._weights(q, k, lse, sight, how).to(lse.dtype) * weights[:, None]
        return shares.sum(1).unflatten(0, (k.shape[1], -1)).sum(1).t()

    @classmethod
    def attention_backward(cls, grad, q, k, v, out, lse, sight, how, all_keys=None):
        dq, dk, dv = cls._backward(grad, q, k, v, out, lse, sight, how)
        if all_keys is not None:
            dq, _, _ = cls._backward(grad, q, *all_keys[:2], out, lse, all_keys[2], how)
        return dq, dk, dv

    @classmethod
    def _backward(cls, grad, q, k, v, out, lse, sight, how):
        H, G = q.shape[1], k.shape[1]
        weights = cls._weights(q, k, lse, sight, how)
        by_head, incoming = q.transpose(0, 1), grad.transpose(0, 1)
        wide_k, wide_v = (x.repeat_interleave(H // G, 1).transpose(0, 1) for x in (k, v))
        dv = cls._dropped(weights, sight, how).mT @ incoming
        change = cls._dropped(incoming @ wide_v.mT, sight, how)
        delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()[..., None]
        change = (weights * (change - delta)).to(q.dtype)
        if how.softcap is not None:
            products = by_head @ wide_k.mT * how.scale
            change = change * (1 - (products / how.softcap).tanh() ** 2)
        dq = (change @ wide_k * how.scale).transpose(0, 1)
        return dq, cls._shared(change.mT @ by_head * how.scale, G), cls._shared(dv, G)
