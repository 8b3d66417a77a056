import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

import lightning_sage.fidelity
from lightning_sage import GradientFidelity

NAN, INF = float("nan"), float("inf")


def fidelity(sparse, dense, blocks=None):
    metric = GradientFidelity(blocks)
    metric.update(sparse, dense)
    return {name: value.item() for name, value in metric.compute().items()}


def gradients(seed, dtype=torch.float32, size=1000):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=generator) for shape in ((size, 3), (7,), ())]
    return [x.to(dtype) for x in draw]


def test_blocks_and_updates_by_hand():
    metric = GradientFidelity(["a", "b"])
    one, zero = torch.tensor([2.0]), torch.tensor([0.0])
    # over both: (2, 0) and (2, 2)
    metric.update({"a": [one], "b": [zero]}, {"a": [one], "b": [one]})
    metric.update({"b": [one, one]}, {"b": [one, -one]})
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx(
        {
            "cosine": (math.sqrt(0.5) + 0) / 2,
            "norm_ratio": (math.sqrt(0.5) + 1) / 2,
            "cosine/a": 1.0,
            "norm_ratio/a": 1.0,
            "cosine/b": 0.0,
            "norm_ratio/b": 0.5,
        },
        abs=1e-9,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 13, 2**20])
def test_as_one_long_vector_in_float64(monkeypatch, dtype, chunk):
    monkeypatch.setattr(lightning_sage.fidelity, "_CHUNK", chunk)
    size = 20 if chunk == 1 else 1000
    sparse, dense = ({b: gradients(s + i, dtype, size) for i, b in enumerate("ab")} for s in (0, 5))
    a, b = (
        torch.cat([x.double().flatten() for g in d.values() for x in g]) for d in (sparse, dense)
    )
    found = fidelity(sparse, dense)
    assert found["cosine"] == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-9)
    assert found["norm_ratio"] == pytest.approx((a.norm() / b.norm()).item(), abs=1e-9)
    # layouts are not values
    turned = [x.T.contiguous().T if x.dim() == 2 else x for x in sparse["a"]]
    assert fidelity({"a": turned}, {"a": dense["a"]}) == fidelity(
        {"a": sparse["a"]}, {"a": dense["a"]}
    )


def test_float32_sums_would_not_do():
    # a long tail beside one large element, which float32 cannot add to it
    dense = torch.full((2**22,), 1e-4)
    dense[0] = 1.0
    sparse = dense.clone()
    sparse[2**21 :] = 0
    expected = math.sqrt(1 + (2**21 - 1) * 1e-8) / math.sqrt(1 + (2**22 - 1) * 1e-8)
    found = fidelity({"a": [sparse]}, {"a": [dense]})
    assert found == pytest.approx({"cosine": expected, "norm_ratio": expected}, abs=1e-9)


def test_equal_gradients_have_a_cosine_of_one_exactly():
    for seed in range(20):
        own = gradients(seed)
        assert fidelity({"a": own}, {"a": own}) == {"cosine": 1.0, "norm_ratio": 1.0}


@pytest.mark.parametrize(
    ("sparse", "dense", "cosine", "ratio"),
    [
        (0.0, 0.0, 1, 1),
        (None, 0.0, 1, 1),
        (None, None, 1, 1),
        (0.0, 2.0, 0, 0),
        (None, 2.0, 0, 0),
        (2.0, 0.0, 0, 1024),
        (2.0, None, 0, 1024),
        (-3.0, 2.0, -1, 1.5),
        (5000.0, 1.0, 1, 1024),
        (1e-30, 2e-30, 1, 0.5),
        (1e30, 2e30, 1, 0.5),
        (NAN, 1.0, NAN, NAN),
        (1.0, NAN, NAN, NAN),
        (INF, 1.0, NAN, NAN),
        (None, INF, NAN, NAN),
    ],
)
def test_zeros_and_what_is_not_finite(sparse, dense, cosine, ratio):
    pair = [[None if x is None else torch.tensor([x])] for x in (sparse, dense)]
    expected = {"cosine": cosine, "norm_ratio": ratio}
    assert fidelity(*({"a": x} for x in pair)) == pytest.approx(expected, nan_ok=True)
    # beside others it takes nothing away from them, and an update that does not count does not
    metric = GradientFidelity(["a", "b"])
    for _ in range(2):
        metric.update(*({"a": x, "b": [torch.tensor([1.0])]} for x in pair))
    found = metric.compute()
    assert found["cosine/b"] == found["norm_ratio/b"] == 1
    assert found["cosine/a"].item() == pytest.approx(cosine, nan_ok=True)
    assert found["cosine"].isnan() == math.isnan(cosine)


def test_nothing_counted_is_nan():
    metric = GradientFidelity(["a"])
    metric.update({}, {})
    assert all(value.isnan() for value in metric.compute().values())
    metric.update({"a": []}, {"a": []})
    assert metric.compute()["cosine/a"] == 1


@pytest.mark.parametrize(
    ("sparse", "dense", "message"),
    [
        ({"z": []}, {"z": []}, r"block 'z' is none of blocks=\['a'\]"),
        ({"a": []}, {}, "block 'a' has one of the gradients"),
        ({"a": [None]}, {"a": []}, "block 'a' has 1 sparse gradients and 0 dense ones"),
        ({"a": [torch.ones(2)]}, {"a": [torch.ones(1, 2)]}, r"shapes \[2\] and \[1, 2\]"),
    ],
)
def test_gradients_that_do_not_match_are_refused(sparse, dense, message):
    metric = GradientFidelity(["a"])
    with pytest.raises(ValueError, match=message):
        metric.update(sparse, dense)
    assert not metric.seen.any()


def test_comparing_reads_nothing_from_the_device():
    metric = GradientFidelity(["a", "b"]).to("meta")
    own = [torch.ones(3, device="meta"), None]
    metric.update({"a": own}, {"a": own})
    assert metric.seen.is_meta


class Largest(TorchFunctionMode):
    """The most float64 elements of one result."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            self.elements = max(self.elements, out.numel())
        return out


def test_no_gradient_is_copied_to_float64_as_a_whole(monkeypatch):
    monkeypatch.setattr(lightning_sage.fidelity, "_CHUNK", 100)
    with Largest() as largest:
        fidelity({"a": gradients(0)}, {"a": gradients(1)})
    assert largest.elements == 100
