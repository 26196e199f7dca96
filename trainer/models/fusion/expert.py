"""What every expert is: streams in; one vector per slot and modality and their validity out.

Shapes: B samples, T time, K slots, M modalities, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trainer.config import FusionConfig, Modality
from trainer.models.fusion.encoders import EncodedModality

Streams = Mapping[Modality, EncodedModality]


class ExpertOutput(NamedTuple):
    """`values`: `[B, K, M, D]` as M tensors `[B, K, D]`, which the gate reads unstacked; `valid_BM`: which of them count.

    What is not valid holds nothing of the sample, and nothing may read it: the gate does not.
    """

    values: tuple[Tensor, ...]
    valid_BM: Tensor


def presence(streams: Streams) -> Tensor:
    """Which modalities a sample has [B, M]: those with at least one valid frame."""
    return torch.stack([stream.mask_BT.any(1) for stream in streams.values()], 1)


class _NormEach(nn.LayerNorm):
    """One LayerNorm for several tensors, none of them copied into another."""

    def forward(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(super(_NormEach, self).forward(value) for value in values)


class _Answer(nn.Module):
    """LayerNorm of an expert's vectors, so that those of all experts enter the gate at one scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _NormEach(width)

    def forward(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.norm(values)


class Expert(nn.Module, ABC):
    """One expert of the fusion network. A subclass makes its layers in :meth:`build` and its vectors in :meth:`values`;
    :func:`trainer.models.fusion.registry.register_expert` gives it the name by which configs ask for it.

    A vector is valid where the sample has its modality, and at least `least_modalities` of them; with fewer in the whole run
    the expert is not built. Every layer must run in every pass, whatever is missing: under ZeRO-3 all ranks make the same calls.
    """

    least_modalities: ClassVar[int] = 1

    def __init__(self, config: FusionConfig, modalities: Sequence[Modality]) -> None:
        super().__init__()
        if len(modalities) < self.least_modalities:
            raise ValueError(
                f"{type(self).__name__} needs at least {self.least_modalities} modalities, not {len(modalities)}"
            )
        self.modalities = tuple(modalities)
        self.slots = config.pseudo_tokens
        self.build(config, self.modalities)
        self.answer = _Answer(config.width)  # last: the order of parameters is part of checkpoints

    @abstractmethod
    def build(self, config: FusionConfig, modalities: Sequence[Modality]) -> None:
        """Make the layers for these modalities, D = `config.width` wide, for K = `config.pseudo_tokens` slots."""

    @abstractmethod
    def values(self, streams: Streams) -> Sequence[Tensor]:
        """M tensors [B, K, D], one per modality in the order of `streams`; a LayerNorm follows.

        Streams are 0 where their mask is False. Padding must change nothing, and samples must not read each other.
        """

    def forward(self, streams: Streams) -> ExpertOutput:
        values = self.values(streams)
        if len(values) != len(streams) or any(value.shape[1] != self.slots for value in values):
            shapes = ", ".join(str(list(value.shape)) for value in values)
            raise ValueError(
                f"{type(self).__name__} must give {len(streams)} tensors [B, {self.slots}, D], one per modality, not: {shapes}"
            )
        present_BM = presence(streams)
        enough_B1 = present_BM.sum(1, keepdim=True) >= self.least_modalities
        return ExpertOutput(self.answer(values), present_BM & enough_B1)
