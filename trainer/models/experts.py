"""The three experts: each turns the streams into one vector per slot and modality.

An expert answers values [B, K, M, D] and validity [B, M]; values that are not valid are 0. Modalities stand in the order
in which the expert was built.

Shapes: B samples, T time, K slots, M modalities, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.config import FusionConfig, Modality
from trainer.models.encoders import Stream
from trainer.models.masked import (
    SlotPooling,
    masked_attention,
    masked_logsumexp,
    masked_max,
    masked_window_mean,
)

Streams = Mapping[Modality, Stream]
SHARPNESS = 4.0  # of log-sum-exp pooling


def presence(streams: Streams) -> Tensor:
    """Which modalities a sample has [B, M]: those with at least one valid frame."""
    return torch.stack([stream.mask_BT.any(1) for stream in streams.values()], 1)


class _Answer(nn.Module):
    """LayerNorm of an expert's vectors, so that those of all experts enter the gate at one scale; 0 where not valid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, values: Sequence[Tensor], valid_BM: Tensor) -> tuple[Tensor, Tensor]:
        values_BKMD = self.norm(torch.stack(list(values), 2))
        return values_BKMD.masked_fill(~valid_BM[:, None, :, None], 0.0), valid_BM


class _LocalStream(nn.Module):
    """Multi-scale depthwise-separable convolution, then the peaks over time per slot."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.width
        self.pooling = config.local_pooling
        self.slots = config.pseudo_tokens
        self.depthwise = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
            for kernel in config.local_kernels
        )
        self.pointwise = nn.Linear(width * len(config.local_kernels), width)
        self.slot = nn.Linear(width, width * config.pseudo_tokens)

    def forward(self, stream: Stream) -> Tensor:
        stream_BDT = stream.values_BTD.transpose(1, 2).contiguous()
        scales_BnT = torch.cat([convolve(stream_BDT) for convolve in self.depthwise], 1)
        hidden_BTD = nn.functional.gelu(self.pointwise(scales_BnT.transpose(1, 2)))
        wide_BTn = self.slot(hidden_BTD)
        if self.pooling == "max":
            pooled_Bn = masked_max(wide_BTn, stream.mask_BT)
        else:
            pooled_Bn = masked_logsumexp(wide_BTn, stream.mask_BT, SHARPNESS)
        return pooled_Bn.unflatten(-1, (self.slots, -1))


class LocalExpert(nn.Module):
    """Narrow receptive field, fine time resolution, one modality at a time.

    Of a stream x, for every kernel k of the config: c_k = depthwise_k(x); h = GELU(W [c_3; c_5; c_7]);
    y_slot = pool_t(V_slot h_t), with the maximum or log-sum-exp over the valid frames as pool: peaks survive, where a
    mean would drown a burst of few frames. Masked frames are 0 and act like the zero padding at the ends.
    """

    def __init__(self, config: FusionConfig, modalities: Sequence[Modality]) -> None:
        super().__init__()
        self.streams = nn.ModuleDict({modality: _LocalStream(config) for modality in modalities})
        self.answer = _Answer(config.width)

    def forward(self, streams: Streams) -> tuple[Tensor, Tensor]:
        return self.answer([self.streams[m](stream) for m, stream in streams.items()], presence(streams))


class _SemanticStream(nn.Module):
    """What one modality contributes: queries to the others, keys and values for them."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.width
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(stream.values_BTD).chunk(3, -1)
        return query, key, value


class _SemanticAnswer(nn.Module):
    """Joins what a modality's frames asked and what they were answered, and pools it per slot."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.width
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(2 * width)
        self.up = nn.Linear(2 * width, width)
        self.pool = SlotPooling(width, config.pseudo_tokens, config.heads)

    def forward(self, stream: Stream, heard_BTD: Tensor) -> Tensor:
        heard_BTD = self.out(heard_BTD)
        joint_BTn = self.norm(torch.cat([stream.values_BTD, heard_BTD], -1))
        return self.pool(heard_BTD + nn.functional.gelu(self.up(joint_BTn)), stream.mask_BT)


class SemanticExpert(nn.Module):
    """Cross-modal attention only: the frames of each modality query those of every other one.

    For modality m, over the others o that are present, every pair with its own softmax:
    a_m = W_m sum_o attend(Q_m x_m, K_o x_o, V_o x_o); h_m = a_m + GELU(U_m LayerNorm([x_m; a_m])); then attention
    pooling of h_m per slot. There is no self-attention, and no position beyond that of the encoders. Not valid where
    the modality itself, or every other one, is missing.
    """

    def __init__(self, config: FusionConfig, modalities: Sequence[Modality]) -> None:
        super().__init__()
        if len(modalities) < 2:
            raise ValueError("the semantic expert relates modalities: it needs at least two of them")
        self.heads = config.heads
        self.ask = nn.ModuleDict({modality: _SemanticStream(config) for modality in modalities})
        self.join = nn.ModuleDict({modality: _SemanticAnswer(config) for modality in modalities})
        self.answer = _Answer(config.width)

    def forward(self, streams: Streams) -> tuple[Tensor, Tensor]:
        asked = {m: self.ask[m](stream) for m, stream in streams.items()}
        values = []
        for m, stream in streams.items():
            heard = [
                masked_attention(asked[m][0], asked[o][1], asked[o][2], streams[o].mask_BT, self.heads)
                for o in streams
                if o != m
            ]
            values.append(self.join[m](stream, torch.stack(heard).sum(0)))
        present_BM = presence(streams)
        return self.answer(values, present_BM & (present_BM.sum(1, keepdim=True) > 1))


class _GlobalBlock(nn.Module):
    """A pre-norm transformer layer: x + attend(LN(x)), then x + FFN(LN(x))."""

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
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, joined_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        query, key, value = self.qkv(self.attention_norm(joined_BTD)).chunk(3, -1)
        joined_BTD = joined_BTD + self.dropout(self.out(masked_attention(query, key, value, mask_BT, self.heads)))
        hidden_BTn = nn.functional.gelu(self.up(self.norm(joined_BTD)))
        return joined_BTD + self.dropout(self.down(hidden_BTn))


class _Tag(nn.Module):
    """Adds a modality's learned vector to its stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector_D = nn.Parameter(torch.randn(width) * 0.5)

    def forward(self, values_BTD: Tensor) -> Tensor:
        return values_BTD + self.vector_D


class GlobalExpert(nn.Module):
    """Wide receptive field, coarse time resolution: all modalities together.

    Every stream is cut into windows of `global_stride` frames, averaged over their valid frames, and marked with its
    modality's vector; a pre-norm transformer of `global_layers` layers runs over the joined windows; attention pooling
    per slot reads the windows of each modality apart. It knows nothing of earlier utterances: history is in the prompt.
    """

    def __init__(self, config: FusionConfig, modalities: Sequence[Modality]) -> None:
        super().__init__()
        self.stride = config.global_stride
        self.tag = nn.ModuleDict({modality: _Tag(config.width) for modality in modalities})
        self.blocks = nn.ModuleList(_GlobalBlock(config) for _ in range(config.global_layers))
        self.norm = nn.LayerNorm(config.width)
        self.pool = nn.ModuleDict(
            {modality: SlotPooling(config.width, config.pseudo_tokens, config.heads) for modality in modalities}
        )
        self.answer = _Answer(config.width)

    def forward(self, streams: Streams) -> tuple[Tensor, Tensor]:
        windows = [masked_window_mean(s.values_BTD, s.mask_BT, self.stride) for s in streams.values()]
        joined_BTD = torch.cat([self.tag[m](values) for m, (values, _) in zip(streams, windows, strict=True)], 1)
        mask_BT = torch.cat([mask for _, mask in windows], 1)
        for block in self.blocks:
            joined_BTD = block(joined_BTD, mask_BT)
        parts = self.norm(joined_BTD).split([mask.shape[1] for _, mask in windows], 1)
        pooled = [self.pool[m](part, mask) for m, part, (_, mask) in zip(streams, parts, windows, strict=True)]
        return self.answer(pooled, presence(streams))
