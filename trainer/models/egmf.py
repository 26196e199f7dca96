"""EGMF: pseudo tokens of the fusion network inside a prompt, read by the backbone, which answers in words.

Source: EGMF, arXiv 2601.07565; docs/method.md has the maths.
Shapes: B samples, H backbone hidden size, P prefix tokens, K pseudo tokens, n answer tokens of all samples, V vocabulary, C
answers, E experts, M modalities.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.batch import AnswerTrie, Batch, PackedBatch
from trainer.models.backbone.causal_lm import Backbone
from trainer.models.backbone.packed import PrefixCache
from trainer.models.fusion.groups import fuse_groups
from trainer.models.fusion.network import Fusion, FusionOutput
from trainer.models.layouts import Layout, PackedLayout, PaddedLayout
from trainer.models.losses import distribution_nll, expected_error, option_nll, token_nll
from trainer.models.ranks import Ranks, SingleProcess
from trainer.models.trie_scores import answer_logprobs
from trainer.text import end_token


class LossOutput(NamedTuple):
    """Per-sample losses, unweighted, float32.

    `loss_B` = minus the answer's score under `train.loss` (smoothed, and with an expected error, where the batch asks
    for it), or the cross-entropy with the shares of all answers; `auxiliary_B` are the fusion network's own terms, already times their weights: the gate's balance, the experts'
    answers, the gate's trust in them. `unused_param_zero` is 0 and belongs in the sum, so that every parameter has a gradient.
    """

    loss_B: Tensor
    auxiliary_B: Tensor
    unused_param_zero: Tensor
    gate_expert_BKE: Tensor | None
    gate_modality_BKEM: Tensor | None


class ScoreOutput(NamedTuple):
    """`logprob_BC`: the score of every answer (:mod:`trainer.answer_tree`), float32. Constrained ones are log-probabilities among the
    answers; full ones, log p of all tokens, are not normalised over them. `pseudo_BKH`: the pseudo tokens as they entered the backbone;
    None without a fusion network."""

    logprob_BC: Tensor
    gate_expert_BKE: Tensor | None
    gate_modality_BKEM: Tensor | None
    pseudo_BKH: Tensor | None = None


class EGMF(nn.Module):
    """The fusion network before the backbone; without it (K = 0) the backbone alone, a text-only model.

    Args:
        ranks: the processes that run the model together; default: this one alone.
    """

    def __init__(self, backbone: Backbone, fusion: Fusion | None, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.fusion = fusion
        self.ranks = ranks or SingleProcess()
        self.end = end_token(backbone.tokenizer)

    def forward(
        self, batch: Batch | PackedBatch, trie: AnswerTrie | None = None, prefix: PrefixCache | None = None
    ) -> LossOutput | ScoreOutput:
        """With a trie the score of each of its answers, else the loss of the batch's own answers.

        A packed batch without answers is scored over the trie it was packed with. `prefix`, of :meth:`prefix`, stands for its
        prefix.
        """
        layout = PackedLayout(batch, prefix) if isinstance(batch, PackedBatch) else PaddedLayout(batch, trie)
        embeds, fused = self.embed(layout)
        hidden = layout.hidden(self.backbone, embeds)
        gates = (None, None) if fused is None else (fused.gate_expert_BKE, fused.gate_modality_BKEM)
        if layout.scored:
            pseudo_BKH = None if fused is None else fused.pseudo_BKH.to(embeds.dtype)
            return ScoreOutput(self._scores(layout, hidden), gates[0], gates[1], pseudo_BKH)
        loss_B = self._loss(layout, hidden)
        if fused is None or self.fusion is None:
            return LossOutput(loss_B, torch.zeros_like(loss_B), loss_B.new_zeros(()), *gates)
        auxiliary_B = self.fusion.auxiliary_loss(fused, batch.answer_B, batch.share_BC)
        if self.training:
            self.fusion.gate.accumulate(fused.gate_expert_BKE.detach(), batch.weight_B)
        return LossOutput(loss_B, auxiliary_B, fused.unused_param_zero.float(), *gates)

    def embed(self, layout: Layout) -> tuple[Tensor, FusionOutput | None]:
        """The embeddings of a batch's tokens with the pseudo tokens at their places, and what the fusion network gave."""
        embeds, batch = self.backbone.embed(layout.token_ids), layout.batch
        fused = None if self.fusion is None else fuse_groups(self.fusion, self.backbone.embed, batch.task, batch.inputs)
        made = 0 if fused is None else fused.pseudo_BKH.shape[1]
        if made != batch.pseudo_tokens:
            raise ValueError(
                f"the batch keeps {batch.pseudo_tokens} places for pseudo tokens, the model makes {made or 'none'}"
            )
        return embeds if fused is None else layout.insert(embeds, fused.pseudo_BKH.to(embeds.dtype)), fused

    @torch.no_grad()
    def prefix(self, ids_P: Tensor) -> PrefixCache:
        """The keys and values of a task's prefix, for packed batches that are scored; the weights must not change."""
        was_training = self.training
        self.eval()
        try:
            return self.backbone.prefix(self.backbone.embed(ids_P), fp32_attention=True)
        finally:
            self.train(was_training)

    def _loss(self, layout: Layout, hidden: Tensor) -> Tensor:
        """The loss `[B]` of the batch's own answers; logits are made at their places, or the trie's, alone."""
        if layout.trie is not None and layout.batch.share_BC is not None:
            return distribution_nll(self._scores(layout, hidden), layout.batch.share_BC)
        at_answers = layout.at_answers(hidden)
        if not at_answers.numel():
            raise ValueError(
                "a batch without answers has no loss: collate it with answers, or score it over a trie of answers"
            )
        choices = layout.batch.choices
        if choices is not None and choices.chosen_n is not None:
            nll_n = option_nll(self.backbone.token_logits(at_answers, choices.token_m).flatten(0, -2), choices)
        else:
            nll_n = token_nll(self.backbone.logits(at_answers).float().flatten(0, -2), layout.answer_id_n, choices)
        loss_B = layout.sum_by_sample(nll_n)
        if layout.trie is None or not layout.batch.error_weight:
            return loss_B
        assert layout.trie.value_C is not None
        error_B = expected_error(self._scores(layout, hidden), layout.trie.value_C, layout.batch.target_B)
        return loss_B + layout.batch.error_weight * error_B

    def _scores(self, layout: Layout, hidden: Tensor) -> Tensor:
        """The score `[B, C]` of every answer of the layout's trie."""
        assert layout.trie is not None
        at_trie = layout.at_trie(hidden)
        return answer_logprobs(self.backbone, at_trie, layout.trie, self.ranks, layout.batch.most_samples)
