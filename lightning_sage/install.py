"""Find the blocks of a model, put SAGE below their forward, and take it out without a trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_sage import adapters, sharding
from lightning_sage.balance import Agreement
from lightning_sage.buffers import buffers_kept
from lightning_sage.discovery import find_blocks, tell_of_left_dense
from lightning_sage.engine.block import sparse_forward
from lightning_sage.engine.session import Session
from lightning_sage.engine.wrapped import ATTRIBUTE, Wrapped
from lightning_sage.errors import ReplayError
from lightning_sage.policy import Preset, SagePolicy, as_policy
from lightning_sage.records import BlockRecord


class Installation:
    """SAGE on a model, from :func:`install` until :func:`Installation.remove`.

    Also a context manager, which removes it at the end, whatever happened.

    Attributes:
        model: The model.
        blocks: The wrapped blocks by name, in order.
        session: What they share.
    """

    def __init__(
        self, model: nn.Module, policy: SagePolicy, blocks: dict[str, nn.Module], session: Session
    ) -> None:
        self.model, self.blocks, self.session = model, blocks, session
        self._policy = policy

    @property
    def policy(self) -> SagePolicy:
        """What is kept and replayed; of another one all but which blocks are wrapped, and how."""
        return self._policy

    @policy.setter
    def policy(self, new: SagePolicy) -> None:
        fixed = {k: getattr(self._policy, k) for k in ("blocks", "dense_blocks", "unselected")}
        self._policy = replace(new, **fixed)
        self.session.policy = replace(self._policy, blocks=None)

    @property
    def records(self) -> list[BlockRecord]:
        """What each block did with the latest batch, in order; empty before the first.

        A block that is called several times in a forward has a record of each call.
        """
        return [record for _, record in sorted(self.session.records.items())]

    @property
    def refused(self) -> dict[str, str]:
        """Blocks that could not be replayed and are left dense, with the reason."""
        marks = ((name, block.__dict__[ATTRIBUTE].refused) for name, block in self.blocks.items())
        return {name: reason for name, reason in marks if reason is not None}

    @property
    def dense_saved_bytes(self) -> int | None:
        """Bytes that a dense step would have saved in the blocks; None before it was measured."""
        return sum(self.session.dense_bytes.values()) or None

    @property
    def agreement(self) -> Agreement | None:
        """What ranks tell one another of every batch; None where each goes its own way."""
        return self.session.agreement

    @agreement.setter
    def agreement(self, agreement: Agreement | None) -> None:
        self.session.agreement = agreement

    @property
    def unreached(self) -> list[str]:
        """Trainable parameters of replayed blocks to which no replay has given a gradient yet.

        One that blocks share is reached where any of them reaches it.
        """
        missing, reached = dict[str, int](), set[int]()
        for name, block in self.blocks.items():
            names = block.__dict__[ATTRIBUTE].unreached
            for parameter, value in block.named_parameters() if names is not None else ():
                if parameter in names:
                    missing[f"{name}.{parameter}"] = id(value)
                elif value.requires_grad:
                    reached.add(id(value))
        return [name for name, value in missing.items() if value not in reached]

    def check_gradients(self, where_torch_puts_them: bool = True) -> bool:
        """Whether the latest backward pass reached a block; if so, its parameters have gradients.

        Args:
            where_torch_puts_them: Whether that is where they stay.

        Raises:
            ReplayError: A trainable parameter of a replayed block has none.
        """
        reached = {record.name for record in self.records if record.replayed is not None}
        lost = {
            f"{name}.{parameter}"
            for name, block in self.blocks.items()
            if name in reached and where_torch_puts_them
            for parameter, value in block.named_parameters()
            # a rank may hold no element of a sharded parameter
            if value.requires_grad and value.grad is None and value.numel()
        }
        if names := sorted(lost.union(self.unreached)):
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise ReplayError(
                f"no gradient reached {', '.join(names[:8])}{more}, although the backward pass "
                "went through their blocks; freeze them if they are not used, or, if they are "
                "experts that had no token, set SageCallback(check_gradients=False)"
            )
        return bool(reached)

    def observe(self, batch: object) -> None:
        """Hand over the batch, for models whose forward is not given labels or padding by keyword.

        Args:
            batch: A mapping with `labels` and `attention_mask`; anything else tells nothing.
        """
        self.session.batch = dict(batch) if isinstance(batch, Mapping) else {}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Check on ``model(**batch)`` that every block can be replayed on some of its rows.

        Gradients, buffers, random generators and records are left as they were.

        Raises:
            ReplayError: Names the first block that cannot, and the reason.
        """
        session = self.session
        records, session.force_check = dict(session.records), True
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices), buffers_kept(self.model):
                self.model(**batch)
        finally:
            session.records, session.force_check = records, False

    def remove(self) -> None:
        """Leave the model as it was before; again is no error."""
        uninstall(self.model)

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def install(
    model: nn.Module,
    policy: SagePolicy | Preset | None = None,
    *,
    measure_dense: bool = False,
    allow_untested: bool = False,
    strict: bool = True,
) -> Installation:
    """Give the blocks of a model a sparse backward pass.

    Only forwards that record a graph change, and only in what they keep: values, evaluation,
    generation, state_dict and saved files are those of the model alone.

    Args:
        model: Any module with transformer blocks; also a LightningModule or a PeftModel.
        policy: What to keep and replay, or the name of a preset; None is `balanced`.
        measure_dense: On the first training forward, also count the bytes that a dense step would
            have saved, block by block.
        allow_untested: Only warn of what was done to the model and does not go with SAGE.
        strict: Whether a block that cannot be replayed ends training, at its first step and by its
            name. Else it is left dense, exact and without savings, with a warning that names it.

    Raises:
        ValueError: No block is found, one is wrapped already, the policy does not fit the model, or
            what was done to the model does not go with SAGE. The model is untouched then.
    """
    policy = as_policy(policy)
    blocks = find_blocks(model, policy)
    if any(ATTRIBUTE in m.__dict__ for m in model.modules()):
        raise ValueError(
            "SAGE is installed on this model already: remove() that installation first"
        )
    dense = policy.left_dense(len(blocks))
    wrapped = {n: m for i, (n, m) in enumerate(blocks.items()) if i not in dense}
    for reason in (*sharding.conflicts(model, wrapped), *adapters.conflicts(model)):
        if not allow_untested:
            raise ValueError(f"{reason}; allow_untested=True tries it nevertheless")
        warnings.warn(f"SAGE goes on because of allow_untested=True: {reason}", stacklevel=2)
    if policy.blocks is None:
        tell_of_left_dense(model)
    session = Session(replace(policy, blocks=None))
    session.measure_dense, session.strict = measure_dense, strict
    last_chooser = math.ceil(len(wrapped) / 10) - 1
    skip = policy.unselected == "skip"
    for i, (name, block) in enumerate(wrapped.items()):
        mark = Wrapped(name, i, session, skip and i > last_chooser, skip and i == last_chooser)
        mark.previous = block.__dict__.get("forward")
        if getattr(block, "gradient_checkpointing", False):
            mark.checkpointing = True
            setattr(block, "gradient_checkpointing", False)  # noqa: B010 - of unknown type
        block.__dict__[ATTRIBUTE] = mark
        # unlike a closure or a method, a partial deep-copies and pickles with its block
        block.forward = partial(sparse_forward, block)
    if any(b.__dict__[ATTRIBUTE].checkpointing for b in wrapped.values()):
        warnings.warn(
            "gradient checkpointing is switched off on the blocks that SAGE wraps, which save less "
            "than it does; removing SAGE switches it on again",
            stacklevel=2,
        )
    session.listen(model, set(wrapped.values()))
    return Installation(model, policy, wrapped, session)


def uninstall(model: nn.Module) -> None:
    """Take SAGE out of a model, whichever installation put it there; no error where there is none.

    Args:
        model: The model, or a copy of one that SAGE was installed on.
    """
    for module in model.modules():
        mark = module.__dict__.pop(ATTRIBUTE, None)
        if mark is not None:
            # a wrapper that came after us stays; it finds the block's own forward behind it
            if getattr(module.__dict__.get("forward"), "func", None) is sparse_forward:
                del module.__dict__["forward"]
                if mark.previous is not None:
                    module.__dict__["forward"] = mark.previous
            if mark.checkpointing is not None:
                module.gradient_checkpointing = mark.checkpointing
        for hooks, extras in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_always_called,)),
        ):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Session):
                    del hooks[key]
                    for extra in extras:
                        extra.pop(key, None)
