"""Made-up runs, written as a fit writes them."""

import math
import random

from lightning_sage.watch.history import NAME, History

MIB = 2**20
POLICY = {"keep": "TopMass(0.8)", "replay": None, "sinks": 4, "attention": "salient"}
SUMMARY = {"kept_fraction": 0.543, "cached_mib": 5.69, "dense_mib": 162.7, "seconds": 0.1234}


def start(history, names, **values):
    history.write(
        "start", version=1, policy=POLICY, blocks=names, world=2,
        precision="32-true", versions={"torch": "2.13.0"}, parameters=3_300_000, trainable=120_000,
        **{"model": "LlamaForCausalLM", "device": "cpu", "fidelity_floor": 0.8, **values},
    )  # fmt: skip


def bits(count, share, draw, within=None):
    inside = within or "1" * count
    return "".join(str(int(bit == "1" and draw.random() < share)) for bit in inside)


def sample(history, step, names, text, valid=None, seed=0):
    draw, valid = random.Random(seed), valid or "1" * len(text)
    kept = [bits(len(text), 0.4, draw, valid) for _ in names]
    replayed = [bits(len(text), 0.6, draw, row) for row in kept]
    labels = "".join("1" if v == "1" and i > 0.7 * len(text) else "0" for i, v in enumerate(valid))
    history.write(
        "tokens", step=step, text=text, labels=labels, valid=valid, kept=kept, replayed=replayed
    )


def made(folder, blocks=4, lines=12, samples=2, tokens=60, names=None, whole=True, every=10):
    """A run with everything in it, or with `whole=False` a killed one of few measures."""
    history = History(folder / NAME)
    names = names or [f"model.layers.{block}" for block in range(blocks)]
    draw = random.Random(0)
    start(history, names)
    if whole:
        history.write("dense", bytes=[90 * MIB + block for block in range(len(names))])
    for line in range(1, lines + 1):
        kept = [0.2 + 0.3 * block / len(names) + 0.1 * draw.random() for block in range(len(names))]
        step = line * every
        history.write(
            "step", step=step, steps=every, seconds=2.5 if line == 1 else 0.125,
            loss=1 + math.exp(-line) if whole else None, kept=kept,
            replayed=[share / 2 for share in kept], cached=[int(9 * MIB * share) for share in kept],
            saved=40 * MIB if whole else None, valid=2048,
            peak={"forward": 800 * MIB, "backward": 900 * MIB} if whole else None,
        )  # fmt: skip
        if whole:
            of_blocks = {name: [0.9 + 0.05 * draw.random(), 1.01] for name in names}
            history.write(
                "fidelity", step=step, cosine=0.93, norm_ratio=1.02, blocks=of_blocks, samples=4,
                setting=0.25,
            )  # fmt: skip
    for number in range(samples):
        words = [draw.choice([" word", " of", "\n", "    ", "ly"]) for _ in range(tokens)]
        valid = "1" * (tokens - tokens // 10) + "0" * (tokens // 10)
        sample(history, (number + 1) * every, names, words, valid, seed=number)
    if whole:
        history.write("event", step=10, text="memory budget: keep=0.25, int8 fits")
        history.write("end", summary=SUMMARY)
    return folder / NAME
