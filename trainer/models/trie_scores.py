"""Log-probabilities of all answers of a task from one pass over their trie.

Shapes: B samples, H backbone hidden size, V vocabulary, N nodes of the trie, P = N + 1 places that predict a token of it (0: the
last token before the answer, i + 1: node i), C answers, r some of all places, m tokens of the trie and its end token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer.batch import AnswerTrie
from trainer.models.backbone.causal_lm import Backbone
from trainer.models.ranks import Ranks

MAX_LOGITS = 2**25  # entries of [B x P, V] in memory at a time


def answer_logprobs(backbone: Backbone, hidden_BPH: Tensor, trie: AnswerTrie, ranks: Ranks) -> Tensor:
    """log p `[B, C]` of every answer with its end token, float32, not normalised over the answers.

    Where a trie has tokens that are given, p is conditional on them.
    """
    B, P, _ = hidden_BPH.shape
    next_m = torch.cat([trie.token_N, trie.token_N.new_tensor([trie.end])])

    def next_logprobs(hidden_rH: Tensor) -> Tensor:
        logits_rV = backbone.logits(hidden_rH).float()
        # in float64: sums reach -50 and below
        return logits_rV[:, next_m].double() - logits_rV.logsumexp(-1, keepdim=True).double()

    rows = []
    for hidden_rH in hidden_BPH.flatten(0, 1).tensor_split(_chunks(backbone, B * P, ranks)):
        if torch.is_grad_enabled():  # logits are recomputed in the backward pass: all of them at once would be too many
            rows.append(checkpoint(next_logprobs, hidden_rH, use_reentrant=False, preserve_rng_state=False))
        else:
            rows.append(next_logprobs(hidden_rH))
    logprob_BPm = torch.cat(rows).unflatten(0, (B, P))
    from_N = trie.parent_N + 1  # the place that predicts a node
    node_BN = logprob_BPm[:, from_N, torch.arange(P - 1, device=from_N.device)]
    if trie.given_N is not None:
        node_BN = node_BN.masked_fill(trie.given_N, 0.0)
    end_BP = logprob_BPm[..., -1]
    total_BP = torch.zeros_like(end_BP)
    for depth in range(int(trie.depth_N.max()) + 1):
        at_n = (trie.depth_N == depth).nonzero()[:, 0]
        total_BP[:, at_n + 1] = total_BP[:, from_N[at_n]] + node_BN[:, at_n]
    return (total_BP + end_BP)[:, trie.leaf_C + 1].float()


def _chunks(backbone: Backbone, rows: int, ranks: Ranks) -> int:
    """Into how many parts so many rows of logits are cut: the same number on every rank, since under ZeRO-3 each part gathers
    the head's weights."""
    chunks = max(1, -(-rows * backbone.vocabulary // MAX_LOGITS))
    if ranks.size == 1:
        return chunks
    most = torch.tensor(chunks, device=backbone.base.device)
    ranks.max(most)
    return int(most)
