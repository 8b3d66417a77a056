"""The coverage matrix: what is asked of each transformers type, and how it is judged.

`coverage.json` says what was found out about each type, by task: class A works as it is, B with an
adaptation that its codes name, C cannot, for the reason given.
"""

import contextlib
import copy
import functools
import json
import warnings
from pathlib import Path

import torch

import tiny
from accuracy import parameter_gradients, scales
from exact import in_double
from lightning_sage import AllTokens, RandomTokens, SagePolicy, install
from oracle import oracle, replayed

TABLE = json.loads((Path(__file__).parent / "coverage.json").read_text())
TOLERANCE = 1e-7
MODES = ("salient", "full")


def entries(*classes):
    """``(task, type)`` of all entries of these classes."""
    return [(task, name) for c in classes for task, names in TABLE[c].items() for name in names]


def class_of(task, name):
    return next(c for c in "ABC" if name in TABLE[c].get(task, ()))


def adaptations(task, name):
    return TABLE["B"].get(task, {}).get(name, "").split()


@functools.lru_cache(maxsize=2)
def built(task, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny.build(task, name)


def with_lora(model):
    import peft

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=4,
            target_modules="all-linear",
            init_lora_weights=False,  # B is not zero, so that A has a gradient
            # routers that are a linear layer by class, and return more than one tensor
            exclude_modules=[name for name, module in model.named_modules() if _has_forward(module)],
        )
        return peft.get_peft_model(copy.deepcopy(model), config).double()


def _has_forward(module):
    linear = torch.nn.Linear
    return isinstance(module, linear) and type(module).forward is not linear.forward


class _EveryCall(dict):
    """Records of an installation by block, which also remembers those of earlier calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __setitem__(self, index, record):
        super().__setitem__(index, record)
        self.calls.append(record)


@contextlib.contextmanager
def _embedded(model):
    """Outputs of the model's embedding of words, which keep their gradient."""
    seen = []

    def keep(_module, _args, output):
        if output.requires_grad:
            output.retain_grad()
            seen.append(output)

    try:
        handle = model.get_input_embeddings().register_forward_hook(keep)
    except (AttributeError, NotImplementedError):
        yield seen
        return
    try:
        yield seen
    finally:
        handle.remove()


class Case:
    """One model and one batch, and what they give densely.

    Attributes:
        reads_padding: Whether the loss depends on what stands at padding: no gradient flows there.
    """

    def __init__(self, model, batch):
        self.model, self.batch = model, batch
        with _embedded(model) as seen:
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

    def sparse(self, **fields):
        """Loss, gradients and rows of a sparse step."""
        with install(self.model, SagePolicy(**{"replay": None, "sinks": 1} | fields)) as installed:
            installed.session.records = records = _EveryCall()
            value, gradients = self.step()
            return value, gradients, replayed(records.calls)

    def expected(self, rows, mode):
        with oracle(self.model, rows, mode):
            return self.step()[1]

    def error_of_all(self, mode):
        """Of a step in which every token is kept, against dense autograd."""
        if self.reads_padding:
            return None
        value, gradients, _ = self.sparse(keep=AllTokens(), attention=mode)
        assert value == self.value, f"the loss is {value}, and densely {self.value}"
        return largest_error(gradients, self.dense)

    def error_of_some(self, mode, keep):
        """Of a step in which some are, against the oracle."""
        value, gradients, rows = self.sparse(keep=keep, attention=mode)
        assert value == self.value, f"the loss is {value}, and densely {self.value}"
        assert rows, "no block replayed anything"
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


KEEPS = {"random": RandomTokens(0.4), "salient": 0.3}


def checks(task, name):
    """The checks of an entry: by name, a function that returns an error."""
    model, make_batch = built(task, name)

    @functools.cache
    def case(padding, lora=False):
        return Case(with_lora(model) if lora else model, make_batch(padding=padding))

    paddings = (None,) if task == "image-cls" else ("right", "left")
    found = {}
    for padding in paddings:
        for mode in MODES:
            label = f"{padding or 'unpadded'}, {mode}"
            found[f"{label}, all"] = lambda p=padding, m=mode: case(p).error_of_all(m)
            found[f"{label}, some"] = lambda p=padding, m=mode: case(p).error_of_some(
                m, RandomTokens(0.4)
            )
    found["salient tokens"] = lambda: case(paddings[0]).error_of_some("salient", 0.3)
    found["LoRA, all"] = lambda: case(paddings[0], True).error_of_all("salient")
    found["LoRA, some"] = lambda: case(paddings[0], True).error_of_some("salient", RandomTokens(0.4))
    return found
