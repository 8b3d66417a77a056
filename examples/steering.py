"""Does `fidelity_target` hold the gradient's cosine, and what does looking at it cost?

Fine-tunes the quickstart's pre-trained model (pre-trained first where that has not been done) with
and without a target; prints a table and appends one line of JSON a row:

    python examples/steering.py
"""

import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

from fidelity import QUICKSTART, show
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from measure import RESULTS, circumstances, write
from rich.console import Console
from rich.progress import track

from lightning_sage import SageCallback, SagePolicy
from lightning_sage.cli import SageCLI
from lightning_sage.corpus import StdlibFunctions
from lightning_sage.models import CausalLM, LoRA, Optimization
from lightning_sage.watch.history import NAME, read

STEPS, SETTLED, EVERY = 150, 50, 5
# what is started from, and the cosine to be held
TRIALS: tuple[tuple[SagePolicy, float | None], ...] = (
    (SagePolicy(), None),
    (SagePolicy(), 0.95),
    (SagePolicy(keep=0.25), 0.95),
    (SagePolicy(keep=0.9, replay=None), 0.95),
)


class Clock(Callback):
    """Seconds of every batch, what comes before it included."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock; the first of the callbacks to be called."""
        self.started = perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it."""
        self.seconds.append(perf_counter() - self.started)


def train(folder: Path, policy: SagePolicy, target: float | None) -> dict[str, Any]:
    """One fit."""
    seed_everything(0, verbose=False)
    module = CausalLM(str(folder), lora=LoRA(), optimization=Optimization(lr=2e-3))
    clock = Clock()
    callback = SageCallback(
        policy,
        fidelity_every_n_steps=EVERY,
        fidelity_floor=0.0,
        fidelity_target=target,
        print_summary=False,
    )
    with tempfile.TemporaryDirectory() as logs, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu", max_steps=STEPS, limit_val_batches=0, gradient_clip_val=1.0,
            logger=CSVLogger(logs, name="", version=""), enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[clock, callback],
        )  # fmt: skip
        trainer.fit(module, StdlibFunctions())
        [run] = read(Path(logs) / NAME)
    settled = [look for look in run.fidelity if look["step"] >= SETTLED]
    # the first batches include the self-check and a search
    looks = [x for i, x in enumerate(clock.seconds) if i % EVERY == 0 and i >= SETTLED]
    steps = [x for i, x in enumerate(clock.seconds) if i % EVERY and i >= SETTLED]
    look = median(looks) - median(steps)
    return {
        "experiment": "steering",
        "policy": f"keep={policy.keep!r}, replay={policy.replay!r}",
        "target": "none" if target is None else str(target),
        "first cosine": run.fidelity[0]["cosine"],
        "cosine": fmean(x["cosine"] for x in settled),
        "lowest": min(x["cosine"] for x in settled),
        "highest": max(x["cosine"] for x in settled),
        "setting": settled[-1]["setting"],
        "replayed": callback.summary["replayed_fraction"],
        "step s": median(steps),
        "look / step": look / median(steps),
        "cost at k=100": look / median(steps) / 100,
    }


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """One for each trial."""
    for policy, target in track(TRIALS, description="fits", console=Console(stderr=True)):
        yield train(folder, policy, target)


def main() -> None:
    """Run them all."""
    # Lightning's command line would take them for its own
    sys.argv[1:] = []
    folder = SageCLI(["--config", str(QUICKSTART)], run=False).pretrained()
    found = list(rows(folder))
    about = {"every": EVERY, "steps": STEPS, "settled after": SETTLED}
    write([row | about | circumstances("cpu") for row in found], RESULTS / "steering.jsonl")
    show(Console(width=180), f"Cosines of steps {SETTLED} to {STEPS}", found)


if __name__ == "__main__":
    main()
