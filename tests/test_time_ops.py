"""The script that times kernels runs through, with tiny shapes and a clock of its own."""

import json
from pathlib import Path
from time import perf_counter

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = "--batch 2 --tokens 12 --keep 0.5 --width 32 --mlp 48 --heads 4 --key_heads 2 --head 16"


@pytest.fixture
def time_ops(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import time_ops

    return time_ops


def clock(run):
    start = perf_counter()
    run()
    return 1e3 * (perf_counter() - start)


def test_every_op_is_timed(time_ops, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", "triton")
    out = tmp_path / "kernels.jsonl"
    options = [*TINY.split(), "--dtype", "float32", "--device", "cpu", "--out", str(out)]
    time_ops.main(options, clock)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    printed = capsys.readouterr().out
    assert all(record["op"] in printed and record["ms"] > 0 for record in records)
    assert {"gather", "pack int8", "saliency, last row", "backward, full, ours"} <= {
        record["op"] for record in records
    }
    assert all(("gb_per_s" in r) != ("of_block" in r) for r in records)
    assert records[0]["config"]["tokens"] == 12


def test_without_a_gpu_it_says_so(time_ops, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        time_ops.main([])
    assert "there is none here" in capsys.readouterr().err
