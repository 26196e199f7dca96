"""The hierarchical gate: how much of each modality inside each expert, and of each expert, per slot.

Shapes: B samples, T time, K slots, E experts, M modalities, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trainer.config import FusionConfig, Modality
from trainer.kernels.gate import gate_mix
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
    """The context c [B, D]: LayerNorm(W [mean of every stream's contents; task's embedding]).

    Positions are left out: their mean is large and nearly the same for all samples, and drowns what differs. A learned vector stands for the mean of a modality that a sample does not have, so that the gate knows.
    """

    def __init__(self, config: FusionConfig, modalities: Sequence[Modality], tasks: int) -> None:
        super().__init__()
        width = config.width
        self.missing_MD = nn.Parameter(torch.randn(len(modalities), width) * 0.5)
        self.task = nn.Embedding(tasks, width)
        self.project = nn.Linear((len(modalities) + 1) * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, streams: Streams, task: int) -> Tensor:
        mean_BMD = torch.stack([masked_mean(s.content_BTD, s.mask_BT) for s in streams.values()], 1)
        mean_BMD = torch.where(presence(streams).unsqueeze(-1), mean_BMD, self.missing_MD)
        task_BD = self.task(torch.full(mean_BMD.shape[:1], task, device=mean_BMD.device))
        return self.norm(self.project(torch.cat([mean_BMD.flatten(1), task_BD], -1)))


class HierarchicalGate(Float32Buffers):
    """Weighs modalities inside each expert, then experts, per slot, and mixes them.

    With z_BK = GELU(W (c_B + slot_K)): modality logits V_1 z, expert logits V_2 z, residual r_BK = slot_K + W_c c_B; the
    mix is :func:`trainer.kernels.gate.gate_mix`. V starts at 0: all that is valid weighs the same at first. A level that
    the config replaces by the mean has no logits and no parameters.

    Noise: in training, `noise` * a⁸ * w_D * N(0, 1) is added to every channel of the mix, with a the running `confidence`
    and w_D the mix's own scale. An answer that can be read from a third of the right expert gives the gate nothing to
    learn; noise does, and more of the right expert is the remedy. It comes when answers are nearly certain, so that it
    does not keep them from being learned, and goes where it makes them uncertain.

    Running averages: `usage_E`, the experts' mean weight, 1/E at first, for the balance term; and `confidence`, the mean
    probability of the right answer, 0 at first. Both are exponential averages over earlier steps, float32, in the state
    dict. Samples of this step are collected by `accumulate` and enter them by `update_usage`.
    """

    usage_E: Tensor
    confidence: Tensor
    step_usage_E: Tensor
    step_confidence: Tensor
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
            self.modality = _from_zero(nn.Linear(width, self.experts * self.modalities))
        if config.gate.expert == "learned":
            self.expert = _from_zero(nn.Linear(width, self.experts))
        self.register_buffer("usage_E", torch.full((self.experts,), 1.0 / self.experts))
        self.register_buffer("confidence", torch.zeros(()))
        self.register_buffer("step_usage_E", torch.zeros(self.experts), persistent=False)
        self.register_buffer("step_confidence", torch.zeros(()), persistent=False)
        self.register_buffer("step_weight", torch.zeros(()), persistent=False)

    def forward(
        self, values: Sequence[Tensor], valid_BEM: Tensor, streams: Streams, task: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mixed slots y [B, K, D], expert weights [B, K, E] and modality weights [B, K, E, M].

        `values` are E M tensors [B, K, D], those of the first expert first.
        """
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
        if self.training and self.config.noise:
            scale = self.config.noise * self.confidence**8 * self.weight_D
            mixed_BKD = mixed_BKD + scale.to(mixed_BKD.dtype) * torch.randn_like(mixed_BKD)
        return mixed_BKD, expert_BKE, modality_BKEM

    def balance_loss(self, gate_expert_BKE: Tensor) -> Tensor:
        """E sum_e u_e mean_k g2_bke, per sample [B], not yet times the weight of the config.

        Linear in the samples (u is constant within a step), so the same however a step is cut into micro-batches or
        dealt to ranks. It is 1 at even usage, or for an even gate.
        """
        return self.experts * (gate_expert_BKE.mean(1) @ self.usage_E.to(gate_expert_BKE.dtype, copy=True))

    @torch.no_grad()
    def accumulate(self, gate_expert_BKE: Tensor, weight_B: Tensor, probability_B: Tensor) -> None:
        """Collect the expert weights and the answers' probabilities of one micro-batch, each sample times its weight."""
        weight_B = weight_B.to(self.step_usage_E)
        self.step_usage_E += weight_B @ gate_expert_BKE.mean(1).to(self.step_usage_E)
        self.step_confidence += weight_B @ probability_B.to(self.step_confidence)
        self.step_weight += weight_B.sum()

    def collected(self) -> Tensor:
        """What a step has collected, to be summed over ranks: usage, confidence, weight [E + 2]."""
        return torch.cat([self.step_usage_E, torch.stack([self.step_confidence, self.step_weight])])

    @torch.no_grad()
    def update_usage(self, reduce: Callable[[Tensor], object] | None = None) -> None:
        """Once per optimizer step: average = decay * average + (1 - decay) * mean over this step's samples.

        `reduce` sums a tensor over the ranks in place. A step without weight leaves the averages as they were.
        """
        total = self.collected()
        if reduce is not None:
            reduce(total)
        mean = total[:-1] / total[-1].clamp_min(torch.finfo(total.dtype).tiny)
        decay = torch.where(total[-1] > 0, self.config.usage_decay, 1.0)
        self.usage_E.mul_(decay).add_(mean[:-1] * (1.0 - decay))
        self.confidence.mul_(decay).add_(mean[-1] * (1.0 - decay))
        self.discard_usage()

    def discard_usage(self) -> None:
        """Forget what this step collected: the step is not taken."""
        self.step_usage_E.zero_()
        self.step_confidence.zero_()
        self.step_weight.zero_()


def _from_zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
