"""The three experts that are built in.

Shapes: B samples, T time, K slots, M modalities, D width, N valid frames of all samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu

from trainer.config import FusionConfig, Modality
from trainer.models.fusion.dropout import Dropout
from trainer.models.fusion.encoders import EncodedModality
from trainer.models.fusion.expert import Expert, Streams
from trainer.models.fusion.masked import (
    SlotAttention,
    SlotLinear,
    masked_attention,
    masked_scaled_logsumexp,
    masked_scaled_max,
    masked_window_mean,
    pool,
    pool_each,
)
from trainer.models.fusion.registry import register_expert
from trainer.models.fusion.valid_rows import ValidRows

NEARNESS = 3.0  # score of two equal moments before training
SHARPNESS = 4.0  # of log-sum-exp pooling


class DepthwiseConv(nn.Conv1d):
    """A convolution of every channel by itself, [B, D, T] to [B, D, T], in whichever of both layouts the memory is.

    As a two-dimensional one of height 1: CPUs then have fast kernels for channels that lie side by side, so frames need no transposition.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, width, kernel, padding=kernel // 2, groups=width, bias=False)

    def forward(self, values_BDT: Tensor) -> Tensor:
        values_BD1T, weight_D11k = values_BDT.unsqueeze(2), self.weight.unsqueeze(2)
        padding = (0, self.kernel_size[0] // 2)
        return conv2d(values_BD1T, weight_D11k, padding=padding, groups=self.groups).squeeze(2)


class _LocalStream(nn.Module):
    """Multi-scale depthwise-separable convolution, then the peaks over time per slot."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.width
        self.pooling = config.local_pooling
        self.depthwise = nn.ModuleList(DepthwiseConv(width, kernel) for kernel in config.local_kernels)
        self.pointwise = nn.Linear(width * len(config.local_kernels), width)
        self.detect = nn.Linear(width, width)
        self.slot_KD = nn.Parameter(torch.randn(config.pseudo_tokens, width))
        self.out = nn.Linear(width, width)

    def forward(self, stream: EncodedModality) -> Tensor:
        stream_BDT = stream.content_BTD.transpose(1, 2)
        if stream_BDT.device.type != "cpu":
            stream_BDT = stream_BDT.contiguous()
        scales_BTn = torch.cat([convolve(stream_BDT).transpose(1, 2) for convolve in self.depthwise], -1)
        rows = ValidRows(stream.mask_BT)
        found_BTD = rows.pad(self.detect(gelu(self.pointwise(rows.pack(scales_BTn)))))
        if self.pooling == "max":
            peak_BKD = masked_scaled_max(found_BTD, stream.mask_BT, self.slot_KD)
        else:
            peak_BKD = masked_scaled_logsumexp(found_BTD, stream.mask_BT, self.slot_KD, SHARPNESS)
        return self.out(gelu(peak_BKD))


@register_expert("local")
class LocalExpert(Expert):
    """Narrow receptive field, fine time resolution, one modality at a time.

    Of a stream's contents x, for every kernel k of the config: c_k = depthwise_k(x); h = V GELU(W [c_3; c_5; c_7]); and per slot
    y = U GELU(pool_t(s_slot * h_t)), with the maximum or log-sum-exp over the valid frames as pool: peaks survive, where
    a mean would drown a burst of few frames. s scales each channel per slot, and its sign chooses between peak and
    trough. Masked frames are 0 and act like the zero padding at the ends.

    Positions are left out: with them the peaks also say when something was, which is the global expert's task; this
    expert then takes over the long-range evidence, and all is learned later (measured, docs/method.md).
    """

    def build(self, config: FusionConfig, modalities: Sequence[Modality]) -> None:
        self.streams = nn.ModuleDict({modality: _LocalStream(config) for modality in modalities})

    def values(self, streams: Streams) -> Sequence[Tensor]:
        return [self.streams[m](stream) for m, stream in streams.items()]


class SlotQuery(nn.Module):
    """One question per slot and head of a modality: what its pooled frames hold and, if `timed`, when they are."""

    def __init__(self, config: FusionConfig, timed: bool) -> None:
        super().__init__()
        self.attention = SlotAttention(config.width, config.pseudo_tokens, config.heads)
        self.norm = nn.LayerNorm(config.width)
        self.content = SlotLinear(config.pseudo_tokens, config.width)
        self.timed = timed
        if timed:
            waves = (config.width + 1) // 2
            self.near_hKn = nn.Parameter(torch.full((config.heads, config.pseudo_tokens, waves), NEARNESS / waves))

    def forward(self, stream: EncodedModality) -> tuple[Tensor, Tensor | None]:
        weight_BhKT = self.attention(stream.content_BTD, stream.mask_BT)
        query_BKD = self.content(self.norm(pool(weight_BhKT, stream.content_BTD)))
        if not self.timed:
            return query_BKD, None
        when_BhKD = pool_each(weight_BhKT, stream.position_BTD)
        return query_BKD, when_BhKD * torch.cat([self.near_hKn, self.near_hKn], -1)[..., : when_BhKD.shape[-1]]


class FoldedCrossAttention(nn.Linear):
    """Multi-head attention of few queries to many frames: keys and values, the two halves of the layer, are never made.

        q . (K x_s) = (K^T q) . x_s,    sum_s a_s (V x_s + b) = V (sum_s a_s x_s) + b

    A bias of keys is the same for all frames and falls out of the softmax. A frame costs 2 h Q D multiplications and not
    2 D^2. The softmax is computed in float32.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, 2 * width)
        self.heads = heads

    def forward(  # type: ignore[override]
        self, query_BQD: Tensor, frames_BTD: Tensor, mask_BT: Tensor, bias_BhQT: Tensor | None
    ) -> Tensor:
        """What each query attends to [B, Q, D]; 0 for a sample without a valid frame. `bias` is added to the scores."""
        key_hdD, value_hdD = (half.unflatten(0, (self.heads, -1)) for half in self.weight.chunk(2))
        query_BQhd = query_BQD.unflatten(-1, (self.heads, -1)) / math.sqrt(key_hdD.shape[1])
        folded_BhQD = torch.einsum("bqhd,hdn->bhqn", query_BQhd, key_hdD)
        score_BhQT = (folded_BhQD.flatten(1, 2) @ frames_BTD.transpose(1, 2)).unflatten(1, folded_BhQD.shape[1:3])
        score_BhQT = score_BhQT.to(torch.promote_types(score_BhQT.dtype, torch.float32))
        if bias_BhQT is not None:
            score_BhQT = score_BhQT + bias_BhQT
        seen_B11T = mask_BT[:, None, None]
        score_BhQT = score_BhQT.masked_fill(~seen_B11T, torch.finfo(score_BhQT.dtype).min)
        weight_BhQT = (score_BhQT.softmax(-1) * seen_B11T).to(frames_BTD.dtype)
        pooled_BhQD = pool_each(weight_BhQT, frames_BTD)
        attended_BQD = torch.einsum("bhqn,hdn->bqhd", pooled_BhQD, value_hdD).flatten(2)
        return attended_BQD + self.bias.chunk(2)[1] * mask_BT.any(1)[:, None, None]


@register_expert("semantic")
class SemanticExpert(Expert):
    """Cross-modal attention only: every slot of each modality queries the frames of every other one.

    For modality m, attention pooling a of its contents gives one query per slot k (and head, not written); it is put to
    the others o that are present, every pair with its own softmax:

        q_mk = Q_k LayerNorm(sum_t a_kt content_mt)
        score_kos = q_mk . K_o content_os / sqrt(d) + sum_i n_ki sum_t a_kt cos(2 pi (time_mt - time_os) / lambda_i)
        y_mk = W_m sum_o sum_s softmax_s(score_kos) V_o content_os

    Content relates to content, and moment to moment through the products of the encoders' positions, which know
    distances in time only; text has no clock, so pairs with text have no such term. The answer holds nothing of m
    but what m asked for. No self-attention. Not valid where the modality itself, or every other one, is missing.

    Queries are pooled first, and positions kept out of content: planted relations are learned sooner so than with one
    query per frame, which costs about twice as much, or with positions added (measured, docs/method.md).
    """

    least_modalities = 2

    def build(self, config: FusionConfig, modalities: Sequence[Modality]) -> None:
        self.heads = config.heads
        self.timed = [m for m in modalities if m != "text"] if {"audio", "video"} <= set(modalities) else []
        self.ask = nn.ModuleDict({modality: SlotQuery(config, modality in self.timed) for modality in modalities})
        self.source = nn.ModuleDict(
            {modality: FoldedCrossAttention(config.width, config.heads) for modality in modalities}
        )
        self.out = nn.ModuleDict({modality: nn.Linear(config.width, config.width) for modality in modalities})

    def values(self, streams: Streams) -> Sequence[Tensor]:
        queries = {m: self.ask[m](stream) for m, stream in streams.items()}
        attended: dict[str, list[Tensor]] = {m: [] for m in streams}
        for o, stream in streams.items():  # all queries to a modality in one call
            others = [m for m in streams if m != o]
            query_BQD = torch.cat([queries[m][0] for m in others], 1)
            answers = self.source[o](
                query_BQD, stream.content_BTD, stream.mask_BT, self._nearness(queries, others, o, stream)
            )
            for m, answer_BKD in zip(others, answers.chunk(len(others), 1), strict=True):
                attended[m].append(answer_BKD)
        return [self.out[m](torch.stack(attended[m]).sum(0)) for m in streams]

    def _nearness(
        self,
        queries: Mapping[Any, tuple[Tensor, Tensor | None]],
        sources: Sequence[Any],
        target: str,
        stream: EncodedModality,
    ) -> Tensor | None:
        """How near in time the moment of each query is to the frames of `target`; 0 for one without a clock."""
        if target not in self.timed or not any(m in self.timed for m in sources):
            return None
        parts = []
        for m in sources:
            query_BKD, when_BhKD = queries[m]
            if when_BhKD is None:
                when_BhKD = query_BKD.new_zeros(query_BKD.shape[0], self.heads, *query_BKD.shape[1:])
            parts.append(when_BhKD)
        when_BhQD = torch.cat(parts, 2)
        return (when_BhQD.flatten(1, 2) @ stream.position_BTD.transpose(1, 2)).unflatten(1, when_BhQD.shape[1:3])


class _GlobalBlock(nn.Module):
    """A pre-norm transformer layer over the valid windows: x + attend(LN(x)), then x + FFN(LN(x))."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = Dropout(config.dropout)

    def forward(self, joined_ND: Tensor, mask_BT: Tensor, rows: ValidRows) -> Tensor:
        query, key, value = rows.pad(self.qkv(self.attention_norm(joined_ND))).chunk(3, -1)
        attended_BTD = masked_attention(query, key, value, mask_BT, self.heads)
        joined_ND = joined_ND + self.dropout(self.out(rows.pack(attended_BTD)))
        hidden_Nn = gelu(self.up(self.norm(joined_ND)))
        return joined_ND + self.dropout(self.down(hidden_Nn))


class ModalityEmbedding(nn.Module):
    """Adds a modality's learned vector to its stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector_D = nn.Parameter(torch.randn(width) * 0.5)

    def forward(self, values_BTD: Tensor) -> Tensor:
        return values_BTD + self.vector_D


class SlotPooling(nn.Module):
    """Attention pooling of one modality's windows, per slot."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.attention = SlotAttention(config.width, config.pseudo_tokens, config.heads)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, values_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        return self.out(pool(self.attention(values_BTD, mask_BT), values_BTD))


@register_expert("global")
class GlobalExpert(Expert):
    """Wide receptive field, coarse time resolution: all modalities together.

    Every stream is cut into windows of `global_stride` frames, averaged over their valid frames, and marked with its
    modality's vector; a pre-norm transformer of `global_layers` layers runs over the joined windows; attention pooling
    per slot reads the windows of each modality apart. It knows nothing of earlier utterances: history is in the prompt.
    """

    def build(self, config: FusionConfig, modalities: Sequence[Modality]) -> None:
        self.stride = config.global_stride
        self.tag = nn.ModuleDict({modality: ModalityEmbedding(config.width) for modality in modalities})
        self.blocks = nn.ModuleList(_GlobalBlock(config) for _ in range(config.global_layers))
        self.norm = nn.LayerNorm(config.width)
        self.read = nn.ModuleDict({modality: SlotPooling(config) for modality in modalities})

    def values(self, streams: Streams) -> Sequence[Tensor]:
        windows = [masked_window_mean(s.values_BTD, s.mask_BT, self.stride) for s in streams.values()]
        joined_BTD = torch.cat([self.tag[m](values) for m, (values, _) in zip(streams, windows, strict=True)], 1)
        mask_BT = torch.cat([mask for _, mask in windows], 1)
        rows = ValidRows(mask_BT)
        joined_ND = rows.pack(joined_BTD)
        for block in self.blocks:
            joined_ND = block(joined_ND, mask_BT, rows)
        parts = rows.pad(self.norm(joined_ND)).split([mask.shape[1] for _, mask in windows], 1)
        return [self.read[m](part, mask) for m, part, (_, mask) in zip(streams, parts, windows, strict=True)]
