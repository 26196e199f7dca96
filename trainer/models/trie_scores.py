"""Log-probabilities of all answers of a task from one pass over their trie.

Shapes: B samples, H backbone hidden size, V vocabulary, N nodes of the trie, P = N + 1 places that predict a token of it (0: the
last token before the answer, i + 1: node i), C answers, r some of all places, m tokens of the trie and its end token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.batch import AnswerTrie
from trainer.models.backbone.causal_lm import Backbone
from trainer.models.backbone.sharded import is_partitioned
from trainer.models.ranks import Ranks

MAX_LOGITS = 2**25  # entries of [B x P, V] in memory at a time; Backbone.scored_logits may allow more without gradients
LOGIT_BYTES = 12  # of an entry: in half precision, in float32, and what the sum of exponentials holds beside


def answer_logprobs(
    backbone: Backbone, hidden_BPH: Tensor, trie: AnswerTrie, ranks: Ranks, most_samples: int = 0
) -> Tensor:
    """log p `[B, C]` of every answer with its end token, float32, not normalised over the answers.

    Where a trie has tokens that are given, p is conditional on them. `most_samples`: see :class:`trainer.batch.Batch`. No host waits
    for a device here, where they are known.
    """
    B, P, _ = hidden_BPH.shape
    next_m = trie.next_m

    def next_logprobs(hidden_rH: Tensor) -> Tensor:
        logits_rV = backbone.logits(hidden_rH).float()
        # in float64: sums reach -50 and below
        return logits_rV[:, next_m].double() - logits_rV.logsumexp(-1, keepdim=True).double()

    rows = []
    for hidden_rH in hidden_BPH.flatten(0, 1).tensor_split(_chunks(backbone, B, P, ranks, most_samples)):
        if torch.is_grad_enabled():  # logits are recomputed in the backward pass: all of them at once would be too many
            rows.append(checkpoint(next_logprobs, hidden_rH, use_reentrant=False, preserve_rng_state=False))
        else:
            rows.append(next_logprobs(hidden_rH))
    logprob_BPm = torch.cat(rows).unflatten(0, (B, P))
    from_N = trie.parent_N + 1  # the place that predicts a node
    node_BN = logprob_BPm[:, from_N, torch.arange(P - 1, device=from_N.device)]
    if trie.given_N is not None:
        node_BN = node_BN.masked_fill(trie.given_N, 0.0)
    node_BN = nn.functional.pad(node_BN, (0, 1))  # what stands behind an answer's last token adds 0
    total_BC = node_BN.new_zeros(())
    for node_C in trie.path_CD.unbind(1):
        total_BC = total_BC + node_BN.index_select(1, node_C)
    return (total_BC + logprob_BPm[..., -1].index_select(1, trie.leaf_C + 1)).float()


def logits_in_free_memory(backbone: Backbone, ranks: Ranks) -> int:
    """Entries of logits that fit into a quarter of a GPU's free memory, the same on every rank; 0 where the head is whole, and more at
    a time would save nothing. All ranks call this together."""
    head = backbone.base.get_output_embeddings()
    device = backbone.base.device
    if device.type != "cuda" or not any(is_partitioned(p) for p in head.parameters()):
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return int(min(ranks.gather_all(free // 4 // LOGIT_BYTES)))


def _chunks(backbone: Backbone, samples: int, places: int, ranks: Ranks, most_samples: int) -> int:
    """Into how many parts the logits of so many samples are cut: the same number on every rank, since under ZeRO-3 each part gathers
    the head's weights."""
    most = MAX_LOGITS if torch.is_grad_enabled() else max(MAX_LOGITS, backbone.scored_logits)
    if ranks.size > 1 and most_samples:
        samples = max(samples, most_samples)
    chunks = max(1, -(-samples * places * backbone.vocabulary // most))
    if ranks.size == 1 or most_samples:
        return chunks
    agreed = torch.tensor(chunks, device=backbone.base.device)
    ranks.max(agreed)
    return int(agreed)
