"""The oracle against finite differences where attention is more than a softmax over own keys.

(Plain attention is in test_judges.py.)
"""

import pytest
import torch
from torch import nn

from oracle import Rows, oracle

B, T, S, H, D = 2, 7, 5, 4, 8
C = H * D
INSIDE = torch.tensor([[1, 0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 1, 0]]).bool()


class Block(nn.Module):
    """Attention to its own tokens, to others, or to both, with a residual path."""

    def __init__(self, by_hand=False, sinks=False, own=True, other=False):
        super().__init__()
        self.by_hand, self.own, self.other = by_hand, own, other
        self.q, self.k, self.v, self.out = (nn.Linear(C, C) for _ in range(4))
        keys = T * own + S * other
        self.bias = nn.Parameter(torch.randn(1, H, T, keys))
        self.sinks = nn.Parameter(torch.randn(H)) if sinks else None

    def forward(self, hidden, states):
        given = torch.cat([hidden] * self.own + [states] * self.other, dim=1)
        q, k, v = (
            layer(x).unflatten(-1, (H, D)).transpose(1, 2)
            for layer, x in ((self.q, hidden), (self.k, given), (self.v, given))
        )
        y = self._by_hand(q, k, v) if self.by_hand else self._through_transformers(q, k, v)
        return hidden + self.out(y.flatten(2)), None

    def _by_hand(self, q, k, v):
        q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
        bias = self.bias.expand(B, -1, -1, -1).flatten(0, 1)
        weights = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).softmax(-1)
        return torch.bmm(nn.functional.dropout(weights, 0.0), v).view(B, H, T, D).transpose(1, 2)

    def _through_transformers(self, q, k, v):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        # the oracle's own, inside of it; there is no need of another
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("eager", None)
        seen = torch.ones(1, 1, T, k.shape[2], dtype=torch.bool)
        more = {"position_bias": self.bias, "s_aux": self.sinks}
        return attend(self, q, k, v, seen, scaling=D**-0.5, **more)[0]


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.block = Block(**options)


def _objective(block, now, base, cotangent, mode):
    """What the rows inside contribute, where all that lies outside keeps its base value."""

    def parts(p):
        given = torch.cat([p["hidden"]] * block.own + [p["states"]] * block.other, dim=1)
        q, k, v = (
            (x @ p[f"{n}.weight"].T + p[f"{n}.bias"]).unflatten(-1, (H, D)).transpose(1, 2)
            for n, x in (("q", p["hidden"]), ("k", given), ("v", given))
        )
        return q, k, v, p["bias"]

    (q, k, v, bias), (base_q, base_k, base_v, base_bias) = parts(now), parts(base)
    inside = torch.ones(B, T * block.own + S * block.other, dtype=torch.bool)
    if block.own:
        inside[:, :T] = INSIDE
    rows = inside[:, None, :, None]
    v = torch.where(rows, v, base_v)
    if mode == "full":
        k = torch.where(rows, k, base_k)
    logits = q @ k.mT * D**-0.5 + bias
    if mode == "salient":
        logits = torch.where(rows.mT, logits, base_q @ base_k.mT * D**-0.5 + base_bias)
    if "sinks" in now:
        sinks = now["sinks"].view(1, H, 1, 1).expand(B, H, T, 1)
        logits = torch.cat([logits, sinks], dim=-1)
    y = logits.softmax(-1)[..., : v.shape[2]] @ v
    output = y.transpose(1, 2).flatten(2) @ now["out.weight"].T + now["out.bias"]
    return (cotangent * torch.where(INSIDE[..., None], now["hidden"] + output, now["hidden"])).sum()


KINDS = {
    "bias": {},
    "sinks": {"sinks": True},
    "other": {"own": False, "other": True},
    "both": {"other": True},
    "by-hand": {"by_hand": True},
    "other-by-hand": {"by_hand": True, "own": False, "other": True},
}


def _assert_matches(mode, kind):
    model = Model(**KINDS[kind]).double()
    given = {
        "hidden": torch.randn(B, T, C, dtype=torch.float64, requires_grad=True),
        "states": torch.randn(B, S, C, dtype=torch.float64, requires_grad=True),
    }
    cotangent = torch.randn_like(given["hidden"])
    base = given | dict(model.block.named_parameters())
    with oracle(model, [Rows("block", INSIDE.double())], mode):
        output, _ = model.block(given["hidden"], given["states"])
    found = torch.autograd.grad(output, list(base.values()), cotangent, allow_unused=True)
    with torch.no_grad():
        for (name, value), gradient in zip(base.items(), found, strict=True):
            step, ends = torch.randn_like(value), []
            for sign in (1, -1):
                moved = base | {name: value + sign * 1e-5 * step}
                ends.append(_objective(model.block, moved, base, cotangent, mode))
            numeric = (ends[0] - ends[1]) / 2e-5
            analytic = 0 * numeric if gradient is None else (gradient * step).sum()
            assert (numeric - analytic).abs() <= 1e-7 * (1 + numeric.abs()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["salient", "full"])
def test_oracle_matches_finite_differences(mode, kind):
    if mode == "full" and kind == "by-hand":
        with pytest.raises(AssertionError, match="is not defined for 'full'"):
            _assert_matches(mode, kind)
    else:
        _assert_matches(mode, kind)
