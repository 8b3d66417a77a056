"""Tiny random models of the architectures that lightning-sage is held to, and batches for them.

Classes are transformers' own, unchanged; only the sizes are ours. They are chosen so that no two
axes agree: batch 5, 11 tokens, width 32, 4 query heads and 2 key heads of width 8.
"""

import contextlib
import copy
import functools
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, PAD, CLASSES = 64, 0, 3
WINDOW = 4  # shorter than any batch here, so that it is felt

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    name: value for name, value in _LLAMA.items() if name not in ("num_key_value_heads", "head_dim")
}
_GEMMA = _LLAMA | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {name: value for name, value in _ENCODER.items() if name != "intermediate_size"} | {
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "attention_dropout": 0.0,
}
_BERT = _ENCODER | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
_MODERNBERT = _ENCODER | {
    "num_hidden_layers": 3,
    "local_attention": WINDOW,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "cls_token_id": 1,
    "sep_token_id": 2,
    "classifier_pooling": "mean",
}


@dataclass(frozen=True)
class Case:
    """How to build a model: transformers' model type, head ("causal", "masked", "classes")."""

    model_type: str
    head: str = "causal"
    config: dict = field(default_factory=lambda: _LLAMA)
    dropout: str | None = None  # the config field that is residual dropout
    attention_dropout: str | None = "attention_dropout"
    paddings: tuple = ("right", "left", None)


MODELS = {
    "llama": Case("llama"),
    "qwen3": Case("qwen3"),
    "mistral": Case("mistral", config=_LLAMA | {"sliding_window": WINDOW}),
    "gemma2": Case(
        "gemma2",
        config=_GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": Case(
        "gemma3_text",
        config=_GEMMA
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": Case("gpt2", config=_GPT2, dropout="resid_pdrop", attention_dropout="attn_pdrop"),
    "gpt_neox": Case("gpt_neox", config=_ENCODER, dropout="hidden_dropout"),
    "opt": Case("opt", config=_OPT, dropout="dropout"),
    "bert": Case(
        "bert",
        "masked",
        _BERT,
        dropout="hidden_dropout_prob",
        attention_dropout="attention_probs_dropout_prob",
    ),
    "modernbert": Case("modernbert", "masked", _MODERNBERT, dropout="mlp_dropout"),
    "llama-classes": Case("llama", "classes"),
    # reads its first position, which left padding would make padding
    "bert-classes": Case(
        "bert",
        "classes",
        _BERT,
        attention_dropout="attention_probs_dropout_prob",
        paddings=("right", None),
    ),
    "modernbert-classes": Case("modernbert", "classes", _MODERNBERT),
    "plain": Case("plain", dropout="dropout", paddings=(None,)),
}


@contextlib.contextmanager
def exactly(name):
    """Let a float64 model of `MODELS` compute in float64 throughout its blocks.

    Gemma casts norm weights and the eager softmax to float32 whatever it is given. Sums over rows
    would agree to 1e-7 only, and the mask of a float64 model would overflow to -inf, turning rows
    that may attend to nothing into NaN. (A TorchFunctionMode would not reach into backward.)
    """
    cast, softmax = torch.Tensor.float, F.softmax

    def keep_double(x, *args, **kwargs):
        return x if x.dtype == torch.float64 else cast(x, *args, **kwargs)

    def keep_double_softmax(x, *args, **kwargs):
        if x.dtype == torch.float64:
            kwargs["dtype"] = None
        return softmax(x, *args, **kwargs)

    with contextlib.ExitStack() as patches:
        if name.startswith("gemma"):
            patches.enter_context(mock.patch.object(torch.Tensor, "float", keep_double))
            patches.enter_context(mock.patch.object(F, "softmax", keep_double_softmax))
        yield


class PlainBlock(nn.Module):
    """A causal transformer block as one writes it oneself, in ten lines."""

    def __init__(self, width=32, heads=4, dropout=0.0, attention_dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.attention_dropout = attention_dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        p = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class PlainModel(nn.Module):
    """A language model of :class:`PlainBlock` that knows nothing of transformers."""

    def __init__(self, blocks=2, **options):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(PlainBlock(**options) for _ in range(blocks))
        self.head = nn.Linear(32, VOCABULARY)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def build(
    name, *, lora=False, lora_dropout=0.0, dropout=0.0, attention_dropout=0.0, dtype=torch.float64
):
    """A fresh copy of a model of `MODELS` in training mode, every parameter made to matter."""
    return copy.deepcopy(_built(name, lora, lora_dropout, dropout, attention_dropout)).to(dtype)


@functools.cache
def _built(name, lora, lora_dropout, dropout, attention_dropout):
    case = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "plain":
            model = PlainModel(dropout=dropout, attention_dropout=attention_dropout)
        else:
            model = _pretrained(case, dropout, attention_dropout)
        if lora:
            model = _with_lora(model, case, lora_dropout)
        # initial zeros (biases, scales) and flat attention would hide mistakes
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double().train()


def _pretrained(case, dropout, attention_dropout):
    import transformers

    fields = case.config | {case.attention_dropout: attention_dropout}
    fields |= {case.dropout: dropout} if case.dropout else {}
    config = transformers.AutoConfig.for_model(case.model_type, **fields)
    if case.head == "classes":
        config.num_labels = CLASSES
    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "classes": transformers.AutoModelForSequenceClassification,
    }[case.head]
    return auto.from_config(config)


def _with_lora(model, case, dropout):
    import peft

    plain = case.model_type == "plain"
    config = peft.LoraConfig(
        r=4,
        target_modules=["qkv", "out", "up", "down"] if plain else "all-linear",
        lora_dropout=dropout,
        init_lora_weights=False,  # B is not zero, so that A has a gradient
        fan_in_fan_out=case.model_type == "gpt2",
    )
    return peft.get_peft_model(model, config)


def make_batch(name, padding="right", *, size=5, length=11, every_token=False, seed=0):
    """Keyword arguments of a training step.

    Labels are -100 on padding and on a prompt that takes about half of each sample (the first
    token always: what predicts it may be padding), or on the first token alone with `every_token`.
    """
    case, draw = MODELS[name], torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (size, length), generator=draw)
    pads = torch.arange(size).clamp(max=max(length - 3, 0))[:, None] * (padding is not None)
    position = torch.arange(length)
    if padding == "left":
        first, last = pads, torch.full_like(pads, length)
    else:
        first, last = torch.zeros_like(pads), length - pads
    valid = (position >= first) & (position < last)
    batch = {"input_ids": ids.masked_fill(~valid, PAD)}
    if padding is not None:
        batch["attention_mask"] = valid.long()
    if case.head == "classes":
        return batch | {"labels": torch.randint(0, CLASSES, (size,), generator=draw)}
    answer = first + 1 if every_token else (first + last) // 2 + 1
    return batch | {"labels": ids.masked_fill(~valid | (position < answer), -100)}
