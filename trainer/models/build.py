"""A run's whole model from its config and a backbone, with weights or of shapes only (meta tensors)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from trainer.batch import Standardisation
from trainer.config import FusionConfig
from trainer.models.backbone.causal_lm import Backbone
from trainer.models.egmf import EGMF
from trainer.models.fusion.network import Fusion
from trainer.models.ranks import Ranks


def build_model(
    config: FusionConfig,
    backbone: Backbone,
    widths: Mapping[str, Mapping[str, int]],
    answers: Mapping[str, int] | None,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks | None = None,
    statistics: Mapping[str, Mapping[str, Standardisation]] | None = None,
    paired: Collection[str] = (),
    shared: Mapping[str, str] | None = None,
) -> EGMF:
    """The fusion network for this backbone, where the config asks for one, and both as one model.

    Args:
        widths: task -> features per frame of audio and video; 0: the task has none of it.
        answers: task -> number of its answers; needed where the config asks for expert heads.
        statistics: task -> modality -> how its features are standardised; not used with `config.standardise` false.
        paired: the multi-label tasks, whose answers come in pairs.
        shared: task -> the name of the encoders that it shares with other questions about the same samples.
    """
    if not config.pseudo_tokens:
        return EGMF(backbone, None, ranks)
    H = backbone.hidden_size
    fusion = Fusion(config, widths, H, H, backbone.embedding_norm, answers, paired, shared)
    if config.standardise and statistics:
        fusion.encoders.standardise(statistics)
    return EGMF(backbone, fusion.to(device=device, dtype=dtype), ranks)
