"""The coverage matrix: what is asked of each transformers type, and how it is judged.

`coverage.json` says what was found out about each type, by task: class A works as it is, B with an
adaptation that its codes name, C cannot, for the reason given. "refused" are those of class B that
SAGE does not adapt to.
"""

import contextlib
import functools
import itertools
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from transformers.modeling_layers import GradientCheckpointingLayer

import tiny
from accuracy import parameter_gradients, scales
from exact import in_double
from lightning_sage import AllTokens, RandomTokens, ReplayError, SagePolicy, install
from oracle import oracle, replayed

TABLE = json.loads((Path(__file__).parent / "coverage.json").read_text())
TOLERANCE = 1e-7


def entries(*classes):
    """``(task, type)`` of all entries of these classes."""
    return [(task, name) for c in classes for task, names in TABLE[c].items() for name in names]


def class_of(task, name):
    return next(c for c in "ABC" if name in TABLE[c].get(task, ()))


def adaptations(task, name):
    return TABLE["B"].get(task, {}).get(name, "").split()


def reason(task, name):
    """Why a type cannot be adapted to, or is not; empty for all others."""
    why = TABLE["C"].get(task, {}).get(name)
    return why or TABLE["refused"].get(f"{task}:{name}", "")


@dataclass
class Verdict:
    """What came of an entry.

    Attributes:
        errors: By check, the error of the gradients; None where the check does not apply.
        refused: By check, the message of SAGE's refusal.
        wrong: What must not be: an error beyond the tolerance, another exception, or a refusal
            that does not say which block, and what to do.
        blocks: Names of the blocks that were replayed.
        dense: Names of transformers' layers that were not.
    """

    errors: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)
    wrong: list = field(default_factory=list)
    blocks: list = field(default_factory=list)
    dense: list = field(default_factory=list)

    @property
    def word(self):
        """In a word: wrong, refused, dense where nothing was replayed, or right."""
        if self.wrong or self.refused:
            return "wrong" if self.wrong else "refused"
        return "right" if self.blocks else "dense"

    def __str__(self):
        """What is not right, a line each."""
        refused = [f"{label}: refused: {message}" for label, message in self.refused.items()]
        return "\n".join([self.word, *self.wrong, *refused])

    def note(self, label, check):
        try:
            self.errors[label] = error = check()
        except (ReplayError, ValueError) as refusal:
            self.refused[label] = str(refusal)
            if not _says_enough(str(refusal)):
                self.wrong.append(f"{label}: the refusal does not help: {refusal}")
        except Exception as crash:
            self.wrong.append(f"{label}: {type(crash).__name__}: {crash}")
        else:
            if error is not None and not error <= TOLERANCE:
                self.wrong.append(f"{label}: gradients are off by {error:.1e}")

    def note_left_dense(self, case):
        """Of a type that is refused: the others of its blocks are right, the refused dense."""
        try:
            error = case.error_of_some("salient", RandomTokens(0.4), strict=False)
        except ValueError as refusal:
            # where there is no block at all, or only such as are known to be none
            if not str(refusal).startswith(("no block found", "blocks ['")):
                raise
            return
        if not error <= TOLERANCE:
            self.wrong.append(f"left dense: gradients are off by {error:.1e}")
        self.blocks, self.dense = case.blocks()


def _says_enough(message):
    """Whether a refusal names a block, or those that there are, and a way out."""
    names = re.search(r"^block '|no block found|^blocks \[", message)
    way = re.search(r"dense_blocks|blocks=|freeze|attention='salient'|to 0|switch", message)
    return bool(names and way)


def judge(task, name, left_dense=True):
    """Every check of an entry; what is refused at once is not asked again, but to be left dense."""
    verdict = Verdict()
    some = RandomTokens(0.4)
    paddings = (None,) if task == "image-cls" else ("right", "left")
    for padding in paddings:
        said = f", {padding} padding" if padding else ""
        model, make_batch = _built(task, name)
        case = Case(model, make_batch(padding=padding))
        for mode in ("salient", "full"):
            by_hand = not SALIENT_ONLY.isdisjoint([name, *adaptations(task, name)])
            checks = {
                "all": functools.partial(case.error_of_all, mode),
                "some": functools.partial(case.error_of_some, mode, some),
            }
            for label, check in checks.items():
                if by_hand and mode == "full":
                    check = functools.partial(_unless_salient_only, check)
                verdict.note(f"{label}, {mode}{said}", check)
                if verdict.refused and all(error is None for error in verdict.errors.values()):
                    if left_dense:
                        verdict.note_left_dense(case)
                    return verdict
        keys = functools.partial(case.error_of_some, "kept", RandomTokens(0.7), 0.3)
        verdict.note(f"keys{said}", keys)
        verdict.blocks, verdict.dense = case.blocks()
        if padding == paddings[0]:
            some_of = functools.partial(case.error_of_some, "salient")
            verdict.note(f"by saliency{said}", functools.partial(some_of, 0.3))
            # fewer in all than a sample is long: a block must not see how many there are
            verdict.note(f"few{said}", functools.partial(some_of, AllTokens(), 0.06))
    adapted = _with_lora(task, name)
    names = [name for name, _ in adapted[0].named_parameters()] if adapted else []
    # adapters on the head alone give no block a gradient to replay
    if any("lora_" in name and block in name for name in names for block in verdict.blocks):
        case = Case(*adapted)
        verdict.note("all, LoRA", functools.partial(case.error_of_all, "salient"))
        verdict.note("some, LoRA", functools.partial(case.error_of_some, "salient", some))
    return verdict


# by adaptation or name: attention by hand and trained biases, which attention="full" refuses
SALIENT_ONLY = {"eagertap", "bias", "dynmask", "git", "bigbird_pegasus"}


def _unless_salient_only(check):
    try:
        return check()
    except ReplayError as refusal:
        if "attention='salient'" not in str(refusal):
            raise
        return None


def _built(task, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny.build(task, name)


def _with_lora(task, name):
    """The model with adapters on every linear layer, and a batch; None where peft has none."""
    import peft

    model, make_batch = _built(task, name)
    config = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights=False,  # B is not zero, so that A has a gradient
        # routers that are a linear layer by class, and return more than one tensor
        exclude_modules=[name for name, module in model.named_modules() if _has_forward(module)],
    )
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            model = peft.get_peft_model(model, config)
        except ValueError:
            return None
    return model.double(), make_batch(padding=None if task == "image-cls" else "right")


def _has_forward(module):
    linear = torch.nn.Linear
    return isinstance(module, linear) and type(module).forward is not linear.forward


@contextlib.contextmanager
def _outputs(model):
    """Tensors that the blocks of the model return inside, which keep their gradient."""
    lists = [x for x in model.modules() if isinstance(x, torch.nn.ModuleList)]
    blocks = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
    seen = []

    def keep(_module, _args, output):
        for x in pytree.tree_leaves(output):
            if isinstance(x, torch.Tensor) and x.requires_grad:
                x.retain_grad()
                seen.append(x)

    handles = [module.register_forward_hook(keep) for module in {*blocks, *itertools.chain(*lists)}]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Case:
    """One model and one batch, and what they give densely.

    Attributes:
        reads_padding: Whether the loss depends on what stands at padding, as where a head reads
            the first token and padding is on the left. SAGE gives it no gradient.
    """

    def __init__(self, model, batch):
        self.model, self.batch = model, batch
        self.replayed = set()
        with _outputs(model) as seen:
            self.value, self.dense = self.step()
        masks = [x for name, x in batch.items() if name.endswith("attention_mask")]
        self.reads_padding = any(
            x.grad is not None and bool(x.grad[mask == 0].any())
            for x in seen
            for mask in masks
            if mask.shape == x.shape[:2]
        )

    def step(self):
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        with in_double():
            output = self.model(**self.batch)
            loss = getattr(output, "loss", None)
            if loss is None:
                made = [x for x in output.values() if isinstance(x, torch.Tensor)]
                loss = sum(x.square().mean() for x in made if x.is_floating_point())
            loss.backward()
        return loss.item(), parameter_gradients(self.model)

    def sparse(self, strict=True, **fields):
        """Loss, gradients and rows of a sparse step."""
        policy = SagePolicy(**{"replay": None, "sinks": 1} | fields)
        with warnings.catch_warnings():
            # of hybrids, and of layers that share keys: SAGE says so, and `blocks` shows it
            warnings.filterwarnings("ignore", ".*left dense")
            if self.reads_padding:
                warnings.filterwarnings(
                    "ignore", "the loss has a gradient at tokens that are padding"
                )
            with install(self.model, policy, strict=strict) as installed:
                value, gradients = self.step()
        self.replayed |= {record.name for record in installed.records}
        return value, gradients, replayed(installed.records)

    def blocks(self):
        """Names of the blocks that were replayed, and of transformers' layers that were not."""
        modules = self.model.named_modules()
        layers = [name for name, x in modules if isinstance(x, GradientCheckpointingLayer)]
        return sorted(self.replayed), [name for name in layers if name not in self.replayed]

    def expected(self, rows, mode):
        with oracle(self.model, rows, mode):
            return self.step()[1]

    def judge_loss(self, value):
        # a mask that requires grad makes torch choose another kernel, and SAGE's pass is without
        off = abs(value - self.value) / abs(self.value)
        assert off <= 1e-12, f"the loss is off by {off:.1e}"

    def error_of_all(self, mode):
        """Of a step in which every token is kept, against dense autograd."""
        if self.reads_padding:
            return None
        value, gradients, _ = self.sparse(keep=AllTokens(), attention=mode)
        self.judge_loss(value)
        return largest_error(gradients, self.dense)

    def error_of_some(self, mode, keep, replay=None, strict=True):
        """Of a step in which some are, against the oracle."""
        policy = {"keep": keep, "attention": mode, "replay": replay}
        value, gradients, rows = self.sparse(strict, **policy)
        self.judge_loss(value)
        return largest_error(gradients, self.expected(rows, mode))


def largest_error(actual, expected):
    """Of all gradients, each relative to its scale (see `accuracy.scales`)."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    errors = [
        ((actual[name] - expected[name]).abs().max() / scale).item()
        for name, scale in scales({n: g for n, g in expected.items() if g.numel()}).items()
    ]
    # max() would pass over a NaN
    return max(errors, key=lambda error: float("inf") if error != error else error)
