"""The whole fusion network, gate operator included, through torch.compile and torch.export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.models.fusion.fusion_cases import INPUTS, backward, fusion, inputs
from trainer.batch import Standardisation


def standardised(**changes):
    """A network whose features are standardised."""
    net = fusion(**changes)
    some = {
        n: Standardisation(np.linspace(-1, 1, n, dtype="f4"), np.linspace(0.5, 9, n, dtype="f4"), 10.0)
        for n in (3, 4, 5)
    }
    net.encoders.standardise({task: {m: some[n] for m, n in of.items() if n} for task, of in INPUTS.items()})
    return net


class Tensors(nn.Module):
    """A fusion network as a function of tensors alone, as torch.export wants it.

    Without the global expert: torch.export writes Python code, in which no attribute may be called `global`.
    """

    def __init__(self):
        super().__init__()
        self.net = standardised(experts=["local", "semantic"])
        self.task, self.words, self.mask, self.audio, self.video = inputs(present=(True, True, False))

    def forward(self, words):
        return tuple(self.net(self.task, words, self.mask, self.audio, self.video))


def test_exports_with_the_gate_as_one_operator():
    model = Tensors()
    exported = torch.export.export(model, (model.words,))
    assert "egmf.gate_mix" in str(exported.graph)
    for mine, reference in zip(exported.module()(model.words), model(model.words), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # quick are the network's export in one graph, above, and the gate's compilation, tests/kernels/test_operator.py
def test_compiles_as_one_graph():
    net = standardised()
    expected, gradients = backward(net, inputs())
    found, others = backward(torch.compile(net, fullgraph=True, backend="aot_eager"), inputs())
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
    for name, reference in gradients.items():
        torch.testing.assert_close(others[f"_orig_mod.{name}"], reference, rtol=1e-3, atol=1e-4, msg=name)
