"""torch.compile around a model, a block or a part of one: the gradients, and what is compiled."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import zoo
from accuracy import assert_gradients_close, parameter_gradients
from lightning_sage import AllTokens, SageCallback, install
from oracle import replayed
from steps import oracle_step, policy_of, told_blocks
from tasks import LIGHTNING_WARNINGS, Task, fit

# dynamo's own, of what it traces: it hides the second itself, but where warnings are errors
pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:Dynamo (does not know|detected):UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # inductor, as it is imported
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
NAMES = ("llama", "bert", "plain")


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def layers_of(model):
    if hasattr(model, "blocks"):
        return model.blocks
    return model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers


def whole(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def each_block(model, backend):
    for block in layers_of(model):
        block.compile(backend=backend)
    return model


def each_replaced(model, backend):
    layers = layers_of(model)
    for i, block in enumerate(layers):
        layers[i] = torch.compile(block, backend=backend)
    return model


def each_mlp(model, backend):
    for name, part in model.named_modules():
        if name.endswith(("mlp", "intermediate", "up")):
            part.compile(backend=backend)
    return model


def each_attention(model, backend):
    for name, part in model.named_modules():
        if name.endswith(("self_attn", "self", "qkv")):
            part.compile(backend=backend)
    return model


HOWS = {
    f.__name__: f for f in (whole, in_place, each_block, each_replaced, each_mlp, each_attention)
}
over_hows = pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
over_names = pytest.mark.parametrize("name", NAMES)
over_orders = pytest.mark.parametrize("first", ["compiled first", "installed first"])


def gradients_of(model, called, batch):
    """Gradients by the names of the model that is not compiled."""
    model.zero_grad(set_to_none=True)
    called(**batch).loss.backward()
    return without_prefix(parameter_gradients(model))


def without_prefix(named):
    return {name.replace("_orig_mod.", ""): x for name, x in named.items()}


def without_inputs(gradients):
    return {name: gradient for name, gradient in gradients.items() if name != "inputs"}


def prepared(name, how, first, policy, backend="eager"):
    """A model compiled and SAGE installed on it: the model, what is called, the installation."""
    model = zoo.build(name)
    policy = told_blocks(name, policy)
    if first == "compiled first":
        called = how(model, backend)
        return model, called, install(called, policy)
    installation = install(model, policy)
    return model, how(model, backend), installation


@over_orders
@over_hows
@over_names
def test_gradients_of_a_compiled_model(name, how, first):
    """All tokens against dense autograd, then some of several batches against brute force."""
    plain, padding = zoo.build(name), zoo.MODELS[name].paddings[0]
    model, called, installation = prepared(name, how, first, policy_of(keep=AllTokens()))
    with installation:
        batch = zoo.make_batch(name, padding)
        expected = gradients_of(plain, plain, batch)
        assert_gradients_close(gradients_of(model, called, batch), expected, 1e-10)
        for seed, keep in enumerate((0.3, 0.5)):
            batch = zoo.make_batch(name, padding, seed=seed)
            installation.policy = told_blocks(name, policy_of(keep=keep))
            found = gradients_of(model, called, batch)
            rows = replayed(installation.records)
            assert all("_orig_mod" not in r.name for r in rows)
            assert all(0 < (r.weights > 0).sum() < r.weights.numel() for r in rows)
            _, expected = oracle_step(name, plain, batch, rows, "salient")
            assert_gradients_close(found, without_inputs(expected), 1e-8)


def test_the_model_is_compiled_around_its_blocks():
    counter = CompileCounter()
    model, called, installation = prepared(
        "llama", whole, "installed first", policy_of(keep=0.3), counter
    )
    with installation:
        gradients_of(model, called, zoo.make_batch("llama"))
    assert counter.frame_count > 0
    assert any("_recorded" in reason for reason in counters["graph_break"])


@over_hows
@pytest.mark.parametrize("name", ["llama", "plain"])
def test_kept_counts_compile_nothing_anew(name, how):
    policy, padding = policy_of(keep=0.2), zoo.MODELS[name].paddings[0]
    model, called, installation = prepared(name, how, "compiled first", policy)
    kept, compiled = set(), []
    with installation:
        for step, keep in enumerate((0.2, 0.3, 0.4, 0.6, 0.8)):
            installation.policy = told_blocks(name, policy_of(keep=keep, keep_loss_rows=False))
            gradients_of(model, called, zoo.make_batch(name, padding, seed=step))
            kept.add(int(installation.records[0].kept.sum()))
            compiled.append(counters["stats"]["unique_graphs"])
    assert len(kept) == 5
    assert compiled == compiled[:1] * 5


def test_lengths_are_compiled_twice_and_no_more():
    """As without SAGE: once as it is, once with sizes that may change."""
    model, called, installation = prepared("plain", whole, "compiled first", policy_of(keep=0.3))
    compiled = []
    with installation:
        for length in (8, 9, 10, 12, 16, 17):
            gradients_of(model, called, zoo.make_batch("plain", None, length=length))
            compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[1:] == compiled[1:2] * 5


@over_names
def test_evaluation_stays_compiled_through_the_blocks(name):
    counter = CompileCounter()
    model, batch = zoo.build(name).eval(), zoo.make_batch(name, zoo.MODELS[name].paddings[0])
    with torch.no_grad():
        expected = model(**batch).logits
        with install(model, told_blocks(name, policy_of(keep=0.3))):
            found = torch.compile(model, backend=counter)(**batch).logits
    assert torch.equal(found, expected)
    assert not any("_recorded" in reason for reason in counters["graph_break"])
    assert counter.op_count > 10 * len(layers_of(model))


def test_a_full_graph_is_refused_with_the_reason():
    model = zoo.build("plain")
    with install(model, told_blocks("plain", policy_of(keep=0.3))):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"SAGE (runs|notes)"):
            compiled(**zoo.make_batch("plain", None))


def test_compiled_autograd():
    plain, batch = zoo.build("llama"), zoo.make_batch("llama")
    model, called, installation = prepared("llama", whole, "compiled first", policy_of(keep=0.3))
    with installation, torch._dynamo.config.patch(compiled_autograd=True):
        found = gradients_of(model, called, batch)
        rows = replayed(installation.records)
    _, expected = oracle_step("llama", plain, batch, rows, "salient")
    assert_gradients_close(found, without_inputs(expected), 1e-8)


def test_compiled_by_the_backend_that_users_have():
    """Inductor sums in another order: what it is compared with is its own dense step."""
    plain, batch = zoo.build("llama"), zoo.make_batch("llama")
    try:
        expected = gradients_of(plain, torch.compile(plain), batch)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no C++ compiler: {error}")
    model, called, installation = prepared(
        "llama", whole, "compiled first", policy_of(keep=AllTokens()), "inductor"
    )
    with installation:
        assert_gradients_close(gradients_of(model, called, batch), expected, 1e-6)


class Compiling(Task):
    """Compiles in `configure_model`."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def configure_model(self):
        if self.model is None:
            self.model = self.how(zoo.build("llama", dtype=torch.float32), "eager")


@pytest.mark.parametrize("how", [whole, in_place, each_block, each_replaced])
def test_a_fit_with_a_model_compiled_in_configure_model(how):
    """The same weights as a fit with the same rows of a model that is not compiled."""
    policy, weights = policy_of(keep=0.4), []
    for task in (Compiling(how), Task(zoo.build("llama", dtype=torch.float32))):
        fit(task, SageCallback(policy))
        weights.append(without_prefix(dict(task.model.named_parameters())))
    assert_gradients_close(*weights, 1e-6)


def test_a_fit_of_a_compiled_module():
    policy, weights = policy_of(keep=0.4), []
    for compiled in (True, False):
        task = Task(zoo.build("llama", dtype=torch.float32))
        fit(torch.compile(task, backend="eager") if compiled else task, SageCallback(policy))
        weights.append(dict(task.model.named_parameters()))
    assert_gradients_close(*weights, 1e-6)


def test_removed_and_copied():
    model, called, installation = prepared("llama", each_replaced, "compiled first", policy_of())
    batch = zoo.make_batch("llama")
    gradients_of(model, called, batch)
    again = copy.deepcopy(model)
    installation.remove()
    plain = zoo.build("llama")
    expected = gradients_of(plain, plain, batch)
    assert_gradients_close(gradients_of(model, called, batch), expected, 1e-10)
    assert not installation.records[0].name.endswith("_orig_mod")
    assert set(again.state_dict()) == set(model.state_dict())
