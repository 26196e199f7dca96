"""The fusion network: encoders, experts and gate turn text, audio and video into K pseudo tokens.

Shapes: B samples, T time, S text tokens, H hidden size of the backbone, D width, K slots, E experts, M modalities.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.batch import Features
from trainer.config import FusionConfig
from trainer.models.fusion.encoders import Encoders
from trainer.models.fusion.float32_buffers import Float32Buffers
from trainer.models.fusion.gating import HierarchicalGate
from trainer.models.fusion.heads import ExpertHeads, expert_losses
from trainer.models.fusion.selection import expert_classes, fitting_experts, kept_modalities

log = logging.getLogger(__name__)


class FusionOutput(NamedTuple):
    """Pseudo tokens and what the gate decided; `unused_param_zero` is a scalar 0 to be added to the loss (see :class:`Encoders`).

    Experts and modalities stand in the order of `Fusion.experts_built` and `Fusion.modalities`: an ablated one has no
    place. `expert_logprob_BEC`: log p of the task's answers by each expert's own head, None without expert heads, and
    meaningless where the expert is not valid (`expert_valid_BE`).
    """

    pseudo_BKH: Tensor
    gate_expert_BKE: Tensor
    gate_modality_BKEM: Tensor
    unused_param_zero: Tensor
    expert_valid_BE: Tensor
    expert_logprob_BEC: Tensor | None


class PseudoProjection(Float32Buffers):
    """``scale * (W y + b)`` from D to H, so that a pseudo token starts as long as an embedding of the backbone.

    y leaves an RMSNorm with length sqrt(D); W has entries of variance 1/D, so that W y has length sqrt(H) on average,
    and scale = norm / sqrt(H). The scale is a constant of the checkpoint (float32) and not part of W, whose entries
    would otherwise be as small as the embeddings of a large model and be overthrown by one optimizer step.
    """

    scale: Tensor

    def __init__(self, width: int, output_width: int, output_norm: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, output_width)
        nn.init.normal_(self.linear.weight, std=1.0 / math.sqrt(width))
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("scale", torch.tensor(output_norm / math.sqrt(output_width)))

    def forward(self, mixed_BKD: Tensor) -> Tensor:
        raw_BKH = self.linear(mixed_BKD)
        return raw_BKH * self.scale.to(raw_BKH.dtype)


class Fusion(nn.Module):
    """Text, audio and video of a task in; K pseudo tokens for the backbone out.

    Args:
        inputs: task -> {"audio": features per frame, "video": features per frame}; 0: the task has none of it.
        text_width: H of the embeddings that come in. output_width: H of the pseudo tokens.
        output_norm: mean length of the backbone's input embeddings.
        answers: task -> how many answers it has, for the expert heads; needed where `config.expert_loss_weight` is not 0.
        paired: the tasks whose answers come in pairs, as those of a multi-label task do.
        shared: task -> the name of the encoders that it shares with other questions about the same samples.

    A modality that the config removes, or that no task has, is built nowhere, and neither is an ablated expert.

    Raises:
        ValueError: a network with nothing to mix.
    """

    def __init__(
        self,
        config: FusionConfig,
        inputs: Mapping[str, Mapping[str, int]],
        text_width: int,
        output_width: int,
        output_norm: float,
        answers: Mapping[str, int] | None = None,
        paired: Collection[str] = (),
        shared: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if config.pseudo_tokens < 1:
            raise ValueError("fusion.pseudo_tokens=0 switches fusion off: build no fusion network")
        self.config = config
        self.modalities = kept_modalities(config, inputs)
        classes = expert_classes(config)
        fitting = fitting_experts(classes, self.modalities)
        for name in classes.keys() - fitting.keys():
            log.warning(
                "the %s expert is left out: it needs %d modalities, and there is only %s",
                name, classes[name].least_modalities, ", ".join(self.modalities),
            )  # fmt: skip
        self.experts_built = tuple(fitting)
        self.tasks = {task: index for index, task in enumerate(inputs)}
        self.encoders = Encoders(inputs, self.modalities, text_width, config.width, shared)
        self.experts = nn.ModuleDict({name: cls(config, self.modalities) for name, cls in fitting.items()})
        self.gate = HierarchicalGate(config, self.experts_built, self.modalities, len(self.tasks))
        self.heads = None
        if config.expert_loss_weight:
            if answers is None or set(answers) != set(inputs):
                raise ValueError(
                    "expert_loss_weight asks for expert heads, which need the number of answers of every task"
                )
            answers = {task: answers[task] for task in inputs}
            self.heads = ExpertHeads(self.experts_built, config.pseudo_tokens, config.width, answers, paired)
        self.pseudo = PseudoProjection(config.width, output_width, output_norm)

    def forward(
        self, task: str, text_BSH: Tensor, text_mask_BS: Tensor, audio: Features, video: Features
    ) -> FusionOutput:
        """The pseudo tokens of samples of one task; every submodule runs, whatever is missing."""
        features = {"audio": audio, "video": video}
        streams, unused_param_zero = self.encoders(task, text_BSH, text_mask_BS, features)
        outputs = [expert(streams) for expert in self.experts.values()]
        values = [value for out in outputs for value in out.values]
        valid_BEM = torch.stack([out.valid_BM for out in outputs], 1)
        gated = self.gate(values, valid_BEM, streams, self.tasks[task])
        logprob_BEC = None if self.heads is None else self.heads(values, gated.modality_BKEM, valid_BEM, task)
        pseudo_BKH = self.pseudo(gated.mixed_BKD)
        valid_BE = valid_BEM.any(-1)
        return FusionOutput(pseudo_BKH, gated.expert_BKE, gated.modality_BKEM, unused_param_zero, valid_BE, logprob_BEC)

    def auxiliary_loss(self, out: FusionOutput, answer_B: Tensor | None, share_BC: Tensor | None = None) -> Tensor:
        """The gate's balance term and the loss of the expert heads `[B]`, each times its weight in the config."""
        loss_B = self.gate.config.balance_weight * self.gate.balance_loss(out.gate_expert_BKE).float()
        if out.expert_logprob_BEC is None:
            return loss_B
        experts_B, gate_B = expert_losses(
            out.expert_logprob_BEC, answer_B, out.gate_expert_BKE, out.expert_valid_BE, share_BC
        )
        return loss_B + self.config.expert_loss_weight * (experts_B + gate_B)
