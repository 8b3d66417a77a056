"""Measure one training step: what it holds for backward, its peak, its seconds.

One run gives one line of JSON; a suite measures methods side by side and prints a table too:

    python examples/measure.py --shape small-cpu --head none --method sage --policy.keep 0.25
    python examples/measure.py --suite cpu

The GPU suite is done in parts, each within eight minutes on one H100 (80 GiB; dense training of
the 8B shape may want an H200):

    python examples/measure.py --suite gpu --only 3b-16x256,3b-4x2048,8b-2x4096
    python examples/measure.py --suite gpu --only 8b-1x32768
    python examples/measure.py --suite gpu --only 3b-4x2048-chunked,1b-4x2048-rank0

A step is forward and backward: the optimizer's part is the same for every method. Weights are
random and made on the device; nothing is downloaded. Random weights attend almost evenly, so
TopMass keeps far more tokens here than in a trained model; fractions do not depend on that.
`saved_mib` counts what autograd holds after the forward pass, on any device; `activation_mib` is
CUDA's own account (see `Contender` in step.py).
"""

import gc
import json
import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from race import race
from step import Contender, Setting
from tables import table

from lightning_sage import AllTokens, SagePolicy
from lightning_sage.compare.callbacks import spread
from lightning_sage.policy import PRESETS

RESULTS = Path(__file__).parent / "results"
# settings of CUDA's allocator; the second is the older name of the first
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
PACKAGES = ("lightning-sage", "torch", "transformers", "peft", "triton")


@dataclass(frozen=True)
class Command(Setting):
    """What is measured, and what becomes of it.

    Args:
        suite: Measure a standard set instead; of the other options only `only`, `device`, `seed`,
            `warmup` and `steps` count then.
        only: Names of the suite's conditions to measure, with commas between; all by default.
        out: File to append the JSON lines to; a suite's default is examples/results/SUITE.jsonl.
    """

    suite: Literal["cpu", "gpu"] | None = None
    only: str | None = None
    out: str | None = None


def name_of(setting: Setting) -> str:
    """The method, with the preset's name or the policy's differences from `SagePolicy()`."""
    if setting.method != "sage":
        return setting.method
    policy, default = setting.policy, SagePolicy()
    if preset := next((name for name, known in PRESETS.items() if known == policy), None):
        return f"sage {preset}"
    changed = [
        f"{f.name}={getattr(policy, f.name)!r}"
        for f in fields(policy)
        if getattr(policy, f.name) != getattr(default, f.name)
    ]
    return f"sage {', '.join(changed) or 'default'}"


def make_record(contender: Contender) -> dict[str, Any]:
    """What the line of JSON says."""
    setting, result = contender.setting, contender.result
    config = {f.name: getattr(setting, f.name) for f in fields(Setting)}
    config["policy"] = plain(setting.policy) if setting.method == "sage" else None
    steps = [f + b for f, b in zip(contender.forward_s, contender.backward_s, strict=True)]
    if not steps:
        result.setdefault("error", "over the time budget")
    tokens = setting.batch * setting.length
    return {
        "name": name_of(setting),
        **config,
        "saved_mib": None,
        "peak_mib": None,
        "activation_mib": None,
        **result,
        "forward_s": spread(contender.forward_s),
        "backward_s": spread(contender.backward_s),
        "step_s": spread(steps),
        "tokens_per_s": spread([tokens / seconds for seconds in steps]),
        "measured_steps": len(steps),
        **circumstances(setting.device),
    }


def plain(policy: SagePolicy) -> dict[str, Any]:
    """A policy's values as JSON has them."""
    values = {f.name: getattr(policy, f.name) for f in fields(policy)}
    known = (str, int, float, bool, type(None))
    return {name: v if isinstance(v, known) else repr(v) for name, v in values.items()}


def circumstances(device: str) -> dict[str, Any]:
    """Machine, versions, commit and date."""
    cuda = torch.device(device).type == "cuda"
    nvidia = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    commit = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=40"]
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "driver": _output(nvidia) if cuda else None,
        "allocator": next((os.environ[name] for name in ALLOCATOR if name in os.environ), None),
        "threads": torch.get_num_threads(),
        **{name.replace("-", "_"): _version(name) for name in PACKAGES},
        "commit": _output(commit),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split("\n")[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def methods(base: Setting) -> list[Setting]:
    """The standard contenders."""
    policies = (
        *(PRESETS[name] for name in ("balanced", "memory", "speed")),
        SagePolicy(keep=0.25),
        SagePolicy(keep=0.25, attention="full"),
        SagePolicy(keep=0.1, unselected="skip"),
        SagePolicy(keep=AllTokens(), replay=0.25),
    )
    baselines = [replace(base, method="dense"), replace(base, method="checkpointing")]
    return baselines + [replace(base, method="sage", policy=policy) for policy in policies]


def condition_name(condition: Setting) -> str:
    """Short, and different for each condition of a suite."""
    parts = [condition.shape.split("-")[-1], f"{condition.batch}x{condition.length}"]
    if not condition.rank:
        parts.append("rank0")
    if condition.head != "none":
        parts.append(condition.head)
    return "-".join(parts)


def suite_settings(suite: str, base: Setting) -> list[Setting]:
    """The conditions of a suite; each is raced by all methods."""
    base = replace(base, head="none", loss="last-quarter")
    if suite == "cpu":
        return [replace(base, shape="small-cpu", batch=4, length=512, dtype="float32", rank=16)]
    base = replace(base, dtype="bfloat16", rank=64)
    small = replace(base, shape="llama-3.2-3b")
    large = replace(base, shape="llama-3.1-8b")
    return [
        replace(small, batch=16, length=256),
        replace(small, batch=4, length=2048),
        replace(small, batch=4, length=2048, head="chunked"),
        replace(base, shape="llama-3.2-1b", batch=4, length=2048, rank=0),
        replace(large, batch=2, length=4096),
        replace(large, batch=1, length=32768),
    ]


def chosen_conditions(conditions: Sequence[Setting], only: str | None) -> list[Setting]:
    """Those with the names in `only`.

    Raises:
        ValueError: No condition has that name.
    """
    if only is None:
        return list(conditions)
    known = {condition_name(condition): condition for condition in conditions}
    wanted = [name.strip() for name in only.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no condition {', '.join(unknown)} here, but {', '.join(known)}")
    return [known[name] for name in wanted]


def run_suite(conditions: Sequence[Setting], budget_s: float, out: Path) -> None:
    """Race all methods under each condition, append the records, print the table."""
    deadline = perf_counter() + budget_s
    for left, condition in zip(range(len(conditions), 0, -1), conditions, strict=True):
        # what one condition leaves unused goes to the rest
        contenders = race(methods(condition), (deadline - perf_counter()) / left)
        records = [make_record(contender) for contender in contenders]
        del contenders
        write(records, out)
        print(table(records), end="\n\n", flush=True)
        # wrapped blocks refer to themselves: only the collector frees them
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def write(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Append lines of JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    command = auto_cli(Command, as_positional=False, args=arguments)
    device = command.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = {f.name: getattr(command, f.name) for f in fields(Setting)} | {"device": device}
    if command.suite is None:
        [contender] = race([Setting(**chosen)])
        record = make_record(contender)
        print(json.dumps(record))
        if command.out is not None:
            write([record], Path(command.out))
        return
    base = Setting(**{name: chosen[name] for name in ("device", "seed", "warmup", "steps")})
    out = Path(command.out or RESULTS / f"{command.suite}.jsonl")
    # a part of the GPU suite has to end within eight minutes, imports and the last table included
    budget_s = 420.0 if command.suite == "gpu" else math.inf
    conditions = chosen_conditions(suite_settings(command.suite, base), command.only)
    run_suite(conditions, budget_s, out)


if __name__ == "__main__":
    main()
