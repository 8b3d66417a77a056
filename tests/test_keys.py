"""Kept rows that are not replayed learn as keys and values: attention="kept"."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

import zoo
from accuracy import assert_gradients_close, loss_and_gradients, relative_error
from lightning_sage import AllTokens, ImportanceSampling, SagePolicy, install
from lightning_sage.selections import Chosen, Selection
from oracle import oracle, replayed
from steps import oracle_step, policy_of, sage_step

LENGTH, LOSS = 24, 6


def model_of(blocks=1, kind=LlamaConfig, **fields):
    sizes = {"hidden_size": 32, "vocab_size": 50, "pad_token_id": 0, "use_cache": False}
    if kind is LlamaConfig:
        sizes |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"num_hidden_layers": blocks}
    else:
        sizes |= {"n_layer": blocks, "n_head": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**sizes | fields)).double().train()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch_of(count=3):
    """Loss on the last quarter."""
    ids = torch.randint(1, 50, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "labels": torch.where(torch.arange(LENGTH) < LENGTH - LOSS, -100, ids),
    }


def step(model, policy=None, batch=None):
    batch = batch or batch_of()
    if policy is None:
        return loss_and_gradients(model, batch)[1], []
    with install(model, policy) as installed:
        return loss_and_gradients(model, batch)[1], installed.records


def farthest(gradients, dense):
    return max(relative_error(gradients[name], dense[name]) for name in dense)


def test_replaying_the_rows_with_gradient_is_dense_where_all_are_keys():
    # of one block only the loss-bearing rows have a gradient coming in
    model = model_of()
    dense, _ = step(model)
    policy = SagePolicy(keep=AllTokens(), replay=LOSS / LENGTH)
    gradients, [record] = step(model, policy)
    assert_gradients_close(gradients, dense, 1e-10)
    assert len(record.keys) == record.valid.sum() - record.replayed.sum() == 3 * (LENGTH - LOSS)
    apart, _ = step(model, SagePolicy(**vars(policy) | {"attention": "salient"}))
    assert farthest(apart, dense) > 0.05


@pytest.mark.parametrize("replay", [0.25, ImportanceSampling(0.25)], ids=["top", "drawn"])
def test_only_kept_rows_are_keys(replay):
    model, batch = model_of(2), batch_of()
    gradients, records = step(model, SagePolicy(keep=0.5, replay=replay), batch)
    for record in records:
        kept = torch.zeros_like(record.kept).flatten()
        kept[torch.cat([record.rows, record.keys])] = True
        assert torch.equal(kept.view_as(record.kept), record.kept)
    with oracle(model, replayed(records), "kept"):
        expected = loss_and_gradients(model, batch)[1]
    assert_gradients_close(gradients, expected, 1e-10)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "gemma3"])
def test_dropout_is_that_of_the_forward(name):
    options = {"attention_dropout": 0.2}
    options |= {"lora": True, "lora_dropout": 0.1} if name == "llama" else {}
    options |= {"dropout": 0.1} if zoo.MODELS[name].dropout else {}
    model, batch = zoo.build(name, **options), zoo.make_batch(name)
    policy = policy_of(keep=0.7, replay=0.3)
    _, gradients, rows = sage_step(name, model, batch, policy)
    assert all(r.others.any() for r in rows)
    _, expected = oracle_step(name, model, batch, rows, "kept")
    assert_gradients_close(gradients, expected, 1e-8)


def test_drawing_with_all_keys_is_unbiased():
    model, batch = model_of(), batch_of(2)
    dense, _ = step(model, batch=batch)
    errors = {}
    for attention in ("kept", "salient"):
        policy = SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.25), attention=attention)
        mean = dict.fromkeys(dense, 0.0)
        with install(model, policy):
            for _ in range(400):
                drawn = loss_and_gradients(model, batch)[1]
                mean = {name: mean[name] + drawn[name] / 400 for name in mean}
        name = "model.layers.0.self_attn.v_proj.weight"
        errors[attention] = relative_error(mean[name], dense[name])
    assert errors["kept"] < 0.05 < 0.1 < errors["salient"]


def test_with_every_row_replayed_nothing_changes():
    model = model_of(2)
    kept, records = step(model, SagePolicy(keep=0.3, replay=None))
    salient, _ = step(model, SagePolicy(keep=0.3, replay=None, attention="salient"))
    assert all(record.keys is None for record in records)
    assert all(torch.equal(kept[name], salient[name]) for name in kept)


class Everything(Selection):
    """Takes all, without saying so beforehand."""

    def replay(self, norms, saliency, valid, noise):
        return Chosen(torch.ones_like(norms, dtype=torch.bool))


def test_a_replay_that_takes_all_kept_rows_leaves_no_keys():
    model = model_of(2)
    policy = SagePolicy(keep=0.5, replay=Everything())
    gradients, records = step(model, policy)
    everything, _ = step(model, SagePolicy(keep=0.5, replay=None))
    assert all(record.keys is None for record in records)
    assert_gradients_close(gradients, everything, 1e-12)


def test_attention_by_hand_has_the_keys_of_replayed_rows_alone():
    model = model_of(2, BloomConfig)
    policy = SagePolicy(keep=0.6, replay=0.3)
    kept, records = step(model, policy)
    salient, _ = step(model, SagePolicy(**vars(policy) | {"attention": "salient"}))
    assert all(record.keys is None for record in records)
    # ranked by gradient and saliency, as there
    assert all(torch.equal(kept[name], salient[name]) for name in kept)


def test_saliency_waits_only_where_the_replay_ranks_by_it():
    model = model_of(2)
    policy = SagePolicy(keep=AllTokens(), replay=0.25)
    cached = {}
    for attention in ("kept", "salient"):
        _, records = step(model, SagePolicy(**vars(policy) | {"attention": attention}))
        cached[attention] = sum(record.cached_bytes for record in records)
    assert cached["salient"] - cached["kept"] == 2 * 3 * LENGTH * torch.float64.itemsize
