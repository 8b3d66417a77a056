"""Tiny random models that see, and batches for them: vision towers, pairs of towers, and
vision-language models, with transformers' own classes.

As in :mod:`zoo`, sizes are chosen so that no two axes agree: 16 patches of a picture (and what a
tower puts before them), width 32, 4 heads. Batches are of 3.
"""

import copy
import functools
from dataclasses import dataclass, field

import torch

import zoo

SIZE, PATCHES, IMAGE_TOKEN = 3, 16, 60
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_PAIR_TEXT = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "projection_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TEXT = {name: value for name, value in zoo._LLAMA.items() if name != "head_dim"}
_GEMMA = zoo._LLAMA | {"query_pre_attn_scalar": 8, "sliding_window": 6}
_PACKED = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_size": 32,
}
_QWEN = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


@dataclass(frozen=True)
class Case:
    """How to build a model.

    Attributes:
        model_type: transformers' name.
        kind: Name of the class behind the model type's own prefix.
        config: Its fields.
        tower: The fields of its `vision_config`, if it has one.
        text: The fields of its `text_config`, if it has one.
        pixels: Shape of the picture or pictures of a sample.
        image_tokens: Placeholders that a sample's pictures take among the tokens.
        packed: Whether its tower takes the patches of all pictures in one row.
    """

    model_type: str
    kind: str
    config: dict = field(default_factory=dict)
    tower: dict | None = None
    text: dict | None = None
    pixels: tuple = (3, 16, 16)
    image_tokens: int = PATCHES
    packed: bool = False


def _classifier(model_type, **fields):
    return Case(model_type, "ForImageClassification", {"num_labels": zoo.CLASSES} | fields)


def _vlm(model_type, text_type, image_tokens=PATCHES, text=_TEXT, tower=(), **rest):
    fields = {"model_type": text_type} | text
    return Case(
        model_type,
        "ForConditionalGeneration",
        rest.pop("config", {}),
        tower=_TOWER | dict(tower),
        text=fields,
        image_tokens=image_tokens,
        **rest,
    )


_CLIP = {"model_type": "clip_vision_model", "num_hidden_layers": 3}
_SIGLIP = {"model_type": "siglip_vision_model"}
TOWERS = {
    "vit": _classifier("vit", **_TOWER),
    "deit": _classifier("deit", **_TOWER),
    "dinov2": _classifier("dinov2", **_TOWER, mlp_ratio=2),
    "dinov2-registers": _classifier("dinov2_with_registers", **_TOWER, mlp_ratio=2),
    "beit": _classifier("beit", **_TOWER, drop_path_rate=0.0),
    # as checkpoints are; their tables are frozen here
    "beit-bias": _classifier("beit", **_TOWER, drop_path_rate=0.0, use_relative_position_bias=True),
    "beit-shared-bias": _classifier(
        "beit", **_TOWER, drop_path_rate=0.0, use_shared_relative_position_bias=True
    ),
    "data2vec-vision": _classifier("data2vec-vision", **_TOWER, drop_path_rate=0.0),
    "clip-classes": Case("clip", "ForImageClassification", {"num_labels": 3}, _TOWER, _PAIR_TEXT),
    "siglip-classes": Case(
        "siglip", "ForImageClassification", {"num_labels": 3}, _TOWER, _PAIR_TEXT
    ),
}
PAIRS = {
    "clip-pair": Case("clip", "Model", {"projection_dim": 24}, _TOWER, _PAIR_TEXT),
    "siglip-pair": Case("siglip", "Model", {}, _TOWER, _PAIR_TEXT | {"projection_size": 32}),
}
LANGUAGE = {
    # reads its tower before the last block, and drops the class token
    "llava": _vlm("llava", "llama", tower=_CLIP),
    "llava_next": _vlm(
        "llava_next",
        "llama",
        # one tile, the whole picture, and the end of each of its four rows
        2 * PATCHES + 4,
        tower=_CLIP,
        pixels=(2, 3, 16, 16),
        config={"image_grid_pinpoints": [[16, 16]]},
    ),
    "llava_onevision": _vlm(
        "llava_onevision",
        "qwen2",
        2 * PATCHES + 4,
        tower=_SIGLIP,
        pixels=(2, 3, 16, 16),
        config={"image_grid_pinpoints": [[16, 16]]},
    ),
    "internvl": _vlm(
        "internvl",
        "qwen2",
        4,
        tower={"image_size": [16, 16], "patch_size": [4, 4]},
        config={"downsample_ratio": 0.5},
    ),
    "idefics3": _vlm("idefics3", "llama", 4, pixels=(1, 3, 16, 16), config={"scale_factor": 2}),
    "smolvlm": _vlm("smolvlm", "llama", 4, pixels=(1, 3, 16, 16), config={"scale_factor": 2}),
    "mistral3": _vlm(
        "mistral3",
        "mistral",
        4,
        tower={"model_type": "pixtral", "head_dim": 8},
        config={"spatial_merge_size": 2},
    ),
    "paligemma": _vlm(
        "paligemma", "gemma", text=zoo._LLAMA, tower=_SIGLIP, config={"projection_dim": 32}
    ),
    "gemma3": _vlm(
        "gemma3",
        "gemma3_text",
        4,
        text=_GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
        tower=_SIGLIP,
        config={"mm_tokens_per_image": 4},
    ),
    "qwen2_vl": _vlm(
        "qwen2_vl",
        "qwen2_vl_text",
        4,
        text=_TEXT | {"rope_parameters": _ROPE},
        tower=_PACKED | {"embed_dim": 32},
        config=_QWEN,
        packed=True,
    ),
    "qwen2_5_vl": _vlm(
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        4,
        text=_TEXT | {"rope_parameters": _ROPE},
        tower=_PACKED | {"intermediate_size": 48, "out_hidden_size": 32},
        config=_QWEN,
        packed=True,
    ),
    "qwen3_vl": _vlm(
        "qwen3_vl",
        "qwen3_vl_text",
        4,
        text=zoo._LLAMA | {"rope_parameters": _ROPE},
        tower=_PACKED
        | {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 64}
        | {"deepstack_visual_indexes": [0, 1]},
        config=_QWEN,
        packed=True,
    ),
}
MODELS = TOWERS | PAIRS | LANGUAGE


def exactly():
    """See :func:`zoo.exactly`; here for every model."""
    return zoo.exactly("gemma")


def build(name, *, frozen_tower=False, lora=False):
    """A fresh copy of a model in training mode, in float64, every parameter made to matter.

    Args:
        name: Of `MODELS`.
        frozen_tower: Whether the tower learns nothing.
        lora: Whether the language model alone learns, through adapters on its linear layers.
    """
    return copy.deepcopy(_built(name, frozen_tower, lora))


@functools.cache
def _built(name, frozen_tower, lora):
    import transformers

    case = MODELS[name]
    fields = dict(case.config)
    if case.tower is not None:
        fields |= {"vision_config": dict(case.tower), "text_config": dict(case.text)}
    if name in LANGUAGE and not case.packed:
        # two names of one thing
        fields |= {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
        # idefics: the text's own would be beyond this vocabulary
        fields |= {"pad_token_id": 0, "tie_word_embeddings": False}
    config = transformers.AutoConfig.for_model(case.model_type, **fields)
    prefix = type(config).__name__.removesuffix("Config")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, prefix + case.kind)(config)
        if lora:
            model = _with_lora(model)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    for key, parameter in model.named_parameters():
        if key.endswith("relative_position_bias_table"):
            parameter.requires_grad_(False)
    if frozen_tower:
        for parameter in tower_of(model).parameters():
            parameter.requires_grad_(False)
    return model.double().train()


def _with_lora(model):
    import peft

    config = peft.LoraConfig(
        r=4,
        target_modules=r".*(language_model|text_model)\.layers\..*_proj",
        init_lora_weights=False,
    )
    return peft.get_peft_model(model, config)


def paddings(name):
    """The paddings that a model goes with."""
    if name in LANGUAGE:
        return ("right", "left")
    # SigLIP's text ends in the token it is judged by, padding or not: its checkpoints see no mask
    return ("right", None) if name == "clip-pair" else (None,)


def tower_of(model):
    """The part of a model that sees."""
    names = ("vision_tower", "visual", "vision_model")
    return next(part for n, part in model.named_modules() if n.split(".")[-1] in names)


def make_batch(name, padding="right", *, length=None, seed=0):
    """Keyword arguments of a training step.

    A classifier's labels are classes. A vision-language model is given, in each sample, a prompt
    with a picture in it and an answer, which alone bears labels.
    """
    case, draw = MODELS[name], torch.Generator().manual_seed(seed)
    pictures = torch.randn(SIZE, *case.pixels, generator=draw, dtype=torch.float64)
    batch = {"pixel_values": pictures}
    if name in TOWERS:
        return batch | {"labels": torch.randint(0, 3, (SIZE,), generator=draw)}
    taken = 0 if name in PAIRS else case.image_tokens
    length = length or taken + 9
    ids = torch.randint(3, IMAGE_TOKEN, (SIZE, length), generator=draw)
    pads = torch.arange(SIZE)[:, None] * (padding is not None)
    position = torch.arange(length)
    valid = position >= pads if padding == "left" else position < length - pads
    if padding is not None:
        batch |= {"attention_mask": valid.long()}
    if name in PAIRS:
        # the pooled token
        ids.scatter_(1, (position * valid).argmax(1, keepdim=True), 2)
        return batch | {"input_ids": ids.masked_fill(~valid, 0), "return_loss": True}
    start = 3
    ids[:, start : start + taken] = IMAGE_TOKEN
    seen = position.expand(SIZE, -1).sub(start).ge(0) & (position < start + taken)
    labels = ids.masked_fill(~valid | (position < start + taken + 2), -100)
    batch |= {"input_ids": ids.masked_fill(~valid, 0), "labels": labels}
    return batch | _told_of_pictures(name, batch, seen, draw)


def _told_of_pictures(name, batch, seen, draw):
    """What else a model wants to know of its pictures."""
    case = MODELS[name]
    if case.packed:
        batch["input_ids"][:, [2, 3 + case.image_tokens]] = torch.tensor([62, 63])
        patches = torch.randn(SIZE * PATCHES, 3 * 2 * 4**2, generator=draw, dtype=torch.float64)
        return {
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 4, 4]] * SIZE),
            "mm_token_type_ids": seen.long(),
        }
    if name in ("paligemma", "gemma3"):
        return {"token_type_ids": seen.long()}
    if name in ("llava_next", "llava_onevision", "mistral3"):
        return {"image_sizes": torch.tensor([[16, 16]] * SIZE)}
    return {}
