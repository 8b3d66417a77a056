"""What a mask means: what can be said by intervals is, and nothing is lost."""

import pytest
import torch

import sights
from lightning_sage.engine import masks
from lightning_sage.engine.masks import visibility
from lightning_sage.ops import How, Rows, Sight, Visibility, reference

B, T = 3, 11
Q, K = torch.arange(T)[:, None], torch.arange(T)


@pytest.fixture(params=[256, 4, 1], ids="rows-{}".format, autouse=True)
def chunked(request, monkeypatch):
    """Rows of a mask looked at together: all, some, each alone."""
    monkeypatch.setattr(masks, "ROWS", request.param)


def documents(T=T, B=B):
    starts = torch.rand(B, T) < 0.3
    number = starts.cumsum(1)
    return number[:, :, None] == number[:, None]


def prefix(T=T, B=B):
    return torch.arange(T) < torch.randint(1, T + 1, (B, 1, 1))


# by name: who sees whom but for padding, ``[B | 1, T, T]``, and whether no key is a later one
RULES = {
    "causal": lambda: (Q >= K, True),
    "full": lambda: ((Q >= 0) & (K >= 0), False),
    "window": lambda: ((Q >= K) & (Q - K < 4), True),
    "window-of-one": lambda: (Q == K, True),
    "window-both": lambda: ((Q - K).abs() <= 3, False),
    "documents-causal": lambda: (documents() & (Q >= K), True),
    "documents-full": lambda: (documents(), False),
    "documents-window": lambda: (documents() & ((Q - K).abs() <= 2), False),
    "chunks": lambda: ((Q // 4 == K // 4) & (Q >= K), True),
    "prefix": lambda: (prefix() | (Q >= K), False),
}
PADDINGS = {
    "none": lambda B, T: torch.ones(B, T, dtype=torch.bool),
    "right": lambda B, T: torch.arange(T) < torch.randint(1, T + 1, (B, 1)),
    "left": lambda B, T: torch.arange(T) >= torch.randint(0, T, (B, 1)),
    "holes": lambda B, T: torch.rand(B, T) < 0.7,
    "a-sample-of-padding": lambda B, T: (torch.arange(B) > 0)[:, None].expand(B, T).clone(),
}
FORMS = {
    "bool": lambda allowed: allowed,
    "minimum": lambda allowed: additive(allowed, torch.finfo(torch.float32).min),
    "infinite": lambda allowed: additive(allowed, -torch.inf),
    "bfloat16": lambda allowed: additive(allowed, torch.finfo(torch.bfloat16).min).bfloat16(),
    "ten-thousand": lambda allowed: additive(allowed, -1e4),
}


def additive(allowed, least):
    return torch.zeros(allowed.shape).masked_fill(~allowed, least)


def padded(rule, valid):
    """No query sees padding; what padding sees is noise."""
    allowed = rule & valid[:, None]
    noise = torch.rand(allowed.shape) < torch.randint(0, 3, (len(valid), 1, 1)) / 2
    return torch.where(valid[:, :, None], allowed, noise)[:, None]


def keys_of(found, B, T):
    return Rows.every(B, T, torch.device("cpu")) if found.keys is None else Rows.of(found.keys)


def seen_by_valid(found, valid):
    """What the valid queries see by an interval, ``[B, T, T]``, False elsewhere."""
    rows, keys = Rows.of(valid), keys_of(found, *valid.shape)
    i, j = sights.seen(Sight(rows, keys, found))[0].nonzero().t()
    out = torch.zeros(*valid.shape, valid.shape[1], dtype=torch.bool)
    out[rows.sample[i], rows.token[i], keys.token[j]] = True
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", RULES)
def test_runs_are_recognised_and_exact(kind, padding, form):
    (rule, causal), valid = RULES[kind](), PADDINGS[padding](B, T)
    allowed = padded(rule, valid)
    found = visibility(FORMS[form](allowed), False, valid)
    assert found.mask is None
    assert torch.equal(seen_by_valid(found, valid), allowed[:, 0] & valid[:, :, None])
    later = (allowed[:, 0] & valid[:, :, None] & (K > Q)).any()
    assert found.causal == (not later)
    assert found.causal or not causal
    assert (found.keys is None) == bool(valid.all())
    for ends in (found.first, found.stop):
        assert ends is None or (ends.diff() >= 0).all(), "neither ever falls"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["causal", "window", "window-both", "chunks"])
def test_one_mask_may_serve_all_samples(kind, form):
    rule, _ = RULES[kind]()
    valid = PADDINGS["none"](B, T)
    found = visibility(FORMS[form](rule[None, None]), False, valid)
    assert found.mask is None
    assert torch.equal(seen_by_valid(found, valid), rule.expand(B, T, T))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_one_row_may_serve_all_queries(padding, form):
    valid = PADDINGS[padding](B, T)
    found = visibility(FORMS[form](valid[:, None, None]), False, valid)
    assert found.plain
    assert not found.causal or T == 1
    assert torch.equal(seen_by_valid(found, valid), valid[:, :, None] & valid[:, None])


def test_what_is_plain_is_said_without_a_span():
    """Then the attention of rows to themselves is one that PyTorch has fused."""
    for padding in PADDINGS:
        valid = PADDINGS[padding](B, T)
        for kind in ("causal", "full"):
            found = visibility(padded(RULES[kind]()[0], valid), False, valid)
            assert found.plain
            assert found.causal == (kind == "causal")
    assert not visibility(padded(RULES["window"]()[0], valid), False, valid).plain


@pytest.mark.parametrize("causal", [False, True])
def test_no_mask_is_plain(causal):
    found = visibility(None, causal, PADDINGS["right"](B, T))
    assert (found.plain, found.causal, found.keys) == (True, causal, None)


def bias(T=T):
    return torch.where(Q >= K, (K - Q).float(), -torch.inf)


def sees_padding():
    mask = RULES["causal"]()[0].repeat(B, 1, 1)[:, None]
    valid = torch.arange(T) != 4
    mask[..., 4] = False
    mask[1, 0, 6, 4] = True
    return mask, valid.expand(B, T)


NONE = torch.ones(B, T, dtype=torch.bool)
BROKEN = {
    "a-hole": lambda: ((Q >= K) & ~((Q == 7) & (K == 3)), NONE),
    "dilated": lambda: ((Q >= K) & ((Q - K) % 2 == 0), NONE),
    "by-head": lambda: (torch.stack([Q >= K, Q - K < 3]), NONE),
    "falling-stop": lambda: (Q + K < T, NONE),
    "falling-first": lambda: ((K >= T - 1 - Q) | (K == T - 1), NONE),
    "sink-and-window": lambda: ((Q >= K) & ((Q - K < 3) | (K == 0)), NONE),
    "a-query-sees-nothing": lambda: ((Q >= K) & (Q != 5), NONE),
    "a-query-sees-padding": sees_padding,
    "alibi": lambda: (bias(), NONE),
    "one-bias": lambda: (torch.where((Q == 7) & (K == 3), 0.5, additive(Q >= K, -torch.inf)), NONE),
    "all-biased": lambda: (additive(Q >= K, -torch.inf) + 1, NONE),
    "a-small-minimum": lambda: (additive(Q >= K, -100.0), NONE),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_run_stays_a_mask(kind):
    mask, valid = BROKEN[kind]()
    mask = mask if mask.dim() == 4 else mask.view(1, -1, T, T)
    found = visibility(mask, False, valid)
    assert found.mask is mask
    assert (found.first, found.stop, found.keys) == (None, None, None)


@pytest.mark.parametrize("kind", ["a-hole", "alibi", "dilated", "sink-and-window"])
def test_a_mask_in_causal_order_is_known_as_such(kind):
    mask, valid = BROKEN[kind]()
    assert visibility(mask.view(1, 1, T, T), False, valid).causal
    later = torch.where((Q == 2) & (K == 3), torch.ones((), dtype=mask.dtype), mask)
    assert not visibility(later.view(1, 1, T, T), False, valid).causal


def random_mask():
    """A mask of some kind, a little spoilt now and then, and the tokens that are valid."""
    B, T = (int(torch.randint(1, high, ())) for high in (4, 13))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    back, ahead = torch.randint(0, T, (2,))
    rules = [
        i >= j,
        (i >= 0) & (j >= 0),
        (i >= j) & (i - j <= back),
        (i - j <= back) & (j - i <= ahead),
        documents(T, B),
        documents(T, B) & (i >= j),
        prefix(T, B) | (i >= j),
        torch.rand(B, T, T) < 0.6,
        i + j < T,
    ]
    rule = rules[torch.randint(len(rules), ())].expand(B, T, T)
    paddings = list(PADDINGS.values())
    valid = paddings[torch.randint(len(paddings), ())](B, T)
    mask = padded(rule, valid)
    if torch.rand(()) < 0.4:
        mask = mask ^ (torch.rand(mask.shape) < 1 / mask.numel())
    forms = list(FORMS.values())
    mask = forms[torch.randint(len(forms), ())](mask)
    if mask.dtype != torch.bool and torch.rand(()) < 0.2:
        mask = mask + torch.randn(mask.shape) * (torch.rand(mask.shape) < 1 / mask.numel())
    return mask, valid


def attention_by(visible, q, k, v, valid):
    """Of the valid queries, by the reference."""
    rows, keys = Rows.of(valid), keys_of(visible, *valid.shape)
    parts = q[rows.index], k[keys.index], v[keys.index]
    return reference.attention_forward(*parts, Sight(rows, keys, visible), How(0.4))


def test_attention_by_what_was_found_is_attention_by_the_mask():
    """Whatever it is: a run that is seen where none is, or a mask that is lost, shows here."""
    runs = 0
    for _ in range(200):
        mask, valid = random_mask()
        q, k, v = (torch.randn(valid.numel(), 1, 4, dtype=torch.float64) for _ in range(3))
        found = visibility(mask, False, valid)
        runs += found.mask is None
        got = attention_by(found, q, k, v, valid)
        expected = attention_by(Visibility(False, mask=mask), q, k, v, valid)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)
    assert 50 < runs < 180, "most of both kinds"
