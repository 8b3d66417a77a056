"""What a step of each method costs, and how far its gradient is from the dense one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from measure import circumstances
from methods import METHODS
from scenarios import Scenario
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from train import Record, about, fit, judge, train_batches

from lightning_sage import Installation, KeptTokens, ReplayedTokens, SagePolicy, install
from lightning_sage.compare.checkpointing import switch_on
from lightning_sage.discovery import find_blocks
from lightning_sage.memory import MIB, saved_bytes
from lightning_sage.models import Batch

Shape = Sequence[int]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    # grouped heads are computed as often as there are queries
    key, value = ([*query[:2], *shape[2:]] for shape in (key, value))
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    key, value = ([*query[:2], *shape[2:]] for shape in (key, value))
    return sdpa_backward_flop_count(gradient, query, key, value)


# the counter knows those of CUDA only; like it these count no causal mask
FLASH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Contender:
    """A model by one method, with the weights of the others.

    Args:
        model: Whose weights are shared.
        policy: None trains every token.
    """

    def __init__(self, model: nn.Module, policy: SagePolicy | None) -> None:
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self.kept, self.replayed = KeptTokens(), ReplayedTokens()
        self.operations: list[int] = []
        self.seconds: list[float] = []
        self.installation: Installation | None = None
        blocks = find_blocks(self.model, SagePolicy()).values()
        parameters = chain.from_iterable(block.parameters() for block in blocks)
        self.parameters = [p for p in parameters if p.requires_grad]
        if policy is not None:
            self.installation = install(self.model, policy)

    def loss(self, batch: Batch) -> Tensor:
        """The forward's."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def step(self, batch: Batch) -> None:
        """Forward and backward."""
        self.model.zero_grad(set_to_none=True)
        self.loss(batch).backward()

    def gradient(self, batch: Batch) -> Tensor:
        """Of all that is trained in the blocks, as one vector; counts operations and tokens."""
        with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
            self.step(batch)
        self.operations.append(counter.get_total_flops())
        if self.installation is not None:
            self.kept.update(self.installation.records)
            self.replayed.update(self.installation.records)
        # where no row was replayed there is none
        found = (
            p.new_zeros(()).expand_as(p) if p.grad is None else p.grad for p in self.parameters
        )
        return torch.cat([gradient.flatten().double() for gradient in found])

    def held(self, batch: Batch) -> tuple[float, float]:
        """MiB that wait for the backward pass: in all, and in SAGE's caches; a step is taken."""
        there = [*self.model.parameters(), *self.model.buffers(), *batch.values()]
        self.model.zero_grad(set_to_none=True)
        with saved_bytes(there) as count:
            loss = self.loss(batch)
            saved = count() / MIB
        loss.backward()
        records = [] if self.installation is None else self.installation.records
        return saved, sum(record.cached_bytes for record in records) / MIB

    def turn(self, batch: Batch) -> None:
        """A step by the clock."""
        started = perf_counter()
        self.step(batch)
        self.seconds.append(perf_counter() - started)


def distance(sparse: Tensor, dense: Tensor) -> dict[str, float]:
    """Of one gradient from another: direction, length, and both."""
    return {
        "cosine": torch.cosine_similarity(sparse, dense, dim=0).item(),
        "norm_ratio": (sparse.norm() / dense.norm()).item(),
        "squared_error": ((sparse - dense).norm() / dense.norm()).square().item(),
    }


def costs(
    scenario: Scenario,
    methods: Sequence[str],
    warmup: int = 10,
    batches: int = 4,
    rounds: int = 5,
) -> list[Record]:
    """A record for each method, at weights that a few dense steps have led to.

    Args:
        scenario: What is trained.
        methods: Some of `METHODS`.
        warmup: The dense steps; before them LoRA's first factors have no gradient.
        batches: That gradients are means over.
        rounds: Steps by the clock of each method, which take turns.

    Returns:
        `cached_mib` is what the blocks of a method hold, of dense training as well.
    """
    module = scenario.module(scenario.lrs[1], False)
    drawn = train_batches(scenario, 0, warmup + batches)
    trainer = fit(scenario, module, drawn[:warmup], [], seed=0)
    start = judge(scenario, module, trainer)
    shown, model = drawn[warmup:], module.model.train()
    reference, contenders = Contender(model, None), {}
    # what head and loss save is the same for all
    saved, cached = Contender(model, SagePolicy()).held(shown[0])
    records = {m: about(scenario, m) | {"kind": "cost", "start": start} for m in methods}
    dense = [reference.gradient(batch) for batch in shown]
    for method in methods:
        try:
            contender = Contender(model, METHODS[method])
            if method == "checkpointing":
                switch_on(contender.model, SagePolicy())
            records[method] |= _measured(contender, shown, dense)
            records[method]["cached_mib"] = records[method]["saved_mib"] - (saved - cached)
            contenders[method] = contender
        # whatever it is, it is a result
        except Exception as error:
            records[method]["error"] = repr(error)
    for _ in range(rounds):
        for contender in contenders.values():
            contender.turn(shown[0])
    for method, contender in contenders.items():
        records[method]["step_s"] = median(contender.seconds)
    settings = {"warmup": warmup, "batches": batches, "rounds": rounds, **circumstances("cpu")}
    return [record | settings for record in records.values()]


def _measured(contender: Contender, shown: Sequence[Batch], dense: Sequence[Tensor]) -> Record:
    torch.manual_seed(0)
    # the first step, which also checks the blocks
    saved, _ = contender.held(shown[0])
    found = [distance(contender.gradient(b), d) for b, d in zip(shown, dense, strict=True)]
    sage = contender.installation is not None
    return {
        "saved_mib": saved,
        **{name: fmean(each[name] for each in found) for name in found[0]},
        "worst_cosine": min(each["cosine"] for each in found),
        "operations": fmean(contender.operations),
        "kept_fraction": contender.kept.compute().item() if sage else None,
        "replayed_fraction": contender.replayed.compute().item() if sage else None,
    }
