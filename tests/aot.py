"""Compile the kernels for GPUs that are not there, and print what each takes, a JSON line each.

A program, because Triton decides at import whether kernels are compiled or interpreted:

    python tests/aot.py 90-bfloat16-128-plain 80-float32-64 ...

Each names a compute capability, a dtype, a width of heads, and what is launched; by default, all.

What is compiled is what the launchers launch: they are called on a CPU with kernels that only note
their arguments.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_sage.ops import Dropout, How, Rows, Sight, Visibility, attention, rows, saliency
from lightning_sage.ops import dropout as dropping

NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8",
    torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Noted:
    """Stands for a kernel, and notes what it would be launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, **kwargs):
        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        # as triton's own launcher specialises: by what is 1, and what 16 divides
        for number, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, given[parameter.name]
            plain = parameter.do_not_specialize
            if parameter.is_constexpr or (not plain and isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            divisible = not plain and isinstance(value, int) and value % 16 == 0
            if isinstance(value, torch.Tensor):
                signature[name], divisible = "*" + NAMES[value.dtype], value.data_ptr() % 16 == 0
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if divisible:
                attributes[number,] = [["tt.divisibility", 16]]
        options = {name: value for name, value in kwargs.items() if name not in names}
        self.launches.append((self.kernel, signature, constants, attributes, options))


def launches(dtype, width, arch):
    """All that the launchers launch for heads of one width: by variant."""
    noted, found = [], {}
    for module in (attention, dropping, rows, saliency):
        for name, kernel in vars(module).copy().items():
            if name.endswith("_kernel"):
                true = kernel.kernel if isinstance(kernel, Noted) else kernel
                setattr(module, name, Noted(true, noted))

    def take(variant):
        found[variant] = noted.copy()
        noted.clear()

    B, T, H, G = 2, 256, 32, 8
    every = Rows.every(B, T, torch.device("cpu"))
    sight = Sight(every, every, Visibility(True))
    q, grad = (torch.zeros(B * T, H, width, dtype=dtype) for _ in range(2))
    k, v = (torch.zeros(B * T, G, width, dtype=dtype) for _ in range(2))
    lse = torch.zeros(B * T, H)
    hows = {
        "plain": How(0.1), "dropout": How(0.1, None, Dropout(0.1, 1, 1)), "softcap": How(0.1, 30.0)
    }  # fmt: skip
    for variant, how in hows.items():
        attention.attention_forward(q, k, v, sight, how)
        attention.attention_backward(grad, q, k, v, q, lse, sight, how)
        take(variant)
    attention.attention_lse(q, k, sight, How(0.1))
    take("lse")
    saliency.attention_received(q, k, lse, torch.zeros(B * T), sight, How(0.1))
    take("received")
    last = Sight(Rows(torch.tensor([T - 1]), B, T), every, Visibility(True))
    saliency.attention_received(q[:1, :8], k, lse[:1, :8], torch.zeros(1), last, How(0.1))
    take("few")
    index, weights = torch.arange(64), torch.zeros(64)
    x = torch.zeros(B, T, 32 * width, dtype=dtype)
    for variant, given in (("moved", None), ("weighted", weights)):
        rows.scatter_rows(rows.gather_rows(x, index, given), index, x)
        take(variant)
    rows.row_norms(x, index)
    rows.rows_of(torch.ones(B, T, dtype=torch.bool), 64)
    dropping.row_dropout(x[0, :64], index, 1, 1, 0.1)
    take("rows")
    # fp8 is the reference's where a GPU does not know it
    for packed in (torch.int8, *([torch.float8_e4m3fn] if arch >= 89 else [])):
        values, scale = rows.pack_rows(x.unflatten(2, (-1, 128)), index, packed)
        rows.unpack_rows(values, scale, index, dtype)
        take(NAMES[packed])
    return found


def compiled(launch, arch):
    kernel, signature, constants, attributes, options = launch
    start = time.perf_counter()
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    return {
        "kernel": kernel.__name__,
        "warps": binary.metadata.num_warps,
        "shared": binary.metadata.shared,
        **usage(binary.asm["cubin"]),
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
        "mma": binary.asm["ptx"].count("mma.sync"),
        "fma": binary.asm["ptx"].count("fma.rn"),
        "seconds": round(seconds, 1),
    }


def usage(cubin):
    """Registers of a thread, and bytes of its memory that it spills to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr).groups()
    return {"registers": int(registers), "stack": int(stack)}


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        arch, dtype, width, *variants = asked.split("-")
        found = launches(getattr(torch, dtype), int(width), int(arch))
        for variant in variants or found:
            for launch in found[variant]:
                told = {"case": f"{arch}-{dtype}-{width}-{variant}"} | compiled(launch, int(arch))
                print(json.dumps(told), flush=True)  # noqa: T201
