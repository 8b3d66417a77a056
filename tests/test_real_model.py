"""On a trained language model of 30 layers: what small random models cannot show."""

import sys
from pathlib import Path

import pytest
import torch

from accuracy import cosine, parameter_gradients
from lightning_sage import install

EVIDENCE = Path(__file__).parents[1] / "examples" / "evidence"

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model():
    sys.path[:0] = [str(EVIDENCE), str(EVIDENCE.parent)]
    bases = pytest.importorskip("bases", reason="the evidence's packages are missing")
    try:
        folder = bases.smollm2()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).train()


@pytest.fixture(scope="module")
def batches(model):
    from scenarios import SCENARIOS
    from train import train_batches

    def first(name):
        [batch] = train_batches(SCENARIOS[name], 0, 1)
        return batch

    return first


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return parameter_gradients(model.model.layers)


def test_it_is_a_trained_model_of_30_layers(model, batches):
    assert len(model.model.layers) == 30
    with torch.no_grad():
        assert model(**batches("smol-every")).loss < 4


@pytest.mark.parametrize(
    ("scenario", "least"),
    [("smol-label", 0.9), ("smol-short", 0.85), ("smol-third", 0.75), ("smol-every", 0.5)],
)
def test_the_default_is_near_the_dense_gradient(model, batches, scenario, least):
    torch.manual_seed(0)
    batch = batches(scenario)
    dense = gradients(model, batch)
    with install(model):
        sparse = gradients(model, batch)
    assert cosine(sparse, dense) > least
    length = sum(g.square().sum() for g in sparse.values()) ** 0.5
    assert 0.5 < length / sum(g.square().sum() for g in dense.values()) ** 0.5 < 1.5
