"""Answers as trees of tokens, and log-probabilities or free text as predictions.

Legend: B samples, C answers of the task, N nodes of the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.batch import AnswerTrie
from trainer.tasks import Language, Task
from trainer.text import encode, end_token

Style = Literal["words", "indices"]
Mode = Literal["expectation", "mode"]


class AnswerError(ValueError):
    """Answers that a tokenizer cannot tell apart, or scores that do not belong to the task's answers."""


@dataclass
class Predictions:
    """What the model said about B samples.

    `value_B` (float64) is the label's index or the number, nan where there is no valid answer. `answers` is the text
    behind it: the most probable answer when answers were scored (of a regression too, whose value may be the
    expectation), the generated text as it came otherwise. `probability_BC` (float64) is None for generated text.
    """

    value_B: np.ndarray
    answers: list[str]
    probability_BC: np.ndarray | None = None

    @property
    def valid_B(self) -> np.ndarray:
        return np.isfinite(self.value_B)

    def __len__(self) -> int:
        return len(self.answers)


def task_trie(task: Task, tokenizer: PreTrainedTokenizerBase, style: Style, language: Language) -> AnswerTrie:
    """The tree of a task's answers as they follow the cue in a prompt of `language`; see :func:`build_trie`."""
    trie = build_trie(task.answer_texts(style, language), lambda text: encode(tokenizer, text), end_token(tokenizer))
    if task.grid is not None:
        trie.value_C = torch.tensor(task.grid.values)
    return trie


def build_trie(answers: Sequence[str], encode: Callable[[str], list[int]], end: int) -> AnswerTrie:
    """One tree that holds every answer: shared beginnings once, parents before children, answers in the given order.

    Args:
        answers: the texts as they follow the cue (:meth:`trainer.tasks.Task.answer_texts`), tokenised apart from it.
        encode: text -> tokens, adding none.
        end: the token that ends every answer; it tells an answer from a longer one that begins with it.

    Raises:
        AnswerError: naming every answer without tokens, with the end token inside, or with the tokens of another.
    """
    tokens = [list(map(int, encode(text))) for text in answers]
    _check_tokens(answers, tokens, end)
    nodes: dict[tuple[int, ...], int] = {}
    for row in tokens:
        for stop in range(1, len(row) + 1):
            nodes.setdefault(tuple(row[:stop]), len(nodes))
    parents = [nodes.get(path[:-1], -1) for path in nodes]
    ancestors_NN = torch.eye(len(nodes), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            ancestors_NN[node] |= ancestors_NN[parent]
    return AnswerTrie(
        token_N=torch.tensor([path[-1] for path in nodes]),
        parent_N=torch.tensor(parents),
        depth_N=torch.tensor([len(path) - 1 for path in nodes]),
        leaf_C=torch.tensor([nodes[tuple(row)] for row in tokens]),
        ancestors_NN=ancestors_NN,
        end=end,
        answers=[text.strip() for text in answers],
    )


def _check_tokens(answers: Sequence[str], tokens: Sequence[Sequence[int]], end: int) -> None:
    faults = [] if answers else ["there are none"]
    seen: dict[tuple[int, ...], int] = {}
    for c, (text, row) in enumerate(zip(answers, tokens, strict=True)):
        if not row:
            faults.append(f"{text!r} has no tokens")
        elif end in row:
            faults.append(f"{text!r} holds the end token {end}: its tokens are {row}")
        elif (other := seen.setdefault(tuple(row), c)) != c:
            faults.append(f"{answers[other]!r} and {text!r} have the same tokens {row}")
    if faults:
        raise AnswerError(
            "the tokenizer cannot tell these answers apart: "
            + "; ".join(faults)
            + ". Rename the labels, or let the model answer with their numbers (data.answers=indices)"
        )


def predict(
    task: Task, logprob_BC: Tensor | np.ndarray, style: Style = "words", mode: Mode = "expectation"
) -> Predictions:
    """Predictions from the log-probabilities of all answers, end token included.

    p = softmax over the C answers, in float64. Classification: the most probable label. Regression: Σ_c p_c v_c over
    the grid's numbers v, unrounded; with ``mode="mode"`` the most probable number. Ties go to the first answer. Scores
    with nan or +inf, or all -inf, as a diverged model gives them, make no valid prediction.

    Raises:
        AnswerError: the columns are not one for each answer.
    """
    given = logprob_BC.detach().double().cpu().numpy() if isinstance(logprob_BC, Tensor) else logprob_BC
    score_BC = np.array(given, dtype=np.float64)
    words = task.answers(style)
    if score_BC.ndim != 2 or score_BC.shape[1] != len(words):
        raise AnswerError(
            f"task {task.name} has {len(words)} answers: their scores must be [B, {len(words)}], "
            f"not {list(score_BC.shape)}"
        )
    valid_B = np.asarray((score_BC < np.inf).all(axis=1) & (score_BC > -np.inf).any(axis=1))
    score_BC[~valid_B] = 0.0
    best_B = score_BC.argmax(axis=1)
    probability_BC = softmax(score_BC, axis=1)
    if task.grid is None:
        value_B = best_B.astype(np.float64)
    else:
        grid_C = np.array(task.grid.values)
        # a sum by rows, not a matrix product: the last bits do not depend on the batch
        value_B = grid_C[best_B] if mode == "mode" else (probability_BC * grid_C).sum(axis=1)
    value_B[~valid_B] = np.nan
    probability_BC[~valid_B] = np.nan
    said = [words[best] if valid else "" for best, valid in zip(best_B, valid_B, strict=True)]
    return Predictions(value_B, said, probability_BC)


def parse_answer(task: Task, text: str, style: Style = "words") -> float | None:
    """The label's index or the number that a generated text states, or None.

    The text, stripped of white space, must be one of the task's answers, letter for letter: another case, a full stop,
    ``+1.0``, ``-0.0``, ``1`` or ``0.15`` are invalid. Nothing is ever repaired to a label or to 0.
    """
    try:
        index = task.answers(style).index(text.strip())
    except ValueError:
        return None
    return float(index) if task.grid is None else task.grid.values[index]


def parse_answers(task: Task, texts: Sequence[str], style: Style = "words") -> Predictions:
    """Predictions from generated texts, see :func:`parse_answer`."""
    values = [parse_answer(task, text, style) for text in texts]
    return Predictions(np.array([np.nan if v is None else v for v in values], dtype=np.float64), list(texts))
