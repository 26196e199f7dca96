"""The gate's operator on CUDA: Triton against the reference in float64, in every dtype; deterministic; under opcheck."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.gate_cases import TOLERANCE, TRIALS, case, copied, failures, leaves
from trainer.kernels.gate import gate_mix, gate_mix_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on(device, inputs):
    moved = [[x.to(device) for x in inputs[0]], *(t.to(device) for t in inputs[1:])]
    return copied(moved)


@pytest.mark.parametrize(
    "shape", [(7, 4, 3, 3, 256), (64, 4, 3, 3, 512), (5, 3, 4, 3, 100), (3, 1, 1, 1, 4096)], ids=str
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_equals_the_reference_in_float64(kernel, dtype, shape):
    pytest.importorskip("triton", reason="triton is not installed")
    inputs = on("cuda", case(*shape, dtype=dtype))
    exact = copied(inputs, torch.float64)
    results = []
    for given, options in ((inputs, {"kernel": kernel}), (exact, None)):
        mix = gate_mix_reference if options is None else gate_mix
        out = mix(*given, temperature=0.7, **(options or {}))
        (out[0].double().pow(3).sum() + (out[1].double() * out[2].double().amax(-1)).sum()).backward()
        results.append([*out, *(t.grad for t in leaves(given))])
    for mine, reference in zip(*results, strict=True):
        scale = 1.0 + reference.abs().max().item()
        torch.testing.assert_close(mine.double() / scale, reference / scale, rtol=0, atol=TOLERANCE[dtype])


def test_deterministic_and_checked():
    pytest.importorskip("triton", reason="triton is not installed")
    outputs = []
    for _ in range(2):
        inputs = on("cuda", case(64, 4, 3, 3, 512, dtype=torch.bfloat16))
        out = gate_mix(*inputs, kernel="triton")
        sum(t.float().square().sum() for t in out).backward()
        outputs.append([*out, *(t.grad for t in leaves(inputs))])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    inputs = on("cuda", case(dtype=torch.float32))
    torch.library.opcheck(torch.ops.egmf.gate_mix.default, (*inputs, 0.7, 1e-6, False, False, "triton"))


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_raw_kernels(trial):
    pytest.importorskip("triton", reason="triton is not installed")
    from trainer.kernels import gate_triton

    assert failures(gate_triton, trial, "cuda") == []
