"""Training steps by the clock: a model, a method, and several methods taking turns."""

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from time import perf_counter
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from lightning_sage import Installation, SagePolicy, install
from lightning_sage.memory import MIB, saved_bytes
from lightning_sage.metrics import SageUsage

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
        body: Leave the vocabulary head out; the loss is a fixed linear function of the final
            hidden states of the rows that would predict those tokens.
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
    body: bool = False
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
        result: What its record gets besides the times: bytes, peak, tokens kept, loss, error.
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
            # the body is not called with labels
            self.installation.observe({"labels": batch["labels"]})
        if not self.setting.body:
            return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        hidden = self.model(input_ids=batch["input_ids"]).last_hidden_state
        return (hidden[:, loss_rows(self.setting)] * batch["direction"]).sum(-1).mean()

    def timed_step(self, batch: dict[str, Tensor], counts: bool) -> None:
        """One step by the clock; a warm-up's time does not count."""
        cuda = batch["input_ids"].is_cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            self.result["resident_mib"] = torch.cuda.memory_allocated() / MIB
        start = _now(cuda)
        loss = self.loss(batch)
        middle = _now(cuda)
        loss.backward()
        end = _now(cuda)
        self.model.zero_grad(set_to_none=True)
        if counts:
            self.forward_s.append(middle - start)
            self.backward_s.append(end - middle)
            self.result["loss_value"] = loss.item()
            if cuda:
                peak = torch.cuda.max_memory_allocated() / MIB
                self.result["peak_mib"] = max(peak, self.result.get("peak_mib", 0.0))

    def counted_step(self, batch: dict[str, Tensor]) -> None:
        """One step off the clock, in which bytes and tokens are counted."""
        there = chain(self.model.parameters(), self.model.buffers(), batch.values())
        with saved_bytes(there) as held:
            loss = self.loss(batch)
            self.result["saved_mib"] = held() / MIB
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        if self.installation is not None:
            usage = SageUsage().to(loss.device)
            usage.update(self.installation.records)
            self.result |= {name: value.item() for name, value in usage.compute().items()}


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return perf_counter()


def build(setting: Setting) -> nn.Module:
    """The model, with random weights, on its device and in its dtype from the start."""
    torch.manual_seed(setting.seed)
    sizes = dict(zip(SHAPE_FIELDS, SHAPES[setting.shape], strict=True))
    config = LlamaConfig(**sizes, max_position_embeddings=setting.length, use_cache=False)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, setting.dtype))
    try:
        with torch.device(setting.device):
            model = (LlamaModel if setting.body else LlamaForCausalLM)(config)
    finally:
        torch.set_default_dtype(dtype)
    if setting.rank:
        lora = LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear")
        # float32 adapters in a bfloat16 model would cost every method the same casts
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return model.train()


def make_batch(setting: Setting) -> dict[str, Tensor]:
    """Random tokens, labels where the loss is, and the direction the body's loss looks along."""
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
    return Contender(
        setting, twin, install(twin, setting.policy) if setting.method == "sage" else None
    )


def race(settings: Sequence[Setting], budget_s: float = math.inf) -> list[Contender]:
    """Measure settings that share everything but the method, taking turns.

    Args:
        settings: What is measured.
        budget_s: Rounds end early when the next would outlast it.
    """
    started = perf_counter()
    model, batch = build(settings[0]), make_batch(settings[0])
    contenders = [prepare(setting, model) for setting in settings]
    warmup, longest = settings[0].warmup, 0.0
    for turn in range(warmup + 1 + settings[0].steps):
        before = perf_counter()
        if before + longest > started + budget_s:
            budget = f"the budget of {max(budget_s, 0):.0f} s"
            _say(f"{settings[0].shape}: over {budget} after {turn} rounds")
            break
        for contender in contenders:
            if "error" not in contender.result:
                _take_turn(contender, batch, turn - warmup)
        longest = max(longest, perf_counter() - before)
    return contenders


def _take_turn(contender: Contender, batch: dict[str, Tensor], turn: int) -> None:
    try:
        if turn == 0:
            contender.counted_step(batch)
        else:
            contender.timed_step(batch, counts=turn > 0)
        return
    except torch.OutOfMemoryError:
        contender.result["error"] = "out of memory"
    # outside of the handler, whose traceback holds the activations
    _say(f"{contender.setting.shape}, {contender.setting.method}: out of memory, left out")
    contender.model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()


def _say(text: str) -> None:
    # standard output is for records and tables
    print(text, file=sys.stderr, flush=True)
