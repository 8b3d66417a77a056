"""What is measured: a setting, the model it trains, and one training step of it."""

import copy
from dataclasses import dataclass, field, replace
from itertools import chain
from time import perf_counter
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from lightning_sage import Installation, SagePolicy, install
from lightning_sage.cross_entropy import check_chunked_loss, chunked_loss
from lightning_sage.memory import MIB, free_unused, saved_bytes
from lightning_sage.metrics import CachedBytes, KeptTokens, ReplayedTokens

# vocabulary, width, width of the MLP, blocks, query heads, key heads, tied embedding
SHAPES = {
    "tiny": (256, 64, 128, 2, 4, 2, False),
    "small-cpu": (256, 512, 2048, 8, 8, 4, False),
    "llama-3.2-1b": (128_256, 2048, 8192, 16, 32, 8, True),
    "llama-3.2-3b": (128_256, 3072, 8192, 28, 24, 8, True),
    "llama-3.1-8b": (128_256, 4096, 14336, 32, 32, 8, False),
}
SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        method: Training method; `checkpointing` is Hugging Face's, non-reentrant.
        policy: Tokens kept and replayed by `sage`.
        shape: Size of the Llama.
        batch: Sequences in a batch.
        length: Tokens of a sequence.
        dtype: Of the weights, and so of everything.
        rank: Of LoRA on all linear layers; 0 trains every parameter.
        loss: Which tokens are to be predicted.
        head: `full` is the model's own vocabulary head and loss, `chunked` the same without
            logits of every token (:func:`lightning_sage.cross_entropy.chunked_loss`), and `none`
            leaves the head out: the loss is a fixed linear function of the final hidden states
            of the rows that would predict those tokens.
        device: Where to run; `auto` is a GPU if there is one.
        seed: Of weights and tokens.
        warmup: Rounds before the clock counts.
        steps: Rounds that count.
    """

    method: Literal["dense", "checkpointing", "sage"] = "dense"
    policy: SagePolicy = field(default_factory=SagePolicy)
    shape: Literal["tiny", "small-cpu", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"] = "tiny"
    batch: int = 2
    length: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    rank: int = 0
    loss: Literal["last-quarter", "last-token", "all"] = "last-quarter"
    head: Literal["none", "full", "chunked"] = "full"
    device: str = "auto"
    seed: int = 0
    warmup: int = 2
    steps: int = 10


def loss_rows(setting: Setting) -> slice:
    """Positions whose next token is to be predicted."""
    last = setting.length - 1
    count = {"last-quarter": setting.length // 4, "last-token": 1, "all": last}[setting.loss]
    return slice(last - count, last)


@dataclass
class Contender:
    """One setting in a race: a model that shares its weights with the others, and its results.

    Attributes:
        result: What its record gets besides the times: bytes, peaks, tokens kept, loss, error.
    """

    setting: Setting
    model: nn.Module
    installation: Installation | None
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward."""
        if self.installation is not None:
            # without its head the model is not called with labels
            self.installation.observe({"labels": batch["labels"]})
        labelled = {name: batch[name] for name in ("input_ids", "labels")}
        if self.setting.head == "full":
            return self.model(**labelled).loss
        if self.setting.head == "chunked":
            return chunked_loss(self.model, labelled)
        hidden = self.model(input_ids=batch["input_ids"]).last_hidden_state
        return (hidden[:, loss_rows(self.setting)] * batch["direction"]).sum(-1).mean()

    def timed_step(self, batch: dict[str, Tensor], counts: bool) -> None:
        """One step by the clock; a warm-up's time does not count."""
        cuda = batch["input_ids"].is_cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = now(cuda)
        loss = self.loss(batch)
        middle = now(cuda)
        loss.backward()
        end = now(cuda)
        self.model.zero_grad(set_to_none=True)
        if counts:
            self.forward_s.append(middle - start)
            self.backward_s.append(end - middle)
            self.result["loss_value"] = loss.item()
            if cuda:
                peak = torch.cuda.max_memory_allocated() / MIB
                self.result["peak_mib"] = max(peak, self.result.get("peak_mib", 0.0))

    def counted_step(self, batch: dict[str, Tensor]) -> None:
        """Steps off the clock, in which bytes and tokens are counted."""
        there = chain(self.model.parameters(), self.model.buffers(), batch.values())
        with saved_bytes(there) as held:
            loss = self.loss(batch)
            self.result["saved_mib"] = held() / MIB
        loss.backward()
        if self.installation is not None:
            metrics = {
                "kept_fraction": KeptTokens(),
                "replayed_fraction": ReplayedTokens(),
                "cached_mib": CachedBytes(),
            }
            for name, metric in metrics.items():
                metric.to(loss.device).update(self.installation.records)
                unit = MIB if name == "cached_mib" else 1
                self.result[name] = metric.compute().item() / unit
        if batch["input_ids"].is_cuda:
            del loss
            self.result |= self.activation(batch)
        self.model.zero_grad(set_to_none=True)

    def activation(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """CUDA's account of one step, all gradients there before it and none taken for activation.

        Gradients that come to be during a step would count or not, depending on when its peak
        is. So this one adds to those of the step before, as the second batch of an accumulation.

        Returns:
            `resident_mib`, allocated before the step: weights, gradients, batch (there is no
            optimizer); `gradients_mib`, of those the gradients; `forward_mib`, what a forward
            without grad peaks at above that; `step_mib`, the same of a step; and their
            difference, `activation_mib`: what is there for the sake of the backward pass.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            self.loss(batch)
        forward = torch.cuda.max_memory_allocated() - resident
        torch.cuda.reset_peak_memory_stats()
        self.loss(batch).backward()
        step = torch.cuda.max_memory_allocated() - resident
        return {
            "resident_mib": resident / MIB,
            "gradients_mib": sum(gradient.nbytes for gradient in gradients) / MIB,
            "forward_mib": forward / MIB,
            "step_mib": step / MIB,
            "activation_mib": (step - forward) / MIB,
        }


def now(cuda: bool) -> float:
    """Seconds, when the device has done all it was given."""
    if cuda:
        torch.cuda.synchronize()
    return perf_counter()


def make_room(model: nn.Module) -> None:
    """Give back what a step that failed has left."""
    model.zero_grad(set_to_none=True)
    free_unused()


def build(setting: Setting) -> nn.Module:
    """The model, with random weights, on its device and in its dtype from the start."""
    torch.manual_seed(setting.seed)
    sizes = dict(zip(SHAPE_FIELDS, SHAPES[setting.shape], strict=True))
    config = LlamaConfig(**sizes, max_position_embeddings=setting.length, use_cache=False)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, setting.dtype))
    try:
        with torch.device(setting.device):
            model = (LlamaModel if setting.head == "none" else LlamaForCausalLM)(config)
    finally:
        torch.set_default_dtype(dtype)
    if setting.rank:
        lora = LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear")
        # float32 adapters in a bfloat16 model would cost every method the same casts
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return model.train()


def make_batch(setting: Setting) -> dict[str, Tensor]:
    """Random tokens, labels where the loss is, and the direction the loss of `none` looks along."""
    generator = torch.Generator().manual_seed(setting.seed)
    vocabulary, width, *_ = SHAPES[setting.shape]
    ids = torch.randint(vocabulary, (setting.batch, setting.length), generator=generator)
    labels = torch.full_like(ids, -100)
    rows = loss_rows(setting)
    labels[:, rows.start + 1 :] = ids[:, rows.start + 1 :]
    direction = torch.randn(rows.stop - rows.start, width, generator=generator)
    direction = direction.to(getattr(torch, setting.dtype))
    batch = {"input_ids": ids, "labels": labels, "direction": direction}
    return {name: tensor.to(setting.device) for name, tensor in batch.items()}


def prepare(setting: Setting, model: nn.Module) -> Contender:
    """A copy of the model that shares every weight, made ready for the method."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    if setting.method == "checkpointing":
        # the second name is the first one's before transformers renamed it
        enable = getattr(twin, "activation_checkpointing_enable", None)
        (enable or twin.gradient_checkpointing_enable)({"use_reentrant": False})
    if setting.head == "chunked":
        check_chunked_loss(twin, make_batch(replace(setting, batch=1, length=16)))
    return Contender(
        setting, twin, install(twin, setting.policy) if setting.method == "sage" else None
    )
