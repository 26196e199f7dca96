"""The JSON files of a run folder as types: their keys, and what stands behind each. A key may be absent in older runs.

Nothing is checked here: a file of a run in progress or of another version may lack any key.
"""

from __future__ import annotations

from typing import TypedDict


class GitRecord(TypedDict, total=False):
    """The commit that the run's code was at; `changed`: with local changes on top."""

    commit: str | None
    changed: bool | None


class MlflowRecord(TypedDict):
    """The store's address, and the run's id there."""

    uri: str
    run_id: str


class RunRecord(TypedDict, total=False):
    """``run.json``. Times are ISO 8601; `data` is task -> fingerprint of its dataset."""

    state: str
    failure: str | None
    started: str
    ended: str | None
    pid: int
    host: str
    tasks: list[str]
    data: dict[str, str]
    steps: int
    seed: int
    world: int
    zero: int
    precision: str
    device: str
    platform: str
    base: str
    command: list[str]
    versions: dict[str, str]
    git: GitRecord
    mlflow: MlflowRecord


class TargetStatistics(TypedDict):
    """The truths of a regression split."""

    mean: float | None
    std: float | None
    min: float | None
    max: float | None


class SplitStatistics(TypedDict, total=False):
    """One split of a prepared dataset; `labels` is label (or sign) -> samples."""

    n: int
    labels: dict[str, int]
    target: TargetStatistics


class DatasetRecord(TypedDict):
    """``record.json`` of a prepared dataset, as far as results need it; `task` is the task's own definition."""

    fingerprint: str
    task: dict[str, object]
    splits: dict[str, SplitStatistics]
    widths: dict[str, int]


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


class ReliabilityBin(TypedDict):
    """A bin of predictions by the probability given to them; the means are None where `n` is 0."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


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
    reference: str | None
    tasks: dict[str, TaskRobustness]


def number_or_none(value: object) -> float | None:
    """A JSON value as a number; None for what is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
