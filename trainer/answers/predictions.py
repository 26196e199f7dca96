"""Log-probabilities of all answers, or generated texts, as predictions.

Legend: B samples, C answers of the task (of a multi-label task two for each of its L labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import softmax
from torch import Tensor

from trainer.answers.tree import AnswerError
from trainer.label_sets import encode_sets
from trainer.tasks import AnswerStyle, Task

Mode = Literal["expectation", "mode"]


@dataclass
class Predictions:
    """Predictions of B samples.

    `value_B` (float64) is the label's index, the number or the set of labels (:mod:`trainer.label_sets`), nan where there is no
    valid answer. `answers` is the text behind it: the most probable answer when answers were scored (of a regression too, whose
    value may be the expectation), the generated text as it came otherwise. `probability_BC` (float64) is None for generated
    text; of a multi-label task it is `[B, L]`, the probability that each label applies.
    """

    value_B: np.ndarray
    answers: list[str]
    probability_BC: np.ndarray | None = None

    @property
    def valid_B(self) -> np.ndarray:
        return np.asarray(np.isfinite(self.value_B))

    def __len__(self) -> int:
        return len(self.answers)


def predict(
    task: Task, logprob_BC: Tensor | np.ndarray, style: AnswerStyle = "words", mode: Mode = "expectation"
) -> Predictions:
    """Predictions from the log-probabilities of all answers, end token included.

    p = softmax over the C answers, in float64. Classification: the most probable label. Regression: Σ_c p_c v_c over
    the grid's numbers v, unrounded; with ``mode="mode"`` the most probable number. Ties go to the first answer. Of a multi-label
    task the softmax runs over each label's two answers, and the labels with p ≥ 0.5 are predicted. Scores
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
    if task.kind == "multilabel":
        return _predict_sets(task, score_BC, valid_B)
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
    answers = [words[best] if valid else "" for best, valid in zip(best_B, valid_B, strict=True)]
    return Predictions(value_B, answers, probability_BC)


def _predict_sets(task: Task, score_BC: np.ndarray, valid_B: np.ndarray) -> Predictions:
    pair_BL2 = score_BC.reshape(len(score_BC), len(task.labels), 2)
    with np.errstate(invalid="ignore"):  # a label of which neither answer is possible
        possible_BL = np.asarray((pair_BL2 > -np.inf).any(axis=2))
    valid_B = valid_B & possible_BL.all(axis=1)
    pair_BL2[~valid_B] = 0.0
    probability_BL = softmax(pair_BL2, axis=2)[..., 0]
    value_B = encode_sets(probability_BL >= 0.5)
    value_B[~valid_B] = np.nan
    probability_BL[~valid_B] = np.nan
    answers = [str(task.word(value)) if valid else "" for value, valid in zip(value_B, valid_B, strict=True)]
    return Predictions(value_B, answers, probability_BL)


def parse_answer(task: Task, text: str, style: AnswerStyle = "words") -> float | None:
    """The label's index or the number that a generated text states, or None.

    The text, stripped of white space, must be one of the task's answers, letter for letter: another case, a full stop,
    ``+1.0``, ``-0.0``, ``1`` or ``0.15`` are invalid. Nothing is ever repaired to a label or to 0.
    """
    try:
        index = task.answers(style).index(text.strip())
    except ValueError:
        return None
    return float(index) if task.grid is None else task.grid.values[index]


def parse_answers(task: Task, texts: Sequence[str], style: AnswerStyle = "words") -> Predictions:
    """Predictions from generated texts, see :func:`parse_answer`."""
    values = [parse_answer(task, text, style) for text in texts]
    return Predictions(np.array([np.nan if v is None else v for v in values], dtype=np.float64), list(texts))
