"""Tiny random models of every transformers type, and batches for them.

A type is what transformers calls `model_type`, perhaps with a variant of `tiny_fields.py` behind
an "@"; a task is a key of `TASKS`. Configurations are the defaults of their types, made small.
"""

import functools
import inspect
import random
from types import SimpleNamespace

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tiny_fields import FIELDS, VARIANTS
from tiny_sizes import (
    BLOCKS,
    CLASSES,
    DECODER_TOKENS,
    HEAD_WIDTH,
    HEADS,
    IMAGE,
    SAMPLES,
    SIZES,
    SPECIAL_IDS,
    TOKENS,
)

TASKS = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "seq-cls": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "image-cls": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}


def build(task, model_type, seed=0, **fields):
    """A model in float64 and training mode, without dropout, and its :func:`make_batch`."""
    model_type, _, variant = model_type.partition("@")
    if variant:
        fields = VARIANTS[f"{model_type}@{variant}"] | fields
    kind = CONFIG_MAPPING[model_type]
    cls = TASKS[task][kind]
    cls = cls[0] if isinstance(cls, list | tuple) else cls
    fields = FIELDS.get(model_type, {}) | FIELDS.get(f"{task}:{model_type}", {}) | fields
    if task == "causal-lm" and cls.__name__.endswith(("LMHeadModel", "ForCausalLM")):
        usual = kind()
        if getattr(usual, "is_decoder", None) is False and not _has_encoder(usual):
            fields = {"is_decoder": True} | fields
    config = _deterministic(_tiny(kind, fields))
    if task in ("seq-cls", "image-cls"):
        config.num_labels = CLASSES
    if task == "seq-cls" and getattr(config, "problem_type", None) is None:
        config.problem_type = "single_label_classification"
    own = getattr(cls, "config_class", None)
    for part in ("text_config", "decoder"):
        inner = getattr(config, part, None)
        if own is not None and not isinstance(config, own) and isinstance(inner, own):
            config = inner
    return _made(cls, config, seed), functools.partial(
        make_batch, SimpleNamespace(config=config, forward=cls.forward), task, model_type
    )


def _made(cls, config, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        model = cls(config)
        # initial zeros (biases, scales) and flat attention would hide mistakes
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    if _has_encoder(config) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    model = model.double().train()
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and _drops(name):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def _drops(name):
    return any(part in name.lower() for part in ("drop", "jitter", "input_noise"))


def _deterministic(config, seen=None):
    """Nothing is dropped, no cache is built, and experts take any dtype."""
    config._experts_implementation = "eager"
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            _deterministic(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif name == "use_cache":
            config.use_cache = False
    return config


def _has_encoder(config):
    return getattr(config, "is_encoder_decoder", False)


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _tiny(kind, fields, depth=0):
    """A small configuration of a class; `fields` go before what names say."""
    left = fields.get("_default", ())
    fields = {name: value for name, value in fields.items() if name != "_default"}
    usual, given, ids = kind(), {}, iter(range(100, 128))
    for name, value in list(vars(usual).items()):
        if name in left or name in fields or name.startswith("_"):
            continue
        if isinstance(value, transformers.PreTrainedConfig):
            if depth < 4:
                given[name] = _tiny(type(value), FIELDS.get(value.model_type, {}), depth + 1)
        elif name in SPECIAL_IDS and (_is_int(value) or value is None):
            given[name] = next(ids)
        elif name in SIZES and _is_int(value):
            absent = value < 0 if name == "pad_token_id" else value <= 0 and "window" in name
            given[name] = value if absent else SIZES[name]
        elif name == "pad_token_id" and value is None:
            given[name] = 0
        elif name == "eos_token_id" and isinstance(value, list | tuple):
            given[name] = 2
        elif name == "head_dim" and value is None:
            given[name] = HEAD_WIDTH
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        given["num_key_value_heads"] = HEADS  # latent attention has no grouped heads
    given = _one_block_of_each_kind(usual, given, fields) | fields
    parameters = inspect.signature(kind.__init__).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        given = {name: value for name, value in given.items() if name in parameters}
    return kind(**given)


def _one_block_of_each_kind(usual, given, fields):
    count, kinds = BLOCKS, getattr(usual, "layer_types", None)
    if isinstance(kinds, list | tuple) and "layer_types" not in fields:
        kinds = list(dict.fromkeys(kinds))
        kinds = kinds * BLOCKS if len(kinds) == 1 else kinds
        count, given["layer_types"] = len(kinds), kinds
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in given:
                given[name] = count
    kinds = getattr(usual, "mlp_layer_types", None)
    if isinstance(kinds, list | tuple) and "mlp_layer_types" not in fields:
        given["mlp_layer_types"] = (list(dict.fromkeys(kinds)) * count)[:count]
    return given


def make_batch(model, task, model_type, padding="right", *, size=SAMPLES, length=TOKENS, seed=0):
    """Keyword arguments of a training step; padding is "right", "left" or None."""
    draw = torch.Generator().manual_seed(seed)
    parameters = inspect.signature(model.forward).parameters
    batch = (
        _pictures(model.config, model_type, size, draw)
        if task == "image-cls"
        else _text(model.config, task, parameters, padding, (size, length), draw)
    )
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "labels" in parameters or (task == "seq-cls" and free):
        batch["labels"] = _labels(batch, task, size, draw)
    change = _BATCHES.get(model_type)
    if change is not None:
        change(batch, padding, model.config, task, draw)
    return {name: value for name, value in batch.items() if name in parameters or free}


def padded(shape, padding):
    """``[B, T]`` int64, 0 on padding: none in the first sample, one token more in each."""
    size, length = shape
    pads = torch.arange(size).clamp(max=length - 2)[:, None] * (padding is not None)
    position = torch.arange(length)
    valid = position >= pads if padding == "left" else position < length - pads
    return valid.long()


def _text(config, task, parameters, padding, shape, draw):
    ids = torch.randint(10, 90, shape, generator=draw)
    valid = padded(shape, padding)
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    ids = ids.masked_fill(valid == 0, pad if _is_int(pad) and pad >= 0 else 0)
    batch = {"input_ids": ids}
    if "attention_mask" in parameters:
        batch["attention_mask"] = valid
    if task == "seq-cls" and _has_encoder(config):
        # its head reads the last end of sequence; the decoder is given the same words
        last = (valid * torch.arange(shape[1])).argmax(-1)
        batch["input_ids"] = ids.scatter(1, last[:, None], 2)
    elif (task == "seq2seq" or _has_encoder(config)) and "decoder_input_ids" in parameters:
        short = (shape[0], DECODER_TOKENS)
        batch["decoder_input_ids"] = torch.randint(10, 90, short, generator=draw)
        if "decoder_attention_mask" in parameters:
            batch["decoder_attention_mask"] = padded(short, padding)
    return batch


def _labels(batch, task, size, draw):
    if task in ("seq-cls", "image-cls"):
        return torch.randint(0, CLASSES, (size,), generator=draw)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if "decoder_input_ids" in batch:
        ids, mask = batch["decoder_input_ids"], batch.get("decoder_attention_mask")
        ids = torch.randint(10, 90, ids.shape, generator=draw)
    elif mask is not None:
        # what predicts the first word may be padding
        mask = mask * (mask.cumsum(1) > 1)
    return ids if mask is None else ids.masked_fill(mask == 0, -100)


def _pictures(config, model_type, size, draw):
    vision = getattr(config, "vision_config", None) or config
    side = FIELDS.get(model_type, {}).get("image_size") or getattr(vision, "image_size", IMAGE)
    side = side if _is_int(side) else (side[0] if side else IMAGE)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    return {"pixel_values": torch.randn(size, channels, side, side, generator=draw).double()}


def _add_pictures(batch, padding, config, task, draw):
    batch |= _pictures(config, "", len(batch["input_ids"]), draw)


def _words_of_pictures(batch, padding, config, task, draw):
    shape = len(batch.pop("pixel_values")), TOKENS
    batch["input_ids"] = torch.randint(10, 90, shape, generator=draw)


def _patches(batch, padding, config, task, draw):
    size, side = len(batch["pixel_values"]), config.vision_config.patch_size
    batch["pixel_values"] = torch.randn(size, 12, 3 * side * side, generator=draw).double()
    mask = torch.ones(size, 12, dtype=torch.long)
    mask[-1, 8:] = 0
    batch["pixel_attention_mask"] = mask
    batch["spatial_shapes"] = torch.tensor([[3, 4]] * (size - 1) + [[2, 4]])


def _codebooks(batch, padding, config, task, draw):
    count = config.num_codebooks
    batch["input_ids"] = batch["input_ids"].repeat_interleave(count, 0)
    if "labels" in batch:
        batch["labels"] = batch["labels"][:, :, None].expand(-1, -1, count).contiguous()


def _packed_pictures(batch, padding, config, task, draw):
    """One picture of 4 x 4 patches (4 tokens) in each sample, where none has padding."""
    ids = batch["input_ids"]
    if task != "image-text" or ids.shape[1] < TOKENS:
        return
    vision, size = config.vision_config, len(ids)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    width = channels * vision.temporal_patch_size * vision.patch_size**2
    batch["pixel_values"] = torch.randn(size * 16, width, generator=draw).double()
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * size)
    first = 4 if padding == "left" else 0
    ids[:, first] = config.vision_start_token_id
    ids[:, first + 1 : first + 5] = config.image_token_id
    ids[:, first + 5] = config.vision_end_token_id
    batch["mm_token_type_ids"] = (ids == config.image_token_id).long()
    batch["labels"] = ids.masked_fill(batch["labels"] == -100, -100)


# by model type, what its batches are beyond words and labels
_BATCHES = {
    "git": _add_pictures,
    "imagegpt": _words_of_pictures,
    "siglip2": _patches,
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "qwen2_vl": _packed_pictures,
    "qwen2_5_vl": _packed_pictures,
    "qwen3_vl": _packed_pictures,
}
