"""The reference against mathematics, PyTorch's fused attention against the reference, the door."""

import dataclasses
import itertools

import pytest
import torch

import sights
from accuracy import Largest, assert_as_accurate, sqnr_db
from lightning_sage import ops
from lightning_sage.engine import packing
from lightning_sage.ops import Dropout, How, Rows, Sight, Visibility, reference, stock
from lightning_sage.ops.sight import positions

HOWS = {
    "plain": How(0.4),
    "capped": How(0.4, softcap=1.5),
    "dropped": How(0.4, dropout=Dropout(0.3, 5, 2)),
    "capped-dropped": How(0.4, softcap=1.5, dropout=Dropout(0.3, 5, 2)),
}
SIZES = [(1, 1), (3, 7), (2, 13)]
name_size = "B{0[0]}-T{0[1]}".format


def problem(sight, H=4, G=2, D=8, E=8, dtype=torch.float64):
    """Incoming gradient, queries, keys and values."""
    N, M = len(sight.rows), len(sight.keys)
    shapes = (N, H, E), (N, H, D), (M, G, D), (M, G, E)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.fixture(params=["one-chunk", "many-chunks"])
def chunked(request, monkeypatch):
    if request.param == "many-chunks":
        monkeypatch.setattr(reference.attention, "CHUNK", 100)


# rows and who sees whom


@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_rows_know_where_they_lie(share):
    chosen = torch.rand(3, 11) < share
    count = int(chosen.sum())
    for rows in (Rows.of(chosen), Rows.of(chosen, count)):
        assert torch.equal(rows.index, chosen.flatten().nonzero().squeeze(1))
        assert torch.equal(rows.sample, chosen.nonzero()[:, 0])
        assert torch.equal(rows.token, chosen.nonzero()[:, 1])
        assert rows.counts == chosen.sum(1).tolist()
        assert rows.ends.tolist() == [0, *itertools.accumulate(rows.counts)]
        assert len(rows) == count
        assert rows.whole == (share == 1)
        assert max(rows.counts) <= rows.most <= 11
        # a view of something longer would hold more than it shows
        assert rows.index.untyped_storage().nbytes() == 8 * count


def test_positions_are_those_of_the_flags():
    flags = torch.rand(40) < 0.3
    expected = flags.nonzero().squeeze(1)
    assert torch.equal(positions(flags), expected)
    assert torch.equal(positions(flags, len(expected)), expected)
    assert positions(torch.zeros(4, dtype=torch.bool), 0).tolist() == []


@pytest.mark.parametrize("size", SIZES, ids=name_size)
@pytest.mark.parametrize("case", sights.CASES)
def test_spans_are_what_the_tokens_see(case, size):
    sight = sights.build(case, *size)
    first, stop = sight.spans
    number = torch.arange(len(sight.keys)) - sight.keys.ends[sight.rows.sample, None]
    own = sight.keys.sample == sight.rows.sample[:, None]
    inside = own & (number >= first[:, None]) & (number < stop[:, None])
    assert torch.equal(inside[None], sights.seen(sight))
    for ends in (first, stop):
        falls = (ends.diff() < 0) & (sight.rows.sample.diff() == 0)
        assert not falls.any(), "the kernels search in these"


@pytest.mark.parametrize("case", sights.CASES)
def test_groups_hold_every_seeing_query_once_beside_the_keys_of_its_sample(case):
    sight = sights.build(case, 3, 7)
    both = torch.tensor(sight.rows.counts).bool() & torch.tensor(sight.keys.counts).bool()
    queries, keys = [], []
    for group in sight.groups():
        samples = group.samples.stop - group.samples.start
        for rows, part, found in (
            (sight.rows, group.queries, queries),
            (sight.keys, group.keys, keys),
        ):
            index = rows.index[part].view(samples, -1)
            assert (index // 7 == torch.arange(3)[group.samples, None]).all()
            found += index.flatten().tolist()
    assert queries == sight.rows.index[both[sight.rows.sample]].tolist()
    assert keys == sight.keys.index[both[sight.keys.sample]].tolist()


# the reference is its definition


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("case", sights.CASES)
def test_attention_is_its_definition(case, how):
    sight = sights.build(case, 3, 7)
    _, q, k, v = problem(sight, E=5)
    expected, norms = sights.attention(q, k, v, sight, how)
    out, lse = reference.attention_forward(q, k, v, sight, how)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, norms)
    torch.testing.assert_close(reference.attention_lse(q, k, sight, how), norms)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("how", ["plain", "capped"])
@pytest.mark.parametrize("case", sights.CASES)
def test_attention_received_is_its_definition(case, how):
    sight, how = sights.build(case, 3, 7), HOWS[how]
    _, q, k, _ = problem(sight)
    lse = reference.attention_lse(q, k, sight, how)
    weights = torch.rand(len(q), dtype=torch.float64)
    logits = sights.logits_of(q, k, sight, how)
    shares = (logits - lse.t()[..., None]).exp().nan_to_num(0.0) * weights[:, None]
    expected = shares.sum(1).view(2, 2, -1).sum(1).t()
    got = reference.attention_received(q, k, lse, weights, sight, how)
    torch.testing.assert_close(got, expected)
    # every weighted query hands out its weight once in each head
    seeing = (lse > -torch.inf).sum(1)
    torch.testing.assert_close(got.sum(), (seeing * weights).sum())


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("size", SIZES[:2], ids=name_size)
@pytest.mark.parametrize("case", sights.CASES)
def test_attention_backward_is_the_gradient(case, size, how):
    sight = sights.build(case, *size)
    grad, *inputs = problem(sight, E=5)
    q, k, v = (x.requires_grad_() for x in inputs)
    out, lse = sights.attention(q, k, v, sight, how)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    got = reference.attention_backward(grad, q, k, v, out, lse, sight, how)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("full", [False, True], ids=["salient", "full"])
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("case", sights.CASES)
def test_keys_left_out_are_constants(case, how, full, choice, monkeypatch):
    """The gradient from the dense log-sum-exp: nothing is renormalised."""
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", choice)
    every = sights.build(case, 3, 13)
    grad, *inputs = problem(every)
    q, k, v = (x.requires_grad_() for x in inputs)
    some, inside = sights.half(every)
    out, lse = sights.attention(q, k, v, every, how, inside, exact_queries=full)
    expected = torch.autograd.grad(out, (q, k, v), grad, allow_unused=True, materialize_grads=True)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    all_keys = (k, v, every) if full else None
    got = ops.attention_backward(grad, q, k[inside], v[inside], out, lse, some, how, all_keys)
    for x, y in zip(got, (expected[0], *(y[inside] for y in expected[1:])), strict=True):
        torch.testing.assert_close(x, y)
    assert all(not y[~inside].any() for y in expected[1:])


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("case", sights.CASES)
def test_an_interval_and_the_same_thing_as_a_mask_are_one(case, how):
    sight = sights.build(case, 2, 13)
    masked = sights.as_mask(sight)
    assert torch.equal(sights.seen(masked), sights.seen(sight))
    grad, q, k, v = problem(sight)
    results = []
    for each in (sight, masked):
        out, lse = reference.attention_forward(q, k, v, each, how)
        grads = reference.attention_backward(grad, q, k, v, out, lse, each, how)
        results.append((out, lse, *grads))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)


MASKS = {
    "holes": lambda B, H, T: (torch.rand(1, 1, T, T) > 0.4) | torch.eye(T, dtype=torch.bool),
    "by-sample": lambda B, H, T: torch.rand(B, 1, T, T) > 0.4,
    "by-head": lambda B, H, T: torch.rand(1, H, T, T) > 0.4,
    "one-row": lambda B, H, T: torch.rand(B, 1, 1, T) > 0.4,
    "bias": lambda B, H, T: torch.randn(1, H, T, T, dtype=torch.float64),
    "bias-and-holes": lambda B, H, T: torch.randn(B, H, T, T).masked_fill(
        torch.rand(B, 1, T, T) > 0.6, -torch.inf
    ),
}


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("case", ["all-full", "own-full", "superset-full", "sample-without-keys"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_shape_are_gathered(kind, case, how):
    sight = sights.build(case, 3, 7)
    visible = Visibility(False, mask=MASKS[kind](3, 4, 7))
    sight = dataclasses.replace(sight, visible=visible)
    grad, *inputs = problem(sight)
    q, k, v = (x.requires_grad_() for x in inputs)
    out, lse = sights.attention(q, k, v, sight, how)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    got = (
        *reference.attention_forward(q, k, v, sight, how),
        *reference.attention_backward(grad, q, k, v, out, lse, sight, how),
    )
    for x, y in zip(got, (out, lse, *expected), strict=True):
        torch.testing.assert_close(x, y)


def test_no_op_holds_all_pairs_of_tokens(monkeypatch):
    """Neither for one head nor for all: working memory does not grow with the square of T."""
    monkeypatch.setattr(reference.attention, "CHUNK", 20_000)
    rows = Rows.every(1, 500, torch.device("cpu"))
    sight, how = Sight(rows, rows, Visibility(True)), How(0.4)
    grad, q, k, v = problem(sight, dtype=torch.float32)
    with Largest() as largest:
        out, lse = reference.attention_forward(q, k, v, sight, how)
        reference.attention_lse(q, k, sight, how)
        reference.attention_received(q, k, lse, torch.ones(500), sight, how)
        reference.attention_backward(grad, q, k, v, out, lse, sight, how)
    assert 0 < largest.elements <= 20_000 < 500 * 500


@pytest.mark.parametrize("tail", [(5,), (3, 5)], ids=["C", "H-D"])
@pytest.mark.parametrize("rows", [[], [0], [11], [0, 3, 4, 11]], ids=str)
def test_gather_and_scatter_rows(rows, tail):
    index = torch.tensor(rows, dtype=torch.int64)
    x = torch.randn(3, 4, *tail, dtype=torch.float64, requires_grad=True)
    got = reference.gather_rows(x, index)
    assert torch.equal(got, x.reshape(12, *tail)[rows])
    base = torch.randn(3, 4, *tail, dtype=torch.float64)
    untouched = base.clone()
    out = reference.scatter_rows(got.detach(), index, base)
    assert torch.equal(base, untouched)
    expected = base.reshape(12, *tail).clone()
    expected[rows] = x.detach().reshape(12, *tail)[rows]
    assert torch.equal(out.reshape(12, *tail), expected)
    assert torch.autograd.gradcheck(lambda t: reference.gather_rows(t, index), (x,))
    assert torch.equal(
        reference.gather_rows(x.transpose(0, 1), index),
        x.transpose(0, 1).reshape(12, *tail)[rows],
    )


def test_rows_are_weighted_as_they_are_gathered():
    index, weights = torch.tensor([1, 4, 5]), torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)
    incoming = torch.randn(2, 3, 4, dtype=torch.float64)
    weighted = reference.gather_rows(incoming, index, weights)
    own = incoming.view(6, 4)[index]
    torch.testing.assert_close(weighted, own * weights[:, None])


def test_norms_of_half_precision_rows_do_not_overflow():
    x = torch.full((1, 2, 300), 200.0, dtype=torch.float16)
    expected = torch.tensor([200 * 300**0.5])
    torch.testing.assert_close(reference.row_norms(x, torch.tensor([1])), expected)


# rows in fewer bits: a floor in decibels for what is packed

PACKED = {
    "gaussian": lambda: torch.randn(2, 40, 256),
    "gaussian-odd": lambda: torch.randn(2, 40, 96),
    "gaussian-heads": lambda: torch.randn(2, 40, 4, 64),
    "uniform": lambda: torch.rand(2, 40, 256) - 0.5,
    "small": lambda: 1e-30 * torch.randn(2, 40, 256),
    # what lies beside an outlier loses its bits in int8, not in fp8; other groups lose none
    "beside-an-outlier": lambda: torch.randn(2, 40, 256).index_fill(2, torch.tensor([7]), 60.0),
}
FLOORS = {
    "int8": {
        "gaussian": 42, "gaussian-odd": 43, "gaussian-heads": 43, "uniform": 47, "small": 42,
        "beside-an-outlier": 18,
    },
    "fp8": {
        "gaussian": 31, "gaussian-odd": 31, "gaussian-heads": 31, "uniform": 31, "small": 31,
        "beside-an-outlier": 31,
    },
    "bf16": dict.fromkeys(PACKED, 55),
}  # fmt: skip


@pytest.mark.parametrize("choice", ["reference", "triton"])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("cache_dtype", FLOORS)
def test_packed_rows_keep_so_much(cache_dtype, packed, choice, monkeypatch, device):
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", choice)
    x = PACKED[packed]().to(device)
    rows = Rows.of(torch.rand(2, 40, device=device) < 0.6)
    stored = packing.store(x, rows, cache_dtype)
    got = stored.some(None, x.shape[2:], x.dtype)
    expected = x.flatten(0, 1)[rows.index]
    others = torch.arange(x.shape[-1], device=device) != 7
    floor = FLOORS[cache_dtype][packed]
    if (cache_dtype, choice, device.type) == ("fp8", "triton", "cpu"):
        # the interpreter loses the carry of a mantissa that is rounded up: 126 becomes 64
        floor -= 8
    assert got.dtype == x.dtype
    assert sqnr_db(got[..., others], expected[..., others]) >= floor
    assert stored.nbytes <= expected.numel() * (2 if cache_dtype == "bf16" else 1.0625)
    some = torch.arange(0, len(rows), 3, device=device)
    assert torch.equal(stored.some(some, x.shape[2:], x.dtype), got[some])


def test_rows_kept_as_they_are_lose_nothing():
    x, rows = torch.randn(2, 5, 8), Rows.of(torch.rand(2, 5) < 0.6)
    for wide, cache_dtype in ((x, None), (x.half(), "bf16"), (x.bfloat16(), "bf16")):
        stored = packing.store(wide, rows, cache_dtype)
        assert stored.scale is None
        assert torch.equal(stored.some(None, (8,), wide.dtype), wide.flatten(0, 1)[rows.index])


@pytest.mark.parametrize("dtype", reference.LARGEST, ids=str)
def test_a_packed_group_is_zero_or_broken_as_a_whole(dtype):
    x = torch.randn(1, 1, 5, 4)
    x[0, 0, 0] = 0
    x[0, 0, 1, 2] = torch.nan
    x[0, 0, 2, 1] = -torch.inf
    x[0, 0, 3] = torch.tensor([1e-41, -1e-41, 0, 0])
    rows = torch.tensor([0])
    values, scale = reference.pack_rows(x, rows, dtype)
    got = reference.unpack_rows(values, scale, None, torch.float32)[0]
    assert not got[0].any()
    assert got[1:3].isnan().all(), "a gradient scaler must see what was not finite"
    assert scale[0, 1:3].isnan().all()
    assert not values[0, 3].float().any(), "the inverse of such a scale overflows"
    largest = x[0, 0, 4].abs().max()
    torch.testing.assert_close(got[4].abs().max(), largest)
    assert ((got[4] - x[0, 0, 4]).abs() <= largest / (254 if dtype == torch.int8 else 28)).all()


# dropout by row


def test_dropout_mask_of_some_rows_is_that_of_all():
    every = ops.dropout_mask(7, 1, torch.arange(40), 13, 0.3)
    some = torch.tensor([0, 5, 39])
    assert torch.equal(ops.dropout_mask(7, 1, some, 13, 0.3), every[some])
    for other in ((8, 1), (7, 2)):
        assert not torch.equal(ops.dropout_mask(*other, torch.arange(40), 13, 0.3), every)


def test_dropout_mask_drops_the_right_share_everywhere():
    p, rows, width = 0.2, 3000, 300
    dropped = ~ops.dropout_mask(3, 0, torch.arange(rows), width, p)
    sigma = (p * (1 - p)) ** 0.5
    assert (dropped.double().mean() - p).abs() < 5 * sigma / (rows * width) ** 0.5
    assert (dropped.double().mean(0) - p).abs().max() < 5 * sigma / rows**0.5
    assert (dropped.double().mean(1) - p).abs().max() < 5 * sigma / width**0.5
    for a, b in ((dropped[:-1], dropped[1:]), (dropped[:, :-1], dropped[:, 1:])):
        both = (a & b).double().mean()
        assert (both - p * p).abs() < 5 * p * (1 - p * p) ** 0.5 / a.numel() ** 0.5


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_row_dropout_is_its_mask_over_what_is_left(p):
    x, rows = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 3, 4, 9, 11])
    mask = ops.dropout_mask(5, 2, rows, 7, p)
    expected = torch.where(mask, x / max(1 - p, 1e-30), 0.0)
    torch.testing.assert_close(reference.row_dropout(x, rows, 5, 2, p), expected)
    assert mask.all() if p == 0 else not mask.all()
    assert p < 1 or not mask.any()


def test_uniform_is_uniform_and_depends_on_its_row_alone():
    u = ops.uniform(5, -1, torch.arange(20000))
    assert torch.equal(u[::7], ops.uniform(5, -1, torch.arange(20000)[::7]))
    assert ((u >= 0) & (u < 1)).all()
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 1000).abs() < 5 * (1000 * 0.95) ** 0.5).all()
    assert not torch.equal(u, ops.uniform(5, -2, torch.arange(20000)))


# PyTorch's fused attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
name_dtype = {x: str(x).removeprefix("torch.") for x in (*DTYPES, torch.float64)}.get


@pytest.mark.parametrize("dtype", DTYPES, ids=name_dtype)
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (1, 63), (2, 64), (1, 65)], ids=name_size)
def test_dense_attention_is_as_accurate_as_sdpa(size, dtype, device):
    """And its log-sum-exp, where it is to be had, is that of the logits."""
    B, T = size
    for D, G, masked in itertools.product((8, 32), (1, 2, 4), (False, True)):
        q, k, v = (torch.randn(B, heads, T, D, dtype=dtype, device=device) for heads in (4, G, G))
        mask = None
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        if masked:
            mask = causal & (torch.rand(B, 1, T, T, device=device) > 0.3)
            mask |= torch.eye(T, dtype=torch.bool, device=device)
        eager, exact = (
            torch.nn.functional.scaled_dot_product_attention(
                *inputs, attn_mask=mask, is_causal=mask is None, enable_gqa=G < 4
            )
            for inputs in ((q, k, v), (q.double(), k.double(), v.double()))
        )
        out, lse = ops.fused_attention(q, k, v, mask, mask is None, D**-0.5)
        assert_as_accurate(out, eager, exact)
        if lse is None:
            assert device.type == "cuda", "PyTorch fuses all of these on a CPU"
            continue
        norms = []
        for x, y in ((q, k), (q.double(), k.double())):
            logits = x @ y.repeat_interleave(4 // G, 1).mT * D**-0.5
            logits = logits.masked_fill(~(causal if mask is None else mask), -torch.inf)
            norms.append(logits.to(torch.promote_types(x.dtype, torch.float32)).logsumexp(-1))
        assert_as_accurate(lse, *norms)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_dtype)
@pytest.mark.parametrize("size", [(3, 9), (1, 65)], ids=name_size)
@pytest.mark.parametrize("case", sights.CASES)
def test_attention_is_as_accurate_as_eager(case, size, dtype, device):
    """As the door leads where nothing is asked for: fused, where that can serve."""
    sight = sights.build(case, *size, device)
    grad, q, k, v = (x.to(device) for x in problem(sight, D=16, E=16, dtype=dtype))
    how = How(0.25)
    exact = [x.double() for x in (grad, q, k, v)]
    found = []
    for at, inputs in ((ops, (grad, q, k, v)), (sights.Eager, (grad, q, k, v)),
                       (reference, exact)):  # fmt: skip
        g, *rest = inputs
        out, lse = at.attention_forward(*rest, sight, how)
        grads = at.attention_backward(g, *rest, out, lse, sight, how)
        blind = lse == -torch.inf
        assert not out[blind].any()
        found.append((out, lse.masked_fill(blind, 0), *grads))
    for x, y, z in zip(*found, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == z.shape
        if x.numel():
            assert_as_accurate(x, y, z)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=name_dtype)
def test_the_fused_backward_serves_on_this_machine(dtype):
    """Without it every step takes the slow way; nothing else would tell."""
    assert stock._agrees("cpu", dtype)
    sight = sights.build("own-causal", 3, 9)
    grad, q, k, v = problem(sight, dtype=dtype)
    out, lse = stock.attention_forward(q, k, v, sight, How(0.4))
    assert stock.attention_backward(grad, q, k, v, out, lse, sight, How(0.4)) is not None


def test_a_fused_backward_that_disagrees_is_not_used(monkeypatch):
    true = stock._cpu_backward

    def wrong(*args):
        dq, dk, dv = true(*args)
        return dq, dk * 1.001, dv

    sight = sights.build("own-causal", 1, 6)
    grad, q, k, v = problem(sight, dtype=torch.float32)
    stock._agrees.cache_clear()
    monkeypatch.setattr(stock, "_cpu_backward", wrong)
    try:
        assert not stock._agrees("cpu", torch.float32)
        assert stock.attention_forward(q, k, v, sight, How(1.0)) is None
        assert stock.attention_backward(grad, q, k, v, q, q[..., 0], sight, How(1.0)) is None
    finally:
        stock._agrees.cache_clear()


def test_fused_ops_leave_alone_what_they_do_not_know(monkeypatch):
    own, other = sights.build("own-causal", 3, 9), sights.build("window", 3, 9)

    def served(sight, how=HOWS["plain"], **options):
        grad, q, k, v = problem(sight, **options)
        out, lse = reference.attention_forward(q, k, v, sight, how)
        forward = stock.attention_forward(q, k, v, sight, how)
        backward = stock.attention_backward(grad, q, k, v, out, lse, sight, how)
        return forward is not None, backward is not None

    assert served(own) == (True, True)
    assert served(other) == (False, True)
    for how in ("capped", "dropped"):
        assert served(own, HOWS[how]) == (False, False)
    assert served(own, E=4) == (False, False)
    # a mask that would be held whole
    monkeypatch.setattr(reference.attention, "CHUNK", 1)
    assert served(other) == (False, False)
    assert served(own) == (True, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_dtype)
def test_the_fused_varlen_attention_serves_on_a_gpu(dtype, device):
    assert stock._agrees("cuda", dtype)
    for case in ("own-causal", "own-full", "sample-without-rows"):
        sight = sights.build(case, 3, 65, device)
        sight = dataclasses.replace(sight, keys=sight.rows)
        _, q, k, v = (x.to(device) for x in problem(sight, D=64, E=64, dtype=dtype))
        assert stock.attention_forward(q, k, v, sight, How(0.125)) is not None


# the door

DOORS = {
    "gather_rows": ("rows", "gather_rows"),
    "scatter_rows": ("rows", "scatter_rows"),
    "row_norms": ("rows", "row_norms"),
    "pack_rows": ("rows", "pack_rows"),
    "unpack_rows": ("rows", "unpack_rows"),
    "row_dropout": ("dropout", "row_dropout"),
    "attention_forward": ("attention", "attention_forward"),
    "attention_lse": ("attention", "attention_lse"),
    "attention_backward": ("attention", "attention_backward"),
    "attention_received": ("saliency", "attention_received"),
}


def arguments(op, sight):
    grad, q, k, v = problem(sight, dtype=torch.float32)
    out, lse = reference.attention_forward(q, k, v, sight, How(0.4))
    x, index = torch.randn(2, 9, 3, 4), torch.tensor([1, 4])
    values, scale = reference.pack_rows(x, index, torch.int8)
    return {
        "gather_rows": (x, index),
        "scatter_rows": (x[0, :2], index, x),
        "row_norms": (x[..., 0], index),
        "pack_rows": (x, index, torch.int8),
        "unpack_rows": (values, scale, None, torch.float32),
        "row_dropout": (x[0, :2, 0], index, 3, 0, 0.5),
        "attention_forward": (q, k, v, sight, How(0.4)),
        "attention_lse": (q, k, sight, How(0.4)),
        "attention_backward": (grad, q, k, v, out, lse, sight, How(0.4)),
        "attention_received": (q, k, lse, torch.ones(len(q)), sight, How(0.4)),
    }[op]


class Taken(Exception):
    """The way that a test watches was taken."""


def watch(monkeypatch, module, name):
    def taken(*args):
        raise Taken

    monkeypatch.setattr(module, name, taken)


@pytest.mark.parametrize("op", DOORS)
def test_kernels_are_taken_where_they_are_asked_for(op, kernels, monkeypatch):
    module, name = DOORS[op]
    at = pytest.importorskip(f"lightning_sage.ops.{module}")
    given = arguments(op, sights.build("own-causal", 2, 9))
    watch(monkeypatch, at, name)
    # nothing is launched: as well where there is a GPU, and kernels are compiled
    monkeypatch.setattr(ops, "_interpreted", lambda: True)
    with pytest.raises(Taken):
        getattr(ops, op)(*given)
    for choice in ("auto", "reference"):
        monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", choice)
        getattr(ops, op)(*given)


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward"])
def test_fused_attention_is_taken_unless_something_else_is_asked_for(op, monkeypatch):
    given = arguments(op, sights.build("own-causal", 2, 9))
    watch(monkeypatch, stock, op)
    for choice in ("", "auto"):
        monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", choice)
        with pytest.raises(Taken):
            getattr(ops, op)(*given)
    monkeypatch.delenv("LIGHTNING_SAGE_KERNELS")
    with pytest.raises(Taken):
        getattr(ops, op)(*given)
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", "reference")
    getattr(ops, op)(*given)


def test_masks_are_for_the_reference(kernels):
    """Kernels take intervals; what cannot be said by them must not reach one."""
    sight = sights.as_mask(sights.build("own-causal", 2, 9))
    for op in DOORS:
        if op.startswith("attention"):
            given = arguments(op, sight)
            got, expected = getattr(ops, op)(*given), getattr(reference, op)(*given)
            pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
            assert all(torch.equal(x, y) for x, y in pairs)


def test_a_choice_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"'cuda': must be auto, triton or reference.*unset"):
        ops.gather_rows(torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.int64))


def test_kernels_on_a_cpu_need_the_interpreter(kernels, monkeypatch):
    monkeypatch.setattr(ops, "_interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs a GPU, or TRITON_INTERPRET=1.*use auto"):
        ops.gather_rows(torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=name_dtype)
def test_kernels_serve_on_a_gpu_but_for_float64(dtype, device, monkeypatch):
    monkeypatch.delenv("LIGHTNING_SAGE_KERNELS", raising=False)
    assert ops._kernels(torch.zeros(1, dtype=dtype, device=device)) == (dtype != torch.float64)
    assert not ops._kernels(torch.zeros(1, dtype=dtype))
