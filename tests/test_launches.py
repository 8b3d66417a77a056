"""Ways to start several processes: all of them train, sparsely and alike, and one speaks."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import load_file

import launched
from lightning_sage import cli
from lightning_sage.models import CausalLM
from processes import free_port, ranks
from tasks import LLAMA, QUIET
from test_cli import config, losses

TESTS = Path(__file__).parent
TABLE = "SAGE: memory for the backward pass"


def output_of(*command, cwd, stdin="", timeout=150):
    """What a process and all that it starts print; none of them outlives this call."""
    environment = dict(os.environ, PYTHONPATH=str(TESTS), OMP_NUM_THREADS="1", COLUMNS="200")
    (cwd / "stdin").write_text(stdin)
    with open(cwd / "stdin") as given, open(cwd / "output", "w") as written:
        # to a file: a pipe would be read for as long as anyone holds its other end
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd, stdin=given, stdout=written, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            # torchrun ends its workers, which are in sessions of their own
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            code = "none in time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = (cwd / "output").read_text()
    assert code == 0, f"exit code: {code}\n{output}"
    return output


def torchrun():
    # its own choice of a port is one that two of them may make
    port = f"--master-port={free_port()}"
    return ["-m", "torch.distributed.run", "--nproc-per-node=2", port]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_trained(path):
    """Both ranks, on different data, with sparse backward passes, to the same weights."""
    one, other = found = [torch.load(f"{path}-{rank}.pt") for rank in range(2)]
    for rank in found:
        assert rank["world"] == 2
        assert len(rank["losses"]) == 2
        assert len(rank["replayed"]) == 2
        assert all(0 < share < 1 for step in rank["replayed"] for share in step)
    assert one["losses"] != other["losses"]
    assert same(one["before"], other["before"])
    assert same(one["after"], other["after"])
    assert not same(one["before"], one["after"])
    return one["after"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Weights after the same fit of forked processes in an environment like torchrun's."""
    folder = tmp_path_factory.mktemp("expected")
    ranks(2, lambda rank: launched.main(folder, "sage_ddp"), group=False)
    return assert_trained(folder / "sage_ddp")


def test_a_script_starts_itself_again(tmp_path, expected):
    strategies = ["sage_ddp", "ddp+", "sage_fsdp"]
    output = output_of(TESTS / "launched.py", tmp_path, *strategies, cwd=tmp_path)
    assert output.count(TABLE) == len(strategies)
    for strategy in strategies:
        weights = assert_trained(tmp_path / strategy)
        assert same(weights, expected) == (strategy != "ddp+")


def test_torchrun_starts_a_script(tmp_path, expected):
    strategies = ["sage_fsdp", "sage_ddp"]
    output = output_of(*torchrun(), TESTS / "launched.py", tmp_path, *strategies, cwd=tmp_path)
    assert output.count(TABLE) == len(strategies)
    for strategy in strategies:
        assert same(assert_trained(tmp_path / strategy), expected)


def test_spawned_processes_leave_weights_and_metrics(tmp_path):
    output = output_of(TESTS / "launched.py", tmp_path, "sage_ddp_spawn+", cwd=tmp_path)
    assert output.count(TABLE) == 1
    weights = assert_trained(tmp_path / "sage_ddp_spawn+")
    user = torch.load(tmp_path / "sage_ddp_spawn+-user-0.pt")
    assert same(user["after"], weights)
    assert user["metrics"].keys() >= {"loss", "sage/kept_fraction", "sage/replayed_fraction"}
    assert 0.4 < user["metrics"]["sage/kept_fraction"] < 0.9


@pytest.fixture
def command(tmp_path):
    """A command line with all that base.yaml has, for a tiny model and rows of all lengths."""
    rows = [{"question": "1+1?" * n, "answer": "2" * n} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(report, *names):
        callback = {"class_path": "launched.Report", "init_args": {"path": report}}
        tiny = {
            "model": {"init_args": {"name_or_path": None, "config": LLAMA}},
            "data": {
                "init_args": {
                    **dict.fromkeys(("train", "val"), "rows.jsonl"),
                    "loading": {"tokenizer": "bytes", "batch_size": 2},
                }
            },
            "trainer": {"accelerator": "cpu", "devices": 2, "callbacks+": [callback]},
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
        names = ["base.yaml", "llama_lora_sft.yaml", *names]
        return ["fit", *config(*names), "--config=tiny.yaml"]

    return made


def assert_told_once(folder, weights, output):
    """The table, and losses of validations before and after; what was saved is what was trained."""
    assert output.count(TABLE) == 1
    assert output.count("before fine-tuning: validation loss") == 1
    before, after = losses(output)
    assert after < before
    saved = load_file(folder / "runs" / "model" / "adapter_model.safetensors")
    adapters = {name: x for name, x in weights.items() if "lora" in name}
    names = [name.removeprefix("model.").replace(".default", "") for name in adapters]
    assert same(saved, dict(zip(names, adapters.values(), strict=True)))


def test_the_command_line_starts_itself_again(tmp_path, command):
    arguments = [*command("ddp", "method/sage.yaml"), "--trainer.strategy=sage_ddp"]
    output = output_of("-m", "lightning_sage", *arguments, cwd=tmp_path)
    assert_told_once(tmp_path, assert_trained(tmp_path / "ddp"), output)


def test_torchrun_starts_the_command_line(tmp_path, command):
    arguments = command("fsdp", "strategy/fsdp.yaml")
    output = output_of(*torchrun(), "-m", "lightning_sage", *arguments, cwd=tmp_path)
    assert_told_once(tmp_path, assert_trained(tmp_path / "fsdp"), output)
    # a warning that the chunked loss has to avoid
    assert "returned a view tensor" not in output


def test_a_notebook_forks(tmp_path, command, expected):
    arguments = [*command("cli", "method/sage.yaml"), "--trainer.strategy=sage_ddp_fork"]
    cells = [
        "import launched",
        f"launched.main({str(tmp_path)!r}, 'sage_ddp')",
        f"launched.main({str(tmp_path)!r}, 'sage_ddp_fork')",
        "from lightning_sage.cli import main",
        f"main({arguments!r})",
    ]
    output = output_of("-i", cwd=tmp_path, stdin="\n".join(cells))
    assert "`Trainer(strategy='sage_ddp')` is not compatible with an interactive" in output
    ours, command_line = output.split("before fine-tuning")
    assert ours.count(TABLE) == 1
    assert same(assert_trained(tmp_path / "sage_ddp_fork"), expected)
    assert same(torch.load(tmp_path / "sage_ddp_fork-user-0.pt")["after"], expected)
    told = f"before fine-tuning{command_line}"
    assert_told_once(tmp_path, assert_trained(tmp_path / "cli"), told)


def test_a_model_that_ends_with_its_processes_is_warned_of():
    module = CausalLM(config=LLAMA)
    module._trainer = Trainer(accelerator="cpu", devices=2, strategy="sage_ddp_fork", **QUIET)
    module._trainer.state.fn = TrainerFn.FITTING
    with pytest.warns(UserWarning, match=r"call configure_model\(\) before it, or save them"):
        module.configure_model()


def on_a_node_of_its_own(rank, arguments, starter):
    warnings.simplefilter("ignore")
    # a node's only process would take all cores
    os.environ["OMP_NUM_THREADS"] = "1"
    if starter == "SLURM":
        del os.environ["TORCHELASTIC_RUN_ID"]
        slurm = {"NTASKS": 2, "NTASKS_PER_NODE": 1, "NNODES": 2}
        slurm |= {"PROCID": rank, "NODEID": rank, "LOCALID": 0}
        os.environ.update({f"SLURM_{name}": str(value) for name, value in slurm.items()})
    else:
        os.environ.update(GROUP_RANK=str(rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        cli.main(arguments)
    return output.getvalue()


@pytest.mark.parametrize(
    ("strategy", "starter"), [("strategy/ddp.yaml", "torchrun"), ("strategy/fsdp.yaml", "SLURM")]
)
def test_two_nodes_of_one_process(tmp_path, monkeypatch, command, strategy, starter):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-sage"])
    arguments = command("nodes", strategy, "strategy/multi_node.yaml")
    arguments += ["--trainer.devices=1", "--trainer.num_nodes=2"]
    first, second = ranks(2, on_a_node_of_its_own, arguments, starter, group=False)
    assert_told_once(tmp_path, assert_trained("nodes"), first)
    assert second.strip() == ""
