"""What a training loss asks of its batches beside the answers: weights of samples, options at an answer's tokens, the tree.

Shapes: B samples, C answers of a task, W options at a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trainer.answer_tree import AnswerTree, Score, Step
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
        tree: the task's answers, for all but the weights.
        shared: samples have a share of every answer as their target: annotators disagree, or a sample has several labels.
        loss: over what the probabilities of the answer's tokens are taken.
        score: the same of the probabilities of numbers, of which the expected error is a mean.
    """

    weight_C: np.ndarray | None = None
    smoothing: float = 0.0
    error_weight: float = 0.0
    tree: AnswerTree | None = None
    shared: bool = False
    loss: Score = "full"
    score: Score = "full"

    @cached_property
    def trie_in_batch(self) -> AnswerTrie | None:
        """What every training sample carries of all answers: the loss needs their probabilities."""
        if not (self.error_weight or self.shared):
            return None
        assert self.tree is not None
        return self.tree.trie(self.loss if self.shared else self.score, every_node=self._every_node)

    @property
    def _every_node(self) -> bool:
        """Whether rows carry all nodes, so that an answer's own tokens are among them."""
        return self.loss == "full" and not self.shared

    def target(self, tokens: Sequence[int], answer: int) -> list[int]:
        """The tokens of an answer that are predicted; of a constrained loss those up to its last choice."""
        if self.loss == "full":
            return list(tokens)
        assert self.tree is not None
        return list(tokens[: len(self.tree.steps(answer, self.loss)[-1].before) + 1])

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
        """Of every answer: where its predicted tokens are predicted among a row's places; 0 is the cue's end, n + 1 node n."""
        assert self.tree is not None
        place = {node: i for i, node in enumerate(self.tree.row_nodes(self.score, self._every_node), 1)}
        return [
            [place.get(tuple(row[:depth]), 0) for depth in range(len(self.target(row, c)))]
            for c, row in enumerate(self.tree.tokens)
        ]

    @cached_property
    def _steps(self) -> list[list[Step]]:
        """Of every answer: its predicted tokens and what else might stand in their places."""
        tree = self.tree
        assert tree is not None
        return [tree.steps(c, "full")[: len(self.target(row, c))] for c, row in enumerate(tree.tokens)]

    @cached_property
    def _option(self) -> dict[int, int]:
        """token -> its place among all options."""
        tokens = dict.fromkeys(token for steps in self._steps for step in steps for token in step.options)
        return {token: i for i, token in enumerate(tokens)}

    def choices(self, answers: Sequence[int], longest: int | None = None) -> Choices | None:
        """What could stand at every token of these answers, one behind another; with `longest`, padded to so many each, by tokens
        without an alternative."""
        constrained = self.loss == "constrained"
        if self.shared or not (self.smoothing or constrained) or not answers:
            return None
        rows: list[Step] = []
        for answer in answers:
            rows += self._steps[answer]
            rows += [_NOTHING] * (0 if longest is None else longest - len(self._steps[answer]))
        widest = max(len(step.options) for step in rows)
        option = torch.zeros(len(rows), widest, dtype=torch.long)
        mask = torch.zeros(option.shape, dtype=torch.bool)
        for i, step in enumerate(rows):
            option[i, : len(step.options)] = torch.tensor([self._option.get(token, 0) for token in step.options])
            mask[i, : len(step.options)] = True
        chosen = torch.tensor([step.chosen for step in rows]) if constrained else None
        return Choices(torch.tensor(list(self._option)), option, mask, self.smoothing, chosen)


_NOTHING = Step((), (-1,), 0)  # a token that nothing else can stand for
