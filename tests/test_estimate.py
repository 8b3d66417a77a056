import copy
import io
import json

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from rich.console import Console
from torch import nn

import zoo
from lightning_sage import AllTokens, SagePolicy, install
from lightning_sage.engine import backward
from lightning_sage.estimate.command import estimate_table, main, notes, size_text
from lightning_sage.estimate.fakes import without_memory
from lightning_sage.estimate.largest import largest, largest_each
from lightning_sage.estimate.prediction import estimate
from lightning_sage.memory import saved_bytes
from lightning_sage.memory_size import parse_size
from lightning_sage.models import CausalLM, LoRA
from lightning_sage.policy import PRESETS, LossFirst
from lightning_sage.sampling import RandomTokens
from lightning_sage.selections import GradientMass, TopMass

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]
POLICIES = {
    "quarter": SagePolicy(keep=0.25),
    "full fp8": SagePolicy(keep=0.4, attention="full", cache_dtype="fp8"),
    "half int8": SagePolicy(keep=0.5, cache_dtype="int8"),
    "drawn": SagePolicy(keep=LossFirst(0.3), replay=None),
    "full": SagePolicy(keep=0.25, attention="full"),
    "random": SagePolicy(keep=RandomTokens(0.3), replay=GradientMass(0.9)),
    "all": SagePolicy(keep=AllTokens(), replay=0.25),
    "first dense": SagePolicy(keep=0.25, dense_blocks=1, cache_dtype="bf16"),
    "memory": SagePolicy.preset("memory"),
}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def named(name, lora, policy):
    if name != "plain":
        return policy
    blocks = ["base_model.model.blocks.*" if lora else "blocks.*"]
    return SagePolicy(**{**vars(policy), "blocks": blocks})


def held_by(model, batch, forward=None, extra=()):
    exclude = [*model.parameters(), *model.buffers(), *batch.values()]
    excluded = {x.untyped_storage().data_ptr() for x in exclude}
    with saved_bytes(exclude) as held:
        loss = forward() if forward else model(**batch).loss
        saved = held()
    del loss
    seen = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in extra}
    return saved + sum(size for at, size in seen.items() if at not in excluded)


def checkpointed(model, batch):
    """With what is hidden from saved-tensor hooks: tensors given to blocks by keyword."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    extra = []
    for part in model.modules():
        if isinstance(part, transformers.modeling_layers.GradientCheckpointingLayer):
            part.register_forward_pre_hook(
                lambda _, args, kwargs: extra.extend(
                    y
                    for x in kwargs.values()
                    for y in (x if isinstance(x, tuple) else (x,))
                    if isinstance(y, torch.Tensor)
                ),
                with_kwargs=True,
            )
    return held_by(model, batch, extra=extra)


@pytest.mark.parametrize(
    ("lora", "size", "length"), [(False, 5, 11), (True, 3, 48)], ids=["full", "lora"]
)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_saved_bytes_are_those_that_are_measured(name, lora, size, length):
    model = zoo.build(name, lora=lora, dtype=torch.float32)
    batch = zoo.make_batch(name, None, size=size, length=length)
    chosen = list(POLICIES)[:: 2 if lora else 1]
    policies = {key: named(name, lora, POLICIES[key]) for key in chosen}
    first = policies.pop("quarter")
    found = estimate(
        model,
        size,
        length,
        first,
        presets=policies,
        inputs=lambda b, t: zoo.make_batch(name, None, size=b, length=t),
    ).footprints
    assert found["dense"].saved == held_by(copy.deepcopy(model), batch)
    if name != "plain":
        expected = checkpointed(copy.deepcopy(model), batch)
        assert found["checkpointing"].saved == pytest.approx(expected, rel=0.05)
    for key, policy in {"yours": first, **policies}.items():
        twin = copy.deepcopy(model)
        with install(twin, policy):
            assert found[key].saved == held_by(twin, batch), key
    assert (
        sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
        == found["dense"].gradients
    )


@pytest.mark.parametrize(
    ("name", "precision"),
    [("llama", "bf16-mixed"), ("gpt2", "16-mixed"), ("bert", "bf16-mixed"), ("llama", "bf16-true"),
     ("bert", "64-true")],
)  # fmt: skip
def test_precisions(name, precision):
    batch = zoo.make_batch(name, None)
    found = estimate(
        zoo.build(name, dtype=torch.float32),
        5,
        11,
        presets=dict(list(POLICIES.items())[::2]),
        precision=precision,
        inputs=lambda b, t: zoo.make_batch(name, None, size=b, length=t),
    ).footprints
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    true = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    for key, policy in {"dense": None, **dict(list(POLICIES.items())[::2])}.items():
        model = zoo.build(name, dtype=true)
        if policy is not None:
            install(model, policy)

        def forward(model=model):
            torch.set_default_dtype(true)
            try:
                with torch.autocast("cpu", dtype=mixed or torch.bfloat16, enabled=bool(mixed)):
                    return model(**batch).loss
            finally:
                torch.set_default_dtype(torch.float32)

        # a layer norm of mixed dtypes keeps its statistics wider than its fake does
        assert found[key].saved == pytest.approx(held_by(model, batch, forward), rel=0.01), key
    assert found["dense"].weights == sum(
        x.untyped_storage().nbytes() for x in {*model.parameters(), *model.buffers()}
    )


@pytest.mark.parametrize("attention", ["kept", "salient"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_replay_saves_what_is_predicted(monkeypatch, name, attention):
    policy = SagePolicy(keep=AllTokens(), replay=0.25, attention=attention)
    model, batch = zoo.build(name), zoo.make_batch(name, None, size=4, length=64)
    batch.pop("attention_mask", None)
    inputs = {"presets": {"one": policy}, "inputs": lambda b, t: batch}
    found = estimate(model, 4, 64, **inputs).footprints["one"]
    seen = []
    with install(model, policy):
        loss = model(**batch).loss
        with saved_bytes(exclude=[*model.parameters(), *model.buffers()]) as held:
            gradients = backward._gradients
            monkeypatch.setattr(
                backward, "_gradients", lambda *args: seen.append(held()) or gradients(*args)
            )
            loss.backward()
    assert seen == [found.replay] * 2


@pytest.mark.parametrize("tokens", [0.01, 0.3, 1.0])
def test_rows_kept_follow_from_the_tokens_that_bear_loss(tokens):
    def build():
        return transformers.AutoModelForCausalLM.from_config(config())

    found = estimate(build, 2, 100, presets=PRESETS, loss_tokens=tokens).footprints
    assert found["memory"].kept == pytest.approx(0.25 + 0.05 * (tokens == 1.0), abs=0.05)
    assert found["speed"].kept == pytest.approx(min(1.0, 0.9 + max(tokens, 0.01)), abs=0.02)
    assert (found["memory"].kept_by, found["balanced"].kept_by) == ("policy", "flat attention")
    # the first 95 of 100 hold the mass; loss rows are the last
    assert found["balanced"].kept == pytest.approx(min(1.0, 0.95 + max(tokens, 0.01)), abs=0.02)
    capped = {"capped": SagePolicy(keep=TopMass(0.8, max_fraction=0.4))}
    assert estimate(build, 2, 100, presets=capped).footprints["capped"].kept <= 0.46
    given = estimate(build, 2, 100, presets=PRESETS, kept=0.5).footprints["balanced"]
    assert (given.kept, given.kept_by) == (0.5, "given")


def config(**changes):
    return transformers.AutoConfig.for_model(**{**CONFIG, **changes})


def test_weights_optimizer_and_largest():
    def build():
        return transformers.AutoModelForCausalLM.from_config(config())

    real = build()
    count = sum(p.numel() for p in real.parameters())
    found = estimate(build, 2, 64, memory="5MiB", presets={"q": SagePolicy(keep=0.25)})
    dense = found.footprints["dense"]
    assert dense.gradients == 4 * count
    assert dense.optimizer == 8 * count + 4 * len(list(real.parameters()))
    for method, one in found.footprints.items():
        for more, least in ((0, True), (1, False)):
            grown = estimate(
                build, one.largest_batch + more, 64, presets={"q": SagePolicy(keep=0.25)}
            )
            assert (grown.footprints[method].total <= 5 * 2**20) == least, method
    assert found.footprints["q"].largest_length == 512
    assert dense.largest_length < 512
    plain = estimate(build, 2, 64, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    assert plain.footprints["dense"].optimizer == 0
    tight = estimate(build, 2, 64, memory=dense.weights).footprints
    assert {(one.largest_batch, one.largest_length) for one in tight.values()} == {(0, 0)}
    assert "does not fit" in text(estimate(build, 2, 64, memory=dense.weights))


def test_a_real_and_a_meta_model_say_the_same_and_are_left_alone():
    real = transformers.AutoModelForCausalLM.from_config(config())
    with torch.device("meta"):
        meta = transformers.AutoModelForCausalLM.from_config(config())
    state = {name: value.clone() for name, value in real.state_dict().items()}
    drawn = torch.get_rng_state()
    found = [estimate(model, 2, 16) for model in (real, meta)]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, state[name]) for name, value in real.state_dict().items())
    assert all("forward" not in vars(part) for part in real.modules())


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_lightning_modules(loss):
    module = CausalLM(config=CONFIG, lora=LoRA(r=4), loss=loss, gradient_checkpointing=True)
    found = estimate(module, 2, 24, loss_tokens=0.5).footprints
    assert module.model is None
    dense = CausalLM(config=CONFIG, lora=LoRA(r=4), loss=loss)
    dense.configure_model()
    dense._loss_checked = True
    ids = torch.ones(2, 24, dtype=torch.int64)
    labels = ids.clone()
    labels[:, :12] = -100
    batch = {"input_ids": ids, "labels": labels}
    expected = held_by(dense, batch, lambda: dense.compute_loss(batch))
    assert found["dense"].saved == pytest.approx(expected, rel=0.02)


class Own(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = zoo.PlainModel()

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_a_module_that_takes_other_batches_is_told_so():
    class Pairs(Own):
        def training_step(self, batch, batch_idx):
            ids, labels = batch
            return self.model(ids, labels).loss

    policy = SagePolicy(blocks=["model.blocks.*"])
    with pytest.raises(ValueError, match=r"training_step of Pairs does not take.*inputs=\.\.\."):
        estimate(Pairs(), 2, 8, policy)


def test_a_module_of_ones_own():
    found = estimate(Own, 2, 16, SagePolicy(keep=0.25, blocks=["model.blocks.*"]))
    count = sum(p.numel() for p in Own().parameters())
    assert found.footprints["yours"].optimizer == 4 * count
    assert found.footprints["yours"].saved < found.footprints["dense"].saved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "8-bit"}, "precision must be one of 32-true, .* got '8-bit'"),
        ({"length": 4096}, "length 4096 is beyond the 512 positions"),
        ({"policy": SagePolicy(blocks=["nothing.*"])}, "no block found"),
        ({"policy": SagePolicy(dense_blocks=(7,))}, "out of range"),
        ({"memory": "lots"}, "'lots' is no size of memory"),
        ({"batch": 0}, "batch must be a number of at least 1, got 0"),
        ({"loss_tokens": 0.0}, "loss_tokens must lie in"),
        ({"kept": 2.0}, "kept must lie in"),
        ({"inputs": lambda b, t: {"input_ids": torch.ones(b, t).long()}}, "no loss for input_ids"),
        ({"model": nn.Linear(2, 2)}, "no block found"),
        ({"model": CausalLM("no/such-model")}, "configuration of no/such-model is not on this"),
    ],
)
def test_bad_input(changes, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {
        "model": lambda: transformers.AutoModelForCausalLM.from_config(config()),
        "batch": 2,
        "length": 16,
    }
    with pytest.raises(ValueError, match=message):
        estimate(**given | changes)


def test_what_is_installed_or_frozen_is_refused():
    model = transformers.AutoModelForCausalLM.from_config(config())
    with install(model, SagePolicy(keep=0.5)), pytest.raises(ValueError, match="SAGE is installed"):
        estimate(model, 2, 16)
    with pytest.raises(ValueError, match="nothing to train"):
        estimate(model.requires_grad_(False), 2, 16)


@pytest.mark.parametrize(
    "curve", [lambda x: 7 + 3 * x, lambda x: x * x, lambda x: 9 * x + (x > 40) * 5000, lambda x: 5]
)
@pytest.mark.parametrize("room", [-1, 3, 400, 3000, 10**6])
@pytest.mark.parametrize("start", [1, 2, 30, 2000])
def test_largest(curve, room, start):
    expected = max((x for x in range(1, 1001) if curve(x) <= room), default=0)
    assert largest(curve, room, start, 1000) == expected
    both = largest_each(lambda x: {"a": curve(x), "b": 2 * x}, room, start, 1000)
    assert both == {"a": expected, "b": min(1000, max(room // 2, 0))}


@pytest.mark.parametrize(
    ("given", "size"),
    [("20GiB", 20 * 2**30), ("80GB", 80 * 10**9), ("512 MiB", 2**29), (7, 7), ("1.5k", 1500)],
)
def test_sizes(given, size):
    assert parse_size(given) == size


@pytest.mark.parametrize(
    "given", ["", "GiB", "-1GiB", "3 iB", "12 XB", 0, True, float("nan"), None]
)
def test_what_is_no_size(given):
    with pytest.raises(ValueError, match="is no size of memory: give"):
        parse_size(given)


def test_known_values():
    real = torch.tensor([[3, -100], [4, 5]])
    with without_memory() as known:
        ids = known.lift(real, torch.device("cpu"))
        labelled = ids != -100
        assert int(labelled.sum()) == 3
        assert torch.randn(2, 2, 8)[labelled].shape == (3, 8)
        ids += 1
        assert ids.max().item() == 6
        ids.copy_(torch.randn(2, 2, 5000).argmax(-1))
        assert known.value(ids) is None
        with pytest.raises(RuntimeError):
            int(ids.sum())
        assert known.built(lambda: int(ids.sum())) == 0
        assert known.built(lambda: nn.Linear(9, 3).double()).weight.dtype == torch.float64
    assert real.tolist() == [[3, -100], [4, 5]]


def text(found):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(estimate_table(found))
    return console.export_text()


def test_table():
    def build():
        return transformers.AutoModelForCausalLM.from_config(config())

    found = estimate(build, 2, 64, SagePolicy(keep=0.1), memory="64MiB")
    shown = text(found)
    for word in ("yours", "checkpointing", "speed", "512 #", "100% *", "weights 13"):
        assert word in shown
    assert any("--kept" in note for note in notes(found))
    assert [size_text(x) for x in (999, 2**20)] == ["999 B", "1 MiB"]


TEXT = {
    "class_path": "lightning_sage.corpus.StdlibFunctions",
    "init_args": {"loading": {"batch_size": 3, "max_tokens": 40}},
}


def command(*more, tmp_path, data=TEXT):
    path = tmp_path / "model.yaml"
    path.write_text(
        json.dumps(
            {
                "model": {
                    "class_path": "lightning_sage.models.CausalLM",
                    "init_args": {"config": CONFIG, "lora": {"r": 4}},
                },
                "data": data,
                "trainer": {
                    # there is none here, and none is asked for
                    "accelerator": "gpu",
                    "devices": 4,
                    "precision": "bf16-mixed",
                    "callbacks": [
                        {
                            "class_path": "lightning_sage.SageCallback",
                            "init_args": {"policy": {"keep": 0.5}},
                        }
                    ],
                },
            }
        )
    )
    return ["--config", str(path), *more]


def test_command(tmp_path, capsys):
    main(command("--batch=2", "--length=32", "--memory=64MiB", "--json", tmp_path=tmp_path))
    found = json.loads(capsys.readouterr().out)
    assert found["precision"] == "bf16-mixed"
    assert found["footprints"]["yours"]["kept"] == 0.5 + 1 / 32
    assert found["footprints"]["yours"]["largest_length"] == 512
    main(command(tmp_path=tmp_path))
    assert "3 x 40 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="beyond the 512 positions"):
        main(command("--length=4096", tmp_path=tmp_path))
    with pytest.raises(SystemExit, match="batch must be a number of at least 1, got 0"):
        main(command("--batch=0", tmp_path=tmp_path))
    # as a fit writes them down
    written = ("--ckpt_path=null", "--weights_only=null", "--length=24")
    main(command(*written, tmp_path=tmp_path))
    assert "3 x 24 tokens" in capsys.readouterr().out
    silent = {"class_path": "lightning.pytorch.LightningDataModule"}
    with pytest.raises(SystemExit, match="give --batch and --length"):
        main(command(tmp_path=tmp_path, data=silent))
