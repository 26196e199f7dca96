"""The two layouts of a batch: where its samples stand in the rows of the backbone, and where in them answers are predicted.

All that differs between packed and padded batches is here. Losses and scores (egmf.py) ask a layout for hidden states.

Shapes: B samples, L positions of a padded row, T own tokens of a packed row, H backbone hidden size, K pseudo tokens, A answer
tokens, n answer tokens of all samples, N nodes of the answer trie, Q places at which it has a choice, among the last token before
the answer and the nodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from trainer.batch import AnswerTrie, Batch, PackedBatch
from trainer.models.backbone.causal_lm import Backbone
from trainer.models.backbone.packed import PrefixCache, take


class Layout(ABC):
    """A batch as the backbone reads it.

    Attributes: `trie`, whose nodes every sample carries, None where none does; `scored`, whether the batch is scored over
    it and has no answers of its own.
    """

    batch: Batch | PackedBatch
    trie: AnswerTrie | None
    scored: bool

    @property
    @abstractmethod
    def token_ids(self) -> Tensor:
        """Ids of the samples' tokens; what stands at the places of pseudo tokens means nothing."""

    @abstractmethod
    def insert(self, embeds: Tensor, pseudo_BKH: Tensor) -> Tensor:
        """The embeddings of `token_ids` with the pseudo tokens at their places."""

    @abstractmethod
    def hidden(self, backbone: Backbone, embeds: Tensor) -> Tensor:
        """Hidden states of these embeddings and of the trie's nodes, in one pass through the backbone."""

    @property
    @abstractmethod
    def answer_id_n(self) -> Tensor:
        """The answer tokens of all samples, end tokens included."""

    @abstractmethod
    def at_answers(self, hidden: Tensor) -> Tensor:
        """The hidden states `[n, H]` or `[B, A, H]` that predict `answer_id_n`."""

    @abstractmethod
    def sum_by_sample(self, value_n: Tensor) -> Tensor:
        """The sum `[B]` of what belongs to each sample's answer tokens."""

    @abstractmethod
    def at_trie(self, hidden: Tensor) -> Tensor:
        """The hidden states `[B, Q, H]` at the trie's places."""


class PackedLayout(Layout):
    """One row without padding; a row without answers of its own is scored over the trie it was packed with.

    Args:
        prefix: keys and values that stand for the batch's prefix, from :meth:`trainer.models.egmf.EGMF.prefix`.
    """

    batch: PackedBatch

    def __init__(self, batch: PackedBatch, prefix: PrefixCache | None = None) -> None:
        self.batch, self.prefix, self.trie = batch, prefix, batch.packing.trie
        self.scored = self.trie is not None and not batch.longest_answer and batch.share_BC is None

    @property
    def token_ids(self) -> Tensor:
        return self.batch.own_ids_T

    def insert(self, embeds: Tensor, pseudo_BKH: Tensor) -> Tensor:
        return embeds.index_copy(0, self.batch.place_BK.flatten(), pseudo_BKH.flatten(0, 1))

    def hidden(self, backbone: Backbone, embeds: Tensor) -> Tensor:
        packing = self.batch.packing
        if self.prefix is not None:
            return backbone.packed(embeds, packing, self.prefix, fp32_attention=self.scored)
        embeds_TH = torch.cat([backbone.embed(self.batch.prefix_ids_P), embeds])
        return backbone.packed(embeds_TH, packing, fp32_attention=self.scored)[packing.prefix :]

    @property
    def answer_id_n(self) -> Tensor:
        return self.batch.answer_id_n

    def at_answers(self, hidden: Tensor) -> Tensor:
        return take(hidden, self.batch.answer_at_n)

    def sum_by_sample(self, value_n: Tensor) -> Tensor:
        B, A = len(self.batch), self.batch.longest_answer
        return value_n.new_zeros(B * A).index_copy(0, self.batch.answer_slot_n, value_n).view(B, A).sum(1)

    def at_trie(self, hidden: Tensor) -> Tensor:
        assert self.trie is not None
        at_BQ = self.batch.cue_at_B[:, None] + self.trie.place_Q
        return hidden.index_select(0, at_BQ.flatten()).unflatten(0, tuple(at_BQ.shape))


class PaddedLayout(Layout):
    """A row for every sample, padded on the right; the nodes of a trie stand behind the padding.

    Args:
        trie: the batch is scored over it; None: it has answers of its own.
    """

    batch: Batch

    def __init__(self, batch: Batch, trie: AnswerTrie | None = None) -> None:
        self.batch, self.scored = batch, trie is not None
        self.trie = batch.trie if trie is None else trie

    @property
    def token_ids(self) -> Tensor:
        return self.batch.input_ids_BL

    def insert(self, embeds: Tensor, pseudo_BKH: Tensor) -> Tensor:
        start, stop = self.batch.pseudo_start, self.batch.pseudo_start + self.batch.pseudo_tokens
        return torch.cat([embeds[:, :start], pseudo_BKH, embeds[:, stop:]], 1)

    def hidden(self, backbone: Backbone, embeds: Tensor) -> Tensor:
        B, L, _ = embeds.shape
        positions_BL = torch.arange(L, device=embeds.device).expand(B, L)
        if self.trie is None or not self.trie.token_N.shape[0]:
            return backbone.hidden(embeds, positions_BL, fp32_attention=self.scored)
        trie, context_B = self.trie, self.batch.context_length_B
        nodes_BNH = backbone.embed(trie.token_N)[None].expand(B, trie.token_N.shape[0], -1)
        positions_BL = torch.cat([positions_BL, context_B[:, None] + trie.depth_N], 1)
        mask_B1LL = trie_mask(context_B, L, trie)
        return backbone.hidden(torch.cat([embeds, nodes_BNH], 1), positions_BL, mask_B1LL, fp32_attention=self.scored)

    @property
    def answer_id_n(self) -> Tensor:
        return self.batch.answer_ids_BA.flatten()

    def at_answers(self, hidden: Tensor) -> Tensor:
        A = self.batch.answer_ids_BA.shape[1]
        at_BA = self.batch.context_length_B[:, None] - 1 + torch.arange(A, device=hidden.device)
        return gather_positions(hidden, at_BA.clamp(max=self.batch.input_ids_BL.shape[1] - 1))

    def sum_by_sample(self, value_n: Tensor) -> Tensor:
        mask_BA = self.batch.answer_mask_BA
        return torch.where(mask_BA, value_n.view(mask_BA.shape), 0.0).sum(1)

    def at_trie(self, hidden: Tensor) -> Tensor:
        assert self.trie is not None
        place_Q, cue_B1 = self.trie.place_Q, self.batch.context_length_B[:, None] - 1
        return gather_positions(
            hidden, torch.where(place_Q > 0, self.batch.input_ids_BL.shape[1] - 1 + place_Q, cue_B1)
        )


def trie_mask(context_length_B: Tensor, length: int, trie: AnswerTrie) -> Tensor:
    """`[B, 1, L + N, L + N]`: contexts causal, nodes see their row's unpadded context and their ancestors."""
    B, N = context_length_B.shape[0], trie.token_N.shape[0]
    device = context_length_B.device
    mask = torch.zeros(B, 1, length + N, length + N, dtype=torch.bool, device=device)
    mask[:, :, :length, :length] = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:, :, length:, :length] = (torch.arange(length, device=device) < context_length_B[:, None])[:, None, None]
    mask[:, :, length:, length:] = trie.ancestors_NN
    return mask


def gather_positions(values_BLH: Tensor, at_BA: Tensor) -> Tensor:
    """`[B, A, H]`: the positions `at_BA` of every row."""
    return values_BLH.gather(1, at_BA[..., None].expand(-1, -1, values_BLH.shape[2]))
