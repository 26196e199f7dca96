"""Baselines over the folds of a cross-validation: each fold as a dataset of its own, and the figures of all folds together.

Shapes: N samples of all folds, C answers of the task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from trainer.answers.metrics import compute
from trainer.answers.scores import TaskScores
from trainer.baselines.baseline import SPLITS, Baseline, BaselineError, Spec, data_faults
from trainer.data.dataset import PreparedDataset, open_dataset
from trainer.data.folds import FoldChoice, find_fold, fold_labels

Valid = Literal["next"] | float


@dataclass(frozen=True)
class FoldedScores:
    """A baseline's scores on the folds of a cross-validation.

    `folds`: fold -> split -> metrics. `mean` and `sd`: split -> metric -> over the folds, n - 1; None where a fold has none.
    `pooled`: split -> the metrics of all folds' predictions together, each sample once; a split in which folds share samples has none.
    """

    folds: dict[str, dict[str, TaskScores]]
    mean: dict[str, dict[str, float | None]]
    sd: dict[str, dict[str, float | None]]
    pooled: dict[str, TaskScores]


def fold_faults(data: PreparedDataset, fold: str | None) -> list[str]:
    """What is wrong with asking for a fold of the dataset, which was opened without one."""
    if fold is None:
        return []
    if not data.folds:
        return [f"{data.path} has no folds: leave --fold out, or prepare it from samples with a fold (docs/data.md)"]
    try:
        find_fold(fold, data.folds)
    except ValueError as error:
        return [f"--fold: {data.path}: {error}"]
    return []


def open_folds(
    data: PreparedDataset, fold: str | None = None, valid: Valid = "next", seed: int = 0
) -> dict[str, PreparedDataset]:
    """The dataset cut into train, valid and test for `fold`, or for every fold, by its name; see :func:`trainer.data.folds.assign_folds`.

    Raises:
        BaselineError: it has no folds, or not this one.
        DataError: nothing would be left to train on.
    """
    if faults := fold_faults(data, fold):
        raise BaselineError("\n".join(faults))
    names = data.folds if fold is None else [find_fold(fold, data.folds)]
    return {
        name: open_dataset(data.path, choice=FoldChoice(name, valid, seed), question=data.question) for name in names
    }


def check_folds(datasets: Mapping[str, PreparedDataset], wanted: Sequence[Spec]) -> None:
    """Refuse folds on which the baselines cannot be fitted.

    Raises:
        BaselineError: every reason of every fold in one message.
    """
    faults = [f"fold {name}: {fault}" for name, data in datasets.items() for fault in data_faults(data, wanted)]
    if faults:
        path = next(iter(datasets.values())).path
        raise BaselineError("\n  ".join([f"no baseline of {path}: {len(faults)} fault(s)", *faults]))


def fold_folders(runs: Path, stem: str, folds: Iterable[str], every: Sequence[str]) -> dict[str, Path]:
    """Fold -> the folder of its baseline, named as a sweep names the runs of folds; `every` are all folds of the dataset."""
    labels = fold_labels(every)
    return {fold: runs / f"{stem}-{labels[fold]}" for fold in folds}


def over_folds(baselines: Mapping[str, Baseline]) -> FoldedScores:
    """The scores of one baseline on several folds, by fold; their means and deviations, and those of all predictions together."""
    folds = {
        name: {split: scores[one.task.name] for split, scores in one.scores.items()} for name, one in baselines.items()
    }
    mean: dict[str, dict[str, float | None]] = {}
    sd: dict[str, dict[str, float | None]] = {}
    pooled: dict[str, TaskScores] = {}
    for split in SPLITS:
        of_folds = [cast(Mapping[str, object], scores[split]) for scores in folds.values()]
        mean[split], sd[split] = {}, {}
        for key, first in of_folds[0].items():
            if key != "n" and (first is None or isinstance(first, (int, float))):
                values = [scores[key] for scores in of_folds]
                known = [float(value) for value in values if isinstance(value, (int, float))]
                whole = len(known) == len(values)
                mean[split][key] = float(np.mean(known)) if whole else None
                sd[split][key] = float(np.std(known, ddof=1)) if whole and len(known) > 1 else None
        together = _pooled(list(baselines.values()), split)
        if together is not None:
            pooled[split] = together
    return FoldedScores(folds, mean, sd, pooled)


def _pooled(baselines: Sequence[Baseline], split: str) -> TaskScores | None:
    """The metrics of the predictions of all folds, in the order of their ids; None where a sample is in several folds."""
    rows = sorted((row for one in baselines for row in one.rows[split]), key=lambda row: row.id)
    if len({row.id for row in rows}) < len(rows):
        return None
    p_NC = [row.answer.probabilities for row in rows]
    return compute(
        baselines[0].task,
        [row.target for row in rows],
        [row.answer.value for row in rows],
        None if any(p_C is None for p_C in p_NC) else np.array(p_NC, dtype=np.float64),
    )
