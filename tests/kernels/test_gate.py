"""The gate's mix against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer.kernels.gate import gate_mix

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def case(B=4, K=3, E=3, M=3, D=8, seed=0, dtype=torch.float64, requires_grad=False):
    """Random inputs; sample 0 has everything, sample 1 nothing, the others a random part."""
    rng = np.random.default_rng(seed)
    valid = rng.random((B, E, M)) < 0.6
    valid[0] = True
    if B > 1:
        valid[1] = False
    shapes = [(B, K, E, M, D), (B, K, E, M), (B, K, E), (B, K, D), (D,)]
    x, g1, g2, r, w = (torch.tensor(rng.normal(size=s)).to(dtype).requires_grad_(requires_grad) for s in shapes)
    return [x, g1, g2, torch.tensor(valid), r, w]


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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("means", [(False, False), (True, False), (False, True), (True, True)])
def test_equals_loops(dtype, means):
    options = {"mean_modality": means[0], "mean_expert": means[1], "temperature": 0.7}
    inputs = case(dtype=dtype)
    got = gate_mix(*inputs, **options)
    assert got[0].dtype == dtype
    assert got[1].dtype == got[2].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for mine, reference in zip(got, brute_force(*inputs, **options), strict=True):
        torch.testing.assert_close(mine.double(), torch.tensor(reference), rtol=0, atol=TOLERANCE[dtype] * 3)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 1, 1, 3, 5), (3, 5, 2, 1, 7), (5, 2, 3, 2, 33)])
def test_odd_shapes(shape):
    inputs = case(*shape, seed=3)
    for mine, reference in zip(gate_mix(*inputs), brute_force(*inputs), strict=True):
        torch.testing.assert_close(mine, torch.tensor(reference), rtol=0, atol=1e-11)


def test_weights_sum_to_one_over_the_valid_and_are_exactly_zero_elsewhere():
    x, g1, g2, valid, r, w = case(B=16, dtype=torch.float32, seed=1)
    _, expert_BKE, modality_BKEM = gate_mix(x, g1 * 20, g2 * 20, valid, r, w)
    some = valid.any(-1)
    assert (modality_BKEM.masked_select(~valid[:, None].expand_as(modality_BKEM)) == 0).all()
    assert (expert_BKE.masked_select(~some[:, None].expand_as(expert_BKE)) == 0).all()
    torch.testing.assert_close(modality_BKEM.sum(-1), some[:, None].expand(-1, 3, -1).float())
    torch.testing.assert_close(expert_BKE.sum(-1), some.any(-1)[:, None].expand(-1, 3).float())


def test_extreme_logits_stay_finite():
    x, g1, g2, valid, r, w = case(dtype=torch.float32)
    out = gate_mix(x, g1 * 1e30, g2 * -1e30, valid, r, w)
    assert all(torch.isfinite(t).all() for t in out)


def test_nothing_valid_is_the_norm_of_the_residual_with_no_gradient_to_values():
    x, g1, g2, valid, r, w = case(requires_grad=True)
    valid = torch.zeros_like(valid)
    y, expert_BKE, modality_BKEM = gate_mix(x, g1, g2, valid, r, w)
    expected = r / torch.sqrt(r.square().mean(-1, keepdim=True) + 1e-6) * w
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    assert not expert_BKE.any()
    assert not modality_BKEM.any()
    (y.sum() + expert_BKE.sum() + modality_BKEM.sum()).backward()
    assert all(not t.grad.any() for t in (x, g1, g2))
    assert torch.isfinite(r.grad).all()
    assert r.grad.any()


def test_what_is_not_valid_is_not_read():
    inputs = case(dtype=torch.float32, requires_grad=True)
    valid = inputs[3]
    y = gate_mix(*inputs)[0]
    y.square().sum().backward()
    hidden = ~valid[:, None, :, :, None].expand_as(inputs[0])
    other = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        other[0].masked_fill_(hidden, math.nan)
        other[1].masked_fill_(~valid[:, None].expand_as(other[1]), math.inf)
    z = gate_mix(*other)[0]
    z.square().sum().backward()
    assert torch.equal(y, z)
    for mine, theirs in zip(inputs, other, strict=True):
        if mine.is_floating_point():
            assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("means", [(False, False), (True, False), (False, True)])
def test_gradients(means):
    x, g1, g2, valid, r, w = case(B=3, K=2, E=3, M=2, D=3, requires_grad=True, seed=5)

    def mix(x, g1, g2, r, w):
        return gate_mix(x, g1, g2, valid, r, w, temperature=1.3, mean_modality=means[0], mean_expert=means[1])

    assert torch.autograd.gradcheck(mix, (x, g1, g2, r, w))
