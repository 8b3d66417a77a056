"""The reference against mathematics, and PyTorch's fused attention against the reference."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accuracy import assert_as_accurate
from lightning_sage import ops
from lightning_sage.ops import reference, stock
from lightning_sage.ops.reference import Rule

SIZES = [(1, 1), (2, 7), (1, 63), (2, 64), (1, 65)]
ids = lambda values: "B{}-T{}".format(*values)  # noqa: E731 - a name for parametrize alone


def problem(B, T, H=4, G=2, D=8, dtype=torch.float64):
    q, grad = (torch.randn(B, H, T, D, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(B, G, T, D, dtype=dtype) for _ in range(2))
    return grad, q, k, v


def rules(B, T):
    some = torch.rand(B, 1, T, T) > 0.4
    some |= torch.eye(T, dtype=torch.bool)
    padding = torch.arange(T) < torch.arange(max(1, T - B + 1), T + 1)[:B, None]
    order = torch.arange(T)[None]
    return {
        "none": Rule(0.4),
        "causal": Rule(0.4, positions=order),
        "mask": Rule(0.4, mask=some),
        "bias": Rule(0.4, mask=torch.randn(1, 4, T, T, dtype=torch.float64)),
        "padded": Rule(0.4, mask=padding[:, None, None], positions=order),
        "capped": Rule(0.4, softcap=1.5, positions=order),
    }


def explicit(q, k, rule, detach=None):
    """Logits by the definition, [B, H, Q, T]; columns where `detach` is False are constants."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = rule.scale * q @ k.transpose(-1, -2)
    if rule.softcap is not None:
        logits = rule.softcap * (logits / rule.softcap).tanh()
    if detach is not None:
        logits = torch.where(detach, logits, logits.detach())
    if rule.positions is not None:
        later = torch.arange(k.shape[2]) > rule.positions[:, None, :, None]
        logits = logits.masked_fill(later, -torch.inf)
    if rule.mask is not None:
        allowed = rule.mask.dtype == torch.bool
        logits = logits.masked_fill(~rule.mask, -torch.inf) if allowed else logits + rule.mask
    return logits


@pytest.fixture(params=["one-chunk", "many-chunks"])
def chunked(request, monkeypatch):
    if request.param == "many-chunks":
        monkeypatch.setattr(reference, "CHUNK", 100)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("kind", rules(2, 7))
@pytest.mark.parametrize("size", SIZES[:3], ids=ids)
def test_attention_and_lse_are_their_definition(size, kind):
    _, q, k, v = problem(*size)
    rule = rules(*size)[kind]
    logits = explicit(q, k, rule)
    out, lse = reference.attention(q, k, v, rule)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out, logits.softmax(-1) @ v.repeat_interleave(2, 1))
    torch.testing.assert_close(reference.attention_lse(q, k, rule), lse)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("kind", rules(2, 7))
def test_attention_received_is_its_definition(kind):
    _, q, k, _ = problem(2, 7)
    rule = rules(2, 7)[kind]
    weights = torch.rand(2, 7, dtype=torch.float64)
    lse = reference.attention_lse(q, k, rule)
    expected = (weights[:, None, :, None] * explicit(q, k, rule).softmax(-1)).sum(2)
    torch.testing.assert_close(reference.attention_received(q, k, lse, weights, rule), expected)


def test_attention_received_ignores_queries_that_see_nothing():
    _, q, k, _ = problem(1, 5)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 2, :] = False
    rule = Rule(0.3, mask=mask)
    lse = reference.attention_lse(q, k, rule)
    assert lse[0, 0, 2] == -torch.inf
    received = reference.attention_received(q, k, lse, torch.ones(1, 5), rule)
    torch.testing.assert_close(received.sum(-1), torch.full((1, 4), 4.0, dtype=torch.float64))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("kind", rules(2, 7))
@pytest.mark.parametrize("size", SIZES[:3], ids=ids)
def test_attention_backward_is_the_gradient(size, kind):
    grad, *inputs = problem(*size)
    q, k, v = (x.requires_grad_() for x in inputs)
    rule = rules(*size)[kind]
    out = explicit(q, k, rule).softmax(-1) @ v.repeat_interleave(2, 1)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    lse = reference.attention_lse(q.detach(), k.detach(), rule)
    got = reference.attention_backward(
        grad, q.detach(), k.detach(), v.detach(), out.detach(), lse, rule
    )
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backward", ["reference", "stock"])
def test_attention_backward_of_some_rows_leaves_the_others_constant(backward):
    """The S x S gradient from the dense log-sum-exp: softmax over all, constants outside S."""
    grad, *inputs = problem(2, 13)
    q, k, v = (x.requires_grad_() for x in inputs)
    inside = torch.zeros(13, dtype=torch.bool)
    inside[[1, 4, 5, 9, 12]] = True
    rule = Rule(0.4, positions=torch.arange(13)[None])
    logits = explicit(q, k, rule, detach=inside)
    wide_v = v.repeat_interleave(2, 1)
    out = logits.softmax(-1) @ torch.where(inside[:, None], wide_v, wide_v.detach())
    expected = torch.autograd.grad(out, (q, k, v), grad * inside[:, None])
    lse = explicit(q, k, rule).logsumexp(-1).detach()
    rows = [x.detach()[:, :, inside] for x in (grad, q, k, v, out, lse)]
    if backward == "stock":
        got = stock.backward(*rows, None, True, 0.4)
    else:
        got = reference.attention_backward(*rows, Rule(0.4, positions=torch.arange(5)[None]))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y[:, :, inside])
    assert all(y[:, :, ~inside].abs().max() == 0 for y in expected[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_fused_attention_is_as_accurate_as_sdpa(size, dtype):
    """Forward with log-sum-exp, and backward from it, in every dtype that SDPA fuses here."""
    B, T = size
    for D, G, masked in itertools.product((8, 32), (1, 2, 4), (False, True)):
        grad, q, k, v = problem(*size, G=G, D=D, dtype=dtype)
        mask = None
        if masked:
            mask = torch.ones(B, 1, T, T, dtype=torch.bool).tril() & (torch.rand(B, 1, T, T) > 0.3)
            mask |= torch.eye(T, dtype=torch.bool)
        eager = [x.clone().requires_grad_() for x in (q, k, v)]
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        outs, grads = [], []
        for x, y, z in (eager, exact):
            options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": G < 4}
            out = torch.nn.functional.scaled_dot_product_attention(x, y, z, **options)
            outs.append(out.detach())
            grads.append(torch.autograd.grad(out, (x, y, z), grad.to(out.dtype)))
        out, lse = ops.attention_forward(q, k, v, mask, mask is None, D**-0.5)
        assert_as_accurate(out, outs[0], outs[1])
        rule = Rule(D**-0.5, mask=mask)
        got = ops.attention_backward(grad, q, k, v, out, lse, rule, mask is None)
        for x, y, z in zip(got, *grads, strict=True):
            assert_as_accurate(x, y, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_fused_backward_serves_on_this_machine(dtype):
    """Without it every step takes the slow way; nothing else would tell."""
    assert stock._agrees("cpu", dtype)


def test_a_fused_backward_that_disagrees_is_not_used(monkeypatch):
    true = stock._cpu_backward

    def wrong(*args):
        dq, dk, dv = true(*args)
        return dq, dk * 1.001, dv

    stock._agrees.cache_clear()
    monkeypatch.setattr(stock, "_cpu_backward", wrong)
    try:
        assert not stock._agrees("cpu", torch.float32)
        grad, q, k, v = problem(1, 6, dtype=torch.float32)
        assert stock.backward(grad, q, k, v, q, q[..., 0], None, True, 1.0) is None
    finally:
        stock._agrees.cache_clear()


@pytest.mark.parametrize("rows", [[], [0], [11], [0, 3, 4, 11]], ids=str)
def test_gather_and_scatter_rows(rows):
    index = torch.tensor(rows, dtype=torch.int64)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    got = ops.gather_rows(x, index)
    assert torch.equal(got, x.reshape(12, 5)[rows])
    base = torch.randn(3, 4, 5, dtype=torch.float64)
    untouched = base.clone()
    out = ops.scatter_rows(got.detach(), index, base)
    assert torch.equal(base, untouched)
    expected = base.reshape(12, 5).clone()
    expected[rows] = x.detach().reshape(12, 5)[rows]
    assert torch.equal(out.reshape(12, 5), expected)
    assert torch.autograd.gradcheck(lambda t: ops.gather_rows(t, index), (x,))


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


def test_uniform_is_uniform_and_depends_on_its_row_alone():
    u = ops.uniform(5, -1, torch.arange(20000))
    assert torch.equal(u[::7], ops.uniform(5, -1, torch.arange(20000)[::7]))
    assert ((u >= 0) & (u < 1)).all()
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 1000).abs() < 5 * (1000 * 0.95) ** 0.5).all()
    assert not torch.equal(u, ops.uniform(5, -2, torch.arange(20000)))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that anything inside makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


def test_no_op_holds_all_pairs_of_tokens(monkeypatch):
    """Neither for one head nor for all: working memory does not grow with the square of T."""
    monkeypatch.setattr(reference, "CHUNK", 20_000)
    grad, q, k, v = problem(1, 500, dtype=torch.float32)
    rule = Rule(0.4, positions=torch.arange(500)[None])
    with Largest() as largest:
        out, lse = reference.attention(q, k, v, rule)
        reference.attention_lse(q, k, rule)
        reference.attention_received(q, k, lse, torch.ones(1, 500), rule)
        reference.attention_backward(grad, q, k, v, out, lse, rule)
    assert 0 < largest.elements <= 20_000 < 500 * 500
