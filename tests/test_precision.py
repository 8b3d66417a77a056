"""Half and mixed precision and 4-bit weights through the Trainer; what overflows there.

Each case runs on the CPU and, where there is one, on a GPU.
"""

import json
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import BitsandbytesPrecision, MixedPrecision

import zoo
from accuracy import (
    assert_as_accurate,
    assert_gradients_close,
    one_vector,
    parameter_gradients,
    scales,
)
from lightning_sage import (
    AllTokens,
    GradientMass,
    ImportanceSampling,
    ReplayError,
    SagePolicy,
    corpus,
)
from lightning_sage.callback import SageCallback
from oracle import oracle, replayed
from steps import policy_of, told_blocks
from tasks import HALF, LIGHTNING_WARNINGS, Task, fit

pytestmark = LIGHTNING_WARNINGS

EXAMPLES = Path(__file__).parents[1] / "examples"
PRECISIONS = ["32-true", "bf16-true", "bf16-mixed", "16-mixed"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODELS = ["llama", "gemma2", "bert", "plain"]
EVERYTHING = policy_of(keep=AllTokens())
POLICIES = {
    "everything": EVERYTHING,
    "default": SagePolicy(),
    "half": HALF,
    "gradient mass": SagePolicy(replay=GradientMass(0.9), sinks=0),
    "draws": SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.5)),
    "skip": SagePolicy(keep=0.5, unselected="skip"),
    "int8": SagePolicy(keep=0.5, cache_dtype="int8"),
}


def scaled(device, **scaler):
    """Settings of a Trainer that trains in 16-mixed; Lightning itself has it on GPUs only."""
    scaler = torch.amp.GradScaler(device, **scaler)
    return on(device) | {"plugins": [MixedPrecision("16-mixed", device, scaler)]}


def on(device):
    return {"accelerator": {"cpu": "cpu", "cuda": "gpu"}[device], "devices": 1}


def settings_of(precision, device):
    if precision == "16-mixed":
        return scaled(device, init_scale=2.0**10)
    return on(device) | {"precision": precision}


class Gradients(L.Callback):
    """Remembers every step's gradients, unscaled, as the optimizer gets them."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = parameter_gradients(pl_module.model)
        self.steps.append({name: gradient.cpu() for name, gradient in found.items()})


class Journal(L.Callback):
    """Notes the loss scale and whether the step was skipped, batch by batch.

    A step is skipped when the scale comes down, and no weight moves; else every weight does.
    """

    def __init__(self):
        self.scales, self.skipped = [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self._before = self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        (scale_before, before), (scale, after) = self._before, self._look(trainer, pl_module)
        self.scales.append(scale)
        self.skipped.append(scale < scale_before)
        assert all(p.isfinite().all() for p in after)
        moved = {not torch.equal(p, q) for p, q in zip(before, after, strict=True)}
        assert moved == {not self.skipped[-1]}

    def _look(self, trainer, pl_module):
        weights = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]
        return trainer.precision_plugin.scaler.get_scale(), weights


class Replayed(L.Callback):
    """Remembers what the blocks replayed last, by the callback `sage`."""

    def __init__(self, policy):
        self.sage = SageCallback(policy, print_summary=False)

    def on_after_backward(self, trainer, pl_module):
        self.rows = replayed(self.sage.installation.records)


def data_of(name, count=1, **options):
    padding = "right" if "right" in zoo.MODELS[name].paddings else None
    return [zoo.make_batch(name, padding, seed=seed, **options) for seed in range(count)]


def first_gradients(name, *callbacks, lora=False, task=Task, **settings):
    """Of one step through the Trainer."""
    exact = settings.get("precision") == "64-true"
    model = zoo.build(name, lora=lora, dtype=torch.float64 if exact else torch.float32)
    return gradients_of(name, task(model), *callbacks, **settings)


def gradients_of(name, task, *callbacks, **settings):
    seen = Gradients()
    # what it changes, a GradScaler would not bear
    exactly = zoo.exactly(name) if settings.get("precision") == "64-true" else nullcontext()
    with exactly:
        fit(task, *callbacks, seen, data=data_of(name), **settings)
    return seen.steps[0]


def assert_gradients_as_accurate(sage, dense, exact, **options):
    assert sage.keys() == dense.keys() == exact.keys()
    scale = scales(exact)
    vectors = (one_vector(gradients, scale) for gradients in (sage, dense, exact))
    assert_as_accurate(*vectors, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "lora"),
    [*((name, False) for name in (*MODELS, "gpt2", "llama-classes")), ("llama", True)],
)
def test_all_tokens_are_as_accurate_as_dense(name, lora, precision, device):
    exact = first_gradients(name, lora=lora, precision="64-true")
    dense = first_gradients(name, lora=lora, **settings_of(precision, device))
    for attention in ("salient", "full"):
        policy = told_blocks(name, policy_of(keep=AllTokens(), attention=attention))
        sage = SageCallback(policy, print_summary=False)
        found = first_gradients(name, sage, lora=lora, **settings_of(precision, device))
        assert_gradients_as_accurate(found, dense, exact)
        dtypes = {gradient.dtype for gradient in found.values()}
        assert dtypes == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["salient", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_tokens_are_as_accurate_as_the_oracle(name, mode, precision, device):
    """Judged by the same rows in float64, and by the oracle in the same precision."""
    policy = told_blocks(name, policy_of(keep=0.5, keep_loss_rows=False, attention=mode))
    seen = Replayed(policy)
    found = first_gradients(name, seen.sage, seen, **settings_of(precision, device))
    assert all(0.3 < (r.weights > 0).double().mean() < 0.7 for r in seen.rows)

    class ByOracle(Task):
        def training_step(self, batch, batch_idx):
            with oracle(self, seen.rows, mode):
                return super().training_step(batch, batch_idx)

    by_oracle = {
        key: first_gradients(name, task=ByOracle, **settings)
        for key, settings in (
            ("same", settings_of(precision, device)),
            ("exact", {"precision": "64-true"}),
        )
    }
    assert_gradients_as_accurate(found, by_oracle["same"], by_oracle["exact"])


class Manual(Task):
    """Runs backward itself: within autocast, where the Trainer does so outside of it."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_backward_by_hand_gives_the_same_gradient(precision, device):
    found = [
        first_gradients(
            "llama",
            SageCallback(HALF, print_summary=False),
            task=task,
            **settings_of(precision, device),
        )
        for task in (Task, Manual)
    ]
    assert_gradients_close(found[1], found[0], 0.0 if device == "cpu" else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "extra",
    [{"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2}],
    ids=["clipped", "accumulated"],
)
def test_weights_go_where_dense_training_takes_them(extra, precision, device):
    def trained(*callbacks, **settings):
        exact = settings.get("precision") == "64-true"
        model = zoo.build("llama", dtype=torch.float64 if exact else torch.float32)
        before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        fit(Task(model), *callbacks, data=data_of("llama", 4), **settings, **extra)
        return {n: p.detach().double() - before[n] for n, p in model.named_parameters()}

    exact = trained(precision="64-true")
    dense = trained(**settings_of(precision, device))
    sage = SageCallback(EVERYTHING, print_summary=False)
    found = trained(sage, **settings_of(precision, device))
    assert_gradients_as_accurate(found, dense, exact)


class Losses(Task):
    def __init__(self, model):
        super().__init__(model)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def gained(losses):
    """How much the loss of two batches in turns has fallen."""
    return (losses[:2].mean() - losses[-2:].mean()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_every_precision_trains(name, precision, device):
    def losses(precision, *policy):
        task = Losses(zoo.build(name, dtype=torch.float32))
        callbacks = [SageCallback(p, print_summary=False) for p in policy]
        settings = settings_of(precision, device) | {"max_epochs": 12}
        fit(task, *callbacks, data=data_of(name, 2), **settings)
        half = precision == "bf16-true"
        assert {p.dtype for p in task.parameters()} == {torch.bfloat16 if half else torch.float32}
        return torch.tensor(task.losses)

    sage, everything = losses(precision, SagePolicy()), losses(precision, EVERYTHING)
    dense, single = losses(precision), losses("32-true", SagePolicy())
    # the forward before the first step is the dense one
    torch.testing.assert_close(sage[0], dense[0], rtol=1e-6 if device == "cpu" else 1e-2, atol=0)
    assert gained(dense) > 0.5
    assert gained(sage) > 0.7 * gained(dense)
    assert gained(sage) == pytest.approx(gained(single), rel=0.1)
    assert gained(everything) == pytest.approx(gained(dense), rel=0.1)


def journal_of(policy, data, device, task=Task, lora=False, **scaler):
    model = zoo.build("llama", lora=lora, dtype=torch.float32)
    sage = []
    if policy is not None:
        sage.append(SageCallback(policy, fidelity_every_n_steps=0, print_summary=False))
    journal, task = Journal(), task(model)
    fit(task, *sage, journal, data=data, **scaled(device, **scaler))
    return journal, task


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", POLICIES)
def test_steps_are_skipped_until_the_scale_fits(name, device):
    data = data_of("llama") * 24
    # in steps of 4, so that the scale comes down to one that leaves room for larger gradients
    scaler = {"init_scale": 2.0**41, "backoff_factor": 0.25}
    dense, _ = journal_of(None, data, device, Losses, **scaler)
    sage, task = journal_of(POLICIES[name], data, device, Losses, **scaler)
    skipped = sum(dense.skipped)
    assert 3 < skipped < 20
    assert dense.skipped == [True] * skipped + [False] * (24 - skipped)
    assert sage.skipped == dense.skipped
    assert sage.scales == dense.scales
    assert sage.scales[-1] == 2.0 ** (41 - 2 * skipped)
    # nothing was learnt in the skipped steps, and something after
    assert len(set(task.losses[: skipped + 1])) == 1
    assert task.losses[-1] < 0.8 * task.losses[skipped]


class Infinite(Losses):
    """Its fourth batch overflows."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 3 else loss


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", POLICIES)
def test_an_overflow_in_the_middle_costs_one_step(name, device):
    data = data_of("llama", 10)
    options = {"init_scale": 2.0**10, "growth_interval": 3}
    journal, _ = journal_of(POLICIES[name], data, device, Infinite, **options)
    assert journal.skipped == [i == 3 for i in range(10)]
    # up after three good steps, down by the overflow, up again twice
    assert journal.scales == [2.0**p for p in (10, 10, 11, 10, 10, 10, 11, 11, 11, 12)]


def test_an_overflow_leaves_the_weights_where_dense_training_does():
    def trained(policy):
        data = data_of("llama", 8)
        _, task = journal_of(policy, data, "cpu", Infinite, init_scale=2.0**10)
        return {name: p.detach() for name, p in task.model.named_parameters()}

    assert_gradients_close(trained(EVERYTHING), trained(None), 1e-3)


class OneInfiniteRow(Task):
    """From the second batch on, one row of what leaves the blocks gets a gradient of infinity.

    Nothing but the blocks' own adapters learns of it, and its gradient would have been zero.
    """

    row = 0, 2
    value = float("inf")

    def training_step(self, batch, batch_idx):
        def spoil(gradient):
            assert not gradient[self.row].any()
            gradient = gradient.clone()
            gradient[self.row] = self.value
            return gradient

        def watch(_module, args):
            if batch_idx:
                args[0].register_hook(spoil)

        handle = self.model.get_submodule("base_model.model.model.norm")
        handle = handle.register_forward_pre_hook(watch)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            handle.remove()


class OneRowNotANumber(OneInfiniteRow):
    value = float("nan")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("task", [OneInfiniteRow, OneRowNotANumber], ids=["inf", "nan"])
@pytest.mark.parametrize(
    "replay",
    [None, 0.1, GradientMass(0.5), ImportanceSampling(0.1)],
    ids=repr,
)
def test_a_row_that_overflowed_is_replayed(replay, task, device):
    policy = SagePolicy(keep=AllTokens(), replay=replay)
    data = data_of("llama", 3)
    seen = []

    class Look(task):
        def on_after_backward(self):
            records = self.trainer.callbacks[0].installation.records
            seen.append([r.replayed[self.row].item() for r in records])

    journal, _ = journal_of(policy, data, device, Look, lora=True, init_scale=2.0**10)
    assert journal.skipped == [False, True, True]
    assert seen[1] == seen[2] == [True, True]
    if replay is not None:
        # with a gradient of zero it was not among the few
        assert seen[0][1] is False


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A small llama on disk, to be quantized as it is loaded."""
    folder = tmp_path_factory.mktemp("llama")
    zoo.build("llama", dtype=torch.float32).save_pretrained(folder)
    return folder


def qlora(folder, compute_dtype=torch.float32, device="cpu", double=False):
    """Adapters on 4-bit weights, as Hugging Face's documentation makes them."""
    pytest.importorskip("bitsandbytes")
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": device}, dtype=torch.float32
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    adapters = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    # from_pretrained returns it in eval mode
    return peft.get_peft_model(model, adapters).train()


def four_bit(model):
    """Modules with 4-bit weights, by name."""
    import bitsandbytes

    found = {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    # peft's own layers are of such a class too, round the one with the weight
    return {name: module for name, module in found.items() if "weight" in module._parameters}


COMPUTE = {"32-true": "float32", "16-mixed": "float16"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-dq"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_qlora_with_all_tokens_is_as_accurate_as_dense(stored, precision, double, device):
    compute = getattr(torch, COMPUTE.get(precision, "bfloat16"))

    def found(*callbacks):
        task = Task(qlora(stored, compute, device, double))
        return gradients_of("llama", task, *callbacks, **settings_of(precision, device))

    # no float64: bitsandbytes knows none
    exact = gradients_of("llama", Task(qlora(stored, double=double)))
    sage = found(SageCallback(EVERYTHING, print_summary=False))
    # in 32-true the dense gradient is the exact one
    floor = 1e-5 if precision == "32-true" else 1e-6
    assert_gradients_as_accurate(sage, found(), exact, floor=floor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_qlora_trains_adapters_alone(stored, precision, device):
    def weights(model):
        layers = four_bit(model)
        assert len(layers) == 2 * 7
        assert {m.weight.dtype for m in layers.values()} == {torch.uint8}
        return {
            name: (module.weight.cpu().clone(), module.weight.quant_state.absmax.cpu().clone())
            for name, module in layers.items()
        }

    def adapters(model):
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def losses(precision, compute, *policy):
        task = Losses(qlora(stored, compute, device))
        # farther, and four bits make the way down a rough one
        task.lr = 0.02
        before, untrained = weights(task.model), adapters(task.model)
        callbacks = [SageCallback(p, print_summary=False) for p in policy]
        settings = settings_of(precision, device) | {"max_epochs": 12}
        fit(task, *callbacks, data=data_of("llama", 2), **settings)
        for name, tensors in weights(task.model).items():
            assert all(torch.equal(x, y) for x, y in zip(tensors, before[name], strict=True)), name
        for name, adapter in adapters(task.model).items():
            assert "lora_" in name
            assert not torch.equal(adapter.cpu(), untrained[name].cpu()), name
        return torch.tensor(task.losses)

    compute = getattr(torch, COMPUTE.get(precision, "bfloat16"))
    sage, everything = (losses(precision, compute, p) for p in (SagePolicy(), EVERYTHING))
    dense, single = losses(precision, compute), losses("32-true", torch.float32, SagePolicy())
    assert gained(dense) > 0.5
    assert gained(sage) > 0.7 * gained(dense)
    assert gained(sage) == pytest.approx(gained(single), rel=0.1)
    assert gained(everything) == pytest.approx(gained(dense), rel=0.1)


@pytest.fixture
def in_mode(tmp_path):
    """Gradients of QLoRA in train or eval mode, with layers that repack their weights or do not."""
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    # it repacks widths of whole groups only
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(**zoo.MODELS["llama"].config | sizes)).save_pretrained(tmp_path)

    def found(train, repacks):
        task = Task(qlora(tmp_path).train(train))
        for module in four_bit(task).values():
            module.support_avx512bf16_for_cpu = repacks
        return gradients_of("llama", task, SageCallback(EVERYTHING, print_summary=False))

    return found


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:2 of 2 blocks train in eval mode")
def test_qlora_in_eval_mode(in_mode):
    assert_gradients_close(in_mode(False, False), in_mode(True, True), 1e-3)
    # to a form without backward, where a block runs without grad
    with pytest.raises(ReplayError, match=r"Linear4bit .* call train\(\) on the model"):
        in_mode(False, True)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_lightnings_bitsandbytes_plugin_is_as_accurate_as_dense(mode):
    pytest.importorskip("bitsandbytes")

    def found(dtype, *callbacks):
        task = Task(zoo.build("llama", lora=True, dtype=torch.float32))
        # the plugin would quantize adapters too
        kept = {name for name, _ in task.named_modules() if "lora_" in name or "lm_head" in name}
        plugin = BitsandbytesPrecision(mode, dtype, ignore_modules=kept)
        gradients = gradients_of("llama", task, *callbacks, **on("cuda"), plugins=[plugin])
        assert len(four_bit(task)) == 2 * 7
        return gradients

    exact, dense = found(torch.float32), found(torch.bfloat16)
    sage = found(torch.bfloat16, SageCallback(EVERYTHING, print_summary=False))
    assert_gradients_as_accurate(sage, dense, exact)


@pytest.mark.gpu
def test_lightnings_bitsandbytes_plugin_trains():
    pytest.importorskip("bitsandbytes")
    task = Losses(zoo.build("llama", lora=True, dtype=torch.float32))
    kept = {name for name, _ in task.named_modules() if "lora_" in name or "lm_head" in name}
    plugin = BitsandbytesPrecision("nf4", torch.bfloat16, ignore_modules=kept)
    sage = SageCallback(print_summary=False)
    fit(task, sage, data=data_of("llama", 2), **on("cuda"), max_epochs=15, plugins=[plugin])
    assert sum(task.losses[-2:]) < 0.8 * sum(task.losses[:2])


def test_the_loss_curves_are_recorded(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import precision

    files = corpus.stdlib_files
    # the whole library takes seconds to parse
    monkeypatch.setattr(corpus, "stdlib_files", lambda split: files(split)[:30])
    out = tmp_path / "runs.jsonl"
    tiny = {"steps": 4, "batch": 2, "length": 128, "width": 64, "blocks": 2, "last": 2}
    tiny |= {"pretraining": 6, "validation": 2, "out": out}
    precision.main([f"--{name}={value}" for name, value in tiny.items()])
    shown = capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    runs = [precision.Run(r["method"], r["precision"], r["seed"]) for r in records]
    assert tuple(runs) == precision.RUNS
    for record in records:
        assert len(record["losses"]) == record["steps"] == 4
        assert record["final_loss"] == pytest.approx(sum(record["losses"][2:]) / 2)
        assert f"{record['final_loss']:.3f}" in shown
        assert f"{record['validation_loss']:.3f}" in shown
        assert (record["policy"] is None) == (record["kept_fraction"] is None)
        assert {"torch", "lightning", "commit", "date", "threads", "parameters"} <= record.keys()
    first = {(r["method"], r["precision"], r["seed"]): r["losses"][0] for r in records}
    # the same weights and the same batch, and a forward that is the dense one
    for run in runs:
        near = abs(first[run.method, run.precision, run.seed] - first["dense", "32-true", 0])
        assert (near > 0.1) if run.seed else (near < 0.05)
        dense = first["dense", run.precision, run.seed]
        assert first["sage", run.precision, run.seed] == pytest.approx(dense)


def test_differences_are_to_dense_and_to_itself(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import precision

    def record(method, precision, losses, seed=0):
        known = {"method": method, "precision": precision, "seed": seed, "losses": losses}
        return known | {"final_loss": losses[-1], "validation_loss": 2 * losses[-1]}

    records = [
        record("dense", "32-true", [4.0, 2.0]),
        record("dense", "32-true", [5.0, 1.0], seed=1),
        record("sage", "32-true", [4.0, 2.5]),
        record("sage", "bf16-true", [4.5, 3.0]),
    ]
    found = [list(row.values()) for row in precision.differences(records)]
    assert found == [
        [0, 0, 0, 0, 0, 0],
        [1, -1, -2, 1, -1, -2],
        [0.25, 0.5, 1, 0, 0, 0],
        [0.75, 1, 2, 0.5, 0.5, 1],
    ]


def test_recorded_curves_stay_within_the_noise_of_two_seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import precision

    lines = (EXAMPLES / "results" / "precision.jsonl").read_text().splitlines()
    # the latest of each run
    known = {(r["method"], r["precision"], r["seed"]): r for r in map(json.loads, lines)}
    assert [precision.Run(*key) for key in known] == list(precision.RUNS)
    records = list(known.values())
    found = dict(zip(known, precision.differences(records), strict=True))
    noise = found["dense", "32-true", 1]
    for (method, name, seed), row in found.items():
        if seed == 0:
            for of in ("curve", "final", "validation"):
                assert abs(row[f"dense_{of}"]) < abs(noise[f"dense_{of}"]), (method, name, of)
