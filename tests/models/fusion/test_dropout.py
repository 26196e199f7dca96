"""Dropout whose random numbers are drawn four at a time, against what dropout is by definition; rows without padding against indexing."""

from __future__ import annotations

import pytest
import torch

from tests.models.fusion.fusion_cases import lengths_mask
from trainer.models.fusion.dropout import Dropout
from trainer.models.fusion.valid_rows import ValidRows


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_elements_are_dropped_independently_with_probability_p(p):
    torch.manual_seed(0)
    n = 400_002  # no multiple of four
    out = Dropout(p)(torch.ones(n))
    kept = out > 0
    deviation = (p * (1 - p) / n) ** 0.5
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * deviation)
    torch.testing.assert_close(out[kept], torch.full((int(kept.sum()),), 1 / (1 - p)), rtol=1e-3, atol=0)
    for lag in (1, 2, 3, 4):  # those that share a random number too
        both = (kept[lag:] & kept[:-lag]).float().mean().item()
        assert both == pytest.approx((1 - p) ** 2, abs=10 * deviation)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_pass_where_values_do(dtype):
    values = torch.randn(3, 7, 5).to(dtype).requires_grad_()
    torch.manual_seed(1)
    out = Dropout(0.3)(values)
    assert out.dtype == dtype
    (gradient,) = torch.autograd.grad(out.sum(), values)
    torch.testing.assert_close(out, values * gradient)
    assert gradient.unique().numel() == 2


def test_draws_follow_the_generator_and_evaluation_draws_nothing():
    net, values = Dropout(0.5), torch.randn(50)
    one, two, other = (torch.manual_seed(seed) and net(values) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    before = torch.get_rng_state()
    assert net.eval()(values) is values
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("lengths", [[4, 2, 0], [4, 4, 4], [0, 0, 0]])
def test_rows_are_the_valid_frames_in_order(lengths):
    mask, values = lengths_mask(lengths, 4), torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    rows = ValidRows(mask)
    packed = rows.pack(values)
    torch.testing.assert_close(packed, values[mask], rtol=0, atol=0)
    back = rows.pad(packed * 2)
    torch.testing.assert_close(back, torch.where(mask[..., None], 2 * values, 0.0), rtol=0, atol=0)
    weight = torch.randn_like(values)
    (gradient,) = torch.autograd.grad((back * weight).sum(), values)
    torch.testing.assert_close(gradient, torch.where(mask[..., None], 2 * weight, 0.0), rtol=0, atol=0)
