"""What a run's predictions say about one task, as data: `analysis` makes it, tables, pictures and pages show it.

Legend: N samples, E experts. What is undefined is None.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from trainer.answers.calibration import Calibration
from trainer.answers.scores import ReliabilityBin, TaskScores
from trainer.results.records import TaskRobustness
from trainer.run.expert_load import LoadBalance
from trainer.tasks import Task


@dataclass
class Example:
    """A sample and what the model answered. `probabilities` holds the most probable answers, most probable first."""

    id: str
    label: str | float
    prediction: str | float | None
    answer: str | None
    valid: bool
    # 1 - p(truth), |prediction - truth|, the mean of 1 - p(truth) over labels where samples have several; 0 and 1 for p where there
    # are no probabilities; inf when invalid
    error: float
    probabilities: list[tuple[str, float]]
    expert: dict[str, float]
    modality: dict[str, float]
    kind: str | None = None
    text: str | None = None


@dataclass
class GateGroup:
    """Mean gate weights of `n` samples; `modality` is Σ_e expert_e · modality_em, from the means over slots."""

    name: str
    n: int
    expert: dict[str, float]
    modality: dict[str, float]


@dataclass
class Gates:
    """Gate weights of a split: over all samples, inside each expert, and by group ("class", "kind")."""

    all: GateGroup
    inside: dict[str, dict[str, float]]  # expert -> modality -> mean weight
    expert_NE: np.ndarray
    groups: dict[str, list[GateGroup]] = field(default_factory=dict)


@dataclass(frozen=True)
class Robustness:
    """The task's part of robustness.json, with the split it was measured on and the name of the reference run."""

    measured: TaskRobustness
    split: str
    run: str | None


@dataclass(frozen=True)
class BaselineScores:
    """A baseline of the task's data: its name, its folder's name, and its metrics by split."""

    name: str
    folder: str
    scores: dict[str, TaskScores]


@dataclass
class TaskResults:
    """One task of a run. What is computed from predictions is None where there are none."""

    task: Task
    scores: dict[str, TaskScores]  # split -> metrics
    split: str | None = None  # the split that everything below describes
    rows: pd.DataFrame | None = None
    constant: str | None = None  # what the constant answer is
    constant_scores: TaskScores | None = None
    baselines: list[BaselineScores] = field(default_factory=list)  # those that lie beside the run
    reliability: list[ReliabilityBin] | None = None
    coverage: list[tuple[float, float]] | None = None
    gates: Gates | None = None
    calibration: Calibration | None = None  # also None where validation has no probabilities
    balance: dict[str, LoadBalance] = field(default_factory=dict)  # split -> how the gate shares its weight
    robustness: Robustness | None = None
    warnings: list[str] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)

    @property
    def split_scores(self) -> TaskScores:
        """The metrics on `split`; empty where there are none."""
        return self.scores.get(self.split or "", TaskScores())
