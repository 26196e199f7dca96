"""Predictions of a split: what the model answered to each sample, their table, and the file.

Legend: C answers of the task, E experts, M modalities, B samples, K pseudo tokens, H hidden size of the backbone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.tasks import Task

if TYPE_CHECKING:  # baselines write tables without loading torch
    import pandas as pd
    from torch import Tensor

    from trainer.answers.predictions import Predictions
    from trainer.batch import Sample

COLUMNS = (
    "task",
    "id",
    "label",
    "prediction",
    "valid",
    "answer",
    "probabilities",
    "gate_expert",
    "gate_modality",
    "kind",
    "shares",
)
"""Columns of the file, in order; the table of :func:`predictions_table` has `target` and `value` behind them."""

Gates = tuple[list[float], list[list[float]]]  # means over the slots: [E], [E, M]


@dataclass(frozen=True)
class SampleAnswer:
    """What the model answered to one sample.

    `value` is the label's index or the number, nan where the answer is invalid; `prediction` is the label's word or the
    number, None where invalid (of a multi-label task the set's number, and its labels); `answer` is the text behind it.
    Probabilities [C], of the task's answers or of its labels, are None for generated or invalid answers,
    gate weights [E] and [E, M] without a fusion network and for generated answers, pseudo tokens [K, H] (float32) where nobody asks for
    them too.
    """

    value: float
    prediction: str | float | None
    valid: bool
    answer: str
    probabilities: list[float] | None
    gate_expert: list[float] | None = None
    gate_modality: list[list[float]] | None = None
    pseudo_KH: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PredictionRow:
    """A sample with its truth, `label` as a word or number and `target` as an index or number, and the answer to it.

    `shares` of annotators that gave each label are None where all gave one.
    """

    task: str
    id: str
    label: str | float
    kind: str | None
    target: float
    answer: SampleAnswer
    shares: list[float] | None = None

    @classmethod
    def of(cls, task: Task, sample: Sample, answer: SampleAnswer) -> PredictionRow:
        shares = None if sample.share_C is None else sample.share_C.tolist()
        return cls(task.name, sample.id, task.word(sample.target), sample.kind, sample.target, answer, shares)


def sample_answers(
    task: Task,
    predictions: Predictions,
    gates: Sequence[Gates] | None = None,
    pseudo_BKH: np.ndarray | None = None,
) -> list[SampleAnswer]:
    """The answers to a batch, one a sample."""
    answers = []
    for b, (value, valid) in enumerate(zip(predictions.value_B, predictions.valid_B, strict=True)):
        prediction = task.word(value) if valid else None
        probability_BC = predictions.probability_BC
        probabilities = probability_BC[b].tolist() if probability_BC is not None and valid else None
        expert, modality = (None, None) if gates is None else gates[b]
        pseudo_KH = None if pseudo_BKH is None else pseudo_BKH[b].copy()
        text = predictions.answers[b]
        answers.append(SampleAnswer(value, prediction, bool(valid), text, probabilities, expert, modality, pseudo_KH))
    return answers


def mean_gates(expert_BKE: Tensor | None, modality_BKEM: Tensor | None) -> list[Gates] | None:
    """The gate weights of each sample, averaged over the K slots; None without a fusion network."""
    if expert_BKE is None or modality_BKEM is None:
        return None
    expert_BE, modality_BEM = (weight.float().mean(1).cpu().tolist() for weight in (expert_BKE, modality_BKEM))
    return list(zip(expert_BE, modality_BEM, strict=True))


def label_shares(task: Task, target_N: np.ndarray, shares: Sequence[object]) -> np.ndarray | None:
    """`[N, C]`: the shares of annotators that gave each label, 1 for a label that all gave; None where no row has any."""
    given = [np.asarray(share, dtype=float) if isinstance(share, (list, np.ndarray)) else None for share in shares]
    if task.kind != "classification" or all(share is None for share in given):
        return None
    share_NC: np.ndarray = np.eye(len(task.labels))[target_N.astype(int)]
    for i, share in enumerate(given):
        if share is not None:
            share_NC[i] = share
    return share_NC


def predictions_table(rows: Iterable[PredictionRow]) -> pd.DataFrame:
    """One row a sample, sorted by task and id."""
    import pandas as pd  # slow to import, and predict needs no table

    columns = [*COLUMNS, "target", "value"]
    table = pd.DataFrame([{**vars(row), **vars(row.answer)} for row in rows], columns=columns)
    return table.sort_values(["task", "id"], kind="stable", ignore_index=True)


def write_predictions(table: pd.DataFrame, path: Path) -> None:
    """The table as parquet without `target` and `value`; columns that no row fills are left out."""
    write_table(table.drop(columns=["target", "value"]).dropna(axis="columns", how="all"), path)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """A table with labels and predictions as parquet, under a temporary name first.

    Labels and predictions are words or numbers; where a run has tasks of both kinds they are all written as text.
    """
    table = table.copy(deep=False)
    for column in ("label", "prediction"):
        if column in table and table[column].map(type).nunique() > 1:
            table[column] = table[column].map(lambda v: v if v is None or isinstance(v, str) else repr(v))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    table.to_parquet(temporary, index=False)
    temporary.replace(path)
