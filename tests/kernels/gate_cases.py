"""Inputs of the gate's mix and the comparison of kernels with the float64 reference, shared by tests and by programs they start."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch

from trainer.kernels.gate import gate_mix_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def case(B=4, K=3, E=3, M=3, D=8, seed=0, dtype=torch.float64, requires_grad=False):
    """Random inputs; sample 0 has everything, sample 1 nothing, the others a random part."""
    rng = np.random.default_rng(seed)
    valid = rng.random((B, E, M)) < 0.6
    valid[:1] = True
    valid[1:2] = False
    shapes = [(E * M, B, K, D), (B, K, E, M), (B, K, E), (B, K, D), (D,)]
    x, g1, g2, r, w = (torch.tensor(rng.normal(size=s)).to(dtype) for s in shapes)
    inputs = [list(x.clone().unbind(0)), g1, g2, torch.tensor(valid), r, w]
    for tensor in leaves(inputs) if requires_grad else []:
        tensor.requires_grad_()
    return inputs


def leaves(inputs):
    """The tensors that have gradients: values, logits, residual, weight."""
    return [*inputs[0], *inputs[1:3], *inputs[4:]]


def copied(inputs, dtype=None, requires_grad=True):
    """The same inputs, of another dtype if given, with gradients of their own."""

    def copy(t):
        return t.detach().to(dtype or t.dtype, copy=True).requires_grad_(requires_grad)

    return [[copy(x) for x in inputs[0]], *(t if t.dtype == torch.bool else copy(t) for t in inputs[1:])]


def spoiled(inputs, value=math.nan):
    """The inputs with another content wherever something is not valid."""
    valid = inputs[3]
    out = copied(inputs, requires_grad=False)
    for x, some in zip(out[0], valid.flatten(1).unbind(1), strict=True):
        x[~some] = value
    out[1].masked_fill_(~valid[:, None].expand_as(out[1]), value)
    out[2].masked_fill_(~valid.any(-1)[:, None].expand_as(out[2]), value)
    return out


@dataclasses.dataclass(frozen=True)
class Trial:
    """One comparison of raw kernels with the reference; `rows` is the height of a tile."""

    name: str
    shape: tuple[int, int, int, int, int] = (5, 3, 3, 3, 40)
    dtype: torch.dtype = torch.float32
    rows: int = 4
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    logits: float = 1.0  # their size
    hide: float | None = None  # what stands where nothing is valid
    strided: bool = False
    bad_gradient: bool = False


TRIALS = [
    Trial("fp32", options={"temperature": 0.7}),
    Trial("not read", hide=math.nan, options={"temperature": 1.3}),
    Trial("mean of modalities", options={"mean_modality": True, "temperature": 0.5}),
    Trial("mean of experts", options={"mean_expert": True}),
    Trial("large logits", logits=1e30),
    Trial("largest logits", logits=3e38, options={"temperature": 0.5}),
    Trial("small sums", shape=(3, 2, 2, 2, 16), options={"eps": 10.0}),
    Trial("bad gradient", bad_gradient=True),
    Trial("fp64", dtype=torch.float64, options={"temperature": 0.7}),
    Trial("bf16", dtype=torch.bfloat16, options={"temperature": 0.7}),
    Trial("fp16", dtype=torch.float16, options={"temperature": 0.7}),
    Trial("one of each", shape=(2, 1, 1, 1, 1)),
    Trial("one modality", shape=(3, 5, 2, 1, 7), rows=1),
    Trial("one expert", shape=(3, 2, 1, 3, 33), rows=2),
    Trial("twelve values", shape=(3, 2, 4, 3, 100), rows=8),
    Trial("strided", strided=True),
    Trial("own tile", shape=(9, 4, 3, 2, 24), rows=0),
    Trial("no sample", shape=(0, 4, 3, 3, 16)),
]


def failures(kernels: ModuleType, trial: Trial, device: str = "cpu") -> list[str]:
    """What `kernels` (gate_triton, or a mutant of it) answers otherwise than the reference in float64; [] if nothing."""
    inputs = case(*trial.shape, seed=len(trial.name), dtype=trial.dtype)
    for logits in inputs[1:3]:
        logits.copy_(logits.sign() * trial.logits if trial.logits > 1 else logits)
    if trial.strided:
        inputs[0] = [x.mT.contiguous().mT for x in inputs[0]]
        inputs[4] = inputs[4].mT.contiguous().mT
    valid = inputs[3]
    options = {"temperature": 1.0, "eps": 1e-6, "mean_modality": False, "mean_expert": False, **trial.options}
    exact = copied(inputs, torch.float64)
    expected = gate_mix_reference(*exact, **options)
    rng = np.random.default_rng(1)
    upstream = [torch.tensor(rng.normal(size=t.shape)) for t in expected]
    total = sum((t * u).sum() for t, u in zip(expected, upstream, strict=True))
    gradients = torch.autograd.grad(total, leaves(exact), allow_unused=True, materialize_grads=True)

    given = inputs if trial.hide is None else spoiled(inputs, trial.hide)
    given = [[x.to(device) for x in given[0]], *(t.to(device) for t in given[1:])]
    _, _, _, _, D = trial.shape
    tiling = {"R": trial.rows, "BLOCK": kernels.triton.next_power_of_2(D), "num_warps": 4} if trial.rows else None
    accumulate = torch.promote_types(trial.dtype, torch.float32)
    mixed, expert, modality, rstd = kernels.forward(*given, accumulate=accumulate, tiling=tiling, **options)
    dtypes = (given[1].dtype, given[2].dtype)
    d_mixed, d_expert, d_modality = (u.to(t) for u, t in zip(upstream, (mixed, expert, modality), strict=True))
    if trial.bad_gradient:
        d_mixed = torch.full_like(d_mixed, math.nan)
    options.pop("eps")
    d_values, *rest = kernels.backward(
        given[0], dtypes, *given[3:], expert, modality, rstd, d_mixed, d_expert, d_modality, tiling=tiling, **options
    )
    d_values, rest = [t.cpu() for t in d_values], [t.cpu() for t in rest]
    mixed, expert, modality = mixed.cpu(), expert.cpu(), modality.cpu()
    found = []
    for i, (d_value, some) in enumerate(zip(d_values, valid.flatten(1).unbind(1), strict=True)):
        if d_value[~some].any() or d_value.dtype != trial.dtype:
            found.append(f"gradient of value {i} where it is not valid")
    names = ["mixed", "expert", "modality", *(f"d value {i}" for i in range(len(d_values)))]
    names += ["d modality logits", "d expert logits", "d residual", "d weight"]
    mine = [mixed, expert, modality, *d_values, *rest]
    for name, a, b in zip(names, mine, [*expected, *gradients], strict=True):
        if trial.bad_gradient and name.startswith("d "):
            continue
        tolerance = TOLERANCE[trial.dtype]
        if not torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance * 3):
            found.append(f"{name}: off by {(a.double() - b).abs().max().item():.1e}")
    return found
