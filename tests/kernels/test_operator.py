"""The gate's operator for PyTorch: every check of opcheck, torch.compile without graph breaks, torch.export."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.gate_cases import case, copied, leaves
from trainer.kernels.gate import gate_mix

OPTIONS = (0.7, 1e-6, False, False, "auto")
SHAPES = [(4, 3, 3, 3, 8), (1, 1, 1, 1, 1), (2, 4, 2, 3, 5)]


def backward_inputs(inputs):
    inputs = copied(inputs, requires_grad=False)
    y, g2, g1, rstd = torch.ops.egmf.gate_mix(*inputs, *OPTIONS)
    gradients = (torch.randn_like(y), torch.randn_like(g2), torch.randn_like(g1))
    return (*inputs, g2, g1, rstd, *gradients, OPTIONS[0], *OPTIONS[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_opcheck(shape, dtype):
    inputs = case(*shape, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.egmf.gate_mix.default, (*inputs, *OPTIONS))
    torch.library.opcheck(torch.ops.egmf.gate_mix_backward.default, backward_inputs(inputs))


def test_opcheck_of_views():
    inputs = case(dtype=torch.float32)
    inputs[0] = [x.mT.contiguous().mT for x in inputs[0]]
    inputs[4] = inputs[4][:, :1].expand(-1, 3, -1)
    inputs = copied(inputs)
    torch.library.opcheck(torch.ops.egmf.gate_mix.default, (*inputs, *OPTIONS))
    torch.library.opcheck(torch.ops.egmf.gate_mix_backward.default, backward_inputs(inputs))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph_for_any_number_of_samples(backend):
    def loss(*inputs):
        y, g2, g1 = gate_mix(*inputs, temperature=0.7)
        return y.square().sum() + (g2 * g1.amax(-1)).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for B in (4, 7):
        given = case(B=B, dtype=torch.float32, requires_grad=True)
        mine, reference = given, copied(given)
        compiled(*mine).backward()
        loss(*reference).backward()
        for a, b in zip(leaves(mine), leaves(reference), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
