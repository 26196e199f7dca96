"""All answers of a task as one tree of tokens, and the choices that tell them apart.

A *place* is the cue's end or a node of the tree: what follows it is predicted there. Its *options* are the tokens that continue, or
end, some answer there. An answer's score is a sum over the places of its tokens:

    full         Σ log p(token | the vocabulary)
    constrained  Σ log p(token | the place's options)

The second is the distribution of constrained decoding. Over all answers it sums to 1, a token without an alternative costs nothing,
and nothing behind the last choice need be computed.

Legend: C answers, N nodes that rows carry, Q places of choices, W options of a place, m distinct options, D choices of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from trainer.batch import AnswerTrie

Score = Literal["constrained", "full"]
Beginning = tuple[int, ...]  # the tokens before a place


class Step(NamedTuple):
    """A token of an answer: what stands before it, what may follow there, and which of these does."""

    before: Beginning
    options: tuple[int, ...]
    chosen: int


@dataclass(frozen=True)
class AnswerTree:
    """The answers of a task as tokens.

    Attributes:
        answers: their texts.
        tokens: those of each answer, the end token last; no answer is the end token alone, and no two are alike.
        values: the numbers that they mean; None where they are labels.
        pairs: answer 2i and 2i + 1 are the two answers about label i of a multi-label task. A score is then conditional on the tokens
            that the two have in common, as "joy:" in "joy: yes" and "joy: no", and only these two are options.
    """

    answers: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    values: tuple[float, ...] | None = None
    pairs: bool = False

    @property
    def end(self) -> int:
        """The token that ends every answer."""
        return self.tokens[0][-1]

    @cached_property
    def nodes(self) -> tuple[Beginning, ...]:
        """Every beginning of an answer once, the end token left out; parents before children."""
        return tuple(dict.fromkeys(row[:stop] for row in self.tokens for stop in range(1, len(row))))

    @cached_property
    def options(self) -> dict[Beginning, tuple[int, ...]]:
        """Place -> what continues, or ends, some answer there."""
        return _options(self.tokens)

    @cached_property
    def _options_by_label(self) -> list[dict[Beginning, tuple[int, ...]]]:
        return [_options(self.tokens[c : c + 2]) for c in range(0, len(self.tokens), 2)]

    def steps(self, answer: int, score: Score) -> list[Step]:
        """The tokens over which the score of an answer is a sum, in order."""
        row, following = self.tokens[answer], self._options_by_label[answer // 2] if self.pairs else self.options
        found, given = [], self.pairs
        for depth, token in enumerate(row):
            options = following[row[:depth]]
            given = given and len(options) == 1
            if len(options) > 1 or (score == "full" and not given):
                found.append(Step(row[:depth], options, options.index(token)))
        return found

    def row_nodes(self, score: Score, every_node: bool = False) -> list[Beginning]:
        """The nodes that rows carry: those at which something is predicted, and those before them; or every one."""
        if every_node:
            return list(self.nodes)
        read = {
            step.before[:stop]
            for c in range(len(self.tokens))
            for step in self.steps(c, score)
            for stop in range(1, len(step.before) + 1)
        }
        return [node for node in self.nodes if node in read]

    def trie(self, score: Score, every_node: bool = False) -> AnswerTrie:
        """What rows carry to be scored, and how their scores add up."""
        steps = [self.steps(c, score) for c in range(len(self.tokens))]
        nodes = self.row_nodes(score, every_node)
        place = {(): 0} | {node: i for i, node in enumerate(nodes, 1)}
        ancestors_NN = torch.eye(len(nodes), dtype=torch.bool)
        for i, node in enumerate(nodes):
            if parent := place[node[:-1]]:
                ancestors_NN[i] |= ancestors_NN[parent - 1]
        listed = dict.fromkeys((step.before, step.options) for row in steps for step in row)
        choices = {choice: q for q, choice in enumerate(sorted(listed, key=lambda choice: place[choice[0]]))}
        options = {token: i for i, token in enumerate(dict.fromkeys(t for _, listed in choices for t in listed))}
        widest = max(len(listed) for _, listed in choices)
        at = [[choices[step.before, step.options] * widest + step.chosen for step in row] for row in steps]
        most = max(map(len, at))
        return AnswerTrie(
            token_N=torch.tensor([node[-1] for node in nodes], dtype=torch.long),
            depth_N=torch.tensor([len(node) - 1 for node in nodes], dtype=torch.long),
            ancestors_NN=ancestors_NN,
            depth=max(map(len, nodes), default=0),
            place_Q=torch.tensor([place[before] for before, _ in choices]),
            token_m=torch.tensor(list(options)),
            option_QW=torch.tensor(
                [[options[t] for t in listed] + [0] * (widest - len(listed)) for _, listed in choices]
            ),
            mask_QW=torch.tensor([[w < len(listed) for w in range(widest)] for _, listed in choices]),
            step_CD=torch.tensor([row + [len(choices) * widest] * (most - len(row)) for row in at]),
            constrained=score == "constrained",
            answers=list(self.answers),
            value_C=None if self.values is None else torch.tensor(self.values),
        )


def _options(answers: Sequence[tuple[int, ...]]) -> dict[Beginning, tuple[int, ...]]:
    following: dict[Beginning, dict[int, None]] = {}
    for row in answers:
        for depth, token in enumerate(row):
            following.setdefault(row[:depth], {})[token] = None
    return {before: tuple(tokens) for before, tokens in following.items()}
