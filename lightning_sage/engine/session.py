"""What the blocks of one installation share: the policy, the batch's loss rows, and the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sage import ops
from lightning_sage.balance import Agreement, Budget, fit_kept
from lightning_sage.engine import towers
from lightning_sage.engine.choice import Choice, Probe
from lightning_sage.engine.drops import Seed
from lightning_sage.engine.facts import Facts, Judged
from lightning_sage.engine.flash import FlashMask
from lightning_sage.engine.loss_rows import Heard, loss_rows
from lightning_sage.engine.masks import Looks
from lightning_sage.engine.replay import ALONE, Crossing, Recorder
from lightning_sage.engine.requests import asks, mask_told, refuse_cache, refuse_requests
from lightning_sage.engine.saliency import saliency
from lightning_sage.engine.seen import Seen, Written
from lightning_sage.ops import Rows, Visibility
from lightning_sage.policy import SagePolicy
from lightning_sage.records import BlockRecord
from lightning_sage.selections import Chosen

# calls blocks where nobody does
_NOBODY = nn.Identity()
# draws of one seed that must not be the same numbers
KEEP_STREAM, REPLAY_STREAM, DRAW_STREAM = -1, -2, -3


class Session:
    """State of an installation while its model trains.

    Args:
        policy: What to keep and replay.
    """

    def __init__(self, policy: SagePolicy) -> None:
        self.policy = policy
        # by place of the block, and number of its call in the forward pass
        self.records: dict[tuple[int, int], BlockRecord] = {}
        self.calls: Counter[int] = Counter()
        # between ranks; None where each goes its own way
        self.agreement: Agreement | None = None
        self.batch: Mapping[str, Any] = {}
        self.probe: Probe | None = None
        self.force_check = False
        self.strict = True
        self.told_of_padding = False
        # whether a checkpoint computes blocks again
        self.recalls = False
        self._recalled: dict[int, dict[str, Any]] = {}
        # of chains of blocks, by place, as long as those may be computed again
        self.seeds: dict[int, Seed] = {}
        self.measure_dense = False
        self.dense_bytes: dict[tuple[int, int], int] = {}
        self.skip_rows: tuple[Tensor, Rows] | None
        self._reset()

    def _reset(self) -> None:
        # the modules being called, outermost first, and what each was told, by its callers too
        self._inside: dict[nn.Module, dict[str, Any]] = {}
        self._looks = Looks()
        self._facts: list[Facts] = []
        self.skip_rows = None

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take along: nothing that belongs to a forward under way."""
        passing = {"_inside", "_looks", "_facts", "_recalled", "seeds"}
        passing |= {"batch", "records", "skip_rows", "agreement"}
        return {name: value for name, value in vars(self).items() if name not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.batch, self.records, self.agreement, self._recalled = {}, {}, None, {}
        self.seeds = {}
        self._reset()

    def listen(self, model: nn.Module, blocks: set[nn.Module]) -> None:
        """Hear from now on what every module that contains a block is told."""
        for module in model.modules():
            if module not in blocks and any(part in blocks for part in module.modules()):
                module.register_forward_pre_hook(self.enter, with_kwargs=True)
                module.register_forward_hook(self.leave, always_call=True)

    @torch.compiler.disable(reason="SAGE notes what a model is told")  # type: ignore[untyped-decorator]
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of every module above a block: learn labels and padding from keywords.

        Raises:
            ValueError: Something is requested that a training forward with SAGE cannot give.
        """
        # torch calls no hook after a KeyboardInterrupt: a module is never inside itself
        if not self._inside or module in self._inside:
            self._reset()
            self.calls, self._recalled, self.seeds = Counter(), {}, {}
        said = towers.handed_on(self.told(), args, kwargs)
        self._inside[module] = said
        if torch.is_grad_enabled():
            config = getattr(module, "config", None)
            refuse_requests(config, kwargs)
            said["routers"] = said.get("routers") or asks(config, kwargs, "output_router_logits")
            # further in, a model hands on a cache of its own making
            if len(self._inside) == 1:
                refuse_cache(kwargs)
        labels, mask = kwargs.get("labels"), mask_told(module, kwargs)
        # a model may hand its labels on: they stay its own
        if isinstance(labels, Tensor) and labels is not said.get("labels"):
            said |= {"labels": labels, "owner": type(module).__name__}
        # an encoder is handed the mask of pairs under the same name
        if isinstance(mask, Tensor) and mask.dim() == 2:
            said["attention_mask"] = mask
        self._note_side(module, kwargs, said)

    def _note_side(self, module: nn.Module, kwargs: dict[str, Any], said: dict[str, Any]) -> None:
        """Of a model of two sequences: which of them the blocks below are about to see.

        Labels are the decoder's, and the mask that the model is given is the encoder's.
        """
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) is True:
            said.setdefault("side", "encoder")
        if said.get("side") == "encoder" and kwargs.get("encoder_hidden_states") is not None:
            mask = kwargs.get("attention_mask")
            said |= {"side": "decoder", "attention_mask": mask}
            if mask is None:
                said["attention_mask"] = self.batch.get("decoder_attention_mask")

    def note(self, place: int, record: BlockRecord) -> None:
        """Remember what a block did; those of an earlier forward pass go with its first."""
        # the backward pass belongs to the call that a checkpoint computes again
        if self.recalls:
            return
        # outside of any forward seen from above calls are not counted
        call = self.calls[place] if self._inside else 0
        if call == 0 and not any(self.calls.values()):
            self.records = {}
        self.records[place, call] = record
        self.calls[place] = call + 1

    @torch.compiler.disable(reason="SAGE notes what a model is told")  # type: ignore[untyped-decorator]
    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of every module above a block, also called when the forward raised."""
        while module in self._inside:
            self._inside.popitem()
        if not self._inside:
            self._reset()

    def remember(self, place: int) -> None:
        """What a block is told now, for a checkpoint that computes it again."""
        self._recalled[place] = self.told()

    @contextmanager
    def recalling(self, place: int) -> Iterator[None]:
        """Inside, a block is computed again, knowing what it was told."""
        before = self._inside, self.recalls
        if not self._inside and place in self._recalled:
            self._inside, self.recalls = {_NOBODY: self._recalled[place]}, True
        try:
            yield
        finally:
            self._inside, self.recalls = before

    @property
    def wants_routers(self) -> bool:
        """Whether a caller asked for router logits, for a loss on them."""
        return bool(self.told().get("routers"))

    def told(self) -> dict[str, Any]:
        """What the innermost module that is being called was told."""
        return next(reversed(self._inside.values()), None) or towers.handed_on({}, (), self.batch)

    def _heard(self, name: str) -> Any:
        told = self.told()
        if told.get("side") == "decoder" and name == "attention_mask":
            return told[name]
        if told.get("side") == "encoder" and name == "labels":
            return None
        return told[name] if name in told else self.batch.get(name)

    def facts(self, hidden: Tensor) -> Facts:
        """What is known of the batch whose hidden states ``[B, T, C]`` these are."""
        B, T, _ = hidden.shape
        mask, labels = self._heard("attention_mask"), self._heard("labels")
        versions = (x._version if isinstance(x, Tensor) else None for x in (mask, labels))
        told = map(self.told().get, ("side", "tower"))
        heard = (B, T, hidden.device, mask, labels, self._heard("owner"), *told, *versions)
        for known in self._facts:
            if known.about(heard):
                return known
        found = Facts.of(heard, mask, hidden)
        # outside of any forward seen from above nobody would forget it again
        if self._inside:
            self._facts = [*self._facts[-3:], found]
        return found

    def recorder(self, seed: Seed, facts: Facts, crossing: Crossing = ALONE) -> Recorder:
        """What runs the attention of a dense forward."""

        def see(mask: Tensor | FlashMask | None, causal: bool, crosses: bool) -> Visibility:
            return self.visibility(mask, causal, facts.valid, crosses)

        return Recorder(seed, facts.every, facts.valid, see, facts.key_rows, crossing)

    def visibility(
        self,
        mask: Tensor | FlashMask | None,
        causal: bool,
        valid: Tensor,
        crosses: bool = False,
    ) -> Visibility:
        """What `mask` means; looked at once a forward, however many blocks share it."""
        # outside of any forward seen from above nobody would forget it again
        return self._looks.at(mask, causal, valid, crosses, remember=bool(self._inside))

    def loss_rows(self, valid: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Query rows whose attention counts, and rows that bear loss, as far as is known.

        Args:
            valid: ``[B, T]`` bool.
            causal: Whether tokens see no later ones.
        """
        owner = self._heard("owner") or " ".join(type(module).__name__ for module in self._inside)
        side = "tower" if self._heard("tower") else self.told().get("side")
        heard = Heard(self._heard("labels"), owner, side)
        return loss_rows(self.policy.queries, heard, valid, causal)

    def budget(self, facts: Facts) -> Budget | None:
        """Rows that ranks have agreed to replay of a call, if they have."""
        return None if self.agreement is None else self.agreement.budget(facts.count)

    def choose(self, facts: Facts, seen: list[Seen | Written], seed: Seed, ranks: bool) -> Choice:
        """Rows to keep; their saliency too where the replay ranks by it.

        Args:
            facts: Of the batch.
            seen: The block's attention calls.
            seed: Of what is drawn once for the block's chain.
            ranks: Whether the replay looks at the saliency.
        """
        keeper, replays_all = self.policy.keeper, self.policy.replay is None
        own = [one for one in seen if not one.crosses]
        # tokens are not mixed by a block without attention: those of the one before count there too
        causal, scores = facts.latest if not own else (any(one.causal for one in own), None)
        valid = facts.valid
        if causal not in facts.judged:
            queries, loss_rows = self.loss_rows(valid, causal)
            priority = self.policy.priority(valid, loss_rows)
            # all are given as bearing loss where nothing tells
            facts.judged[causal] = Judged(Rows.of(queries), priority, loss_rows is not valid)
        judged = facts.judged[causal]
        if keeper.needs_scores or ranks:
            if own:
                scores = saliency(self.policy.saliency, own, judged, facts)
            elif scores is None and keeper.needs_scores:
                # in front of all attention nothing tells tokens apart
                every = ops.rows_of(valid, facts.count)
                return Choice(Chosen(valid), every, None, None, facts.count, self.budget(facts))
        if own:
            facts.latest = causal, scores
        noise = judged.noise
        if keeper.draws_loss_rows and not judged.told and scores is not None:
            noise = scores
        elif keeper.random:
            noise = ops.uniform(int(seed), KEEP_STREAM, facts.every.index.view_as(valid))
        given = judged.noise if scores is None else scores, valid, judged.priority, noise
        chosen = alone = keeper.keep(*given)
        # the device is waited for only where the number of rows is news
        if keeper.fixed and judged.count is None:
            judged.count = int(chosen.rows.sum())
        count, budget = judged.count, self.budget(facts)
        if budget is not None:
            chosen = fit_kept(keeper, alone, budget, replays_all, given)
            if chosen is not alone and replays_all:
                count = budget.rows
            elif chosen is not alone and count is not None:
                count = max(count, budget.rows)
        wanted = alone.rows.sum() if judged.count is None else judged.count
        drew = judged.told or not keeper.draws_loss_rows
        p = keeper.probability(chosen.rows, valid, judged.priority) if drew else None
        return Choice(chosen, ops.rows_of(chosen.rows, count), scores, p, wanted, budget)
