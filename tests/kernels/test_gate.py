"""The gate's mix, its operator and its plain reference, against loops in float64."""

from __future__ import annotations

import logging
import math
import sys

import numpy as np
import pytest
import torch

from tests.kernels.gate_cases import TOLERANCE, case, copied, leaves, spoiled
from trainer.kernels.gate import gate_mix, gate_mix_reference, resolve_kernel

MIXES = pytest.mark.parametrize("mix", [gate_mix, gate_mix_reference])


def softmax(logits, valid, mean, temperature):
    """Weights over a list, by hand."""
    chosen = [i for i, v in enumerate(valid) if v]
    out = [0.0] * len(logits)
    if not chosen:
        return out
    raised = {i: 1.0 if mean else math.exp((logits[i] - max(logits)) / temperature) for i in chosen}
    for i in chosen:
        out[i] = raised[i] / sum(raised.values())
    return out


def brute_force(x, g1, g2, valid, r, w, temperature=1.0, eps=1e-6, mean_modality=False, mean_expert=False):
    x = torch.stack(x, 2).unflatten(2, valid.shape[1:])
    x, g1, g2, r, w = (t.detach().double().numpy() for t in (x, g1, g2, r, w))
    valid = valid.numpy()
    B, K, E, M, D = x.shape
    y, weight2, weight1 = np.zeros((B, K, D)), np.zeros((B, K, E)), np.zeros((B, K, E, M))
    for b in range(B):
        for k in range(K):
            some = [valid[b, e].any() for e in range(E)]
            weight2[b, k] = softmax(list(g2[b, k]), some, mean_expert, temperature)
            total = r[b, k].copy()
            for e in range(E):
                weight1[b, k, e] = softmax(list(g1[b, k, e]), valid[b, e], mean_modality, temperature)
                for m in range(M):
                    if valid[b, e, m]:
                        total += weight2[b, k, e] * weight1[b, k, e, m] * x[b, k, e, m]
            y[b, k] = total / math.sqrt((total**2).sum() / D + eps) * w
    return y, weight2, weight1


@MIXES
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("means", [(False, False), (True, False), (False, True), (True, True)])
def test_equals_loops(mix, dtype, means):
    options = {"mean_modality": means[0], "mean_expert": means[1], "temperature": 0.7}
    inputs = case(dtype=dtype)
    got = mix(*inputs, **options)
    assert got[0].dtype == dtype
    assert got[1].dtype == got[2].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for mine, reference in zip(got, brute_force(*inputs, **options), strict=True):
        torch.testing.assert_close(mine.double(), torch.tensor(reference), rtol=0, atol=TOLERANCE[dtype] * 3)


@MIXES
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 1, 1, 3, 5), (3, 5, 2, 1, 7), (5, 2, 3, 2, 33), (2, 3, 4, 3, 9)]
)
def test_odd_shapes(mix, shape):
    inputs = case(*shape, seed=3)
    for mine, reference in zip(mix(*inputs), brute_force(*inputs), strict=True):
        torch.testing.assert_close(mine, torch.tensor(reference), rtol=0, atol=1e-11)


def test_no_sample():
    inputs = case(B=0, requires_grad=True)
    y = gate_mix(*inputs)[0]
    assert y.shape == (0, 3, 8)
    y.sum().backward()
    assert not inputs[5].grad.any()


def test_weights_sum_to_one_over_the_valid_and_are_exactly_zero_elsewhere():
    x, g1, g2, valid, r, w = case(B=16, dtype=torch.float32, seed=1)
    _, expert_BKE, modality_BKEM = gate_mix(x, g1 * 20, g2 * 20, valid, r, w)
    some = valid.any(-1)
    assert (modality_BKEM.masked_select(~valid[:, None].expand_as(modality_BKEM)) == 0).all()
    assert (expert_BKE.masked_select(~some[:, None].expand_as(expert_BKE)) == 0).all()
    torch.testing.assert_close(modality_BKEM.sum(-1), some[:, None].expand(-1, 3, -1).float())
    torch.testing.assert_close(expert_BKE.sum(-1), some.any(-1)[:, None].expand(-1, 3).float())


@MIXES
@pytest.mark.parametrize("size", [1e30, 3e38])
def test_extreme_logits_stay_finite(mix, size):
    inputs = case(dtype=torch.float32, requires_grad=True)
    signs = [inputs[1].detach().sign(), inputs[2].detach().sign()]
    out = mix(inputs[0], signs[0] * size, signs[1] * -size, *inputs[3:], temperature=0.5)
    sum(t.square().sum() for t in out).backward()
    assert all(torch.isfinite(t).all() for t in (*out, *(t.grad for t in leaves(inputs) if t.grad is not None)))


@MIXES
def test_nothing_valid_is_the_norm_of_the_residual_with_no_gradient_to_values(mix):
    inputs = case(requires_grad=True)
    inputs[3] = torch.zeros_like(inputs[3])
    r, w = inputs[4:]
    y, expert_BKE, modality_BKEM = mix(*inputs)
    expected = r / torch.sqrt(r.square().mean(-1, keepdim=True) + 1e-6) * w
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    assert not expert_BKE.any()
    assert not modality_BKEM.any()
    (y.sum() + expert_BKE.sum() + modality_BKEM.sum()).backward()
    assert all(not t.grad.any() for t in (*inputs[0], *inputs[1:3]))
    assert torch.isfinite(r.grad).all()
    assert r.grad.any()


@MIXES
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_valid_is_not_read(mix, value):
    inputs = case(dtype=torch.float32, requires_grad=True)
    y = mix(*inputs)[0]
    y.square().sum().backward()
    other = copied(spoiled(inputs, value))
    z = mix(*other)[0]
    z.square().sum().backward()
    assert torch.equal(y, z)
    for mine, other_result in zip(leaves(inputs), leaves(other), strict=True):
        assert torch.equal(mine.grad, other_result.grad)
    for x, some in zip(other[0], inputs[3].flatten(1).unbind(1), strict=True):
        assert not x.grad[~some].any()


def test_a_bad_gradient_does_not_reach_what_is_not_valid():
    inputs = case(requires_grad=True)
    gate_mix(*inputs)[0].backward(torch.full((4, 3, 8), math.nan, dtype=torch.float64))
    for x, some in zip(inputs[0], inputs[3].flatten(1).unbind(1), strict=True):
        assert not x.grad[~some].any()


@MIXES
@pytest.mark.parametrize("means", [(False, False), (True, False), (False, True)])
def test_gradients(mix, means):
    inputs = case(B=3, K=2, E=3, M=2, D=3, requires_grad=True, seed=5)
    count, valid = len(inputs[0]), inputs[3]

    def flat(*tensors):
        x, (g1, g2, r, w) = tensors[:count], tensors[count:]
        return mix(x, g1, g2, valid, r, w, temperature=1.3, mean_modality=means[0], mean_expert=means[1])

    assert torch.autograd.gradcheck(flat, leaves(inputs))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_equal_those_of_the_reference_in_float64(dtype):
    inputs = case(B=6, K=2, D=40, dtype=dtype, requires_grad=True, seed=7)
    exact = copied(inputs, torch.float64)
    for mix, given in ((gate_mix, inputs), (gate_mix_reference, exact)):
        y, g2, g1 = mix(*given, temperature=0.7)
        (y.double().pow(3).sum() + (g2.double() * g1.double().amax(-1)).sum()).backward()
    for mine, reference in zip(leaves(inputs), leaves(exact), strict=True):
        assert mine.grad.dtype == dtype
        scale = 1.0 + reference.grad.abs().max().item()
        torch.testing.assert_close(mine.grad.double() / scale, reference.grad / scale, rtol=0, atol=TOLERANCE[dtype])


def test_strides_and_mixed_dtypes():
    """Views, expanded residuals and logits of another precision give what contiguous tensors do."""
    inputs = case(dtype=torch.float32)
    inputs[4] = inputs[4][:, :1].expand(-1, 3, -1)
    strided = [[x.mT.contiguous().mT for x in inputs[0]], *(t.bfloat16() for t in inputs[1:3]), *inputs[3:]]
    plain = [inputs[0], *(t.bfloat16().float() for t in inputs[1:3]), inputs[3], inputs[4].contiguous(), inputs[5]]
    strided, plain = copied(strided), copied(plain)
    for given in (strided, plain):
        gate_mix(*given)[0].square().sum().backward()
    assert torch.equal(gate_mix(*strided)[0], gate_mix(*plain)[0])
    for mine, other_result in zip(leaves(strided), leaves(plain), strict=True):
        torch.testing.assert_close(mine.grad, other_result.grad.to(mine.dtype))


def test_deterministic():
    outputs = []
    for _ in range(2):
        inputs = case(B=32, D=64, dtype=torch.float32, requires_grad=True)
        out = gate_mix(*inputs)
        sum(t.square().sum() for t in out).backward()
        outputs.append([*out, *(t.grad for t in leaves(inputs))])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_the_kernel_is_chosen_once_and_triton_refused_where_it_cannot_run(caplog):
    resolve_kernel.cache_clear()
    with caplog.at_level(logging.INFO, "trainer.kernels.gate"):
        assert resolve_kernel("auto", "cpu", 256) == "reference"
        assert resolve_kernel("auto", "cpu", 256) == "reference"
    assert caplog.messages == ["gate kernel on cpu: reference"]
    with pytest.raises(ValueError, match=r"kernel=triton cannot run: it needs a CUDA device.*Use auto"):
        gate_mix(*case(), kernel="triton")


def test_every_reason_against_triton_is_logged_once(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setitem(sys.modules, "trainer.kernels.gate_triton", None)
    resolve_kernel.cache_clear()
    for _ in range(2):
        assert resolve_kernel("auto", "cuda", 5000, 12) == "reference"
    assert len(caplog.messages) == 1
    with pytest.raises(ValueError, match=r"gate\.kernel=triton") as refused:
        resolve_kernel("triton", "cuda", 5000, 12)
    for reason in (
        "capability 8.0",
        "width of at most 4096",
        "at most 9 values",
        "C compiler",
        "Python's headers",
        "cannot be imported",
    ):
        assert reason in str(refused.value)
        assert reason in caplog.text
    resolve_kernel.cache_clear()
