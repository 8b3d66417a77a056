"""Adapters of PEFT: exact against dense autograd and the oracle, or refused by name."""

import copy
import functools
import re
from pathlib import Path

import peft
import pytest
import torch

import snippets
import zoo
from accuracy import assert_gradients_close, relative_error
from lightning_sage import AllTokens, SagePolicy, TopMass, adapters, install
from lightning_sage.engine.wrapped import ATTRIBUTE
from lightning_sage.errors import ReplayError
from steps import oracle_step, policy_of, run, trained

pytestmark = [
    # what peft says of layers that it adapts, and of a base that is on no hub
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type '.*Norm'>' encountered:UserWarning"),
]

MODES = ("salient", "full")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "o_proj")
VIRTUAL = 3  # tokens put before a prompt


def lora(model="llama", **fields):
    return model, functools.partial(
        peft.LoraConfig, **{"r": 4, "target_modules": "all-linear"} | fields
    )


def kind(config, model="llama", **fields):
    return model, functools.partial(config, **{"target_modules": list(LINEAR)} | fields)


def prompts(config, model="llama", task="CAUSAL_LM", **fields):
    return model, functools.partial(config, task_type=task, num_virtual_tokens=VIRTUAL, **fields)


# by name: the model, and what makes the configuration
COMMON = {
    "lora": lora(),
    "lora-gpt2": lora("gpt2", fan_in_fan_out=True),
    "lora-bert": lora("bert"),
    "lora-gemma2": lora("gemma2"),
    "lora-biases": lora("gpt2", fan_in_fan_out=True, bias="all"),
    "lora-saves-modules": lora(
        target_modules=list(LINEAR), modules_to_save=["lm_head", "embed_tokens", "input_layernorm"]
    ),
    "lora-embeddings": lora(target_modules=[*LINEAR, "embed_tokens", "lm_head"]),
    "lora-one-layer": lora(target_modules=list(LINEAR), layers_to_transform=[1]),
    "lora-tokens": lora(trainable_token_indices=[3, 4, 5]),
    "dora": lora(use_dora=True),
    "dora-gpt2": lora("gpt2", fan_in_fan_out=True, use_dora=True),
    "dora-embeddings": lora(target_modules=[*LINEAR, "embed_tokens"], use_dora=True),
    "ia3": kind(peft.IA3Config, feedforward_modules=["down_proj"]),
    "norms": ("llama", functools.partial(peft.LNTuningConfig, task_type="CAUSAL_LM")),
    "prompt": prompts(peft.PromptTuningConfig),
    "p-tuning": prompts(peft.PromptEncoderConfig, encoder_hidden_size=16),
    "prompt-gpt2": prompts(peft.PromptTuningConfig, "gpt2"),
    "prompt-gemma2": prompts(peft.PromptTuningConfig, "gemma2"),
}
# their masks are drawn by row: no dense step draws the same
DROPPED = {
    "lora-dropout": lora(lora_dropout=0.1),
    "lora-dropout-gemma2": lora("gemma2", lora_dropout=0.1),
    "rslora-dropout": lora(lora_dropout=0.1, use_rslora=True),
    "dora-dropout": lora(lora_dropout=0.1, use_dora=True),
    "adalora": kind(
        peft.AdaLoraConfig, init_r=4, target_r=2, tinit=1, tfinal=1, total_step=10, lora_dropout=0.1
    ),
    "vera": kind(peft.VeraConfig, target_modules=list(SOME), r=4, vera_dropout=0.1),
    "vblora": kind(
        peft.VBLoRAConfig,
        target_modules=list(SOME),
        r=4,
        num_vectors=8,
        vector_length=8,
        vblora_dropout=0.1,
    ),
    "randlora": kind(peft.RandLoraConfig, r=4, randlora_dropout=0.1),
    "miss": kind(peft.MissConfig, r=8, miss_dropout=0.1),
    "delora": kind(peft.DeloraConfig, r=4, module_dropout=0.1),
    "gralora": kind(peft.GraloraConfig, r=4, gralora_k=2, gralora_dropout=0.1),
    "hira": kind(peft.HiraConfig, r=4, hira_dropout=0.1),
    # these leave out ranks, blocks and whole modules, for all tokens alike
    "loha": kind(peft.LoHaConfig, r=4, rank_dropout=0.3, module_dropout=0.3),
    "lokr": kind(peft.LoKrConfig, r=4, rank_dropout=0.3, module_dropout=0.3),
    "boft-dropout": kind(peft.BOFTConfig, boft_block_size=4, boft_dropout=0.3),
}
RARE = {
    "rslora": lora(use_rslora=True),
    "lora-bias": lora("gpt2", fan_in_fan_out=True, lora_bias=True),
    "lora-repeated-layers": lora(layer_replication=[(0, 2), (0, 2)]),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "qalora": lora(use_qalora=True, qalora_group_size=8),
    "kasa": lora(kasa_config=peft.KasaConfig()),
    "velora": lora(velora_config=peft.VeloraConfig(num_groups=4, init_type="random")),
    "oft": kind(peft.OFTConfig, r=0, oft_block_size=8),
    "boft": kind(peft.BOFTConfig, boft_block_size=4),
    "hra": kind(peft.HRAConfig, r=4),
    "fourierft": kind(peft.FourierFTConfig, n_frequency=10),
    "waveft": kind(peft.WaveFTConfig, n_frequency=10),
    "road": kind(peft.RoadConfig, group_size=8),
    "shira": kind(peft.ShiraConfig, r=2),
    "loha-whole": kind(peft.LoHaConfig, r=4),
    "lokr-whole": kind(peft.LoKrConfig, r=4),
    # its own function takes its Fourier transforms in float32
    "c3a": kind(peft.C3AConfig, block_size=8),
    "deft": kind(peft.DeftConfig, r=4),
    "glora": kind(peft.GloraConfig, r=4),
    "osf": kind(peft.OSFConfig),
    "peanut": kind(peft.PeanutConfig, r=4),
    "tinylora": kind(peft.TinyLoraConfig, r=4),
    "unilora": kind(peft.UniLoraConfig, r=4),
    "beft": kind(peft.BeftConfig, "opt", target_modules=["v_proj"]),
    "tokens": ("llama", functools.partial(peft.TrainableTokensConfig, token_indices=[3, 4, 5])),
    "llama-adapter": (
        "llama",
        functools.partial(
            peft.AdaptionPromptConfig, task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2
        ),
    ),
    "prompt-classes": prompts(peft.PromptTuningConfig, "bert-classes", "SEQ_CLS"),
}
KINDS = COMMON | DROPPED | RARE
LEAVE_OUT_MODULES = ("loha", "lokr")


def noisy(model):
    """Adapters as they are some way into training: many start as nothing."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def adapted(name, config):
    """A float64 model with adapters; some kinds cannot be made in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(zoo.build(name, dtype=torch.float32), config)
    return model.double().train()


@functools.cache
def _made(which):
    name, config = KINDS[which]
    return noisy(adapted(name, config()))


def build(which):
    return KINDS[which][0], copy.deepcopy(_made(which))


def sage(name, model, batch, **fields):
    """Loss, gradients, what was replayed, and the parameters that no replay gave a gradient."""
    from oracle import replayed

    with install(model, policy_of(**fields)) as installation:
        loss, gradients = run(name, model, batch)
        return loss, gradients, replayed(installation.records), installation.unreached


def tolerance(which, bound):
    return 1e-6 if which == "c3a" else bound


def assert_exact(which, padding, mode):
    """Everything kept is dense; some of it is what the oracle says."""
    name, model = build(which)
    batch = zoo.make_batch(name, padding)
    for keep in (AllTokens(), 0.3):
        loss, gradients, rows, unreached = sage(name, model, batch, keep=keep, attention=mode)
        expected_loss, expected = oracle_step(name, model, batch, rows, mode)
        assert relative_error(loss, expected_loss) <= 1e-12
        assert_gradients_close(gradients, expected, tolerance(which, 1e-8))
        assert len(gradients) > 1
        assert not unreached or which in LEAVE_OUT_MODULES
    everything = sage(name, model, batch, keep=AllTokens(), attention=mode)
    dense_loss, dense = run(name, model, batch)
    if which not in DROPPED:
        assert everything[0] == dense_loss
        assert_gradients_close(everything[1], dense, tolerance(which, 1e-10))
    learn, learn_densely = ({n for n, g in x.items() if g.any()} for x in (everything[1], dense))
    assert learn == learn_densely or which in LEAVE_OUT_MODULES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("which", [*COMMON, *DROPPED])
def test_adapters_are_exact(which, padding, mode):
    assert_exact(which, padding, mode)


@pytest.mark.coverage
@pytest.mark.parametrize("which", RARE)
def test_rarer_adapters_are_exact(which):
    assert_exact(which, "right", "salient")


@pytest.mark.parametrize("which", DROPPED)
def test_dropout_is_applied(which):
    name, model = build(which)
    batch = zoo.make_batch(name)
    loss = sage(name, model, batch, keep=AllTokens())[0]
    assert relative_error(loss, run(name, model.eval(), batch)[0]) > 1e-9


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt"])
def test_biases_alone_are_exact(name):
    model = zoo.build(name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.endswith("bias"))
    batch = zoo.make_batch(name, "left")
    for mode in MODES:
        _, gradients, rows, unreached = sage(name, model, batch, keep=0.3, attention=mode)
        assert_gradients_close(gradients, oracle_step(name, model, batch, rows, mode)[1], 1e-8)
        everything = sage(name, model, batch, keep=AllTokens(), attention=mode)[1]
        assert_gradients_close(everything, run(name, model, batch)[1], 1e-10)
        assert not unreached


MIXTURES = {
    "mixtral": zoo.Case(
        "mixtral", config=zoo._LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "qwen3_moe": zoo.Case(
        "qwen3_moe",
        config=zoo._LLAMA
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MIXTURES)
def test_lora_on_the_parameters_of_experts(name, mode, monkeypatch):
    monkeypatch.setitem(zoo.MODELS, name, MIXTURES[name])
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=list(SOME), target_parameters=experts)
    model = noisy(adapted(name, config))
    # grouped products know no float64
    model.config._experts_implementation = "eager"
    for padding in ("right", "left"):
        batch = zoo.make_batch(name, padding)
        dense_loss, dense = run(name, model, batch)
        assert sum("experts" in n for n, gradient in dense.items() if gradient.any()) == 8
        loss, gradients, *_, unreached = sage(name, model, batch, keep=AllTokens(), attention=mode)
        assert loss == dense_loss
        assert_gradients_close(gradients, dense, 1e-10)
        assert not unreached
        _, gradients, rows, _ = sage(name, model, batch, keep=0.3, attention=mode)
        assert_gradients_close(gradients, oracle_step(name, model, batch, rows, mode)[1], 1e-8)


def test_two_forwards_before_one_backward_on_the_parameters_of_experts(monkeypatch):
    """Each call parametrizes them anew, which looks like a change from outside."""
    monkeypatch.setitem(zoo.MODELS, "mixtral", MIXTURES["mixtral"])
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model = noisy(adapted("mixtral", config))
    model.config._experts_implementation = "eager"
    batches = [zoo.make_batch("mixtral", seed=seed) for seed in (0, 1)]

    def two_losses():
        losses = [model(**batch).loss for batch in batches]
        with torch.no_grad():
            model(**batches[0])
        return losses[0] - 0.5 * losses[1]

    dense = gradients_of(model, two_losses)
    with install(model, policy_of(keep=AllTokens())):
        assert_gradients_close(gradients_of(model, two_losses), dense, 1e-10)
        loss = two_losses()
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).mul_(2)
        with pytest.raises(RuntimeError, match="modified in place"):
            loss.backward()


@pytest.mark.parametrize("padding", ["right", "left", None])
@pytest.mark.parametrize("which", ["prompt", "p-tuning", "prompt-gpt2"])
def test_rows_are_those_of_the_longer_sequence(which, padding):
    """A prompt's virtual tokens come first; labels and padding are heard before and after that."""
    name, model = build(which)
    batch = zoo.make_batch(name, padding)
    labels = torch.nn.functional.pad(batch["labels"], (VIRTUAL, 0), value=-100)
    bears_loss = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    valid = torch.nn.functional.pad(mask, (VIRTUAL, 0), value=1).bool()
    policy = policy_of(keep=TopMass(1e-6, min_tokens=1), sinks=0, keep_last=False)
    with install(model, policy) as installation:
        model(**batch).loss.backward()
        for record in installation.records:
            assert torch.equal(record.valid, valid)
            assert not (bears_loss & ~record.kept).any()
            # and, of each sample, the one with the highest score
            assert ((record.kept & ~bears_loss).sum(1) <= 1).all()
            assert not (record.kept & ~valid).any()


def gradients_of(model, loss):
    model.zero_grad(set_to_none=True)
    loss().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def two_adapters(train=True):
    """LoRA twice, on layers of their own choice; embeddings are trained by both."""
    config = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    base = zoo.build("llama", dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=list(LINEAR), **config))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=list(SOME), **config))
    model.get_input_embeddings().weight.requires_grad_(True)
    return model.double().train(train)


def batch_of_one():
    return {name: x[:1] for name, x in zoo.make_batch("llama").items()}


def test_adapters_are_switched_between_steps():
    model, batch = two_adapters(), zoo.make_batch("llama")
    copied = copy.deepcopy(model)
    with install(model, policy_of(keep=AllTokens())):
        for name in ("default", "other", "default"):
            for each in (model, copied):
                each.set_adapter(name)
            found = gradients_of(model, lambda: model(**batch).loss)
            assert_gradients_close(found, gradients_of(copied, lambda: copied(**batch).loss), 1e-10)
            assert {n.split(".")[-2] for n in found if "lora_" in n} == {name}


def test_both_adapters_in_one_backward():
    model, batch = two_adapters(), zoo.make_batch("llama")

    def loss():
        model.set_adapter("default")
        first = model(**batch).loss
        model.set_adapter("other")
        return first - 0.5 * model(**batch).loss

    def loss_of_both():
        found = loss()
        for name, parameter in model.named_parameters():
            # PEFT has frozen the first by now
            parameter.requires_grad_("lora_" in name)
        return found

    for each, names in ((loss, {"other"}), (loss_of_both, {"default", "other"})):
        dense = gradients_of(model, each)
        assert {n.split(".")[-2] for n in dense if "lora_" in n} == names
        with install(model, policy_of(keep=AllTokens())):
            assert_gradients_close(gradients_of(model, each), dense, 1e-10)
            assert model.active_adapters == ["other"]


def test_adapters_switched_off_in_the_forward_are_off_in_the_replay():
    model, batch = two_adapters(), zoo.make_batch("llama")

    def loss():
        with model.disable_adapter():
            return model(**batch).loss

    dense = gradients_of(model, loss)
    with install(model, policy_of(keep=AllTokens())):
        assert_gradients_close(gradients_of(model, loss), dense, 1e-10)
        # afterwards they are on again
        on = gradients_of(model, lambda: model(**batch).loss)
    assert on.keys() - dense.keys()
    assert_gradients_close(on, gradients_of(model, lambda: model(**batch).loss), 1e-10)


def test_adapters_by_sample():
    """Without grad they work; with it, PEFT's hooks would be gone before the replay."""
    model, batch = two_adapters(train=False), zoo.make_batch("llama")
    names = ["other", "default", "__base__", "other", "other"]
    with torch.no_grad():
        plain = model(**batch, adapter_names=names).logits
    with install(model, policy_of(keep=AllTokens())):
        with torch.no_grad():
            assert torch.equal(model(**batch, adapter_names=names).logits, plain)
        for size in (1, 5):
            given = batch_of_one() if size == 1 else batch
            # once a call has been checked, its kind is known
            model(**given).loss.backward()
            loss = model(**given, adapter_names=["other"] * size).loss
            with pytest.raises(ReplayError, match="adapter_names"):
                loss.backward()
    model = two_adapters(train=False)
    with install(model), pytest.raises(ReplayError, match="adapter_names"):
        model(**batch, adapter_names=names)


def test_a_hook_that_stays_is_no_obstacle():
    model, batch = two_adapters(), zoo.make_batch("llama")
    layer = model.get_submodule("base_model.model.model.layers.1.mlp")
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    dense = gradients_of(model, lambda: model(**batch).loss)
    with install(model, policy_of(keep=AllTokens())):
        assert_gradients_close(gradients_of(model, lambda: model(**batch).loss), dense, 1e-10)


@pytest.mark.parametrize("which", ["lora", "dora", "lora-saves-modules", "ia3"])
def test_merged_after_training_as_after_dense_training(which):
    models = [build(which)[1] for _ in range(2)]
    untrained = copy.deepcopy(models[0]).merge_and_unload().state_dict()
    installation = trained(models[0], policy_of(keep=AllTokens()))
    trained(models[1])
    # with SAGE still there, which stays on the blocks and leaves them as it found them
    merged, expected = (model.merge_and_unload() for model in models)
    assert sum(ATTRIBUTE in module.__dict__ for module in merged.modules()) == 2
    installation.remove()
    assert not any(ATTRIBUTE in module.__dict__ for module in merged.modules())
    assert merged.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert relative_error(merged.state_dict()[name], weight) < 1e-10, name
    assert any(
        relative_error(untrained[name], weight) > 1e-4
        for name, weight in expected.state_dict().items()
    )
    batch = zoo.make_batch("llama")
    assert relative_error(merged(**batch).logits, expected(**batch).logits) < 1e-10


@pytest.mark.parametrize("which", ["lora", "dora", "lora-saves-modules", "prompt"])
def test_saved_while_sage_is_there(which, tmp_path):
    name, model = build(which)
    trained(model, SagePolicy())
    model.save_pretrained(tmp_path)
    base = zoo.build(name)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    batch = zoo.make_batch(name)
    with torch.no_grad():
        found, expected = (each.eval()(**batch).logits for each in (loaded, model))
    # peft puts the prompts that it loads into float32
    assert relative_error(found, expected) <= (1e-6 if which == "prompt" else 0)


REFUSED = {
    "prefix": (prompts(peft.PrefixTuningConfig), "PREFIX_TUNING.* use prompt tuning"),
    "cartridge": (prompts(peft.CartridgeConfig), "CARTRIDGE.* use prompt tuning"),
    "lily": (kind(peft.LilyConfig, target_modules=list(SOME), r=4, num_B=2), "LILY.*all tokens"),
    "pvera": (kind(peft.PveraConfig, target_modules=list(SOME), r=4), "PVERA.*random numbers"),
    "poly": (kind(peft.PolyConfig, r=4, n_tasks=3, n_skills=2, n_splits=1), "POLY.*tasks"),
    "alora": (
        lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5]),
        "alora_invocation_tokens.* leave alora_invocation_tokens out",
    ),
    "monteclora": (lora(monteclora_config=peft.MontecloraConfig()), "monteclora_config.*draws"),
    "velora": (lora(velora_config=peft.VeloraConfig(num_groups=4)), "init_type='random'"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_replayed_is_refused_by_name(which):
    (name, config), message = REFUSED[which]
    model = adapted(name, config())
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"adapter 'default' .*{message}"):
        install(model)
    for module_name, module in model.named_modules():
        assert vars(module) == before[module_name]
    # a LightningModule, say, that holds it
    with pytest.raises(ValueError, match=message):
        install(torch.nn.ModuleDict({"held": model}))


def test_a_mixture_of_adapters_is_refused(tmp_path):
    for number in "01":
        lora_config = peft.LoraConfig(r=4, target_modules=list(SOME), task_type="CAUSAL_LM")
        peft.get_peft_model(zoo.build("llama"), lora_config).save_pretrained(tmp_path / number)
    base = zoo.build("llama")
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        adapters={number: str(tmp_path / number) for number in "01"},
    )
    model = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match=r"XLORA.*scalings"):
        install(model)


@pytest.mark.parametrize("which", ["prefix", "lily", "alora"])
def test_what_is_tried_nevertheless_is_refused_at_the_first_step(which):
    (name, config), _ = REFUSED[which]
    model = noisy(adapted(name, config()))
    with pytest.warns(UserWarning, match="allow_untested"):
        installation = install(model, allow_untested=True)
    with installation, pytest.raises(ReplayError):
        model(**zoo.make_batch(name))


def test_adapters_that_are_not_in_use_are_no_obstacle():
    """Until they are used: then what is new about the call is refused."""
    model, batch = two_adapters(), batch_of_one()
    invoked = [int(batch["input_ids"][0, 4])]
    model.add_adapter(
        "invoked",
        peft.LoraConfig(
            target_modules=list(SOME), task_type="CAUSAL_LM", alora_invocation_tokens=invoked
        ),
    )
    model.double()
    with install(model, policy_of(keep=AllTokens())):
        model(**batch).loss.backward()
        model.set_adapter("invoked")
        with pytest.raises(ReplayError, match="attention input q"):
            model(**batch)


class Mean(torch.nn.Module):
    """An adapter that looks at all tokens, and starts as nothing."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight = layer, torch.nn.Parameter(torch.zeros_like(layer.weight))

    def forward(self, x):
        return self.layer(x) + x.mean(1, keepdim=True) @ self.weight.T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_an_adapter_will_do_is_seen_before_it_does_it(dtype):
    model, batch = zoo.build("llama", dtype=dtype).requires_grad_(False), zoo.make_batch("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Mean(layer.mlp.down_proj)
    before = dict(model.named_parameters())
    with install(model), pytest.raises(ReplayError, match="another output than the forward"):
        model(**batch)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert not any(p.any() for p in before.values() if p.requires_grad)


def test_an_adapter_that_starts_as_nothing_trains_as_densely():
    models = [adapted("llama", lora()[1]()) for _ in range(2)]
    assert not any(p.any() for n, p in models[0].named_parameters() if "lora_B" in n)
    trained(models[0], policy_of(keep=AllTokens()))
    trained(models[1])
    weights, expected = (parameters_of(model) for model in models)
    assert all(weight.any() for weight in weights.values())
    assert_gradients_close(weights, expected, 1e-10)


def parameters_of(model):
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


DOCUMENT = (Path(__file__).parents[1] / "examples" / "adapters.md").read_text()


def test_the_document_runs():
    codes = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert codes
    for code in codes:
        names = snippets.names()
        exec(compile(code, "examples/adapters.md", "exec"), names)
        assert not any("lora_" in name for name, _ in names["model"].named_parameters())


def test_the_document_says_what_is_refused():
    refused = DOCUMENT.split("## What is refused")[1]
    for name in (*adapters._KINDS, *adapters._FIELDS):
        assert f"`{name}`" in refused
