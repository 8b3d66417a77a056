"""Packed documents, and what a training step may ask of a model besides its loss."""

import functools
import re
from pathlib import Path

import pytest
import torch

import snippets
import zoo
from accuracy import assert_gradients_close, parameter_gradients
from lightning_sage import AllTokens, SagePolicy, install
from oracle import oracle, replayed
from steps import policy_of

MODES = ("salient", "full")
over_modes = pytest.mark.parametrize("mode", MODES)
LENGTHS = (5, 8, 4, 6)
STARTS = (0, 5, 13, 17)


@functools.cache
def documents():
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, zoo.VOCABULARY, (n,), generator=draw) for n in LENGTHS]


def padded():
    T = max(LENGTHS)
    ids = torch.full((len(LENGTHS), T), zoo.PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, document in enumerate(documents()):
        n = len(document)
        ids[i, :n], mask[i, :n], labels[i, 1:n] = document, 1, document[1:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(told):
    """All documents in one sequence.

    Args:
        told: `positions` that start again; `limits`, as transformers' DataCollatorWithFlattening
            tells of them too; a mask of pairs, `bool` or `float`.
    """
    ids = torch.cat(documents())[None]
    labels = ids.clone()
    labels[0, list(STARTS)] = -100
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}
    of = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    seen = (of[:, None] == of) & torch.ones(len(of), len(of), dtype=torch.bool).tril()
    if told == "limits":
        limits = torch.tensor([*STARTS, len(of)], dtype=torch.int32)
        batch |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), limits)
        batch |= dict.fromkeys(("max_length_q", "max_length_k"), max(LENGTHS))
    if told == "bool":
        batch["attention_mask"] = seen[None, None]
    if told == "float":
        zeros = torch.zeros(seen.shape, dtype=torch.float64)
        batch["attention_mask"] = zeros.masked_fill(~seen, -1e9)[None, None]
    return batch


def step(name, model, batch, loss=lambda model, batch: model(**batch).loss):
    model.zero_grad(set_to_none=True)
    with zoo.exactly(name):
        loss(model, batch).backward()
    return parameter_gradients(model)


def assert_exact(name, batch, mode, *loss):
    """All tokens give the dense gradient, some that of the oracle; returns dense and records."""
    model = zoo.build(name)
    dense = step(name, model, batch, *loss)
    with install(model, policy_of(keep=AllTokens(), attention=mode)):
        assert_gradients_close(step(name, model, batch, *loss), dense, 1e-10)
    policy = policy_of(keep=0.4, attention=mode, keep_loss_rows=False)
    with install(model, policy) as installation:
        found = step(name, model, batch, *loss)
        records = installation.records
    assert all(0 < r.kept.sum() < r.valid.sum() for r in records)
    with oracle(model, replayed(records), mode):
        expected = step(name, model, batch, *loss)
    assert_gradients_close(found, expected, 1e-8)
    return dense, records


PACKED = [
    *((name, told) for name in ("llama", "qwen3", "mistral", "gemma2", "gemma3")
      for told in ("positions", "limits")),
    *((name, told) for name in ("llama", "qwen3") for told in ("bool", "float")),
]  # fmt: skip


@over_modes
@pytest.mark.parametrize(("name", "told"), PACKED)
def test_packed_documents(name, told, mode):
    """As if each stood in a row of its own: documents see nothing of one another."""
    dense, records = assert_exact(name, packed(told), mode)
    with zoo.exactly(name):
        assert_gradients_close(dense, step(name, zoo.build(name), padded()), 1e-9)
    # what is salient is looked for in every document
    ends = (*STARTS[1:], sum(LENGTHS))
    spans = list(zip(STARTS, ends, strict=True))
    assert all(record.kept[0, start:stop].any() for record in records for start, stop in spans)


def test_saliency_of_packed_documents_is_that_of_each_alone():
    """Attention is received from one's own document alone.

    A budget is of the whole sequence, as many tokens of a document as its attention earns.
    """
    model = zoo.build("llama")
    policy = SagePolicy(keep=0.999, replay=None, sinks=0, keep_last=False, keep_loss_rows=False)
    orders = []
    for batch in (packed("positions"), padded()):
        with install(model, policy) as installation:
            seen = []
            choose = installation.session.choose

            def keep_scores(*given, choose=choose, seen=seen):
                choice = choose(*given)
                seen.append(choice.scores)
                return choice

            installation.session.choose = keep_scores
            step("llama", model, batch)
        orders.append(seen)
    for together, apart in zip(*orders, strict=True):
        for i, (start, n) in enumerate(zip(STARTS, LENGTHS, strict=True)):
            one, other = together[0, start : start + n], apart[i, :n]
            torch.testing.assert_close(one / one.sum(), other / other.sum())


def test_a_mask_that_eager_attention_adds_is_refused_as_bool():
    """Gemma 2 adds its mask: True is 1 there, which hides nothing; the model itself is wrong."""
    model = zoo.build("gemma2")
    with install(model, policy_of(keep=0.4)), pytest.raises(RuntimeError, match=r"layers\.0"):
        step("gemma2", model, packed("bool"))


def deep(model, batch):
    """A loss on every hidden state, padding left out."""
    out = model(**batch, output_hidden_states=True)
    valid = batch["attention_mask"][..., None]
    weights = torch.linspace(-1, 1, out.hidden_states[0].numel()).view_as(out.hidden_states[0])
    return out.loss + sum((h * weights).tanh().mul(valid).mean() for h in out.hidden_states)


def one_layer_deep(model, batch):
    out = model(**batch, output_hidden_states=True)
    return out.hidden_states[1].pow(2).mul(batch["attention_mask"][..., None]).mean() + out.loss


def as_a_tuple(model, batch):
    return model(**batch, return_dict=False)[0]


def from_embeddings(model, batch):
    rest = {name: x for name, x in batch.items() if name != "input_ids"}
    return model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), **rest).loss


def of_the_last_logits(model, batch):
    rest = {name: x for name, x in batch.items() if name != "labels"}
    valid = batch["attention_mask"][:, -3:, None]
    return model(**rest, logits_to_keep=3).logits.mul(valid).pow(2).mean()


def by_the_items_of_all_ranks(model, batch):
    return model(**batch, num_items_in_batch=torch.tensor(17)).loss


ASKED = [
    (name, f)
    for name in ("llama", "gemma3", "gpt2", "bert", "modernbert")
    for f in (deep, one_layer_deep, as_a_tuple, from_embeddings, of_the_last_logits,
              by_the_items_of_all_ranks)
    if name not in ("bert", "modernbert") or f not in (of_the_last_logits,
                                                       by_the_items_of_all_ranks)
]  # fmt: skip


@over_modes
@pytest.mark.parametrize(("name", "loss"), ASKED, ids=[f"{n}-{f.__name__}" for n, f in ASKED])
def test_asked_of_a_model(name, loss, mode):
    assert_exact(name, zoo.make_batch(name), mode, loss)


def test_labels_in_the_batch_alone():
    """A loss of the user's own: the same rows are kept as with the model's."""
    model, batch, kept = zoo.build("llama"), zoo.make_batch("llama"), []
    with install(model, policy_of(keep=0.3)) as installation:
        step("llama", model, batch)
        kept.append([r.kept for r in installation.records])
        installation.observe(batch)
        unlabelled = {name: x for name, x in batch.items() if name != "labels"}
        model(**unlabelled)
        kept.append([r.kept for r in installation.records])
    assert all(torch.equal(x, y) for x, y in zip(*kept, strict=True))


GUIDE = (Path(__file__).parents[1] / "examples" / "neighbours.md").read_text()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_the_guide_runs():
    names = snippets.names()
    with torch.compiler.set_stance(force_backend="eager"):
        for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
            exec(code, names)
    assert all(x.grad is not None for x in names["encoder"].parameters())
