"""Attention by the names that users choose: flash attention's layout and masks, and others refused.

The packages are for GPUs. Their functions are stood in for by plain PyTorch, beneath transformers'
own code, which unpads, finds packed documents and names windows.
"""

import contextlib
import itertools
import math
from unittest import mock

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import modeling_flash_attention_utils as flash
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import zoo
from accuracy import assert_gradients_close, parameter_gradients
from lightning_sage import AllTokens, ReplayError, install
from lightning_sage.engine.flash import FlashMask
from oracle import oracle, replayed
from steps import policy_of

MODES = ("salient", "full")
MODELS = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "bert", "bert-classes")


def flash_fn(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """``[B, T, H, D]`` in and out, as of `flash_attn_func`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    hidden = ahead > (0 if causal else math.inf)
    for side, step in zip(window_size, (-1, 1), strict=True):
        if side >= 0:
            hidden = hidden | (step * ahead > side)
    return (logits.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(1, 2)


def flash_varlen_fn(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """``[N, H, D]`` in and out, one sequence after the other."""
    out = []
    limits = cu_seqlens_q.tolist()
    assert limits == cu_seqlens_k.tolist()
    for start, stop in itertools.pairwise(limits):
        one = (x[None, start:stop] for x in (q, k, v))
        out.append(flash_fn(*one, softmax_scale, causal, window_size, softcap)[0])
    return torch.cat(out)


@contextlib.contextmanager
def stood_in():
    functions = flash_fn, flash_varlen_fn, None, flash._pad_input, flash._unpad_input
    process = flash._lazy_define_process_function(flash_varlen_fn)
    given = functions, (process, dict)
    with mock.patch.object(flash, "lazy_import_flash_attention", return_value=given):
        yield


def batch_of(name, kind):
    """A batch; of a packed one the documents are 4, 7 and 5 tokens long."""
    if kind not in ("packed", "limits"):
        return zoo.make_batch(name, kind)
    batch = zoo.make_batch(name, None, size=1, length=16)
    lengths = (4, 7, 5)
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    batch["labels"][:, [0, 4, 11]] = -100
    if kind == "limits":
        limits = torch.tensor([0, 4, 11, 16], dtype=torch.int32)
        batch |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), limits)
        batch |= dict.fromkeys(("max_length_q", "max_length_k"), 7)
    return batch | {"use_cache": False}


def step(name, model, batch, implementation):
    model.config._attn_implementation = implementation
    model.zero_grad(set_to_none=True)
    with zoo.exactly(name), stood_in():
        model(**batch).loss.backward()
    return parameter_gradients(model)


CASES = [
    (name, kind)
    for name in MODELS
    for kind in (*zoo.MODELS[name].paddings, "packed", "limits")
    if kind not in ("packed", "limits") or zoo.MODELS[name].head == "causal"
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_flash_attention(name, kind, mode):
    """Dense: the same through SDPA. Sparse: dense, and the oracle, which attends by itself."""
    model, batch = zoo.build(name), batch_of(name, kind)
    plain = "eager" if name == "gemma2" else "sdpa"  # a softcap
    dense = step(name, model, batch, "flash_attention_2")
    assert_gradients_close(dense, step(name, model, batch, plain), 1e-9)
    with install(model, policy_of(keep=AllTokens(), attention=mode)):
        found = step(name, model, batch, "flash_attention_2")
    assert_gradients_close(found, dense, 1e-9)
    policy = policy_of(keep=0.4, attention=mode, keep_loss_rows=False)
    with install(model, policy) as installation:
        found = step(name, model, batch, "flash_attention_2")
        rows = replayed(installation.records)
    assert all(0 < (r.weights > 0).sum() < r.weights.numel() for r in rows)
    with oracle(model, rows, mode):
        expected = step(name, model, batch, plain)
    assert_gradients_close(found, expected, 1e-8)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_same_tokens_are_kept_as_with_sdpa(name):
    batch, kept = batch_of(name, "left"), {}
    for implementation in ("sdpa", "flash_attention_2", "flash_attention_3"):
        model = zoo.build(name)
        with install(model, policy_of(keep=0.4)) as installation:
            step(name, model, batch, implementation)
        kept[implementation] = torch.stack([r.kept for r in installation.records])
    assert all(torch.equal(rows, kept["sdpa"]) for rows in kept.values())


def test_what_a_call_was_told_is_looked_at_once():
    model, batch = zoo.build("llama"), batch_of("llama", "packed")
    look = FlashMask.visibility
    with (
        install(model, policy_of(keep=0.4)),
        mock.patch.object(FlashMask, "visibility", autospec=True, side_effect=look) as looked,
    ):
        step("llama", model, batch, "flash_attention_2")
    # by both blocks, in the self-check and in the step
    assert looked.call_count == 1


def test_a_window_of_tokens_with_holes_between_them():
    """It is of tokens that are there: a hole does not count."""
    model, batch = zoo.build("mistral"), batch_of("mistral", None)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, [2, 3, 6]] = 0
    # nor does what a hole predicts
    batch["labels"][:, [2, 3, 4, 6, 7]] = -100
    dense = step("mistral", model, batch, "flash_attention_2")
    with install(model, policy_of(keep=AllTokens(), attention="full")):
        found = step("mistral", model, batch, "flash_attention_2")
    assert_gradients_close(found, dense, 1e-9)


def test_skipping_is_refused_with_flash_attention():
    model = zoo.build("llama")
    with (
        install(model, policy_of(keep=0.4, unselected="skip")),
        pytest.raises(ReplayError, match="use unselected='identity'"),
    ):
        step("llama", model, batch_of("llama", "right"), "flash_attention_2")


def test_flex_attention_is_refused_by_name():
    """Its mask is made here, because transformers compiles the making of one."""
    model, batch = zoo.build("llama"), batch_of("llama", "right")
    blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
    masks = ALL_MASK_ATTENTION_FUNCTIONS._local_mapping
    with (
        mock.patch.dict(masks, {"flex_attention": lambda *_, **__: blocks}),
        install(model, policy_of(keep=0.4)),
        pytest.raises(ReplayError, match=r"model\.layers\.0.*flex_attention.*BlockMask.*'sdpa'"),
    ):
        step("llama", model, batch, "flex_attention")


@pytest.fixture
def named():
    """Attention functions under names of their own, forgotten afterwards."""
    before = set(ALL_ATTENTION_FUNCTIONS._global_mapping)
    yield ALL_ATTENTION_FUNCTIONS.register
    for name in set(ALL_ATTENTION_FUNCTIONS._global_mapping) - before:
        del ALL_ATTENTION_FUNCTIONS._global_mapping[name]


def test_a_paged_cache_is_refused_by_name(named):
    named("paged|eager", lambda *_, **__: None)
    model, batch = zoo.build("llama"), batch_of("llama", None)
    with (
        install(model, policy_of(keep=0.4)),
        pytest.raises(ReplayError, match=r"model\.layers\.0.*paged"),
    ):
        step("llama", model, batch, "paged|eager")


def test_a_function_of_ones_own_is_judged_by_what_it_computes(named):
    """One that masks as it is told is replayed; one that masks by itself is refused.

    Under a name that transformers does not know it makes no mask at all.
    """

    def told(module, query, key, value, mask, scaling=None, **_):
        from transformers.models.llama.modeling_llama import repeat_kv

        k, v = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        logits = query @ k.mT * scaling
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        return (logits.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2), None

    def by_itself(module, query, key, value, mask, scaling=None, **_):
        T = query.shape[2]
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        return told(module, query, key, value, causal, scaling)

    named("told", told)
    named("by_itself", by_itself)
    model, batch = zoo.build("llama"), batch_of("llama", None)
    with install(model, policy_of(keep=AllTokens())):
        with pytest.raises(ReplayError, match="something unknown in it"):
            step("llama", model, batch, "by_itself")
        model.config._attn_implementation = "told"
        found = step("llama", model, batch, "told")
    assert_gradients_close(found, step("llama", model, batch, "told"), 1e-9)
