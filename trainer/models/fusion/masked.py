"""Attention and pooling over the valid frames only.

Values under a mask of False change nothing, and where nothing is valid the result is 0 with gradients of 0, never
nan. Callers pass finite values there; the encoders make them 0.

Shapes: B samples, T time, Q queries, D width, h heads, d width of a head, K slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def masked_mean(values_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean over the valid frames [B, D]."""
    total_B1D = mask_BT.unsqueeze(1).to(values_BTD.dtype) @ values_BTD
    return total_B1D.squeeze(1) / mask_BT.sum(1, keepdim=True).clamp_min(1).to(values_BTD.dtype)


def masked_scaled_max(values_BTD: Tensor, mask_BT: Tensor, scale_KD: Tensor) -> Tensor:
    """max_t(scale_kd x_td) over the valid frames [B, K, D]; a negative scale reads the lowest value.

    The gradient goes to one of the frames that hold the extreme.
    """
    away_BT1 = (~mask_BT.unsqueeze(-1)).to(values_BTD.dtype) * torch.finfo(values_BTD.dtype).max
    high_BTD, low_BTD = values_BTD - away_BT1, values_BTD + away_BT1
    if values_BTD.requires_grad:  # with indices: amax is faster, but its gradient compares all frames again
        high_B1D, low_B1D = high_BTD.max(1, keepdim=True).values, low_BTD.min(1, keepdim=True).values
    else:
        high_B1D, low_B1D = high_BTD.amax(1, keepdim=True), low_BTD.amin(1, keepdim=True)
    peak_BKD = torch.where(scale_KD > 0, high_B1D, low_B1D)
    return peak_BKD.masked_fill(~mask_BT.any(1)[:, None, None], 0.0) * scale_KD


def masked_scaled_logsumexp(values_BTD: Tensor, mask_BT: Tensor, scale_KD: Tensor, sharpness: float) -> Tensor:
    """A smooth maximum of scale_kd x_td over the valid frames [B, K, D].

        log(mean_t exp(sharpness scale_kd x_td)) / sharpness

    between the mean (sharpness to 0) and the maximum (to infinity), independent of padding. Computed in float32 at least.
    Source: Pinheiro and Collobert 2015, equation 6.
    """
    wide = torch.promote_types(values_BTD.dtype, torch.float32)
    scaled_BTKD = values_BTD.to(wide).unsqueeze(2) * (sharpness * scale_KD.to(wide))
    scaled_BTKD = scaled_BTKD.masked_fill(~mask_BT[:, :, None, None], torch.finfo(wide).min)
    count_B11 = mask_BT.sum(1)[:, None, None].clamp_min(1).to(wide)
    pooled_BKD = (scaled_BTKD.logsumexp(1) - count_B11.log()) / sharpness
    return pooled_BKD.masked_fill(~mask_BT.any(1)[:, None, None], 0.0).to(values_BTD.dtype)


def masked_window_mean(values_BTD: Tensor, mask_BT: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The mean over the valid frames of each window of `stride` frames, and which windows have one.

    Windows start at the first frame, so padding on the right only adds windows that are not valid.

    Returns:
        [B, ceil(T / stride), D] and its mask.
    """
    short = -values_BTD.shape[1] % stride
    values_BTD = values_BTD * mask_BT.unsqueeze(-1)
    if short:
        values_BTD, mask_BT = F.pad(values_BTD, (0, 0, 0, short)), F.pad(mask_BT, (0, short))
    count_BT = mask_BT.unflatten(1, (-1, stride)).sum(2)
    total_BTD = values_BTD.unflatten(1, (-1, stride)).sum(2)
    return total_BTD / count_BT.clamp_min(1).unsqueeze(-1).to(total_BTD.dtype), count_BT > 0


def masked_attention(query_BQD: Tensor, key_BTD: Tensor, value_BTD: Tensor, mask_BT: Tensor, heads: int) -> Tensor:
    """Multi-head scaled dot-product attention to the valid keys; 0 for a sample that has none.

    A row without a valid key attends to all of them and is then set to 0: attention kernels disagree on such rows, and
    some give nan gradients.
    """
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query_BQD, key_BTD, value_BTD))
    some_B1 = mask_BT.any(1, keepdim=True)
    allowed = (mask_BT | ~some_B1)[:, None, None, :]
    out_BhQd = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return out_BhQd.transpose(1, 2).flatten(2).masked_fill(~some_B1.unsqueeze(-1), 0.0)


class SlotAttention(nn.Module):
    """Attention weights over time with one learned query per slot and head.

        a_kht = softmax_t(w_kh . x_t + b_kh) over the valid t

    The rows of the `score` layer are the queries; a key projection would fold into them. Weights in float32.
    """

    def __init__(self, width: int, slots: int, heads: int) -> None:
        super().__init__()
        self.slots, self.heads = slots, heads
        self.score = nn.Linear(width, slots * heads)

    def forward(self, values_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        score_BTn = self.score(values_BTD)
        score_BTn = score_BTn.to(torch.promote_types(score_BTn.dtype, torch.float32))
        score_BTn = score_BTn.masked_fill(~mask_BT.unsqueeze(-1), torch.finfo(score_BTn.dtype).min)
        weight_BTn = (score_BTn.softmax(1) * mask_BT.unsqueeze(-1)).to(values_BTD.dtype)
        return weight_BTn.unflatten(-1, (self.slots, self.heads)).permute(0, 3, 2, 1)


def pool(weight_BhKT: Tensor, values_BTD: Tensor) -> Tensor:
    """The weighted sums over time [B, K, D]: head h pools its own share of the channels."""
    heads = weight_BhKT.shape[1]
    every_BhKhd = pool_each(weight_BhKT, values_BTD).unflatten(-1, (heads, -1))
    return every_BhKhd.diagonal(dim1=1, dim2=3).transpose(2, 3).flatten(2)


def pool_each(weight_BhKT: Tensor, values_BTD: Tensor) -> Tensor:
    """The weighted sums over time of all channels [B, h, K, D], for every head; no copy of the frames is made."""
    return (weight_BhKT.flatten(1, 2) @ values_BTD).unflatten(1, weight_BhKT.shape[1:3])


class SlotLinear(nn.Module):
    """A linear layer of its own for every slot: y_k = x_k W_k + b_k; W of variance 1/D."""

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        self.weight_KDD = nn.Parameter(torch.randn(slots, width, width) / width**0.5)
        self.bias_KD = nn.Parameter(torch.zeros(slots, width))

    def forward(self, values_BKD: Tensor) -> Tensor:
        return torch.baddbmm(self.bias_KD.unsqueeze(1), values_BKD.transpose(0, 1), self.weight_KDD).transpose(0, 1)
