"""The hierarchical gate: how much of each modality inside each expert, and of each expert, per slot.

Shapes: B samples, T time, K slots, E experts, M modalities, D width, S = 2 D statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.config import FusionConfig, Modality
from trainer.kernels.gate import gate_mix, gate_weights
from trainer.models.encoders import Stream
from trainer.models.experts import Streams, presence
from trainer.models.masked import masked_mean


class Float32Buffers(nn.Module):
    """A module whose own floating buffers stay float32 whatever its parameters are cast to.

    ``module.bfloat16()`` and ``module.half()``, which DeepSpeed calls, cast every floating buffer. Moves between devices
    are followed.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        kept = {name: b for name, b in self.named_buffers(recurse=False) if b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            now = getattr(self, name)
            if now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self


class Context(nn.Module):
    """The context c [B, D]: LayerNorm(W [mean and logarithm of the standard deviation of every stream's contents; task]).

    The deviation over time tells what the mean does not: that something short happened. All of it is near 0, and the
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
        told_BMS = torch.stack([_statistics(s) for s in streams.values()], 1)
        told_BMS = torch.where(presence(streams).unsqueeze(-1), told_BMS, self.missing_MS)
        task_BD = self.task(torch.full(told_BMS.shape[:1], task, device=told_BMS.device))
        return self.norm(self.project(torch.cat([told_BMS.flatten(1), task_BD], -1)))


class GateOutput(NamedTuple):
    """`mixed_BKD`: the slots; weights of experts and modalities; `drawn_BE`: the one expert that an exploring sample
    keeps, False everywhere for the others. Weights of experts are the gate's, drawn or not."""

    mixed_BKD: Tensor
    expert_BKE: Tensor
    modality_BKEM: Tensor
    drawn_BE: Tensor


class HierarchicalGate(Float32Buffers):
    """Weighs modalities inside each expert, then experts, per slot, and mixes them.

    With z_BK = GELU(W (c_B + slot_K)): modality logits V_1 z, expert logits V_2 z, residual r_BK = slot_K + W_c c_B; the
    mix is :func:`trainer.kernels.gate.gate_mix`. V starts at 0: all that is valid weighs the same at first. A level that
    the config replaces by the mean has no logits and no parameters.

    Exploration: in training a share `exploration` * a⁸ of the samples, a the task's running confidence, keeps one expert
    alone, drawn by the mean of its weights over the slots; :meth:`policy_loss` rewards the draw by how likely the right
    answer then is. The mix alone teaches the gate little: an answer that can be read from a third of the right expert is
    no more likely with all of it. Exploration waits until answers are known, since one expert cannot tell what none has
    learned.

    Running averages: `usage_E`, the experts' mean weight, 1/E at first, for the balance term; `confidence_T`, of each task
    the mean probability of the right answer where all experts are mixed, 0 at first; `baseline_T`, the same where one was
    drawn. All are exponential averages over earlier steps, float32, in the state dict. Samples of this step are collected by
    `accumulate` and enter them by `update_usage`.
    """

    usage_E: Tensor
    confidence_T: Tensor
    baseline_T: Tensor
    step_usage_E: Tensor
    step_probability_2T: Tensor
    step_weight_2T: Tensor

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
            self.modality = _from_zero(nn.Linear(width, self.experts * self.modalities))
        if config.gate.expert == "learned":
            self.expert = _from_zero(nn.Linear(width, self.experts))
        self.register_buffer("usage_E", torch.full((self.experts,), 1.0 / self.experts))
        self.register_buffer("confidence_T", torch.zeros(tasks))
        self.register_buffer("baseline_T", torch.zeros(tasks))
        self.register_buffer("step_usage_E", torch.zeros(self.experts), persistent=False)
        self.register_buffer("step_probability_2T", torch.zeros(2, tasks), persistent=False)
        self.register_buffer("step_weight_2T", torch.zeros(2, tasks), persistent=False)

    def forward(self, values: Sequence[Tensor], valid_BEM: Tensor, streams: Streams, task: int) -> GateOutput:
        """`values` are E M tensors [B, K, D], those of the first expert first."""
        context_B1D = self.context(streams, task).unsqueeze(1)
        shape_BKE = (*values[0].shape[:2], self.experts)
        expert_BKE = modality_BKn = None
        if self.config.modality == "learned" or self.config.expert == "learned":
            hidden_BKD = nn.functional.gelu(self.hidden(context_B1D + self.slot_KD))
            modality_BKn = self.modality(hidden_BKD) if self.config.modality == "learned" else None
            expert_BKE = self.expert(hidden_BKD) if self.config.expert == "learned" else None
        policy_BKE, drawn_BE = None, torch.zeros_like(valid_BEM[..., 0])
        if self.training and self.config.exploration and expert_BKE is not None and self.experts > 1:
            policy_BKE = gate_weights(expert_BKE, valid_BEM, self.config.temperature)
            drawn_BE = self._draw(policy_BKE, task)
            valid_BEM = valid_BEM & (drawn_BE | ~drawn_BE.any(-1, keepdim=True)).unsqueeze(-1)
        if modality_BKn is None:
            modality_BKn = values[0].new_zeros(*shape_BKE[:2], self.experts * self.modalities)
        if expert_BKE is None:
            expert_BKE = values[0].new_zeros(shape_BKE)
        mixed_BKD, expert_BKE, modality_BKEM = gate_mix(
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
        return GateOutput(mixed_BKD, expert_BKE if policy_BKE is None else policy_BKE, modality_BKEM, drawn_BE)

    @torch.no_grad()
    def _draw(self, policy_BKE: Tensor, task: int) -> Tensor:
        """Of each sample the expert that it keeps [B, E], one-hot; False everywhere for samples that keep all."""
        policy_BE = policy_BKE.mean(1)
        gumbel_BE = -torch.empty_like(policy_BE).exponential_().log()
        one_BE = nn.functional.one_hot((policy_BE.log() + gumbel_BE).argmax(-1), self.experts).bool()
        rate = self.config.exploration * self.confidence_T[task] ** 8
        explores_B = (torch.rand(len(policy_BE), device=policy_BE.device) < rate) & (policy_BE.sum(-1) > 0)
        return one_BE & explores_B.unsqueeze(-1)

    def policy_loss(self, gate_expert_BKE: Tensor, drawn_BE: Tensor, probability_B: Tensor, task: int) -> Tensor:
        """-(p - baseline) log mean_k g2[drawn], per sample [B], 0 where none was drawn; p has no gradient.

        Its expected gradient is that of minus the mean probability of the right answer over the experts, each drawn by
        its weight (REINFORCE, Williams 1992).
        """
        drawn_B = torch.where(drawn_BE.any(-1), (gate_expert_BKE.mean(1) * drawn_BE).sum(-1), 1.0)
        return (self.baseline_T[task] - probability_B.detach()) * drawn_B.log()

    def balance_loss(self, gate_expert_BKE: Tensor) -> Tensor:
        """E sum_e u_e mean_k g2_bke, per sample [B], not yet times the weight of the config.

        Linear in the samples (u is constant within a step), so the same however a step is cut into micro-batches or
        dealt to ranks. It is 1 at even usage, or for an even gate.
        """
        return self.experts * (gate_expert_BKE.mean(1) @ self.usage_E.to(gate_expert_BKE.dtype, copy=True))

    @torch.no_grad()
    def accumulate(
        self, gate_expert_BKE: Tensor, drawn_BE: Tensor, weight_B: Tensor, probability_B: Tensor, task: int
    ) -> None:
        """Collect the expert weights and the answers' probabilities of one micro-batch, each sample times its weight."""
        weight_B = weight_B.to(self.step_usage_E)
        explores_B = drawn_BE.any(-1).to(weight_B)
        weight_2B = weight_B * torch.stack([1 - explores_B, explores_B])
        self.step_usage_E += weight_B @ gate_expert_BKE.mean(1).to(self.step_usage_E)
        self.step_probability_2T[:, task] += weight_2B @ probability_B.to(self.step_probability_2T)
        self.step_weight_2T[:, task] += weight_2B.sum(1)

    def collected(self) -> Tensor:
        """What a step has collected, to be summed over ranks [E + 4 T]: usage; by task the probabilities of samples that mix,
        and of those that explore; their weights."""
        return torch.cat([self.step_usage_E, self.step_probability_2T.flatten(), self.step_weight_2T.flatten()])

    @torch.no_grad()
    def update_usage(self, reduce: Callable[[Tensor], object] | None = None) -> None:
        """Once per optimizer step: average = decay * average + (1 - decay) * mean over this step's samples.

        `reduce` sums a tensor over the ranks in place. What a step has no weight for stays as it was.
        """
        total = self.collected()
        if reduce is not None:
            reduce(total)
        usage_E = total[: self.experts]
        (mixed_T, drawn_T), (mixed_weight_T, drawn_weight_T) = total[self.experts :].view(2, 2, -1)
        self._average(self.usage_E, usage_E, (mixed_weight_T + drawn_weight_T).sum())
        self._average(self.confidence_T, mixed_T, mixed_weight_T)
        self._average(self.baseline_T, drawn_T, drawn_weight_T)
        self.discard_usage()

    def _average(self, average: Tensor, total: Tensor, weight: Tensor) -> None:
        decay = torch.where(weight > 0, self.config.usage_decay, 1.0)
        average.mul_(decay).add_(total / weight.clamp_min(torch.finfo(weight.dtype).tiny) * (1.0 - decay))

    def discard_usage(self) -> None:
        """Forget what this step collected: the step is not taken."""
        self.step_usage_E.zero_()
        self.step_probability_2T.zero_()
        self.step_weight_2T.zero_()


def _statistics(stream: Stream) -> Tensor:
    """Mean and log of the standard deviation over time [B, 2 D]."""
    mean_BD = masked_mean(stream.content_BTD, stream.mask_BT)
    variance_BD = masked_mean((stream.content_BTD - mean_BD.unsqueeze(1)).square(), stream.mask_BT)
    return torch.cat([mean_BD, 0.5 * (variance_BD + 1e-5).log()], -1)


def _from_zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
