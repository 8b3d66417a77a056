"""Models of other libraries, unchanged: timm's vision transformers, litgpt's GPT, Liger's kernels.

Skipped where a library is not installed; none of them is a dependency of the tests.
"""

import contextlib
import copy

import pytest
import torch
from torch.nn import functional as F

import zoo
from accuracy import assert_gradients_close, parameter_gradients
from lightning_sage import AllTokens, ReplayError, SagePolicy, install
from oracle import oracle, replayed
from steps import policy_of as for_transformers

MODES = ("salient", "full")
over_modes = pytest.mark.parametrize("mode", MODES)


def shaken(model):
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double().train()


def step(model, loss):
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    loss(model).backward()
    return parameter_gradients(model)


def policy_of(blocks, **fields):
    plain = {"replay": None, "sinks": 1, "queries": "all", "keep_loss_rows": False}
    return SagePolicy(**plain | {"blocks": [blocks]} | fields)


def assert_exact(model, loss, blocks, mode, tolerance=1e-9, drops=False):
    """Dropout draws other numbers than a dense step: there the oracle alone can tell."""
    if not drops:
        dense = step(model, loss)
        with install(model, policy_of(blocks, keep=AllTokens(), attention=mode)):
            assert_gradients_close(step(model, loss), dense, tolerance)
    with install(model, policy_of(blocks, keep=0.4, attention=mode)) as installation:
        found = step(model, loss)
        records = installation.records
    assert all(0 < r.kept.sum() < r.valid.sum() for r in records)
    with oracle(model, replayed(records), mode):
        expected = step(model, loss)
    assert_gradients_close(found, expected, tolerance)


def picture_loss(model):
    draw = torch.Generator().manual_seed(1)
    pictures = torch.randn(3, 3, 32, 32, generator=draw, dtype=torch.float64)
    out = model(pictures)
    return (out * torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)).tanh().sum()


def vision_transformer(**options):
    vit = pytest.importorskip("timm.models.vision_transformer")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    if "block_fn" in options:
        options["block_fn"] = getattr(vit, options["block_fn"])
    return shaken(vit.VisionTransformer(**sizes, num_classes=5, **options))


VITS = {
    "plain": {},
    "layer scale, qk norm, registers": {"init_values": 0.5, "qk_norm": True, "reg_tokens": 2},
    "mean of tokens": {"global_pool": "avg", "class_token": False},
    "patches dropped before the blocks": {"patch_drop_rate": 0.5},
    "parallel": {"block_fn": "ParallelScalingBlock"},
    "post-norm": {"block_fn": "ResPostBlock"},
}


@over_modes
@pytest.mark.parametrize("options", VITS.values(), ids=VITS)
def test_timm(options, mode):
    assert_exact(vision_transformer(**options), picture_loss, "blocks.*", mode)


def test_dropout_of_timm_is_replayed():
    model = vision_transformer(proj_drop_rate=0.3, attn_drop_rate=0.2)
    assert_exact(model, picture_loss, "blocks.*", "salient", drops=True)


def test_timm_with_attention_written_out():
    model = vision_transformer()
    same = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.fused_attn = False
    with install(model, policy_of("blocks.*", keep=0.4)) as installation:
        found = step(model, picture_loss)
        rows = replayed(installation.records)
    with oracle(same, rows, "salient"):
        expected = step(same, picture_loss)
    assert_gradients_close(found, expected, 1e-9)


def test_stochastic_depth_of_timm_is_refused_by_name_and_goes_dense():
    model = vision_transformer(drop_path_rate=0.5)
    with (
        install(model, policy_of("blocks.*", keep=0.4)),
        pytest.raises(ReplayError, match=r"blocks\.1.*draws random numbers \(bernoulli_\)"),
    ):
        step(model, picture_loss)
    # the first block has a rate of zero
    with install(model, policy_of("blocks.*", keep=0.4, dense_blocks=(1,))) as installation:
        step(model, picture_loss)
    assert [record.name for record in installation.records] == ["blocks.0"]


def test_windows_of_pictures_are_refused_by_name():
    swin = pytest.importorskip("timm.models.swin_transformer")
    model = swin.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4
    )
    model = shaken(model)
    with (
        install(model, policy_of("layers.*.blocks.*", keep=0.4)),
        pytest.raises(ReplayError, match=r"layers\.0\.blocks\.0"),
    ):
        step(model, picture_loss)


def gpt(name, module="litgpt", **options):
    pytest.importorskip("litgpt")
    library = __import__(module, fromlist=["GPT", "Config"])
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": zoo.VOCABULARY}
    sizes |= {"block_size": 16, "intermediate_size": 48, "head_size": 8}
    return library.GPT(library.Config.from_name(name, **sizes | options))


def text_loss(model):
    ids = zoo.make_batch("llama", None)["input_ids"]
    out = model(ids)
    return F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


GPTS = {
    "Llama-3-8B": {"n_query_groups": 2},
    "pythia-14m": {"n_query_groups": 4},
    "phi-2": {"n_query_groups": 4},
    "falcon-7b": {"n_query_groups": 1},
    "Qwen3-0.6B": {"n_query_groups": 2},
    "OLMo-2-1124-7B": {"n_query_groups": 2},
    "Gemma-3-1b-it": {"n_query_groups": 2, "sliding_window_size": 4},
    "Mixtral-8x7B-v0.1": {"n_query_groups": 2},
}


@over_modes
@pytest.mark.parametrize("name", GPTS)
def test_litgpt(name, mode):
    """Its norms are in float32, whatever they are given."""
    model = shaken(gpt(name, **GPTS[name]))
    assert_exact(model, text_loss, "transformer.h.*", mode, tolerance=1e-6)


@over_modes
def test_lora_of_litgpt(mode):
    adapted = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
    model = gpt("Llama-3-8B", "litgpt.lora", n_query_groups=2, lora_r=4, **adapted)
    from litgpt.lora import mark_only_lora_as_trainable

    mark_only_lora_as_trainable(shaken(model))
    assert_exact(model, text_loss, "transformer.h.*", mode, tolerance=1e-6)


def test_a_mask_that_litgpt_makes_inside_of_a_block_is_refused_by_name():
    """With a softcap it masks by the order of what it is given, whose samples are one here."""
    model = shaken(gpt("Gemma-2-2b", n_query_groups=2, sliding_window_size=4))
    with (
        install(model, policy_of("transformer.h.*", keep=0.4)),
        pytest.raises(ReplayError, match=r"transformer\.h\.0"),
    ):
        step(model, text_loss)


@contextlib.contextmanager
def liger(model, **kernels):
    """Liger's kernels on a model, and the functions of transformers that it replaces put back."""
    transformers = pytest.importorskip("liger_kernel.transformers")
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    every = ("rope", "swiglu", "rms_norm", "cross_entropy", "fused_linear_cross_entropy")
    chosen = dict.fromkeys(every, False) | kernels
    patched = copy.deepcopy(model)
    try:
        transformers.apply_liger_kernel_to_llama(**chosen, model=patched)
        yield patched
    finally:
        vars(modeling_llama).update(before)


def assert_exact_with_liger(device, mode, **kernels):
    """All tokens against a dense step with the same kernels, some against the oracle without."""
    plain = zoo.build("llama", dtype=torch.float32).to(device)
    batch = {name: x.to(device) for name, x in zoo.make_batch("llama").items()}

    def loss(model):
        return model(**batch).loss

    with liger(plain, **kernels) as model:
        dense = step(model, loss)
        with install(model, for_transformers(keep=AllTokens(), attention=mode)):
            assert_gradients_close(step(model, loss), dense, 1e-4)
        with install(model, for_transformers(keep=0.4, attention=mode)) as installation:
            found = step(model, loss)
            rows = replayed(installation.records)
    with oracle(plain, rows, mode):
        expected = step(plain, loss)
    assert_gradients_close(found, expected, 1e-3)


@pytest.mark.gpu
@over_modes
@pytest.mark.parametrize("head", ["cross_entropy", "fused_linear_cross_entropy"])
def test_liger_kernels_on_a_model(device, mode, head):
    assert_exact_with_liger(device, mode, rope=True, swiglu=True, rms_norm=True, **{head: True})


@over_modes
def test_the_one_kernel_of_liger_that_triton_interprets(device, mode):
    assert_exact_with_liger(device, mode, rope=True)
