"""What scoring a task's predictions gives, as types; JSON-safe, and None where a number is undefined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, cast


class ClassScores(TypedDict):
    """One class; None where undefined."""

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


class Confusion(TypedDict):
    """Counts: `matrix` [truth][answer] in the order of `labels`, `invalid` answers by truth."""

    labels: list[str]
    matrix: list[list[int]]
    invalid: list[int]


class TaskScores(TypedDict, total=False):
    """The metrics of one task on one split. The task's own metrics stand beside these keys: read them with ``get``."""

    n: int
    invalid_rate: float | None
    per_class: dict[str, ClassScores]
    confusion: Confusion
    nll: float | None
    ece: float | None
    ece_adaptive: float | None
    brier: float | None
    expected_acc: float | None
    kl: float | None


class ReliabilityBin(TypedDict):
    """A bin of predictions by the probability given to them; the means are None where `n` is 0."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


SplitScores = dict[str, TaskScores]  # task -> its scores, on one split


def metric_value(scores: TaskScores, key: str) -> float | None:
    """A metric of the task by its key.

    Raises:
        KeyError: it was not computed.
    """
    return cast(Mapping[str, float | None], scores)[key]
