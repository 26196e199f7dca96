"""The JSON files that results read, as types: metrics and robustness.

Nothing is checked here: a file of a run in progress or of an older version may lack any key. ``run.json`` has its type in
:mod:`trainer.run.record`, ``record.json`` of a dataset in :mod:`trainer.data.preparation.record`.
"""

from __future__ import annotations

from typing import TypedDict


class DifferenceRecord(TypedDict):
    """A metric less the reference's, with its interval; `worse`: all of the interval is on the worse side of 0."""

    value: float | None
    low: float | None
    high: float | None
    worse: bool


class PointRecord(TypedDict):
    """The scores with damage at one rate."""

    rate: float
    scores: dict[str, float | None]
    against: DifferenceRecord | None


class CurveRecord(TypedDict):
    """One kind of damage (`mode`) on one modality, or on several joined by ``+``, by rate."""

    mode: str
    modality: str
    points: list[PointRecord]


class TaskRobustness(TypedDict):
    """A task's curves of its selecting metric; `reference` is the reference run's value."""

    metric: str
    reference: float | None
    curves: list[CurveRecord]


class RobustnessRecord(TypedDict, total=False):
    """``robustness.json``; `reference` is the name of the run that the curves are compared with."""

    checkpoint: str
    split: str
    rates: list[float]
    modes: list[str]
    modalities: list[str]
    seed: int
    reference: str | None
    tasks: dict[str, TaskRobustness]


def number_or_none(value: object) -> float | None:
    """A JSON value as a number; None for what is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
