"""The hierarchical gate: how much of each modality inside each expert, and of each expert, per slot.

Shapes: B samples, T time, K slots, E experts, M modalities, D width, S = 2 D statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.config import FusionConfig, Modality
from trainer.kernels.gate import gate_mix
from trainer.models.fusion.encoders import EncodedModality
from trainer.models.fusion.expert import Streams, presence
from trainer.models.fusion.float32_buffers import Float32Buffers
from trainer.models.fusion.masked import masked_mean


class Context(nn.Module):
    """The context c [B, D]: LayerNorm(W [mean and logarithm of the standard deviation of every stream's contents; task]).

    The deviation over time shows what the mean hides: that something short happened. All of it is near 0, and the
    task's embedding starts small, since what is large and the same for all samples drowns what differs; positions are
    left out for that reason. Learned statistics stand for a modality that a sample does not have, so that the gate knows.
    """

    def __init__(self, config: FusionConfig, modalities: Sequence[Modality], tasks: int) -> None:
        super().__init__()
        width = config.width
        self.missing_MS = nn.Parameter(torch.randn(len(modalities), 2 * width) * 0.5)
        self.task = nn.Embedding(tasks, width)
        nn.init.normal_(self.task.weight, std=0.02)
        self.project = nn.Linear((2 * len(modalities) + 1) * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, streams: Streams, task: int) -> Tensor:
        statistics_BMS = torch.stack([_statistics(s) for s in streams.values()], 1)
        statistics_BMS = torch.where(presence(streams).unsqueeze(-1), statistics_BMS, self.missing_MS)
        task_BD = self.task(torch.full(statistics_BMS.shape[:1], task, device=statistics_BMS.device))
        return self.norm(self.project(torch.cat([statistics_BMS.flatten(1), task_BD], -1)))


class GateOutput(NamedTuple):
    """`mixed_BKD`: the slots; weights of experts and modalities."""

    mixed_BKD: Tensor
    expert_BKE: Tensor
    modality_BKEM: Tensor


class HierarchicalGate(Float32Buffers):
    """Weighs modalities inside each expert, then experts, per slot, and mixes them.

    With z_BK = GELU(W (c_B + slot_K)): modality logits V_1 z, expert logits V_2 z, residual r_BK = slot_K + W_c c_B; the
    mix is :func:`trainer.kernels.gate.gate_mix`. V starts at 0: all that is valid weighs the same at first. A level that
    the config replaces by the mean has no logits and no parameters.

    `usage_E` is the running mean weight of the experts, 1/E at first, for the balance term: an exponential average over
    earlier steps, float32, in the state dict. Samples of this step are collected by `accumulate` and enter it by `update_usage`.
    """

    usage_E: Tensor
    step_usage_E: Tensor
    step_weight: Tensor

    def __init__(
        self, config: FusionConfig, experts: Sequence[str], modalities: Sequence[Modality], tasks: int
    ) -> None:
        super().__init__()
        width, slots = config.width, config.pseudo_tokens
        self.config = config.gate
        self.experts, self.modalities = len(experts), len(modalities)
        self.context = Context(config, modalities, tasks)
        self.slot_KD = nn.Parameter(torch.randn(slots, width) * 0.5)
        self.residual = nn.Linear(width, width)
        self.weight_D = nn.Parameter(torch.ones(width))
        if "learned" in (config.gate.modality, config.gate.expert):
            self.hidden = nn.Linear(width, width)
        if config.gate.modality == "learned":
            self.modality = from_zero(nn.Linear(width, self.experts * self.modalities))
        if config.gate.expert == "learned":
            self.expert = from_zero(nn.Linear(width, self.experts))
        self.register_buffer("usage_E", torch.full((self.experts,), 1.0 / self.experts))
        self.register_buffer("step_usage_E", torch.zeros(self.experts), persistent=False)
        self.register_buffer("step_weight", torch.zeros(()), persistent=False)

    def forward(self, values: Sequence[Tensor], valid_BEM: Tensor, streams: Streams, task: int) -> GateOutput:
        """`values` are E M tensors [B, K, D], those of the first expert first."""
        context_B1D = self.context(streams, task).unsqueeze(1)
        shape_BKE = (*values[0].shape[:2], self.experts)
        expert_BKE = modality_BKn = None
        if self.config.modality == "learned" or self.config.expert == "learned":
            hidden_BKD = nn.functional.gelu(self.hidden(context_B1D + self.slot_KD))
            modality_BKn = self.modality(hidden_BKD) if self.config.modality == "learned" else None
            expert_BKE = self.expert(hidden_BKD) if self.config.expert == "learned" else None
        if modality_BKn is None:
            modality_BKn = values[0].new_zeros(*shape_BKE[:2], self.experts * self.modalities)
        if expert_BKE is None:
            expert_BKE = values[0].new_zeros(shape_BKE)
        mixed = gate_mix(
            values,
            modality_BKn.unflatten(-1, (self.experts, self.modalities)),
            expert_BKE,
            valid_BEM,
            self.slot_KD + self.residual(context_B1D),
            self.weight_D,
            temperature=self.config.temperature,
            mean_modality=self.config.modality == "mean",
            mean_expert=self.config.expert == "mean",
            kernel=self.config.kernel,
        )
        return GateOutput(*mixed)

    def balance_loss(self, gate_expert_BKE: Tensor) -> Tensor:
        """E sum_e u_e mean_k g2_bke, per sample [B], not yet times the weight of the config.

        Linear in the samples (u is constant within a step), so the same however a step is cut into micro-batches or
        dealt to ranks. It is 1 at even usage, or for an even gate.
        """
        return self.experts * (gate_expert_BKE.mean(1) @ self.usage_E.to(gate_expert_BKE.dtype, copy=True))

    @torch.no_grad()
    def accumulate(self, gate_expert_BKE: Tensor, weight_B: Tensor) -> None:
        """Collect the expert weights of one micro-batch, each sample times its weight."""
        weight_B = weight_B.to(self.step_usage_E)
        self.step_usage_E += weight_B @ gate_expert_BKE.mean(1).to(self.step_usage_E)
        self.step_weight += weight_B.sum()

    def collected(self) -> Tensor:
        """What a step has collected, to be summed over ranks [E + 1]: usage, weight."""
        return torch.cat([self.step_usage_E, self.step_weight[None]])

    @torch.no_grad()
    def update_usage(self, reduce: Callable[[Tensor], object] | None = None) -> None:
        """Once per optimizer step: average = decay * average + (1 - decay) * mean over this step's samples.

        `reduce` sums a tensor over the ranks in place. A step without weight leaves the average as it was.
        """
        total = self.collected()
        if reduce is not None:
            reduce(total)
        usage_E, weight = total[:-1], total[-1]
        decay = torch.where(weight > 0, self.config.usage_decay, 1.0)
        self.usage_E.mul_(decay).add_(usage_E / weight.clamp_min(torch.finfo(weight.dtype).tiny) * (1.0 - decay))
        self.discard_usage()

    def discard_usage(self) -> None:
        """Forget what this step collected: the step is not taken."""
        self.step_usage_E.zero_()
        self.step_weight.zero_()


def _statistics(stream: EncodedModality) -> Tensor:
    """Mean and log of the standard deviation over time [B, 2 D]."""
    mean_BD = masked_mean(stream.content_BTD, stream.mask_BT)
    variance_BD = masked_mean((stream.content_BTD - mean_BD.unsqueeze(1)).square(), stream.mask_BT)
    return torch.cat([mean_BD, 0.5 * (variance_BD + 1e-5).log()], -1)


def from_zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
