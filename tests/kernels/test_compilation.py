"""The Triton kernels compile to PTX and cubin for GPUs that are not here, and fit their registers."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.gate_registers import CAPABILITIES, KERNELS, compile_kernel

SHAPES = [("fp32", 256, 3, 3), ("bf16", 512, 3, 3), ("fp16", 257, 1, 1), ("bf16", 4096, 4, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(  # the registers and loads of one generation are quick, those of the others a second look
    "capability", [pytest.param(c, marks=() if c == max(CAPABILITIES) else pytest.mark.slow) for c in CAPABILITIES]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_a_gpu(kernel, capability, shape, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype, D, E, M = shape
    built = compile_kernel(kernel, capability, dtype, D, E, M)
    assert f".target sm_{capability}" in built.ptx
    assert 0 < built.registers <= 255
    assert built.local == 0
    if (E, M) == (3, 3):
        assert built.stack <= 16  # nothing of a tile is spilled
    if D % 8 == 0:
        assert len(re.findall(r"ld\.global\S*\.v4", built.ptx)) >= E * M  # 16 bytes a load
    assert not re.search(r"\b(atom|red)\.", built.ptx)  # sums in one order
