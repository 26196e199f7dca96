"""Compiles the gate's Triton kernels for GPUs that need not be there, and reads what they take.

    python -m benchmarks.gate_registers [--out benchmarks/results/gate-registers.json]

Registers and stack per thread and local memory are ptxas' own figures, from the cubin; spilled registers lie on the stack. Needs triton, no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.machine import describe, today
from trainer.kernels import gate_triton

CAPABILITIES = (80, 90)
KERNELS = {"forward": gate_triton.forward_kernel, "backward": gate_triton.backward_kernel}
ROWS = 256  # 64 samples of 4 slots
SINGLE = {
    "expert_weights",
    "modality_weights",
    "rstd",
    "d_expert_weights",
    "d_modality_weights",
    "d_weight_parts",
}  # always in the dtype of the computation


@dataclass(frozen=True)
class Compiled:
    """One kernel for one GPU: PTX and what the cubin takes per thread (registers, bytes of stack) and per program (shared bytes)."""

    kernel: str
    capability: int
    dtype: str
    E: int
    M: int
    D: int
    rows_per_program: int
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    ptx: str


def compile_kernel(kernel: str, capability: int, dtype: str, D: int, E: int = 3, M: int = 3) -> Compiled:
    """PTX and cubin of a kernel, as a launch with 16-byte aligned tensors would compile it."""
    function = KERNELS[kernel]
    tiling = gate_triton.tile(ROWS, D)
    constants: dict[str, object] = {
        "K": 4,
        "E": E,
        "M": M,
        "D": D,
        "temperature": 1.0,
        "eps": 1e-6,
        "dtype": tl.float32,
    }
    constants |= {"mean_modality": False, "mean_expert": False, "R": tiling["R"], "BLOCK": tiling["BLOCK"]}
    signature: dict[str, str | tuple[str, ...]] = {}
    aligned: dict[tuple[int, ...], list[list[object]]] = {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "rows":
            signature[name] = "i32"
        elif name.endswith("values_C"):
            signature[name] = (f"*{dtype}",) * (E * M)
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(E * M)}
        else:
            signature[name] = "*fp32" if name in SINGLE else "*u8" if name == "valid" else f"*{dtype}"
            aligned[(i,)] = [["tt.divisibility", 16]]
    known = {(function.arg_names.index(name),): value for name, value in constants.items() if name in signature}
    built = triton.compile(
        ASTSource(function, signature, constexprs=known, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiling["num_warps"], "enable_fp_fusion": True},
    )
    usage = resources(built.asm["cubin"])
    return Compiled(
        kernel,
        capability,
        dtype,
        E,
        M,
        D,
        tiling["R"],
        tiling["num_warps"],
        usage["REG"],
        usage["STACK"],
        usage["LOCAL"],
        built.metadata.shared,
        built.asm["ptx"],
    )


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    (line,) = re.findall(r"REG:.*", done.stdout)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for kernel in KERNELS:
        for capability in CAPABILITIES:
            for dtype in ("fp32", "bf16", "fp16"):
                for D, E, M in ((256, 3, 3), (512, 3, 3), (1024, 3, 3), (4096, 3, 3), (256, 4, 3)):
                    row = asdict(compile_kernel(kernel, capability, dtype, D, E, M))
                    row.pop("ptx")
                    rows.append(row)
                    print(row, flush=True)
    result = {
        "what": "registers and stack per thread of the gate's kernels, compiled without a GPU",
        "date": today(),
        "command": "python -m benchmarks.gate_registers --out benchmarks/results/gate-registers.json",
        "machine": describe("torch", "triton"),
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
