"""Scores of all answers of a task from one pass over what a row carries of their tree.

Shapes: B samples, H backbone hidden size, V vocabulary, Q places at which a choice is made, W options of a place, C answers, D choices
of an answer, r some of all B x Q places, m tokens that are options.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.batch import AnswerTrie
from trainer.models.backbone.causal_lm import Backbone
from trainer.models.backbone.sharded import is_partitioned
from trainer.models.losses import masked_log_softmax
from trainer.models.ranks import Ranks

MAX_LOGITS = 2**25  # entries of [B x Q, V] in memory at a time; Backbone.scored_logits may allow more without gradients
LOGIT_BYTES = 12  # of an entry: in half precision, in float32, and what the sum of exponentials holds beside


def answer_logprobs(
    backbone: Backbone, hidden_BQH: Tensor, trie: AnswerTrie, ranks: Ranks, most_samples: int = 0
) -> Tensor:
    """The score `[B, C]` of every answer (:mod:`trainer.answer_tree`), float32, from the hidden states at the trie's places.

    `most_samples`: see :class:`trainer.batch.Batch`. No host waits for a device here, where they are known.
    """
    logprob_BQW = _option_logprobs(backbone, hidden_BQH, trie, ranks, most_samples)
    option_Bo = nn.functional.pad(logprob_BQW.flatten(1), (0, 1))  # what stands behind an answer's last choice adds 0
    total_BC = option_Bo.new_zeros(())
    for option_C in trie.step_CD.unbind(1):
        total_BC = total_BC + option_Bo.index_select(1, option_C)
    return total_BC.float()


def _option_logprobs(
    backbone: Backbone, hidden_BQH: Tensor, trie: AnswerTrie, ranks: Ranks, most_samples: int
) -> Tensor:
    """log p `[B, Q, W]` of every option, among a place's options or in the vocabulary, float64: sums reach -50 and below."""
    B, Q, _ = hidden_BQH.shape
    place_Q1 = torch.arange(Q, device=hidden_BQH.device)[:, None]
    if trie.constrained and backbone.reads_rows:
        logits_BQW = backbone.token_logits(hidden_BQH, trie.token_m)[:, place_Q1, trie.option_QW]
        return masked_log_softmax(logits_BQW.double(), trie.mask_QW)

    def token_logprobs(hidden_rH: Tensor) -> Tensor:
        logits_rV = backbone.logits(hidden_rH).float()
        logits_rm = logits_rV[:, trie.token_m].double()
        return logits_rm if trie.constrained else logits_rm - logits_rV.logsumexp(-1, keepdim=True).double()

    rows = []
    for hidden_rH in hidden_BQH.flatten(0, 1).tensor_split(_chunks(backbone, B, Q, ranks, most_samples)):
        if torch.is_grad_enabled():  # logits are recomputed in the backward pass: all of them at once would be too many
            rows.append(checkpoint(token_logprobs, hidden_rH, use_reentrant=False, preserve_rng_state=False))
        else:
            rows.append(token_logprobs(hidden_rH))
    value_BQW = torch.cat(rows).unflatten(0, (B, Q))[:, place_Q1, trie.option_QW]
    return masked_log_softmax(value_BQW, trie.mask_QW) if trie.constrained else value_BQW


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
