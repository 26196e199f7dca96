"""Expert heads: an answer predicted from each expert by itself. They train the experts, and teach the gate which to trust.

Shapes: B samples, K slots, E experts, M modalities, D width, C answers of the task.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.models.fusion.gating import from_zero


class ExpertHeads(nn.Module):
    """A linear layer per expert from its K vectors to the logits of every task's answers.

    The vectors are those that the gate mixes, h_ke = sum_m g1[k, e, m] x[k, e, m]; nothing of another expert is read. One
    layer holds the answers of all tasks, so that every pass uses every parameter. Heads start at 0: equal logits.

    Args:
        answers: task -> how many answers it has.
        paired: the multi-label tasks, whose answers come in pairs: a label applies, or does not.
    """

    def __init__(
        self,
        experts: Sequence[str],
        slots: int,
        width: int,
        answers: Mapping[str, int],
        paired: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.paired = frozenset(paired)
        ends = list(itertools.accumulate(answers.values()))
        self.place = {task: (end - count, end) for (task, count), end in zip(answers.items(), ends, strict=True)}
        self.linear = nn.ModuleDict({name: from_zero(nn.Linear(slots * width, ends[-1])) for name in experts})

    def forward(self, values: Sequence[Tensor], modality_BKEM: Tensor, valid_BEM: Tensor, task: str) -> Tensor:
        """Log-probabilities [B, E, C], float32, of all answers or within each pair. `values` are E M tensors [B, K, D], those of the first expert first."""
        start, end = self.place[task]
        modalities = valid_BEM.shape[2]
        logits = []
        for e, layer in enumerate(self.linear.values()):
            of_m = values[e * modalities : (e + 1) * modalities]
            value_BMKD = torch.stack(list(of_m), 1).masked_fill(~valid_BEM[:, e, :, None, None], 0.0)
            weight_BMK1 = modality_BKEM[:, :, e].transpose(1, 2).unsqueeze(-1)
            vector_BKD = (weight_BMK1.to(value_BMKD.dtype) * value_BMKD).sum(1)
            logits.append(layer(vector_BKD.flatten(1))[:, start:end].float())
        logits_BEC = torch.stack(logits, 1)
        if task in self.paired:
            return logits_BEC.unflatten(-1, (-1, 2)).log_softmax(-1).flatten(-2)
        return logits_BEC.log_softmax(-1)


def expert_losses(
    logprob_BEC: Tensor, answer_B: Tensor | None, expert_BKE: Tensor, valid_BE: Tensor, share_BC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of each sample [B], 0 where no expert is valid, with q_e the probability that expert e gives the answer and p_e the
    mean of its gate weight over the slots:

    - the experts' loss, mean over the valid of -log q_e: an expert learns whatever its weight;
    - the gate's loss, -log sum_e p_e q_e with q without gradient: that of a mixture of experts (Jacobs, Jordan, Nowlan,
      Hinton 1991). Its gradient moves p_e to the expert's share p_e q_e / sum p q of the answer, and is 0 as long as all
      experts know equally much.

    Where a target is shares of all answers, log q_e is the mean of the experts' log-probabilities by these shares.
    """
    if share_BC is not None:
        logq_BE = (share_BC[:, None].to(logprob_BEC) * logprob_BEC).sum(-1)
    else:
        assert answer_B is not None
        logq_BE = logprob_BEC.gather(2, answer_B[:, None, None].expand(-1, logprob_BEC.shape[1], 1))[..., 0]
    valid_B = valid_BE.any(1)
    count_B = valid_BE.sum(1).clamp(min=1)
    experts_B = -logq_BE.masked_fill(~valid_BE, 0.0).sum(1) / count_B
    q_BE = logq_BE.detach().exp()
    mixed_B = torch.where(valid_B, (expert_BKE.float().mean(1) * q_BE).sum(1), 1.0)
    return experts_B, -mixed_B.clamp(min=torch.finfo(torch.float32).tiny).log()
