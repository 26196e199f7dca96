"""What a training loss asks of its batches beside the answers: weights of samples, choices at an answer's tokens, the tree.

Shapes: B samples, C answers of a task, W choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trainer.batch import AnswerTrie, Choices, Sample
from trainer.tasks import Task


@dataclass(frozen=True)
class Objective:
    """The training loss of one task; the default is -Σ log p of the answer's tokens, every sample alike.

    Attributes:
        weight_C: weight of a sample by its answer; None: 1.
        smoothing: share of every target that is spread evenly over the tokens which continue some answer there.
        error_weight: of the expected absolute error over the number grid.
        trie: the task's answers, for the two above.
    """

    weight_C: np.ndarray | None = None
    smoothing: float = 0.0
    error_weight: float = 0.0
    trie: AnswerTrie | None = None

    @property
    def trie_in_batch(self) -> AnswerTrie | None:
        """The tree whose nodes every training sample carries: the loss needs the probabilities of all answers."""
        return self.trie if self.error_weight else None

    def weights(self, task: Task, samples: Sequence[Sample], weight: float) -> Tensor:
        """`[B]`: `weight` times what the samples weigh."""
        if self.weight_C is None:
            return torch.full((len(samples),), weight)
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
        if not self.smoothing:
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
