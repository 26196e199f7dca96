"""Attention and pooling over the valid frames alone.

What stands under a mask of False changes nothing, and where nothing is valid the result is 0 with gradients of 0, never
nan. Callers pass finite values there; the encoders make them 0.

Shapes: B samples, T time, Q queries, D width, h heads, d width of a head, K slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def masked_mean(values_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean over the valid frames [B, D]."""
    total_BD = values_BTD.masked_fill(~mask_BT.unsqueeze(-1), 0.0).sum(1)
    return total_BD / mask_BT.sum(1, keepdim=True).clamp_min(1).to(total_BD.dtype)


def masked_max(values_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The largest of the valid frames, per channel [B, D]."""
    lowest = torch.finfo(values_BTD.dtype).min
    peak_BD = values_BTD.masked_fill(~mask_BT.unsqueeze(-1), lowest).amax(1)
    return peak_BD.masked_fill(~mask_BT.any(1, keepdim=True), 0.0)


def masked_logsumexp(values_BTD: Tensor, mask_BT: Tensor, sharpness: float) -> Tensor:
    """A smooth maximum of the valid frames, per channel [B, D].

        log(mean_t exp(sharpness x_t)) / sharpness

    between the mean (sharpness to 0) and the maximum (to infinity), independent of padding and of repetition. Computed
    in float32 at least. Source: Pinheiro and Collobert 2015, equation 6.
    """
    wide_BTD = values_BTD.to(torch.promote_types(values_BTD.dtype, torch.float32)) * sharpness
    wide_BTD = wide_BTD.masked_fill(~mask_BT.unsqueeze(-1), torch.finfo(wide_BTD.dtype).min)
    count_B1 = mask_BT.sum(1, keepdim=True).clamp_min(1).to(wide_BTD.dtype)
    pooled_BD = (wide_BTD.logsumexp(1) - count_B1.log()) / sharpness
    return pooled_BD.masked_fill(~mask_BT.any(1, keepdim=True), 0.0).to(values_BTD.dtype)


def masked_window_mean(values_BTD: Tensor, mask_BT: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The mean over the valid frames of each window of `stride` frames, and which windows have one.

    Windows start at the first frame, so padding on the right only adds windows that are not valid.

    Returns:
        [B, ceil(T / stride), D] and its mask.
    """
    short = -values_BTD.shape[1] % stride
    values_BTD = F.pad(values_BTD.masked_fill(~mask_BT.unsqueeze(-1), 0.0), (0, 0, 0, short))
    count_BT = F.pad(mask_BT, (0, short)).unflatten(1, (-1, stride)).sum(2)
    total_BTD = values_BTD.unflatten(1, (-1, stride)).sum(2)
    return total_BTD / count_BT.clamp_min(1).unsqueeze(-1).to(total_BTD.dtype), count_BT > 0


def masked_attention(query_BQD: Tensor, key_BTD: Tensor, value_BTD: Tensor, mask_BT: Tensor, heads: int) -> Tensor:
    """Multi-head scaled dot-product attention to the valid keys; 0 for a sample that has none.

    A row without a valid key attends to all of them and is then set to 0: attention kernels disagree on such rows, and
    some give nan gradients.
    """
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query_BQD, key_BTD, value_BTD))
    some_B1 = mask_BT.any(1, keepdim=True)
    allowed_B11T = (mask_BT | ~some_B1)[:, None, None, :]
    out_BhQd = F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed_B11T.expand(-1, -1, query_BQD.shape[1], -1)
    )
    return out_BhQd.transpose(1, 2).flatten(2).masked_fill(~some_B1.unsqueeze(-1), 0.0)


class SlotPooling(nn.Module):
    """Attention pooling with one learned query per slot and head.

        a_kht = softmax_t(w_kh . x_t + b_kh) over the valid t,   y_k = W concat_h(sum_t a_kht x_t[head h])

    The rows of the `score` layer are the queries (a key projection would fold into them). Weights in float32.
    """

    def __init__(self, width: int, slots: int, heads: int) -> None:
        super().__init__()
        self.slots, self.heads = slots, heads
        self.score = nn.Linear(width, slots * heads)
        self.out = nn.Linear(width, width)

    def forward(self, values_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        score_BTn = self.score(values_BTD)
        score_BTn = score_BTn.to(torch.promote_types(score_BTn.dtype, torch.float32))
        score_BTn = score_BTn.masked_fill(~mask_BT.unsqueeze(-1), torch.finfo(score_BTn.dtype).min)
        weight_BTn = (score_BTn.softmax(1) * mask_BT.unsqueeze(-1)).to(values_BTD.dtype)
        weight_BhKT = weight_BTn.unflatten(-1, (self.slots, self.heads)).permute(0, 3, 2, 1)
        value_BhTd = values_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out((weight_BhKT @ value_BhTd).transpose(1, 2).flatten(2))
