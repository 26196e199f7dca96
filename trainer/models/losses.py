"""Losses of answers: of their tokens, and of the number that they mean.

Shapes: n answer tokens, V vocabulary, m tokens that are options, W options at a token, B samples, C answers.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.batch import Choices

MASKED = 1e30  # beyond every logit, and finite in float32: no nan in gradients


def token_nll(logits_nV: Tensor, id_n: Tensor, choices: Choices | None) -> Tensor:
    """-log p of the tokens `[n]`; with choices smoothed over them:

    ``(1 - s) * -log p(id) + s * mean of -log p over the W_n options, the tokens that continue some answer there``

    A token that nothing else could stand for (W_n = 1) keeps its plain loss. Other than smoothing over the vocabulary
    this costs no probability where there is no choice, so it does not favour short answers, whose scores are compared.
    """
    nll_n = nn.functional.cross_entropy(logits_nV, id_n, reduction="none")
    if choices is None:
        return nll_n
    nll_nW = logits_nV.logsumexp(-1, keepdim=True) - logits_nV.gather(1, choices.token_m[choices.option_nW])
    return (1 - choices.share) * nll_n + choices.share * _mean_over_options(nll_nW, choices)


def option_nll(logits_nm: Tensor, choices: Choices) -> Tensor:
    """:func:`token_nll` with p among the options of each token alone; a token without an alternative costs nothing."""
    assert choices.chosen_n is not None
    nll_nW = -masked_log_softmax(logits_nm.gather(1, choices.option_nW), choices.mask_nW)
    nll_n = nll_nW.gather(1, choices.chosen_n[:, None])[:, 0]
    if not choices.share:
        return nll_n
    return (1 - choices.share) * nll_n + choices.share * _mean_over_options(nll_nW, choices)


def _mean_over_options(nll_nW: Tensor, choices: Choices) -> Tensor:
    return nll_nW.masked_fill(~choices.mask_nW, 0.0).sum(1) / choices.mask_nW.sum(1)


def masked_log_softmax(logits_W: Tensor, mask_W: Tensor) -> Tensor:
    """Over the last dimension, among the entries of the mask, which are at least one; very low elsewhere, without nan in any gradient."""
    return logits_W.masked_fill(~mask_W, -MASKED).log_softmax(-1)


def distribution_nll(logprob_BC: Tensor, share_BC: Tensor) -> Tensor:
    """``Σ_c q_c · -log p_c`` of every sample, q the shares of its answers; with q one answer's the loss of that answer.

    With q of annotators it is least where p = q, and exceeds the entropy of q by KL(q ‖ p). With the answers of a multi-label
    task, log p conditional on the label, it is the sum of the labels' binary cross-entropies.
    """
    return -(share_BC.to(logprob_BC) * logprob_BC).sum(1)


def expected_error(logprob_BC: Tensor, value_C: Tensor, target_B: Tensor) -> Tensor:
    """``Σ_c p_c |v_c - t|`` of every sample, p = softmax over the grid's numbers v, t the unrounded truth."""
    probability_BC = logprob_BC.softmax(1)
    return (probability_BC * (value_C.to(probability_BC) - target_B[:, None]).abs()).sum(1)
