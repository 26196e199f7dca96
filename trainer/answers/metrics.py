"""All scores of a task's predictions: its metrics, by class, and what the probabilities are worth.

Legend: N samples, C answers of the task. `trainer/metric_table.py` says what each metric is, `docs/metrics.md` defines every
key, with its source. The rules for all:

- An invalid prediction (None, nan, inf) is wrong in every accuracy and F1, and left out of MAE, Corr, R2 and calibration.
- What is undefined is None, never nan and never 0. Metrics are unrounded fractions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast

import numpy as np
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

from trainer.answers.scores import ReliabilityBin, TaskScores
from trainer.metric_table import FAMILIES, INVALID, LARGEST, WeightedMetric, undefined_metric
from trainer.tasks import Task

BINS = 15
_SHOWN = 3

Values = Sequence[float] | Sequence[float | None] | np.ndarray


class MetricError(ValueError):
    """Truth, predictions or probabilities that do not belong together or to the task; the message lists every fault."""


def compute(task: Task, targets: Values, predictions: Values, probabilities: np.ndarray | None = None) -> TaskScores:
    """All metrics of a task as plain numbers, None, lists and dictionaries (JSON-safe).

    Keys: ``n``, ``invalid_rate``, the task's ``metrics``; for classification ``per_class`` and ``confusion``; with
    probabilities ``nll``, and for classification ``ece``, ``ece_adaptive`` and ``brier``.

    Args:
        targets: [N] label indices, or the unrounded truth.
        predictions: [N] label indices or numbers; None, nan and inf are invalid.
        probabilities: [N, C] over the task's answers; rows of invalid predictions are not read.

    Raises:
        MetricError: see there.
    """
    truth_N, guess_N = _numbers(targets), _numbers(predictions)
    p_NC = None if probabilities is None else np.asarray(probabilities, dtype=np.float64)
    valid_N: np.ndarray = np.abs(guess_N) <= LARGEST  # False for nan; more than float32 holds is inf to published code
    _check(task, truth_N, guess_N, valid_N, p_NC)
    out: TaskScores = {"n": len(truth_N), "invalid_rate": float(np.mean(~valid_N)) if len(truth_N) else None}
    own = {key: _defined(metric_of(task, key, truth_N, guess_N).value()) for key in task.metrics}
    out |= cast(TaskScores, own)
    if task.kind == "classification":
        truth_N = truth_N.astype(int)
        guess_N = np.where(valid_N, guess_N, INVALID).astype(int)
        out |= _by_class(task, truth_N, guess_N)
    if p_NC is not None:
        out |= _calibration(task, truth_N[valid_N], guess_N[valid_N], p_NC[valid_N])
    return out


def metric_of(task: Task, key: str, truth_N: np.ndarray, guess_N: np.ndarray) -> WeightedMetric:
    """One metric of a task, for any weights of the samples; see :meth:`trainer.metric_table.Metric.of`.

    It is undefined where the task's numbers give it no meaning (:attr:`trainer.tasks.Task.undefined`).
    """
    if key in task.undefined:
        return undefined_metric(len(truth_N))
    return FAMILIES[task.family].of(key, truth_N, guess_N)


def scalars(scores: Mapping[str, object]) -> dict[str, float | None]:
    """Those of :func:`compute`'s results that are one number, or undefined."""
    return {key: value for key, value in scores.items() if value is None or isinstance(value, (int, float))}


def reliability(
    targets: Values, predictions: Values, probabilities: np.ndarray, bins: int = BINS, adaptive: bool = False
) -> list[ReliabilityBin]:
    """How often predictions are right, by the probability that the model gave them.

    Equal-width bins ``(i/bins, (i+1)/bins]``, empty ones included; or, adaptive, bins between the quantiles of the
    confidence, equal confidences together, empty ones left out. Each bin: `low`, `high`, `n`, and the means `confidence`
    and `accuracy` (None where n is 0). Invalid predictions are left out. Source: Guo et al. 2017; Nguyen & O'Connor 2015.
    """
    truth_N, guess_N, p_NC = _numbers(targets), _numbers(predictions), np.asarray(probabilities, dtype=np.float64)
    valid_N = np.isfinite(guess_N)
    guess_N, hit_N = guess_N[valid_N].astype(int), (guess_N == truth_N)[valid_N]
    confidence_N = p_NC[valid_N][np.arange(len(guess_N)), guess_N]
    inner = np.arange(1, bins) / bins
    if adaptive and len(guess_N):
        inner = np.unique(np.quantile(confidence_N, inner))
    bin_N = np.searchsorted(inner, confidence_N, side="left")
    edges = [0.0, *inner.tolist(), 1.0]
    rows: list[ReliabilityBin] = []
    for i, (low, high) in enumerate(pairwise(edges)):
        here = bin_N == i
        n = int(here.sum())
        if n or not adaptive:
            confidence, accuracy = (float(v[here].mean()) if n else None for v in (confidence_N, hit_N))
            rows.append({"low": low, "high": high, "n": n, "confidence": confidence, "accuracy": accuracy})
    return rows


def calibration_error(rows: Sequence[ReliabilityBin]) -> float | None:
    """ECE = Σ_b n_b / N · |accuracy_b - confidence_b| over the bins of :func:`reliability`; None without samples."""
    total = sum(row["n"] for row in rows)
    gaps = [
        row["n"] * abs(row["accuracy"] - row["confidence"])
        for row in rows
        if row["accuracy"] is not None and row["confidence"] is not None
    ]
    return sum(gaps) / total if total else None


def _by_class(task: Task, truth_N: np.ndarray, guess_N: np.ndarray) -> TaskScores:
    """Precision, recall, F1 and support of each class, and the confusion matrix."""
    classes = list(range(len(task.labels)))
    if len(truth_N) == 0:
        return {}
    columns = precision_recall_fscore_support(truth_N, guess_N, labels=classes, zero_division=np.nan)
    matrix = confusion_matrix(truth_N, guess_N, labels=[*classes, INVALID])
    return {
        "per_class": {
            label: {
                "precision": _defined(columns[0][c]),
                "recall": _defined(columns[1][c]),
                "f1": _defined(columns[2][c]),
                "support": int(columns[3][c]),
            }
            for c, label in enumerate(task.labels)
        },
        "confusion": {
            "labels": list(task.labels),
            "matrix": matrix[:-1, :-1].tolist(),
            "invalid": matrix[:-1, -1].tolist(),
        },
    }


def _calibration(task: Task, truth_N: np.ndarray, guess_N: np.ndarray, p_NC: np.ndarray) -> TaskScores:
    answer_N = np.array([task.answer_index(t) for t in truth_N], dtype=int)
    nll = None
    if len(answer_N):
        p_NC = p_NC / p_NC.sum(axis=1, keepdims=True)
        nll = float(log_loss(answer_N, p_NC, labels=range(p_NC.shape[1])))
    if task.kind == "regression":
        return {"nll": nll}
    hot_NC = np.eye(p_NC.shape[1])[answer_N]
    return {
        "ece": calibration_error(reliability(truth_N, guess_N, p_NC)),
        "ece_adaptive": calibration_error(reliability(truth_N, guess_N, p_NC, adaptive=True)),
        "nll": nll,
        "brier": float(((p_NC - hot_NC) ** 2).sum(axis=1).mean()) if len(answer_N) else None,
    }


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _numbers(values: Values) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _check(task: Task, truth_N: np.ndarray, guess_N: np.ndarray, valid_N: np.ndarray, p_NC: np.ndarray | None) -> None:
    faults = []
    if truth_N.shape != guess_N.shape or truth_N.ndim != 1:
        raise MetricError(f"{task.name}: truth of shape {truth_N.shape} against predictions of {guess_N.shape}")
    if not np.isfinite(truth_N).all():
        faults.append(f"truth that is not finite: {_first(truth_N, ~np.isfinite(truth_N))}")
    if task.kind == "classification":
        count = len(task.labels)
        for name, values_N, there_N in (("truth", truth_N, np.isfinite(truth_N)), ("prediction", guess_N, valid_N)):
            bad = there_N & ~np.isin(values_N, np.arange(count))
            if bad.any():
                faults.append(f"{name} that is not a label index 0 … {count - 1}: {_first(values_N, bad)}")
    if p_NC is not None:
        shape = (len(truth_N), len(task.answers()))
        if p_NC.shape != shape:
            faults.append(f"probabilities of shape {p_NC.shape}, not {shape}")
        else:
            good = (p_NC >= 0).all(axis=1) & (np.abs(p_NC.sum(axis=1) - 1) < 1e-3)
            if (valid_N & ~good).any():
                faults.append(f"probabilities that are negative or do not sum to 1: {_first(p_NC, valid_N & ~good)}")
    if faults:
        raise MetricError("\n  ".join([f"{task.name}: {len(faults)} fault(s)", *faults]))


def _first(values: np.ndarray, bad_N: np.ndarray) -> str:
    places = np.flatnonzero(bad_N)
    first = ", ".join(f"{values[i].tolist()} at {i}" for i in places[:_SHOWN])
    return first + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")
