"""Laws of one wrapped block: unbiased draws, bytes held, other gradients, and what is refused."""

import gc
import itertools
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_sage.engine.block
import zoo
from accuracy import assert_gradients_close, loss_and_gradients, parameter_gradients
from lightning_sage import (
    AllTokens,
    ImportanceSampling,
    LossFirst,
    RandomTokens,
    ReplayError,
    SagePolicy,
    TopFraction,
    TopMass,
    install,
)
from lightning_sage.memory import saved_bytes
from lightning_sage.sampling import _inclusion

ALL = SagePolicy(keep=AllTokens(), replay=None, blocks=["blocks.*"])


class Rowwise(nn.Module):
    """A residual block without attention."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 12)
        self.down = nn.Linear(12, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Postnorm(Rowwise):
    """The same with its norm on the residual path, as BERT has it."""

    def forward(self, x):
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, **kwargs):
        for block in self.blocks:
            x = block(x, **kwargs)
        return x


def backward(model, x, weight, **kwargs):
    model.zero_grad()
    x = x.detach().requires_grad_()
    (model(x, **kwargs) * weight).sum().backward()
    return parameter_gradients(model) | {"inputs": x.grad}


@pytest.fixture
def x():
    return torch.randn(2, 9, 8, dtype=torch.float64)


@pytest.fixture
def weight(x):
    # light rows and heavy ones
    return torch.randn_like(x) * torch.logspace(-2, 0, 9, dtype=torch.float64)[:, None]


class Mixing(nn.Module):
    """Attention between the tokens."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [Rowwise, Postnorm, Mixing])
def test_the_block_where_rows_are_drawn_has_the_dense_gradient_on_average(
    kind, x, weight, monkeypatch
):
    """Every parameter's, and what is handed down, with attention between rows as without.

    The expectation over draws, as an exact integral over the one number that they use.
    """
    model = Stack(kind()).double()
    dense = backward(model, x, weight)
    policy = SagePolicy(AllTokens(), ImportanceSampling(0.4), sinks=1, blocks=["blocks.*"])
    draw, number = lightning_sage.engine.block.ops.uniform, 0.0

    def chosen(seed, stream, rows):
        if stream >= 0:
            return draw(seed, stream, rows)
        return torch.full(rows.shape, number, dtype=torch.float64)

    monkeypatch.setattr(lightning_sage.engine.block.ops, "uniform", chosen)
    # 0.4 of 18, rounded up; certain rows come first
    p = _inclusion(weight.flatten(0, 1).norm(dim=-1), torch.tensor(8.0))
    ends = p[(p < 1 - 1e-9).long().argsort(stable=True)].cumsum(0)
    cuts = torch.cat([ends % 1, torch.tensor([0.0, 1.0])]).sort()[0]
    mean, drawn = {name: torch.zeros_like(g) for name, g in dense.items()}, set()
    with install(model, policy) as installed:
        for low, high in itertools.pairwise(cuts):
            if high - low < 1e-12:
                continue
            number = float((low + high) / 2)
            for name, g in backward(model, x, weight).items():
                mean[name] += (high - low) * g
            drawn.add(tuple(installed.records[0].drawn.flatten().tolist()))
    assert len(drawn) > 3
    assert all(sum(w > 0 for w in rows) == 8 for rows in drawn)
    assert_gradients_close(mean, dense, 1e-10)


def test_rows_are_drawn_once_however_many_blocks(x, weight):
    model = Stack(*(Mixing() for _ in range(4))).double()
    policy = SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.3), blocks=["blocks.*"])
    with install(model, policy) as installed:
        for _ in range(2):
            backward(model, x, weight)
            assert [r.drawn is None for r in installed.records] == [True, True, True, False]
        # a backward pass begins where the loss is
        seen = []
        model.blocks[1].register_forward_hook(lambda *call: seen.append(call[-1]))
        model(x)
        (seen[0] * weight).sum().backward()
        assert [r.drawn is None for r in installed.records] == [True, False, True, True]


class Checkpointed(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("keep", [RandomTokens(0.5), LossFirst(0.5)], ids=repr)
def test_a_checkpoint_draws_again_what_all_blocks_have_drawn(keep, x, weight):
    blocks = [Mixing() for _ in range(3)]
    policy = SagePolicy(keep=keep, replay=None, sinks=1, blocks=["blocks.*"])
    found = []
    for kind in (Stack, Checkpointed):
        model = kind(*blocks).double()
        torch.manual_seed(0)
        with install(model, policy) as installed:
            installed.observe({"labels": torch.ones(2, 9, dtype=torch.int64)})
            backward(model, x, weight)
            torch.manual_seed(0)
            found.append(backward(model, x, weight))
            kept = [r.kept for r in installed.records]
            assert (installed.records[-1].drawn > 1).any()
        assert isinstance(keep, LossFirst) or all(torch.equal(k, kept[0]) for k in kept)
    assert_gradients_close(*found, 1e-12)


def test_weights_of_random_rows_leave_padding_out(x, weight):
    model, mask = Stack(Mixing()).double(), torch.arange(9).expand(2, -1) < torch.tensor([[9], [5]])
    policy = SagePolicy(keep=RandomTokens(0.4), replay=None, keep_last=False, sinks=1)
    policy = replace(policy, keep_loss_rows=False, blocks=["blocks.*"])
    with install(model, policy) as installed:
        installed.observe({"attention_mask": mask})
        backward(model, x, weight * mask[..., None])
        [record] = installed.records
    # the first token, and three of eight or one of four
    assert record.kept.sum(1).tolist() == [4, 2]
    assert record.drawn.amax(1).tolist() == pytest.approx([8 / 3, 4])


def test_bytes_held_are_the_kept_rows_and_nothing_else():
    """Rows of the input and of the attention's output, its log-sum-exp, and the index."""
    model = zoo.build("llama", lora=True, dtype=torch.float32)
    ids = torch.randint(3, 60, (4, 32))
    policy = SagePolicy(keep=0.25, replay=None)
    with install(model, policy) as installed:
        installed.check({"input_ids": ids, "labels": ids})
        with saved_bytes(exclude=[*model.parameters(), *model.buffers()]) as held:
            hidden = _body(model)(input_ids=ids).last_hidden_state
        records = installed.records
        # one row of H and one of O is 32 floats, 4 heads, an index
        assert [r.cached_bytes for r in records] == [32 * (4 * (32 + 32 + 4) + 8)] * 2
        # rotary tables and positions, once for all blocks; what the norm behind them saves
        outside = 2 * 32 * 8 * 4 + 32 * 8 + hidden.nbytes + 4 * 32 * 4
        assert held() == sum(r.cached_bytes for r in records) + outside


def _body(model):
    return model.get_base_model().model if hasattr(model, "get_base_model") else model.model


def test_saved_bytes_reach_the_target_on_the_reference_shape():
    """LoRA r=16 on all linear layers, D=512, 8 layers, 4 x 512 tokens, keep=0.25."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    body = transformers.LlamaModel(config)
    model = peft.get_peft_model(body, peft.LoraConfig(r=16, target_modules="all-linear")).train()
    ids = torch.randint(0, 64, (4, 512))
    labels = torch.where(torch.arange(512) < 384, -100, ids)

    def counted():
        with saved_bytes(exclude=[*model.parameters(), *model.buffers()]) as held:
            out = model(input_ids=ids).last_hidden_state  # noqa: F841 - keeps the graph alive
            return held()

    dense = counted()
    with warnings.catch_warnings():
        # transformers 5.2x renamed it
        warnings.simplefilter("ignore", FutureWarning)
        body.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointing = counted()
        body.gradient_checkpointing_disable()
    with install(model, SagePolicy(keep=0.25)) as installed:
        installed.observe({"labels": labels})
        sage = counted()
    assert sage <= 0.05 * dense
    assert sage <= 0.65 * checkpointing


def test_nothing_of_the_dense_forward_stays_alive():
    model = zoo.build("llama")
    alive = []

    def watch(_module, args, output):
        alive.extend(weakref.ref(t) for t in (*args, output) if isinstance(t, torch.Tensor))

    for layer in model.model.layers:
        for name, module in layer.named_modules():
            if name.endswith(("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")):
                module.register_forward_hook(watch)
    with install(model, SagePolicy(keep=0.3)) as installed:
        batch = {"input_ids": torch.randint(3, 60, (2, 12))}
        installed.check(batch)
        alive.clear()
        hidden = _body(model)(**batch).last_hidden_state
        gc.collect()
        assert len(alive) == 2 * 5 * 2
        assert not any(ref() is not None for ref in alive)
        del hidden


def test_skipping_blocks_is_a_model_in_which_unselected_tokens_skip():
    """Against the plain blocks run by hand on the chosen rows of each sample."""
    model = zoo.PlainModel(blocks=3).double()
    ids = torch.randint(0, 60, (3, 12))
    policy = SagePolicy(keep=0.4, replay=None, unselected="skip", blocks=["blocks.*"])
    with install(model, policy) as installed:
        sage_loss, sage = loss_and_gradients(model, {"input_ids": ids, "labels": ids})
        records = installed.records
    kept = records[0].kept
    assert all(torch.equal(r.kept, kept) for r in records)
    assert 0 < kept.sum() < kept.numel()

    model.zero_grad()
    x = embedded = model.embed(ids)
    embedded.retain_grad()
    with _frozen_rows(model.blocks[0], kept):
        x = model.blocks[0](x)
    for block in model.blocks[1:]:
        new = [row.clone() for row in x]
        for b in range(3):
            new[b][kept[b]] = block(x[b, kept[b]][None])[0]
        x = torch.stack(new)
    logits = model.head(x)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(sage_loss, loss.detach())
    expected = parameter_gradients(model) | {"inputs": embedded.grad}
    assert_gradients_close(sage, expected, 1e-8)


@pytest.mark.parametrize("padding", ["right", "left", None])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "modernbert"])
def test_skipping_nothing_but_padding_is_dense(name, padding):
    model, batch = zoo.build(name), zoo.make_batch(name, padding)
    policy = SagePolicy(keep=AllTokens(), replay=None, unselected="skip")
    with zoo.exactly(name):
        loss, dense = loss_and_gradients(model, batch)
        with install(model, policy):
            sage_loss, sage = loss_and_gradients(model, batch)
    torch.testing.assert_close(sage_loss, loss)
    assert_gradients_close(sage, dense, 1e-10)


def _frozen_rows(block, kept):
    from contextlib import ExitStack

    from oracle import Rows, _sparse, _Watch

    stack = ExitStack()
    watch = _Watch("salient")
    calls = itertools.cycle([Rows("0", kept.double())])
    block.forward = _sparse(block.forward, calls, watch).__get__(block)
    stack.callback(lambda: block.__dict__.pop("forward"))
    stack.enter_context(watch)
    return stack


def test_other_inputs_that_need_grad_get_theirs(x, weight):
    class Modulated(Rowwise):
        def forward(self, x, shift, scale):
            return super().forward(x + shift) * scale

    model = Stack(Modulated()).double()
    shift = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def run():
        shift.grad = scale.grad = None
        grads = backward(model, x, weight, shift=shift, scale=scale)
        return grads | {"shift": shift.grad, "scale": scale.grad}

    dense = run()
    with install(model, ALL):
        assert_gradients_close(run(), dense, 1e-12)


def test_a_block_used_twice_adds_its_gradients_up(x, weight):
    block = Rowwise()
    model = Stack(block, block).double()
    dense = backward(model, x, weight)
    with install(model, ALL):
        assert_gradients_close(backward(model, x, weight), dense, 1e-12)


def test_tied_weights_inside_a_block(x, weight):
    block = Rowwise()
    block.down.weight = nn.Parameter(block.up.weight.data.t().clone())

    class Tied(Rowwise):
        def __init__(self):
            super().__init__()
            self.again = self.up

        def forward(self, x):
            return super().forward(x) + F.linear(self.again(x), self.up.weight.t())

    model = Stack(Tied()).double()
    dense = backward(model, x, weight)
    with install(model, ALL):
        assert_gradients_close(backward(model, x, weight), dense, 1e-12)


def test_two_backward_passes_through_one_forward():
    model = zoo.build("llama")
    ids = torch.randint(3, 60, (2, 12))
    with install(model, SagePolicy(keep=0.5, replay=0.3)):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward(retain_graph=True)
        once = parameter_gradients(model)
        loss.backward()
        twice = parameter_gradients(model)
    assert_gradients_close(twice, {name: 2 * g for name, g in once.items()}, 1e-12)


def test_a_parameter_changed_between_forward_and_backward_is_an_error():
    model = zoo.build("plain")
    ids = torch.randint(3, 60, (2, 12))
    with install(model, ALL):
        loss = model(ids, labels=ids).loss
        with torch.no_grad():
            model.blocks[1].up.weight.add_(1)
        with pytest.raises(RuntimeError, match=r"block 'blocks.1' was modified in place"):
            loss.backward()


def test_hooks_on_parameters_fire_once(x, weight):
    model = Stack(Rowwise()).double()
    model.blocks[0].up.weight.register_hook(lambda grad: 2 * grad)
    dense = backward(model, x, weight)
    with install(model, ALL):
        assert_gradients_close(backward(model, x, weight), dense, 1e-12)


def test_a_backward_outside_autocast_replays_inside_it():
    model = zoo.build("llama", dtype=torch.float32)
    ids = torch.randint(3, 60, (2, 12))

    def run():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), parameter_gradients(model)

    loss, dense = run()
    with install(model, SagePolicy(keep=AllTokens(), replay=None)):
        sage_loss, sage = run()
    assert torch.equal(loss, sage_loss)
    assert_gradients_close(sage, dense, 4 * 2**-8)
    assert not torch.is_autocast_enabled("cpu")


def test_the_default_dtype_of_the_forward_holds_in_its_replay(x, weight):
    class Constant(Rowwise):
        def forward(self, x):
            return super().forward(x) * torch.tensor([1.0]).to(torch.get_default_dtype())

    model = Stack(Constant()).double()
    with install(model, ALL):
        torch.set_default_dtype(torch.float64)
        try:
            out = (model(x) * weight).sum()
        finally:
            torch.set_default_dtype(torch.float32)
        out.backward()
    assert torch.get_default_dtype() == torch.float32


def test_nothing_random_draws_nothing():
    model = zoo.build("llama")
    ids = torch.randint(3, 60, (2, 12))
    with install(model, SagePolicy(keep=0.5, replay=0.3)) as installed:
        before = torch.get_rng_state()
        model(input_ids=ids, labels=ids).loss.backward()
        assert torch.equal(before, torch.get_rng_state())
        assert installed.records[0].seed is None


@pytest.mark.parametrize("keep", [RandomTokens(0.5), LossFirst(0.5)], ids=repr)
def test_random_choices_repeat_with_the_generator(keep):
    model = zoo.build("llama")
    ids = torch.randint(3, 60, (2, 12))
    labels = torch.where(torch.arange(12) < 3, -100, ids)
    chosen = []
    with install(model, SagePolicy(keep=keep, replay=None, sinks=0)) as installed:
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            model(input_ids=ids, labels=labels).loss.backward()
            chosen.append(torch.stack([r.kept for r in installed.records]))
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


def test_loss_rows_are_drawn_only_where_something_tells_them():
    model = zoo.build("llama")
    ids = torch.randint(3, 60, (2, 12))

    def kept(keep, seed, **labels):
        torch.manual_seed(seed)
        with install(model, SagePolicy(keep=keep, replay=None)) as installed:
            model(input_ids=ids, **labels).logits.sum().backward()
            return torch.stack([record.kept for record in installed.records])

    by_score = kept(TopFraction(0.6), 1)
    for seed in (1, 2):
        assert torch.equal(kept(LossFirst(0.6), seed), by_score)
    assert not torch.equal(kept(LossFirst(0.6), 1, labels=ids), kept(LossFirst(0.6), 2, labels=ids))


@pytest.mark.parametrize("queries", ["auto", "last", "labels", "all"])
def test_queries_decide_whose_attention_counts(queries):
    """Against the definition, from the attention weights that eager attention returns."""
    model = zoo.build("llama")
    ids = torch.randint(3, 60, (2, 12))
    labels = torch.where(torch.arange(12) < 9, -100, ids)
    counts = torch.zeros(12, dtype=torch.bool)
    counts[{"last": slice(11, 12), "all": slice(None)}.get(queries, slice(8, 11))] = True
    policy = SagePolicy(
        keep=0.25, replay=None, queries=queries, sinks=0, keep_last=False, keep_loss_rows=False
    )
    with install(model, policy) as installed:
        model(input_ids=ids, labels=labels).loss.backward()
        kept = [r.kept for r in installed.records]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True).attentions
    for rows, weights in zip(kept, attentions, strict=True):
        score = weights[:, :, counts].sum((1, 2))
        assert torch.equal(rows, score >= score.sort(descending=True).values[:, 2:3])


def test_labels_are_asked_for_only_where_they_are_needed():
    model = zoo.build("llama")
    ids = torch.randint(3, 60, (2, 12))
    with (
        install(model, SagePolicy(queries="labels")),
        pytest.raises(ValueError, match="queries='labels' needs integer labels"),
    ):
        model(input_ids=ids)


@pytest.mark.parametrize("saliency", ["value_norm", "attention_value_norm"])
def test_other_saliencies_are_their_definition(saliency):
    model = zoo.build("plain")
    ids = torch.randint(3, 60, (2, 12))
    x = model.embed(ids)
    block = model.blocks[0]
    q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, 4, -1)).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = q @ k.transpose(-1, -2) * 8**-0.5
    weights = weights.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf)
    received = weights.softmax(-1)[:, :, -1] if saliency != "value_norm" else 1.0
    score = (received * v.norm(dim=-1)).sum(1)
    policy = SagePolicy(
        keep=0.25, saliency=saliency, queries="last", sinks=0, keep_last=False,
        keep_loss_rows=False, replay=None, blocks=["blocks.*"],
    )  # fmt: skip
    with install(model, policy) as installed:
        model(ids, labels=ids).loss.backward()
        rows = installed.records[0].kept
    assert torch.equal(rows, score >= score.sort(descending=True).values[:, 2:3])


class Positional(Rowwise):
    def forward(self, x):
        return super().forward(x) + torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None]


class Neighbourly(Rowwise):
    def forward(self, x):
        return super().forward(x) + F.pad(x, (0, 0, 1, 0))[:, :-1]


class HiddenAttention(Rowwise):
    def forward(self, x):
        weights = (x @ x.transpose(1, 2)).softmax(-1)
        return super().forward(x) + torch.einsum("bij,bjc->bic", weights, x)


class Noisy(Rowwise):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.rand_like(x)


class LearnedBias(Rowwise):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(9, 9))

    def forward(self, x):
        q = x[:, None]
        return super().forward(x) + F.scaled_dot_product_attention(q, q, q, self.bias)[:, 0]


class CrossAttention(Rowwise):
    def forward(self, x):
        q, k = x[:, None], x[:, None, :5]
        return super().forward(x) + F.scaled_dot_product_attention(q, k, k)[:, 0]


class SpatialDropout(Rowwise):
    def forward(self, x):
        return super().forward(x) + F.dropout(x.sum((0, 1)), 0.3)


class Pooled(Rowwise):
    def forward(self, x):
        return super().forward(x)[:, ::2]


class TwoTensors(Rowwise):
    def forward(self, x):
        return super().forward(x), x.sum(1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Positional, "another output than the forward"),
        (Neighbourly, "another output than the forward"),
        (HiddenAttention, "no attention call was seen"),
        (Noisy, "draws random numbers .rand_like."),
        (LearnedBias, "mask of shape .* requires grad.*freeze it"),
        (CrossAttention, "neither to their own tokens nor to the states that the block is given"),
        (SpatialDropout, "does not run along the tokens"),
        (Pooled, "not hidden states of the shape of its input"),
        (TwoTensors, "returns a second tensor"),
    ],
)
def test_a_block_that_cannot_be_replayed_is_refused_by_name(kind, reason, x):
    """At `keep=AllTokens()` too, where this very step would have been right."""
    model = Stack(Rowwise(), kind()).double().train()
    with (
        install(model, ALL),
        pytest.raises(ReplayError, match=rf"block 'blocks.1' \({kind.__name__}\): .*{reason}"),
    ):
        model(x)


def test_a_softmax_that_is_understood_wrongly_is_refused(monkeypatch):
    """An attention function with something unknown in it: here a sink that takes mass away."""
    model = zoo.build("gemma2")
    from transformers.models.gemma2 import modeling_gemma2

    true = modeling_gemma2.eager_attention_forward

    def with_sink(*args, **kwargs):
        out, weights = true(*args, **kwargs)
        return out * 0.9, weights

    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", with_sink)
    ids = torch.randint(3, 60, (2, 12))
    with install(model), pytest.raises(ReplayError, match="gives another attention output"):
        model(input_ids=ids, labels=ids)


def test_an_argument_whose_token_axis_is_ambiguous_is_refused(weight):
    class Extra(Rowwise):
        def forward(self, x, table):
            return super().forward(x)

    model = Stack(Extra()).double()
    x = torch.randn(4, 4, 8, dtype=torch.float64)
    with install(model, ALL), pytest.raises(ReplayError, match=r"'table' of shape .4. has an axis"):
        model(x, table=torch.zeros(4))


def test_eval_and_no_grad_are_the_model_alone():
    model = zoo.build("llama")
    ids = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    with install(model) as installed, torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert installed.records == []


def test_gradients_flow_in_eval_mode_too():
    """`from_pretrained` returns eval mode, and Lightning leaves it so."""
    model = zoo.build("llama").eval()
    ids = torch.randint(3, 60, (2, 12))
    with install(model, SagePolicy(keep=0.3)) as installed:
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(r.replayed.any() for r in installed.records)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (3, 5)], ids=str)
@pytest.mark.parametrize(
    "policy", [SagePolicy(), SagePolicy(keep=0.1), SagePolicy(attention="full")]
)
def test_short_sequences(shape, policy):
    model = zoo.build("llama")
    ids = torch.randint(3, 60, shape)
    with install(model, policy):
        model(input_ids=ids).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attention", ["salient", "full"])
def test_a_sample_without_valid_token_keeps_none(attention):
    model = zoo.build("llama")
    ids = torch.randint(3, 60, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with install(model, SagePolicy(keep=TopMass(0.5), attention=attention)) as installed:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        assert all(not r.kept[1].any() and r.kept[0].any() for r in installed.records)
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_without_any_valid_token_gives_zeros():
    model = zoo.build("llama")
    ids = torch.randint(3, 60, (2, 12))
    with install(model):
        logits = model(input_ids=ids, attention_mask=torch.zeros(2, 12, dtype=torch.long)).logits
        logits.sum().backward()
    assert all(p.grad.abs().sum() == 0 for p in model.model.layers.parameters())


def test_nan_surfaces_as_it_would_without():
    model = zoo.build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    ids = torch.randint(3, 60, (2, 12))
    with install(model):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    assert loss.isnan()
    assert model.model.layers[0].mlp.up_proj.weight.grad.isnan().any()
