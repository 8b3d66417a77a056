"""Time the ops alone: rows against the copy bandwidth, saliency against a block, attention.

    python examples/time_ops.py                     # on a GPU, three minutes; one line of JSON each
    python examples/time_ops.py --tokens 32768 --batch 1

Shapes are those of one block of Llama-3.1-8B, in bfloat16, random data. A kernel on rows is judged
by the bytes it has to move over the time it takes, against a device-to-device copy measured in the
same run; saliency and the others by their share of a dense forward of the block.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from measure import RESULTS, circumstances, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from lightning_sage import ops
from lightning_sage.ops import How, Rows, Sight, Visibility, stock

# a function's milliseconds
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Command:
    """What is timed.

    Args:
        batch: Samples.
        tokens: Of a sample.
        keep: Share of the tokens that the sparse ops work on.
        width: Of the hidden states.
        mlp: Width of the MLP.
        heads: Query heads.
        key_heads: Key heads.
        head: Width of a head.
        dtype: Of everything.
        device: Where.
        out: File to append the JSON lines to.
    """

    batch: int = 1
    tokens: int = 4096
    keep: float = 0.25
    width: int = 4096
    mlp: int = 14336
    heads: int = 32
    key_heads: int = 8
    head: int = 128
    dtype: str = "bfloat16"
    device: str = "cuda"
    out: str = str(RESULTS / "kernels.jsonl")


@dataclass
class Problem:
    """Tensors of one block."""

    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    every: Rows
    some: Rows


def make(command: Command) -> Problem:
    """Random hidden states, queries, keys and values; what the dense attention makes of them."""
    B, T, dtype = command.batch, command.tokens, getattr(torch, command.dtype)
    generator = torch.Generator(command.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=command.device).to(dtype)

    q = draw(B * T, command.heads, command.head)
    k, v = (draw(B * T, command.key_heads, command.head) for _ in range(2))
    every = Rows.every(B, T, q.device)
    chosen = torch.rand(B, T, generator=generator, device=q.device) < command.keep
    out, lse = ops.attention_forward(q, k, v, Sight(every, every, Visibility(True)), How(0.1))
    return Problem(draw(B, T, command.width), q, k, v, out, lse, every, Rows.of(chosen))


def rows_ops(p: Problem) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Ops on token rows and the bytes that each has to move."""
    hidden, rows, size = p.hidden, p.some.index, p.hidden.element_size()
    values = ops.gather_rows(hidden, rows)
    weights = torch.rand(len(rows), device=hidden.device)
    kept, all_bytes = values.numel(), hidden.numel() * size
    grouped = hidden.unflatten(2, (-1, min(128, hidden.shape[2])))
    yield "copy (the bandwidth)", lambda: hidden.clone(), 2 * all_bytes
    yield "gather", lambda: ops.gather_rows(hidden, rows), 2 * kept * size
    yield "gather, weighted", lambda: ops.gather_rows(hidden, rows, weights), 2 * kept * size
    yield "scatter", lambda: ops.scatter_rows(values, rows, hidden), 2 * all_bytes
    yield "norms", lambda: ops.row_norms(hidden, rows), kept * size
    flat = hidden.flatten(0, 1)
    index = p.every.index
    yield "dropout", lambda: ops.row_dropout(flat, index, 5, 0, 0.1), 2 * all_bytes
    for dtype in (torch.int8, torch.float8_e4m3fn):
        name = str(dtype).removeprefix("torch.")
        packed = ops.pack_rows(grouped, rows, dtype)
        moved = kept * (size + 1) + 4 * packed[1].numel()
        yield f"pack {name}", lambda d=dtype: ops.pack_rows(grouped, rows, d), moved
        yield f"unpack {name}", lambda x=packed: ops.unpack_rows(*x, None, hidden.dtype), moved


def attention_ops(p: Problem) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Saliency, log-sum-exp and the sparse backward in both attention modes."""
    visible, how = Visibility(True), How(0.1)
    B, T = p.every.B, p.every.T
    last = torch.zeros(B, T, dtype=torch.bool, device=p.q.device)
    for name, first in (("last row", T - 1), ("last quarter", T * 3 // 4), ("all rows", 0)):
        rows = Rows.of(last.index_fill(1, torch.arange(first, T, device=p.q.device), True))
        q, lse, weights = p.q[rows.index], p.lse[rows.index], torch.ones(len(rows)).to(p.lse)
        sight = Sight(rows, p.every, visible)
        yield (
            f"saliency, {name}",
            lambda q=q, m=lse, w=weights, s=sight: ops.attention_received(q, p.k, m, w, s, how),
        )
    dense = Sight(p.every, p.every, visible)
    yield "log-sum-exp, all rows", lambda: ops.attention_lse(p.q, p.k, dense, how)
    rows = p.some
    q, k, v, out, lse = (x[rows.index] for x in (p.q, p.k, p.v, p.out, p.lse))
    own, full = Sight(rows, rows, visible), Sight(rows, p.every, visible)
    given = (out, q, k, v, out, lse, own, how)
    if stock.attention_backward(*given) is not None:
        yield "backward, salient, PyTorch's", lambda: stock.attention_backward(*given)
    from lightning_sage.ops import attention as kernel

    yield "backward, salient, ours", lambda: kernel.attention_backward(*given)
    every = (p.k, p.v, full)
    yield "backward, full, ours", lambda: kernel.attention_backward(*given, every)


def block_forward(command: Command, hidden: Tensor) -> Callable[[], Any]:
    """A dense forward of the block without a graph."""
    config = LlamaConfig(
        hidden_size=command.width,
        intermediate_size=command.mlp,
        num_attention_heads=command.heads,
        num_key_value_heads=command.key_heads,
        head_dim=command.head,
        attn_implementation="sdpa",
    )
    with torch.device(hidden.device):
        block = LlamaDecoderLayer(config, 0).to(hidden.dtype)
        positions = torch.arange(command.tokens)[None]
        rotary = LlamaRotaryEmbedding(config)(hidden, positions)

    def run() -> Any:
        with torch.no_grad():
            return block(hidden, position_embeddings=rotary)

    return run


def measured(command: Command, timer: Timer) -> Iterator[dict[str, Any]]:
    """One record for each op."""
    p = make(command)
    bandwidth = None
    for name, run, moved in rows_ops(p):
        ms = timer(run)
        rate = moved / ms / 1e6
        bandwidth = bandwidth or rate
        yield {"op": name, "ms": ms, "gb_per_s": rate, "of_copy": rate / bandwidth}
    whole = timer(block_forward(command, p.hidden))
    yield {"op": "block forward (dense)", "ms": whole, "of_block": 1.0}
    for name, run in attention_ops(p):
        ms = timer(run)
        yield {"op": name, "ms": ms, "of_block": ms / whole}


def show(records: list[dict[str, Any]]) -> None:
    """A table."""
    table = Table("op", "ms", "GB/s", "of copy", "of a block's forward")
    for r in records:
        numbers = (r["ms"], r.get("gb_per_s"), r.get("of_copy"), r.get("of_block"))
        table.add_row(r["op"], *("" if x is None else f"{x:.3f}" for x in numbers))
    Console(width=100).print(table)


def main(arguments: list[str] | None = None, timer: Timer | None = None) -> None:
    """Time what the command line asks for."""
    command = auto_cli(Command, as_positional=False, args=arguments)
    if timer is None:
        if not torch.cuda.is_available():
            print("time_ops.py times kernels on a GPU, and there is none here", file=sys.stderr)
            raise SystemExit(2)
        from triton.testing import do_bench

        def timer(run: Callable[[], Any]) -> float:
            return float(do_bench(run, warmup=50, rep=200, return_mode="median"))

    about = {"config": vars(command)} | circumstances(command.device)
    records = [record | about for record in measured(command, timer)]
    write(records, Path(command.out))
    show(records)


if __name__ == "__main__":
    main()
