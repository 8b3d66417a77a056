import io
import json
import math
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForCausalLM

import lightning_sage
from lightning_sage import (
    AllTokens,
    ImportanceSampling,
    LossFirst,
    SageCallback,
    SageModelParallelStrategy,
    SagePolicy,
    SageStrategy,
    TopFraction,
    corpus,
)
from lightning_sage.cli import SageCLI, main
from lightning_sage.corpus import StdlibFunctions, StdlibWindows, stdlib_files
from lightning_sage.models import CausalLM, LoRA, SequenceClassifier
from lightning_sage.saving import SavePretrained
from processes import ranks
from tasks import LLAMA

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
TASKS = {
    "llama_lora_sft.yaml": CausalLM,
    "lora_classification.yaml": SequenceClassifier,
    "full_finetuning.yaml": CausalLM,
}
METHODS = {"method/sage.yaml", "method/checkpointing.yaml"}
STRATEGIES = {
    "strategy/ddp.yaml": SageStrategy,
    "strategy/fsdp.yaml": SageModelParallelStrategy,
}

pytestmark = [
    # two cores do not profit from worker processes, and Lightning advises them whatever the data
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    # Lightning's own use of torch's pytree
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
    # Lightning's own use of jsonargparse
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _as_if_called_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-sage"])


def config(*names):
    return [part for name in names for part in ("--config", str(CONFIGS / name))]


def override(prefix, **values):
    return [f"--{prefix}.{name}={json.dumps(value)}" for name, value in values.items()]


@pytest.fixture
def small_stdlib(monkeypatch):
    """Two modules in place of all, which take seconds to read."""
    names = {"textwrap.py", "shlex.py"}
    files = [path for path in stdlib_files("train") + stdlib_files("val") if path.name in names]
    monkeypatch.setattr(corpus, "stdlib_files", lambda split: files)


@pytest.fixture
def tiny(tmp_path):
    """What makes a task's configuration need no network: a tiny model and a file of four rows."""
    rows = [{"question": "1+1?", "answer": "2", "text": "good", "label": n % 2} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *override("model.init_args", name_or_path=None, config=LLAMA),
        *[f"--data.init_args.{split}=rows.jsonl" for split in ("train", "val")],
        "--data.init_args.loading.tokenizer=bytes",
        "--data.init_args.loading.batch_size=2",
        "--trainer.accelerator=cpu",
        *override("trainer", enable_progress_bar=False, log_every_n_steps=1),
    ]


TINY_QUICKSTART = [
    *override("model.init_args.config", hidden_size=16, intermediate_size=32, num_hidden_layers=2),
    *override("model.init_args.config", num_attention_heads=2, num_key_value_heads=1),
    *override("pretrain.trainer", limit_train_batches=3, limit_val_batches=2),
    *override("trainer", limit_train_batches=3, limit_val_batches=2, log_every_n_steps=1),
]
BORING = [
    "--model=lightning.pytorch.demos.boring_classes.BoringModel",
    "--data=lightning.pytorch.demos.boring_classes.BoringDataModule",
    "--trainer.logger=false",
]


def test_every_configuration_is_tested():
    found = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")}
    layers = {*TASKS, *METHODS, *STRATEGIES, "strategy/multi_node.yaml"}
    assert found == {"base.yaml", "quickstart.yaml", *layers}


@pytest.mark.parametrize("method", [None, *sorted(METHODS)])
@pytest.mark.parametrize("task", TASKS)
def test_configurations_build(tiny, task, method):
    methods = [] if method is None else [method]
    cli = SageCLI([*config("base.yaml", task, *methods), *tiny], run=False)
    assert type(cli.model) is TASKS[task]
    cli.model.configure_model()
    assert (cli.model.lora is None) == (task == "full_finetuning.yaml")
    assert cli.model.gradient_checkpointing == (method == "method/checkpointing.yaml")
    sage = [c for c in cli.trainer.callbacks if isinstance(c, SageCallback)]
    assert len(sage) == (method == "method/sage.yaml")
    assert any(isinstance(c, SavePretrained) for c in cli.trainer.callbacks)


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("method", [None, "method/sage.yaml"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_build_on_top(tiny, strategy, method, nodes):
    names = ["base.yaml", "llama_lora_sft.yaml", method, strategy]
    names.append("strategy/multi_node.yaml" if nodes > 1 else None)
    cli = SageCLI([*config(*filter(None, names)), *tiny], run=False)
    built = cli.trainer.strategy
    assert type(built) is STRATEGIES[strategy]
    assert (built.balance, built.token_weighted, built.policy) == ("mean", True, None)
    assert cli.trainer.num_nodes == nodes
    assert built._timeout == timedelta(hours=1 if nodes > 1 else 0.5)
    # without one in the Trainer, the strategy brings its own
    sage = [c for c in cli.trainer.callbacks if isinstance(c, SageCallback)]
    assert len(sage) == (method is not None)


@pytest.mark.parametrize("name", ["sage_ddp", "sage_ddp_spawn", "sage_ddp_fork", "sage_fsdp"])
def test_strategies_by_a_word(name):
    arguments = [*BORING, f"--trainer.strategy={name}", "--trainer.accelerator=cpu"]
    built = SageCLI([*arguments, "--trainer.devices=2"], run=False).trainer.strategy
    assert type(built) is (SageModelParallelStrategy if name == "sage_fsdp" else SageStrategy)
    assert built.num_processes == 2


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (SageStrategy, {"find_unused_parameters": True}),
        (SageModelParallelStrategy, {"activation_dtype": "bf16"}),
    ],
)
def test_a_printed_configuration_starts_the_same_run(kind, own, capsys):
    policy = {"keep": {"class_path": "TopFraction", "init_args": {"fraction": 0.5}}, "sinks": 2}
    arguments = {"policy": policy, "balance": "max", "token_weighted": True, **own}
    strategy = {"class_path": f"lightning_sage.{kind.__name__}", "init_args": arguments}
    Path("given.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    with pytest.raises(SystemExit):
        SageCLI([*BORING, "--config", "given.yaml", "--print_config"], run=False)
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    found = yaml.safe_load(printed)["trainer"]["strategy"]["init_args"]
    assert found["policy"]["replay"]["class_path"] == "lightning_sage.sampling.ImportanceSampling"
    assert {name: found[name] for name in own} == own
    for written in ("given.yaml", "printed.yaml"):
        cli = SageCLI([*BORING, "--config", written], run=False)
        built = cli.trainer.strategy
        assert type(built) is kind
        assert built.policy == SagePolicy(keep=TopFraction(0.5), sinks=2)
        assert (built.balance, built.token_weighted) == ("max", True)
        settings = vars(built) | getattr(built, "_ddp_kwargs", {})
        assert {name: settings[name] for name in own} == own


@pytest.mark.parametrize("task", TASKS)
def test_configurations_name_real_fields(task):
    settings = yaml.safe_load((CONFIGS / task).read_text())
    origin = settings["model"]["init_args"]["name_or_path"]
    assert settings["data"]["init_args"]["loading"]["tokenizer"] == origin


# a size in MB that nobody reads here
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.parametrize("task", TASKS)
def test_tasks_fit_with_sage(tiny, task, capsys):
    main(["fit", *config("base.yaml", task, "method/sage.yaml"), *tiny])
    output = capsys.readouterr().out
    assert "before fine-tuning: validation loss" in output
    assert "after fine-tuning" in output
    saved = {path.name for path in Path("runs/model").iterdir()}
    assert ("adapter_model.safetensors" in saved) == (task != "full_finetuning.yaml")
    assert "tokenizer_config.json" in saved


def losses(output):
    [line] = [line for line in output.splitlines() if line.startswith("validation loss:")]
    return [float(word) for word in line.replace(",", "").split() if word[0].isdigit()]


@pytest.mark.usefixtures("small_stdlib")
def test_quickstart_pretrains_once_and_fine_tunes(capsys):
    main(["fit", *config("quickstart.yaml"), *TINY_QUICKSTART])
    first = capsys.readouterr().out
    assert "pre-trained in" in first
    assert math.isclose(losses(first)[0], 5.4, abs_tol=0.5)
    assert Path("runs/quickstart/adapter/adapter_model.safetensors").exists()
    [folder] = Path("runs/quickstart/pretrained").iterdir()
    weights = AutoModelForCausalLM.from_pretrained(folder)
    assert weights.config.hidden_size == 16

    main(["fit", *config("quickstart.yaml"), *TINY_QUICKSTART])
    second = capsys.readouterr().out
    assert f"pre-trained model found in {folder}" in second
    assert losses(second) == losses(first)

    main(["fit", *config("quickstart.yaml"), *TINY_QUICKSTART, "--pretrain.optimization.lr=0.001"])
    assert "pre-trained in" in capsys.readouterr().out
    assert len(list(Path("runs/quickstart/pretrained").iterdir())) == 2


def quickstart(rank):
    warnings.simplefilter("ignore")
    two = ["--trainer.devices=2", "--trainer.strategy=sage_ddp"]
    with redirect_stdout(io.StringIO()) as output:
        main(["fit", *config("quickstart.yaml"), *TINY_QUICKSTART, *two])
    return output.getvalue()


@pytest.mark.usefixtures("small_stdlib")
def test_of_processes_that_start_at_once_one_pretrains():
    outputs = ranks(2, quickstart, group=False)
    said = "".join(outputs)
    assert said.count("pre-trained in") == said.count("validation loss:") == 1
    # the table of the fit
    assert said.count("SAGE: memory") == 1
    [folder] = Path("runs/quickstart/pretrained").iterdir()
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 16


@pytest.mark.usefixtures("small_stdlib")
def test_an_interrupted_pretraining_is_not_taken_for_a_finished_one(monkeypatch):
    cli = SageCLI([*config("quickstart.yaml"), *TINY_QUICKSTART], run=False)
    with monkeypatch.context() as patch:
        patch.setattr(SavePretrained, "on_fit_end", lambda *_: sys.exit("interrupted"))
        with pytest.raises(SystemExit, match="interrupted"):
            cli.pretrained()
    assert (cli.pretrained() / "model.safetensors").exists()


@pytest.mark.usefixtures("small_stdlib")
def test_a_script_gets_the_pretrained_model_and_its_text():
    cli = SageCLI([*config("quickstart.yaml"), *TINY_QUICKSTART], run=False)
    folder = cli.pretrained()
    cli.start_from(folder)
    cli.model.configure_model()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    base = cli.model.model.get_base_model().model.embed_tokens.weight
    assert torch.equal(base, loaded.model.embed_tokens.weight)
    assert isinstance(cli.pretraining.data, StdlibWindows)
    assert isinstance(cli.datamodule, StdlibFunctions)


def test_quickstart_is_what_the_documents_say():
    cli = SageCLI(config("quickstart.yaml"), run=False)
    [sage] = [c for c in cli.trainer.callbacks if isinstance(c, SageCallback)]
    assert sage.policy == SagePolicy.preset("balanced")
    assert cli.model.lora == LoRA()
    module = CausalLM(config=cli.model.config)
    module.configure_model()
    assert 3e6 < sum(p.numel() for p in module.parameters()) < 6e6
    assert cli.datamodule.loss_on == "answer"


def test_pretraining_needs_a_module_of_this_package():
    settings = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["pretrain"]
    cli = SageCLI([*BORING, f"--pretrain={json.dumps(settings)}"], run=False)
    with pytest.raises(TypeError, match=r"pretrain needs a model of lightning_sage\.models"):
        cli.pretrained()


@pytest.mark.parametrize(
    ("arguments", "policy"),
    [
        ({}, SagePolicy()),
        ("memory", SagePolicy.preset("memory")),
        (None, SagePolicy.preset("balanced")),
        ({"keep": 0.25}, SagePolicy(keep=0.25)),
        (
            {"keep": {"class_path": "lightning_sage.TopFraction", "init_args": {"fraction": 0.5}}},
            SagePolicy(keep=TopFraction(0.5)),
        ),
        (
            {"keep": {"class_path": "LossFirst", "init_args": {"fraction": 0.5}}, "replay": None},
            SagePolicy(keep=LossFirst(0.5), replay=None),
        ),
        (
            {
                "keep": {"class_path": "AllTokens"},
                "replay": {"class_path": "ImportanceSampling", "init_args": {"fraction": 0.25}},
            },
            SagePolicy(keep=AllTokens(), replay=ImportanceSampling(0.25)),
        ),
        (
            {"replay": None, "dense_blocks": [0, -1], "queries": "last", "blocks": ["*.layers.*"]},
            SagePolicy(replay=None, dense_blocks=(0, -1), queries="last", blocks=["*.layers.*"]),
        ),
    ],
)
@pytest.mark.parametrize("name", ["SageCallback", "lightning_sage.SageCallback"])
def test_policies_in_yaml(tmp_path, name, arguments, policy):
    class_path = {"class_path": name, "init_args": {"policy": arguments}}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [class_path]}}))
    cli = SageCLI([*BORING, "--config", "policy.yaml"], run=False)
    # what a run saves must start the same run
    cli.parser.save(cli.config, "saved.yaml", skip_none=False)
    for built in (cli, SageCLI(["--config", "saved.yaml"], run=False)):
        [sage] = [c for c in built.trainer.callbacks if isinstance(c, SageCallback)]
        assert sage.policy == policy


def test_bad_policies_are_refused_with_their_reason():
    callback = {"class_path": "SageCallback", "init_args": {"policy": {"keep": 3.0}}}
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\], got 3\.0"):
        SageCLI([*BORING, f"--trainer.callbacks={json.dumps([callback])}"], run=False)


def test_every_callback_of_the_package_has_a_short_name():
    names = [
        c.__name__ for c in Callback.__subclasses__() if c.__module__.startswith("lightning_sage")
    ]
    assert {"SageCallback", "SavePretrained"} <= set(names)
    assert lightning_sage.SageCallback is SageCallback


def test_runs_as_a_module():
    command = [sys.executable, "-m", "lightning_sage", "--help"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert output.startswith("usage: lightning-sage")
    assert "fit" in output
