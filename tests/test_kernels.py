"""Triton kernels against the reference: on a GPU, and in Triton's interpreter where there is none.

Both run the same bodies. On a CPU float64 must give the reference's numbers; on a GPU, where
kernels are for the shorter types, and for those in the interpreter, a kernel may err at most twice
as far as eager PyTorch in the same dtype does.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sights
from accuracy import Largest, assert_as_accurate
from lightning_sage import ops
from lightning_sage.memory import saved_bytes
from lightning_sage.ops import Dropout, How, Rows, Sight, Visibility, reference

triton = pytest.importorskip("triton")
tl = triton.language

from lightning_sage.ops import attention, tiles  # noqa: E402 - needs triton

GPU = torch.cuda.is_available()
# tl.dot of bfloat16 is broken in the interpreter of triton 3.9
SHORT = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
# where one dtype is enough to see who sees whom
SHARP = SHORT if GPU else [torch.float64]
name_dtype = {
    x: str(x).removeprefix("torch.")
    for x in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}.get

pytestmark = pytest.mark.usefixtures("kernels", "poison")


def poisoned(make):
    def filled(*args, **kwargs):
        x = make(*args, **kwargs)
        if x.dtype == torch.bool:
            return x
        return x.fill_(torch.nan if x.is_floating_point() else min(torch.iinfo(x.dtype).max, 77777))

    return filled


@pytest.fixture
def poison(monkeypatch):
    """What is allocated without a value is full of NaN: a forgotten element shows."""
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def exactly(monkeypatch):
    """Call an op of the door in the reference."""

    def call(op, *args):
        with monkeypatch.context() as patch:
            patch.setenv("LIGHTNING_SAGE_KERNELS", "reference")
            return getattr(ops, op)(*args)

    return call


def problem(sight, H, G, D, E, dtype):
    """Incoming gradient, queries, keys, values, and weights of the queries."""
    device = sight.rows.index.device
    N, M = len(sight.rows), len(sight.keys)
    shapes = (N, H, E), (N, H, D), (M, G, D), (M, G, E)
    weights = torch.rand(N, device=device) * (torch.rand(N, device=device) < 0.8)
    return *(torch.randn(shape).to(device, dtype) for shape in shapes), weights


def everything(call, problem, sight, how, dense=None, constants=True):
    """Results of all attention ops: of the sight, and of some of its keys, others `constants`.

    `dense` is the output and log-sum-exp that the ops after the forward are given; None for what
    the forward gave.
    """
    grad, q, k, v, weights = problem
    found = {}
    found["out"], found["lse"] = call("attention_forward", q, k, v, sight, how)
    found["lse alone"] = call("attention_lse", q, k, sight, how)
    out, lse = dense or (found["out"], found["lse"])
    found["received"] = call("attention_received", q, k, lse, weights, sight, how)
    backwards = {"": (k, v, out, lse, sight, how)}
    if constants:
        some, inside = sights.half(sight)
        backwards["salient "] = k[inside], v[inside], out, lse, some, how
        backwards["full "] = *backwards["salient "], (k, v, sight)
    for kind, args in backwards.items():
        grads = call("attention_backward", grad, q, *args)
        found |= {kind + name: x for name, x in zip(("dq", "dk", "dv"), grads, strict=True)}
    return found


def door(op, *args):
    return getattr(ops, op)(*args)


def eagerly(op, *args):
    return getattr(sights.Eager, op)(*args)


def check(exactly, sight, shape, dtype, how=None, constants=True):
    """Every op, every result: kernel, eager in the same dtype, and the reference in float64."""
    given = problem(sight, *shape, dtype)
    how = how or How(shape[2] ** -0.5)
    exact = everything(exactly, [x.double() for x in given], sight, how, None, constants)
    # rounded alike for both: else errors of eager's own forward and backward cancel now and then
    dense = exact["out"].to(dtype), exact["lse"].to(torch.promote_types(dtype, torch.float32))
    rest = given, sight, how, dense, constants
    got = everything(door, *rest)
    eager = got if dtype == torch.float64 else everything(eagerly, *rest)
    for name, expected in exact.items():
        compare(name, got[name], eager[name], expected)


def compare(name, got, eager, exact):
    assert got.dtype == eager.dtype, name
    assert got.shape == exact.shape, name
    assert got.is_contiguous(), name
    blind = exact == -torch.inf
    assert torch.equal(got == -torch.inf, blind), f"{name}: a row that sees nothing"
    if not exact.numel():
        return
    got, eager, exact = (x.masked_fill(blind, 0) for x in (got, eager, exact))
    if got.dtype == torch.float64:
        assert (got - exact).abs().max() <= 1e-10 * exact.abs().max() + 1e-14, name
        return
    try:
        assert_as_accurate(got, eager, exact)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


# attention: who sees whom


@pytest.mark.parametrize("dtype", SHARP, ids=name_dtype)
@pytest.mark.parametrize("case", sights.CASES)
def test_rows_see_what_they_should(case, dtype, device, exactly):
    check(exactly, sights.build(case, 2, 40, device), (2, 1, 16, 16), dtype)


# T, H, G, D, E: lengths round a tile, widths that fill one and that do not, shared key heads
SHAPES = [
    (1, 4, 1, 32, 32),
    (1, 1, 1, 256, 256),
    (7, 8, 1, 64, 64),
    (7, 8, 2, 128, 128),
    (63, 1, 1, 96, 96),
    (63, 3, 1, 40, 40),
    (64, 1, 1, 128, 128),
    (64, 8, 1, 32, 32),
    (65, 1, 1, 256, 256),
    (65, 2, 2, 64, 64),
    (65, 2, 1, 80, 80),
    (127, 1, 1, 32, 32),
    (33, 4, 4, 16, 16),
    (40, 2, 2, 24, 48),
    (40, 4, 2, 96, 32),
]
name_shape = "T{0[0]}-H{0[1]}-G{0[2]}-D{0[3]}-E{0[4]}".format


@pytest.mark.parametrize("dtype", SHORT, ids=name_dtype)
@pytest.mark.parametrize("shape", SHAPES, ids=name_shape)
def test_attention_is_as_accurate_as_eager(shape, dtype, device, exactly):
    T, *widths = shape
    check(exactly, sights.build("all-causal", 1, T, device), widths, dtype, constants=GPU)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", SHORT, ids=name_dtype)
@pytest.mark.parametrize("ratio", [1, 4, 8])
@pytest.mark.parametrize("D", [32, 64, 96, 128, 192, 256])
def test_attention_of_every_shape_is_as_accurate_as_eager(D, ratio, dtype, device, exactly):
    for T in (1, 7, 63, 64, 65, 127, 300):
        for case in ("all-causal", "own-full", "window", "superset-causal"):
            check(exactly, sights.build(case, 3, T, device), (2 * ratio, 2, D, D), dtype)


HOWS = {
    "capped": How(0.3, softcap=1.5),
    "dropped": How(0.25, dropout=Dropout(0.3, 2**31 - 1, 5)),
    "capped-dropped": How(0.3, softcap=1.5, dropout=Dropout(0.3, 5, 2)),
    "all-dropped": How(0.25, dropout=Dropout(1.0, 5, 2)),
}


@pytest.mark.parametrize("dtype", SHARP, ids=name_dtype)
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_logits_are_capped_and_weights_dropped(how, dtype, device, exactly):
    case = "window-both" if how.softcap is None else "superset-causal"
    check(exactly, sights.build(case, 2, 34, device), (4, 2, 16, 16), dtype, how)


@pytest.mark.parametrize("dtype", SHORT, ids=name_dtype)
def test_capped_and_dropped_attention_is_as_accurate_as_eager(dtype, device, exactly):
    sight = sights.build("superset-causal", 2, 34, device)
    check(exactly, sight, (4, 2, 16, 16), dtype, HOWS["capped-dropped"])


def test_dropout_of_weights_is_its_mask_bit_for_bit(device):
    """The values are unit vectors, so that the output is the weights."""
    T, how = 45, How(0.25, dropout=Dropout(0.3, 2**31 - 1, 3))
    sight = sights.build("superset-causal", 3, T, device)
    _, q, k, _, _ = problem(sight, 4, 2, 16, T, torch.float32)
    v = torch.eye(T, device=device)[sight.keys.token][:, None].expand(-1, 2, -1)
    out, lse = ops.attention_forward(q, k, v, sight, how)
    kept = sights.kept_weights(sight, how, 4) & sights.seen(sight)
    by_token = torch.zeros(4, len(q), T, dtype=torch.bool, device=device)
    for b in range(3):
        queries, keys = (x.sample == b for x in (sight.rows, sight.keys))
        columns = sight.keys.token[keys]
        by_token[:, queries.nonzero(), columns] = kept[:, queries][:, :, keys]
    assert torch.equal(out.transpose(0, 1) != 0, by_token)
    whole, _ = ops.attention_forward(q, k, v, sight, How(0.25))
    expected = whole.transpose(0, 1) * by_token / 0.7
    torch.testing.assert_close(out.transpose(0, 1), expected)
    plain = ops.attention_lse(q, k, sight, How(0.25))
    assert torch.equal(lse, plain)
    assert torch.equal(ops.attention_lse(q, k, sight, how), plain)


def fused(x, heads):
    """A slice of one projection for queries, keys and values."""
    wide = torch.randn(len(x), 3, heads, x.shape[2], dtype=x.dtype, device=x.device)
    wide[:, 1] = x
    return wide[:, 1]


LAYOUTS = {
    "fused": lambda x: fused(x, x.shape[1]),
    "by-head": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "by-number": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every-other-row": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_reads_any_layout(layout, device):
    sight, how = sights.build("superset-causal", 2, 19, device), How(0.25)
    given = problem(sight, 2, 2, 16, 16, torch.float32)
    strided = [LAYOUTS[layout](x) for x in given[:4]]
    assert not any(x.is_contiguous() for x in strided)
    expected = everything(door, given, sight, how)
    for name, got in everything(door, (*strided, given[4]), sight, how).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-6, atol=1e-6)


def test_attention_takes_shared_keys_and_a_gradient_that_is_one_number(device):
    """Strides of zero: one key head seen as two, and the gradient of a sum."""
    sight, how = sights.build("superset-causal", 2, 19, device), How(0.25)
    _, q, k, v, _ = problem(sight, 4, 1, 16, 16, torch.float32)
    k, v = (x.expand(-1, 2, -1) for x in (k, v))
    grad = torch.ones((), device=device).expand(q.shape)
    out, lse = ops.attention_forward(q, k, v, sight, how)
    got = ops.attention_backward(grad, q, k, v, out, lse, sight, how)
    same = [x.contiguous() for x in (grad, q, k, v)]
    again = ops.attention_forward(*same[1:], sight, how)
    expected = (*again, *ops.attention_backward(*same, *again, sight, how))
    for x, y in zip((out, lse, *got), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("T", [1, 65])
def test_attention_received_from_few_rows(T, device, exactly):
    """From one query a sample, as for a classifier: tiles of few rows."""
    for case in ("last-rows", "one-row"):
        sight = sights.build(case, 3, T, device)
        for H, G in ((1, 1), (8, 1), (4, 4)):
            _, q, k, _, weights = problem(sight, H, G, 32, 32, torch.float32)
            lse = ops.attention_lse(q, k, sight, How(0.2))
            got = ops.attention_received(q, k, lse, weights, sight, How(0.2))
            given = q.double(), k.double(), lse.double(), weights.double()
            expected = exactly("attention_received", *given, sight, How(0.2))
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_no_kernel_is_given_room_for_all_pairs_of_tokens(device):
    T = 130
    every = Rows.every(1, T, device)
    sight, how = Sight(every, every, Visibility(True)), How(0.25)
    given = problem(sight, 1, 1, 16, 16, torch.float32)
    with Largest() as largest:
        everything(door, given, sight, how)
    # the interpreter takes bytes
    assert 0 < largest.elements <= 16 * 4 * T < T * T


def test_float32_products_are_exact_unless_the_user_says_otherwise():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert tiles.precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert tiles.precision(torch.float32) == "tf32"
        assert tiles.precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


# rows


MOVED = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
VIEWS = {
    "C": lambda C: torch.randn(3, 9, C),
    "H-D": lambda C: torch.randn(3, 9, 3, C),
    "heads-first": lambda C: torch.randn(3, 3, 9, C).transpose(1, 2),
    "fused": lambda C: torch.randn(3, 9, 3 * C)[..., C : 2 * C],
    "fused-heads": lambda C: torch.randn(3, 9, 3, 2, C)[:, :, 1],
    "by-number": lambda C: torch.randn(3, C, 9).transpose(1, 2),
    "samples-last": lambda C: torch.randn(9, 3, C).transpose(0, 1),
    "expanded": lambda C: torch.randn(1, 9, C).expand(3, -1, -1),
}


def some_rows(device):
    """Rows of three samples of nine, those at the edges among them."""
    chosen = torch.rand(3, 9) < 0.4
    chosen[0, 0] = chosen[2, 8] = True
    return chosen.flatten().nonzero().squeeze(1).to(device)


@pytest.mark.parametrize("C", [1, 7, 64, 65])
@pytest.mark.parametrize("view", VIEWS)
def test_rows_move_exactly(view, C, device):
    index = some_rows(device)
    for dtype in MOVED:
        x = VIEWS[view](C).to(device, dtype)
        got = ops.gather_rows(x, index)
        assert torch.equal(got, reference.gather_rows(x, index))
        assert got.is_contiguous()
        before = x.clone()
        values = torch.randn(len(index), *x.shape[2:], device=device).to(dtype)
        out = ops.scatter_rows(values, index, x)
        assert torch.equal(out, reference.scatter_rows(values, index, x))
        assert out.is_contiguous()
        assert torch.equal(x, before)


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (5, 64), (2, 4100)], ids="B{0[0]}-T{0[1]}".format)
@pytest.mark.parametrize("share", [0, 0.01, 0.6, 1])
def test_rows_are_found_where_their_number_is_known(share, size, device):
    chosen = (torch.rand(size) < share).to(device)
    for flags in (chosen, chosen.t().contiguous().t()):
        expected = Rows.of(flags)
        got = ops.rows_of(flags, len(expected))
        assert torch.equal(got.index, expected.index)
        assert torch.equal(got.ends, expected.ends)
        assert (got.index.dtype, got.ends.dtype) == (torch.int64, torch.int32)
        assert got.index.untyped_storage().nbytes() == 8 * len(expected)
    assert torch.equal(ops.picked(chosen[0], int(chosen[0].sum())), chosen[0].nonzero().squeeze(1))


@pytest.mark.parametrize("share", [0, 1], ids=["none", "all"])
def test_none_or_all_of_the_rows_move(share, device):
    x = torch.randn(2, 5, 6, device=device)
    index = torch.arange(10 * share, device=device)
    values = torch.randn(10 * share, 6, device=device)
    assert torch.equal(ops.gather_rows(x, index), x.flatten(0, 1)[index])
    out = ops.scatter_rows(values, index, x)
    assert torch.equal(out, values.view(2, 5, 6) if share else x)


def test_what_lies_behind_the_rows_is_none_of_them(device):
    """Rows that are part of a longer list, as a search could run over their end."""
    longer, x = torch.tensor([0, 3, 4, 8], device=device), torch.randn(1, 10, 6, device=device)
    values = torch.randn(4, 6, device=device)
    for part in (slice(0, 3), slice(1, 4), slice(1, 3)):
        got = ops.scatter_rows(values[part], longer[part], x)
        assert torch.equal(got, reference.scatter_rows(values[part], longer[part], x))


def test_wide_rows_take_several_programs(device):
    x, index = torch.randn(1, 3, 8200, device=device), torch.tensor([0, 2], device=device)
    assert torch.equal(ops.gather_rows(x, index), x[0, index])
    out = ops.scatter_rows(x[0, :2], index, x)
    assert torch.equal(out[0], x[0, [0, 1, 1]])
    torch.testing.assert_close(ops.row_norms(x, index), x[0, index].norm(dim=-1))
    packed = ops.pack_rows(x.unflatten(2, (-1, 8)), index, torch.int8)
    for got, expected in zip(
        packed, reference.pack_rows(x.unflatten(2, (-1, 8)), index, torch.int8), strict=True
    ):
        assert torch.equal(got, expected)
    assert torch.equal(
        ops.unpack_rows(*packed, None, torch.float32),
        reference.unpack_rows(*packed, None, torch.float32),
    )


@pytest.mark.parametrize("dtype", [*SHORT, torch.float64], ids=name_dtype)
@pytest.mark.parametrize("view", VIEWS)
def test_weighted_rows_are_those_of_eager(view, dtype, device):
    x, index = VIEWS[view](7).to(device, dtype), some_rows(device)
    weights = 1 + torch.rand(len(index), device=device).to(torch.promote_types(dtype, torch.float))
    got = ops.gather_rows(x, index, weights)
    assert torch.equal(got, reference.gather_rows(x, index, weights))


@pytest.mark.parametrize("C", [1, 7, 300])
@pytest.mark.parametrize("dtype", [*SHORT, torch.float64], ids=name_dtype)
def test_norms_are_as_accurate_as_eager(dtype, C, device):
    index = some_rows(device)
    for view in ("C", "fused", "by-number", "samples-last"):
        x = (100 * VIEWS[view](C)).to(device, dtype)
        got = ops.row_norms(x, index)
        eager = reference.row_norms(x, index)
        assert got.dtype == eager.dtype
        assert_as_accurate(got, eager, x.double().flatten(0, 1)[index].norm(dim=-1), floor=1e-4)
    assert ops.row_norms(x, index[:0]).shape == (0,)


GROUPS = {
    "heads": lambda: torch.randn(3, 9, 4, 16),
    "heads-first": lambda: torch.randn(3, 4, 9, 16).transpose(1, 2),
    "odd": lambda: torch.randn(3, 9, 5, 7),
    "one": lambda: torch.randn(3, 9, 1, 1),
    "groups-of-128": lambda: torch.randn(3, 9, 256).unflatten(2, (-1, 128)),
    "by-number": lambda: torch.randn(3, 9, 16, 4).transpose(2, 3),
    "zeros": lambda: torch.randn(3, 9, 4, 16) * (torch.rand(3, 9, 4, 1) < 0.5),
    "outliers": lambda: torch.randn(3, 9, 4, 16) * (1 + 1e4 * (torch.rand(3, 9, 4, 16) < 0.02)),
    "broken": lambda: (
        torch.randn(3, 9, 4, 16)
        .masked_fill(torch.rand(3, 9, 4, 16) < 0.02, torch.nan)
        .masked_fill(torch.rand(3, 9, 4, 16) < 0.02, -torch.inf)
    ),
    "denormal": lambda: 1e-41 * torch.randn(3, 9, 4, 16),
    # a third is rounded: what was a tie is one only after the product is rounded, too
    "thirds": lambda: (
        1.5 * torch.randint(-254, 255, (3, 9, 4, 16)).index_fill_(3, torch.tensor([0]), 254)
    ),
    "ties": lambda: (
        torch.randint(-254, 255, (3, 9, 4, 16)).index_fill_(3, torch.tensor([0]), 254).float() / 2
    ),
}


def assert_same(got, expected):
    """Bit for bit, NaN for NaN."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", SHORT, ids=name_dtype)
@pytest.mark.parametrize("kind", GROUPS)
def test_rows_are_packed_in_int8_exactly(kind, dtype, device):
    x, index = GROUPS[kind]().to(device, dtype), some_rows(device)
    values, scale = ops.pack_rows(x, index, torch.int8)
    expected, steps = reference.pack_rows(x, index, torch.int8)
    assert_same(scale, steps)
    assert_same(values, expected)
    some = torch.tensor([2, 0], device=device)
    for chosen in (None, some, some[:0]):
        for wide in SHORT:
            assert_same(
                ops.unpack_rows(values, scale, chosen, wide),
                reference.unpack_rows(values, scale, chosen, wide),
            )
    empty = ops.pack_rows(x, index[:0], torch.int8)
    assert [len(part) for part in empty] == [0, 0]


def representable(groups):
    """Groups whose scale is a power of two and whose numbers fp8 knows."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    x = numbers[torch.randint(len(numbers), groups.shape)]
    x[..., 0] = 448.0
    return x * 2.0 ** torch.randint(-8, 8, groups.shape[:-1])[..., None]


@pytest.mark.parametrize("dtype", [torch.float32], ids=name_dtype)
@pytest.mark.parametrize("kind", ["heads", "odd", "one", "groups-of-128"])
def test_rows_that_fp8_knows_come_back_exactly(kind, dtype, device):
    x, index = representable(GROUPS[kind]()).to(device, dtype), some_rows(device)
    values, scale = ops.pack_rows(x, index, torch.float8_e4m3fn)
    expected, steps = reference.pack_rows(x, index, torch.float8_e4m3fn)
    assert_same(scale, steps)
    assert_same(values.view(torch.uint8), expected.view(torch.uint8))
    own = x.flatten(0, 1)[index]
    assert_same(ops.unpack_rows(values, scale, None, dtype), own)
    some = torch.tensor([2, 0], device=device)
    assert_same(ops.unpack_rows(values, scale, some, dtype), own[some])


@pytest.mark.parametrize("dtype", SHORT, ids=name_dtype)
@pytest.mark.parametrize("kind", GROUPS)
def test_rows_are_packed_in_fp8(kind, dtype, device):
    """The interpreter rounds otherwise than hardware: there only the scales are judged."""
    x, index = GROUPS[kind]().to(device, dtype), some_rows(device)
    values, scale = ops.pack_rows(x, index, torch.float8_e4m3fn)
    expected, steps = reference.pack_rows(x, index, torch.float8_e4m3fn)
    assert_same(scale, steps)
    assert values.shape == expected.shape
    assert values.float().isfinite().all()
    if GPU:
        assert_same(values.view(torch.uint8), expected.view(torch.uint8))
        for wide in SHORT:
            assert_same(
                ops.unpack_rows(values, scale, None, wide),
                reference.unpack_rows(values, scale, None, wide),
            )


def test_rows_and_weights_may_be_strided(device):
    """Every argument that a kernel reads as if it were contiguous."""
    x, index = torch.randn(3, 9, 4, 16, device=device), some_rows(device)
    weights = torch.rand(len(index), device=device)
    values, scale = ops.pack_rows(x, index, torch.int8)
    own = ops.gather_rows(x, index)
    sight = sights.build("superset-causal", 3, 9, device)
    _, q, k, _, shares = problem(sight, 2, 2, 16, 16, torch.float32)
    lse = ops.attention_lse(q, k, sight, How(0.25))
    calls = [
        ("gather_rows", x, index, weights),
        ("scatter_rows", own, index, x),
        ("row_norms", x[:, :, 0], index),
        ("pack_rows", x, index, torch.int8),
        ("unpack_rows", values, scale, torch.arange(len(values), device=device), torch.float32),
        ("row_dropout", own[:, 0], index, 3, 0, 0.5),
        ("attention_received", q, k, lse, shares, sight, How(0.25)),
    ]

    def strided(x):
        if not isinstance(x, torch.Tensor) or x.dim() > 3:
            return x
        return x.repeat_interleave(2, 0)[::2]

    for op, *args in calls:
        got, expected = door(op, *map(strided, args)), door(op, *args)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# dropout by row


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("C", [1, 7, 64, 1030])
def test_row_dropout_is_its_mask_bit_for_bit(C, p, device):
    index = torch.tensor([0, 3, 4, 9, 11, 2**31 - 1], device=device)
    for dtype in (*SHORT, torch.float64):
        x = torch.randn(6, C, device=device).to(dtype)
        assert_same(
            ops.row_dropout(x, index, 2**31 - 1, 3, p),
            reference.row_dropout(x, index, 2**31 - 1, 3, p),
        )
    assert ops.row_dropout(x[:0], index[:0], 5, 2, p).shape == (0, C)


def test_row_dropout_of_some_rows_is_that_of_all(device):
    x, every = torch.ones(40, 13, device=device), torch.arange(40, device=device)
    whole = ops.row_dropout(x, every, 5, 2, 0.3)
    assert torch.equal(ops.row_dropout(x[::3], every[::3], 5, 2, 0.3), whole[::3])
    assert torch.equal(whole != 0, ops.dropout_mask(5, 2, every, 13, 0.3))
    for seed, call in ((6, 2), (5, 3)):
        assert not torch.equal(ops.row_dropout(x, every, seed, call, 0.3), whole)


def test_row_dropout_reads_any_layout_and_hands_on_what_is_not_finite(device):
    index = torch.arange(6, device=device)
    x = torch.randn(6, 9, device=device)
    x[2], x[3] = torch.inf, torch.nan
    expected = ops.row_dropout(x, index, 5, 2, 0.5)
    assert_same(expected, reference.row_dropout(x, index, 5, 2, 0.5))
    assert expected[2].isnan().any(), "a dropped infinity is a NaN in eager PyTorch too"
    for view in (x.t().contiguous().t(), x.repeat(1, 2)[:, :9], x.repeat_interleave(2, 0)[::2]):
        assert_same(ops.row_dropout(view, index, 5, 2, 0.5), expected)


def test_row_dropout_has_its_own_gradient(device):
    index = torch.tensor([0, 9], device=device)
    x = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)

    def drop(t):
        return ops.row_dropout(t, index, 5, 2, 0.4)

    assert torch.autograd.gradcheck(drop, (x,))
    assert torch.autograd.gradgradcheck(drop, (x,))
    with saved_bytes() as held:
        out = drop(x)
        assert held() == index.nbytes, "the mask is drawn again"
    assert out.requires_grad
    one, other = (
        torch.autograd.grad(at.row_dropout(x, index, 5, 2, 0.4).sum(), x)[0]
        for at in (ops, reference)
    )
    assert torch.equal(one, other)


# the guards


@triton.jit
def _copy_but_the_last(x, out, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < N), mask=i < N - 1)


def test_an_element_that_a_kernel_forgets_is_seen(device):
    x = torch.randn(7, device=device)
    for out in (x.new_empty(7), torch.empty_like(x), torch.empty(7, device=device)):
        _copy_but_the_last[(1,)](x, out, 7, BLOCK=8)
        assert torch.equal(out[:6], x[:6])
        with pytest.raises(AssertionError):
            compare("x", out, x, x.double())
    assert torch.empty(3, dtype=torch.int64).tolist() == [77777] * 3
    assert torch.empty(3, dtype=torch.int8).tolist() == [127] * 3
    assert torch.empty(3, dtype=torch.float8_e4m3fn).float().isnan().all()


@pytest.mark.parametrize("fault", ["a key", "a query", "the mask"])
def test_a_kernel_that_errs_is_caught(fault, device, exactly, monkeypatch):
    """Of 40 keys or queries one is wrong, or sees one key too many."""
    sight = sights.build("all-causal", 1, 40, device)
    true = attention.attention_forward

    def wrong(q, k, v, sight, how):
        if fault == "a key":
            k = torch.cat([k[:20], k[19:20], k[21:]])
        if fault == "a query":
            q = torch.cat([q[:1], q[:1], q[2:]])
        if fault == "the mask":
            stop = sight.spans[1].long()[None] + (torch.arange(40, device=device) == 7)
            sight = Sight(sight.rows, sight.keys, Visibility(True, None, stop))
        return true(q, k, v, sight, how)

    monkeypatch.setattr(attention, "attention_forward", wrong)
    for dtype in SHORT:
        with pytest.raises(AssertionError, match="eager PyTorch in the same dtype allows"):
            check(exactly, sight, (1, 1, 16, 16), dtype, constants=False)


# what the kernels become on GPUs that are not there


EIGHT_BITS = "i8-fp8e4nv"
COMPILED = [
    f"90-bfloat16-128-plain-dropout-lse-received-few-moved-weighted-rows-{EIGHT_BITS}",
    "90-bfloat16-64-plain",
    "90-bfloat16-256-plain",
    "80-bfloat16-128-plain-received-i8",
    "90-float32-64-plain",
]


def compile_for(cases):
    script = Path(__file__).with_name("aot.py")
    told = subprocess.run([sys.executable, script, *cases], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return [json.loads(line) for line in told.stdout.splitlines()]


def assert_compiled_well(found):
    wrong = []
    for line in found:
        _, dtype, _, variant = line["case"].split("-", 3)
        short, sm90 = dtype != "float32", line["case"].startswith("90")
        products = line["kernel"] in (
            "_forward_kernel", "_queries_kernel", "_keys_kernel", "_received_kernel"
        )  # fmt: skip
        faults = {
            # what a consumer card has for one program
            "shared memory": line["shared"] > 99 * 1024,
            # float32 has no tensor cores: its products are unrolled, and spill
            "spills": short and line["stack"] > 256,
            "no tensor cores": products and short and not line["wgmma"] + line["mma"],
            "no wgmma": line["kernel"] == "_forward_kernel"
            and short
            and sm90
            and not line["wgmma"],
            # a fused product is rounded elsewhere than the reference's
            "fused": line["kernel"] == "_pack_kernel" and variant == "i8" and line["fma"],
        }
        wrong += [f"{name}: {line}" for name, fault in faults.items() if fault]
    table = "\n".join(" ".join(str(x).rjust(6) for x in line.values()) for line in found)
    assert not wrong, "\n".join([*wrong, " ".join(found[0]), table])


def test_kernels_fit_a_gpu():
    found = compile_for(COMPILED)
    kernels = {name for name in vars(attention) if name.endswith("_kernel")}
    assert kernels < {line["kernel"] for line in found}
    assert_compiled_well(found)


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("arch", [80, 86, 90])
def test_every_launch_fits_a_gpu(arch, dtype, width):
    assert_compiled_well(compile_for([f"{arch}-{dtype}-{width}"]))


@pytest.mark.parametrize(
    ("field", "value"), [("shared", 99 * 1024 + 1), ("stack", 1000), ("wgmma", 0), ("fma", 1)]
)
def test_a_kernel_that_does_not_fit_is_caught(field, value):
    line = {
        "case": "90-bfloat16-128-i8", "kernel": "_forward_kernel", "shared": 0, "stack": 0,
        "wgmma": 1, "mma": 0, "fma": 0,
    }  # fmt: skip
    assert_compiled_well([line])
    if field == "fma":
        line["kernel"] = "_pack_kernel"
    with pytest.raises(AssertionError):
        assert_compiled_well([line | {field: value}])
