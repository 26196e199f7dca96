"""What a training loss asks of its batches beside the answers: weights of samples, choices at an answer's tokens, the tree.

Shapes: B samples, C answers of a task, W choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trainer.batch import AnswerTrie, Choices, Sample
from trainer.label_sets import decode_sets
from trainer.tasks import Task


@dataclass(frozen=True)
class Objective:
    """The training loss of one task; the default is -Σ log p of the answer's tokens, every sample alike.

    Attributes:
        weight_C: weight of a sample by its answer; None: 1.
        smoothing: share of every target that is spread evenly over the tokens which continue some answer there.
        error_weight: of the expected absolute error over the number grid.
        trie: the task's answers, for all but the weights.
        shared: samples have a share of every answer as their target: annotators disagree, or a sample has several labels.
    """

    weight_C: np.ndarray | None = None
    smoothing: float = 0.0
    error_weight: float = 0.0
    trie: AnswerTrie | None = None
    shared: bool = False

    @property
    def trie_in_batch(self) -> AnswerTrie | None:
        """The tree whose nodes every training sample carries: the loss needs the probabilities of all answers."""
        return self.trie if self.error_weight or self.shared else None

    def shares(self, task: Task, samples: Sequence[Sample]) -> Tensor | None:
        """`[B, C]`, float32: the share of every answer in the target of each sample; None where a target is one answer.

        Smoothed by s, a label's share q becomes (1 - s) q + s / C; of a multi-label task, where each label has two answers, C is 2.
        """
        if not self.shared:
            return None
        count = len(task.answers())
        share_BC = np.zeros((len(samples), count), dtype=np.float32)
        for share_C, sample in zip(share_BC, samples, strict=True):
            if task.kind == "multilabel":
                member_C = decode_sets(np.array([sample.target]), count // 2)[0]
                share_C[0::2], share_C[1::2] = member_C, ~member_C
            elif sample.share_C is None:
                share_C[task.answer_index(sample.target)] = 1.0
            else:
                share_C[:] = sample.share_C
        even = 0.5 if task.kind == "multilabel" else 1 / count
        return torch.from_numpy((1 - self.smoothing) * share_BC + np.float32(self.smoothing * even))

    def weights(self, task: Task, samples: Sequence[Sample], weight: float) -> Tensor:
        """`[B]`: `weight` times what the samples weigh; where annotators disagree, the mean of their labels' weights."""
        if self.weight_C is None:
            return torch.full((len(samples),), weight)
        if (share_BC := replace(self, smoothing=0.0).shares(task, samples)) is not None:
            return share_BC @ torch.from_numpy(self.weight_C) * weight
        weight_B = self.weight_C[[task.answer_index(sample.target) for sample in samples]]
        return torch.from_numpy(weight_B) * weight

    @cached_property
    def places(self) -> list[list[int]]:
        """Of every answer: where its tokens are predicted, the end token included; 0 is the cue's end, n + 1 node n."""
        assert self.trie is not None
        return [[0, *(node + 1 for node in path)] for path in _paths(self.trie)]

    @cached_property
    def _following(self) -> list[list[int]]:
        """Of every place: the tokens that continue, or end, some answer."""
        trie = self.trie
        assert trie is not None
        out: list[list[int]] = [[] for _ in range(len(trie.token_N) + 1)]
        for token, parent in zip(trie.token_N.tolist(), trie.parent_N.tolist(), strict=True):
            out[parent + 1].append(token)
        for leaf in trie.leaf_C.tolist():
            out[leaf + 1].append(trie.end)
        return out

    def choices(self, answers: Sequence[int], longest: int | None = None) -> Choices | None:
        """What could stand at every token of these answers, one behind another; with `longest`, padded to so many each."""
        if not self.smoothing or self.shared:
            return None
        rows: list[list[int]] = []
        for answer in answers:
            following = [self._following[place] for place in self.places[answer]]
            rows += following + [[]] * (0 if longest is None else longest - len(following))
        token = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
        mask = torch.zeros(token.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            token[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = True
        return Choices(token, mask, self.smoothing)


def _paths(trie: AnswerTrie) -> list[list[int]]:
    """Of every answer: its nodes, from the first token's to the last one's."""
    parents = trie.parent_N.tolist()
    out = []
    for leaf in trie.leaf_C.tolist():
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        out.append(path)
    return out
