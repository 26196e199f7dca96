"""The hierarchical mix of the gate: two masked softmaxes, two weighted sums, a residual and an RMSNorm, in one function.

Shapes: B samples, K slots, E experts, M modalities, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gate_mix(
    values_BKEMD: Tensor,
    modality_logits_BKEM: Tensor,
    expert_logits_BKE: Tensor,
    valid_BEM: Tensor,
    residual_BKD: Tensor,
    weight_D: Tensor,
    *,
    temperature: float = 1.0,
    eps: float = 1e-6,
    mean_modality: bool = False,
    mean_expert: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix the experts' values into one vector per slot.

    With g1 = softmax over the valid modalities inside each expert, g2 = softmax over the experts that have one, both of
    logits / temperature:

        s_BKD = sum_e g2_BKe sum_m g1_BKem x_BKemD + r_BKD
        y_BKD = s / sqrt(mean_D(s^2) + eps) * weight_D

    What is not valid has weight exactly 0, and its values are not read: nan there changes nothing. Where nothing is
    valid every weight is 0 and y = RMSNorm(r). A level under `mean_*` has equal weights over the valid instead of the
    softmax, and its logits are not read.

    This is the plain reference. It computes in float32 (float64 for float64 values); gradients come from autograd.

    Returns:
        y in the dtype of the values, g2 [B, K, E] and g1 [B, K, E, M] in the dtype of the computation.
    """
    dtype = values_BKEMD.dtype
    accumulate = torch.promote_types(dtype, torch.float32)
    valid_B1EM = valid_BEM.unsqueeze(1)
    modality_BKEM = _weights(modality_logits_BKEM.to(accumulate), valid_B1EM, temperature, mean_modality)
    expert_BKE = _weights(expert_logits_BKE.to(accumulate), valid_B1EM.any(-1), temperature, mean_expert)
    weight_BKEM = expert_BKE.unsqueeze(-1) * modality_BKEM
    values_BKEMD = values_BKEMD.to(accumulate).masked_fill(~valid_B1EM.unsqueeze(-1), 0.0)
    mixed_BKD = (weight_BKEM.flatten(2).unsqueeze(-2) @ values_BKEMD.flatten(2, 3)).squeeze(-2)
    mixed_BKD = mixed_BKD + residual_BKD.to(accumulate)
    scale_BK1 = torch.rsqrt(mixed_BKD.square().mean(-1, keepdim=True) + eps)
    return (mixed_BKD * scale_BK1 * weight_D.to(accumulate)).to(dtype), expert_BKE, modality_BKEM


def _weights(logits: Tensor, valid: Tensor, temperature: float, mean: bool) -> Tensor:
    """Weights over the last dimension: exactly 0 where not valid, all 0 where nothing is."""
    valid = valid.expand(logits.shape)
    if mean:
        chosen = valid.to(logits.dtype)
        return chosen / chosen.sum(-1, keepdim=True).clamp_min(1.0)
    # the lowest finite number instead of -inf: a row with nothing valid stays finite, and so do its gradients
    logits = (logits / temperature).masked_fill(~valid, torch.finfo(logits.dtype).min)
    return logits.softmax(-1) * valid
