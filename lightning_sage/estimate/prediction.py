"""How much memory a training step will need, by method, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from lightning_sage.errors import ReplayError
from lightning_sage.estimate.fakes import without_memory
from lightning_sage.estimate.footprint import CHECKPOINTING, DENSE, Activations, Watch
from lightning_sage.estimate.largest import largest_each
from lightning_sage.estimate.rehearsed_model import (
    Inputs,
    MakeOptimizer,
    RehearsedModel,
    precision_of,
)
from lightning_sage.memory_size import parse_size
from lightning_sage.policy import PRESETS, SagePolicy
from lightning_sage.selections import checked_fraction

YOURS = "yours"
# tokens of the largest batch that is looked at
TOKENS = 2**20


@dataclass(frozen=True)
class Footprint:
    """What one method needs; bytes.

    Attributes:
        method: Its name.
        weights: Parameters and buffers.
        gradients: Of the trainable parameters.
        optimizer: The optimizer's state.
        saved: What the forward pass holds for the backward pass.
        replay: What running one block again adds, at most.
        kept: Share of the tokens kept; None where every token is.
        kept_by: How that share is known: `policy` (it follows from the policy), `flat attention`
            (the most that an adaptive policy keeps of tokens that are all alike), or `given`.
        largest_batch: Of this length, on the given memory; 0 where one sample does not fit. No
            batch of more than 2**20 tokens is looked at.
        largest_length: Of a batch of this size, likewise; 0 where nothing fits.
    """

    method: str
    weights: int
    gradients: int
    optimizer: int
    saved: int
    replay: int
    kept: float | None = None
    kept_by: str | None = None
    largest_batch: int | None = None
    largest_length: int | None = None

    @property
    def total(self) -> int:
        """All of it together, at the peak of a step."""
        return self.weights + self.gradients + self.optimizer + self.saved + self.replay


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` found.

    Attributes:
        footprints: By method.
        batch: Samples.
        length: Tokens of a sample.
        precision: The Trainer's name for it.
        memory: Bytes of the card, if one was given.
        positions: Tokens of the longest sequence the model takes, if it says so.
    """

    footprints: dict[str, Footprint]
    batch: int
    length: int
    precision: str
    memory: int | None
    positions: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        found = asdict(self)
        for name, footprint in self.footprints.items():
            found["footprints"][name]["total"] = footprint.total
        return found


def estimate(
    model: nn.Module | Callable[[], nn.Module],
    batch: int,
    length: int,
    policy: SagePolicy | None = None,
    *,
    presets: Mapping[str, SagePolicy] = PRESETS,
    precision: str | int | None = "32-true",
    memory: str | float | None = None,
    loss_tokens: float = 1.0,
    kept: float | None = None,
    inputs: Inputs | None = None,
    optimizer: MakeOptimizer | None = None,
) -> Estimate:
    """Predict what a training step holds: dense, with gradient checkpointing, and with SAGE.

    The step's forward pass runs once on tensors without values: nothing is loaded, no memory is
    taken. Attention and autocast behave as on a CPU; fused kernels of a GPU save the same tensors.

    Args:
        model: A module, real or on the meta device, a LightningModule, or what builds one.
        batch: Samples of a batch.
        length: Tokens of a sample; there is no padding.
        policy: Shown as `yours`, beside the presets.
        presets: Other policies, by name.
        precision: As the Trainer takes it.
        memory: Bytes of a card, or text such as `24GiB`: then the largest batch and the largest
            length are searched too.
        loss_tokens: Share of the tokens that bear loss, the last ones, in (0, 1].
        kept: Share of the tokens kept, in place of what the policies say.
        inputs: ``(batch, length) -> keywords`` of the model's forward, or the batch of a
            LightningModule; None makes token ids and labels.
        optimizer: Makes the optimizer from the trainable parameters; None asks a LightningModule,
            or takes AdamW.

    Raises:
        ValueError: A number or name that cannot be meant, a length beyond the model's positions,
            no block to wrap, a block that SAGE cannot replay, or a model that cannot be run without
            values.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
        >>> found = estimate(lambda: LlamaForCausalLM(config), 2, 128)
        >>> found.footprints["memory"].saved < found.footprints["dense"].saved
        True
    """
    precision = precision_of(precision)
    room = None if memory is None else parse_size(memory)
    _check(batch, length, loss_tokens, kept)
    policies = {} if policy is None else {YOURS: policy}
    blocks = None if policy is None else policy.blocks
    policies |= {name: replace(preset, blocks=blocks) for name, preset in presets.items()}
    with _refusals(), without_memory() as known:
        step = RehearsedModel(model, precision, known)
        if step.positions is not None and length > step.positions:
            raise ValueError(
                f"length {length} is beyond the {step.positions} positions of the model"
            )
        needs = _Needs(step, policies, loss_tokens, kept, inputs)
        return needs.estimate(batch, length, precision, room, optimizer)


def _check(batch: int, length: int, loss_tokens: float, kept: float | None) -> None:
    checked_fraction("loss_tokens", loss_tokens)
    if kept is not None:
        checked_fraction("kept", kept)
    for name, value in (("batch", batch), ("length", length)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a number of at least 1, got {value!r}")


@contextmanager
def _refusals() -> Iterator[None]:
    """What stops a rehearsal is an error in the arguments to whoever asked for the estimate."""
    try:
        yield
    except ReplayError as error:
        raise ValueError(f"SAGE does not go with this model: {error}") from error
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"the model's forward depends on values that are not known in advance ({error.func}), "
            "so that its memory cannot be estimated: measure a step"
        ) from error


class _Needs:
    """Activations by batch and length, each looked at once."""

    def __init__(
        self,
        step: RehearsedModel,
        policies: Mapping[str, SagePolicy],
        loss_tokens: float,
        kept: float | None,
        inputs: Inputs | None,
    ) -> None:
        self.step, self.policies, self.kept = step, policies, kept
        self._loss_tokens, self._inputs = loss_tokens, inputs
        self._watch = Watch(step.module, policies, step.known, kept)
        self._seen: dict[tuple[int, int], dict[str, Activations]] = {}

    def at(self, batch: int, length: int) -> dict[str, Activations]:
        """By method."""
        if (batch, length) not in self._seen:
            given = self.step.batch(batch, length, self._loss_tokens, self._inputs)
            self._seen[batch, length] = self._watch.step(lambda: self.step.loss(given), given)
        return self._seen[batch, length]

    def _kept_by(self, method: str) -> str | None:
        if method in (DENSE, CHECKPOINTING):
            return None
        if self.kept is not None:
            return "given"
        return "policy" if self.policies[method].keeper.fixed else "flat attention"

    def estimate(
        self,
        batch: int,
        length: int,
        precision: str,
        room: int | None,
        optimizer: MakeOptimizer | None,
    ) -> Estimate:
        """What there is to say."""
        step = self.step
        gradients = sum(p.numel() * p.element_size() for p in step.trainable())
        fixed = step.weights(), gradients, step.optimizer_bytes(optimizer)
        now = self.at(batch, length)
        batches: Mapping[str, int | None] = dict.fromkeys(now)
        lengths = batches
        if room is not None:
            left = room - sum(fixed)
            most = max(TOKENS // length, 1), min(step.positions or TOKENS, TOKENS // batch)
            batches = largest_each(lambda b: _bytes(self.at(b, length)), left, batch, most[0])
            lengths = largest_each(lambda t: _bytes(self.at(batch, t)), left, length, most[1])
        found = {
            method: Footprint(
                method,
                *fixed,
                one.saved,
                one.replay,
                one.kept,
                self._kept_by(method),
                batches[method],
                lengths[method],
            )
            for method, one in now.items()
        }
        return Estimate(found, batch, length, precision, room, step.positions)


def _bytes(found: Mapping[str, Activations]) -> dict[str, int]:
    return {method: one.saved + one.replay for method, one in found.items()}
