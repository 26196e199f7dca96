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
from scipy.special import rel_entr

from trainer.answers.scores import ClassScores, ReliabilityBin, TaskScores
from trainer.label_sets import decode_sets
from trainer.metric_formulas import INVALID
from trainer.metric_table import FAMILIES, LARGEST, WeightedMetric, undefined_metric
from trainer.tasks import Task

BINS = 15
_SHOWN = 3
_SMALLEST = 1e-300  # probability; 0 has no logarithm

Values = Sequence[float] | Sequence[float | None] | np.ndarray


class MetricError(ValueError):
    """Truth, predictions or probabilities that do not belong together or to the task; the message lists every fault."""


def compute(
    task: Task,
    targets: Values,
    predictions: Values,
    probabilities: np.ndarray | None = None,
    shares: np.ndarray | None = None,
) -> TaskScores:
    """All metrics of a task as plain numbers, None, lists and dictionaries (JSON-safe).

    Keys: ``n``, ``invalid_rate``, the task's ``metrics``; for classification ``per_class`` and ``confusion``, for several labels a
    sample ``per_class``; with probabilities ``nll``, and where there are labels ``brier``, for classification ``ece`` and
    ``ece_adaptive``; with shares ``expected_acc``, and with both ``kl``.

    Args:
        targets: [N] label indices, the unrounded truth, or sets of labels (:mod:`trainer.label_sets`).
        predictions: [N] label indices, numbers or sets; None, nan and inf are invalid.
        probabilities: [N, C] over the task's answers, or that each label of a multi-label task applies; rows of invalid predictions
            are not read.
        shares: [N, C] of annotators that gave each label; None where no sample has them.

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
        if shares is not None:
            out |= _of_shares(np.asarray(shares, dtype=np.float64), guess_N, p_NC, valid_N)
    if task.kind == "multilabel":
        out |= _by_label(task, truth_N, guess_N)
    if p_NC is not None and task.kind == "multilabel":
        out |= _label_calibration(task, truth_N[valid_N], p_NC[valid_N])
    elif p_NC is not None:
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
    from sklearn.metrics import (
        confusion_matrix,
        precision_recall_fscore_support,
    )  # slow to import, and predict needs it not

    columns = precision_recall_fscore_support(truth_N, guess_N, labels=classes, zero_division=np.nan)
    matrix = confusion_matrix(truth_N, guess_N, labels=[*classes, INVALID])
    return {
        "per_class": _class_scores(task, *columns),
        "confusion": {
            "labels": list(task.labels),
            "matrix": matrix[:-1, :-1].tolist(),
            "invalid": matrix[:-1, -1].tolist(),
        },
    }


def _of_shares(share_NC: np.ndarray, guess_N: np.ndarray, p_NC: np.ndarray | None, valid_N: np.ndarray) -> TaskScores:
    """Scores against the shares q of annotators.

    - expected_acc: mean of q of the predicted label, the accuracy expected of an annotator drawn at random; 0 where invalid.
    - kl: mean of KL(q ‖ p) = Σ_c q_c log(q_c / p_c) over valid predictions.
    """
    if not len(share_NC):
        return {"expected_acc": None, **({} if p_NC is None else {"kl": None})}
    rows_N = np.arange(len(share_NC))
    hit_N = np.where(valid_N, share_NC[rows_N, np.where(valid_N, guess_N, 0)], 0.0)
    out: TaskScores = {"expected_acc": float(hit_N.mean())}
    if p_NC is not None:
        p_NC = np.clip(p_NC[valid_N] / p_NC[valid_N].sum(axis=1, keepdims=True), _SMALLEST, 1)
        out["kl"] = _defined(float(rel_entr(share_NC[valid_N], p_NC).sum(axis=1).mean())) if len(p_NC) else None
    return out


def _by_label(task: Task, truth_N: np.ndarray, guess_N: np.ndarray) -> TaskScores:
    """Precision, recall, F1 and support of each label; an invalid prediction has none."""
    if len(truth_N) == 0:
        return {}
    from sklearn.metrics import precision_recall_fscore_support

    member_NL, guess_NL = (decode_sets(values_N, len(task.labels)) for values_N in (truth_N, guess_N))
    return {
        "per_class": _class_scores(task, *precision_recall_fscore_support(member_NL, guess_NL, zero_division=np.nan))
    }


def _label_calibration(task: Task, truth_N: np.ndarray, p_NL: np.ndarray) -> TaskScores:
    """Means over samples and labels: of the binary cross-entropy, and of the squared error of the probability."""
    if not len(truth_N):
        return {"nll": None, "brier": None}
    member_NL = decode_sets(truth_N, len(task.labels))
    p_true_NL = np.clip(np.where(member_NL, p_NL, 1 - p_NL), _SMALLEST, 1)
    return {"nll": float(-np.log(p_true_NL).mean()), "brier": float(((p_NL - member_NL) ** 2).mean())}


def _class_scores(
    task: Task, precision_C: np.ndarray, recall_C: np.ndarray, f1_C: np.ndarray, support_C: np.ndarray
) -> dict[str, ClassScores]:
    return {
        label: {
            "precision": _defined(precision_C[c]),
            "recall": _defined(recall_C[c]),
            "f1": _defined(f1_C[c]),
            "support": int(support_C[c]),
        }
        for c, label in enumerate(task.labels)
    }


def _calibration(task: Task, truth_N: np.ndarray, guess_N: np.ndarray, p_NC: np.ndarray) -> TaskScores:
    answer_N = np.array([task.answer_index(t) for t in truth_N], dtype=int)
    nll = None
    if len(answer_N):
        from sklearn.metrics import log_loss

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
    if task.kind == "multilabel":
        for name, values_N, there_N in (("truth", truth_N, np.isfinite(truth_N)), ("prediction", guess_N, valid_N)):
            bad = there_N & ~((values_N >= 0) & (values_N < 2.0 ** len(task.labels)) & (values_N == np.floor(values_N)))
            if bad.any():
                faults.append(f"{name} that is not a set of labels: {_first(values_N, bad)}")
    if p_NC is not None:
        shape = (len(truth_N), task.probabilities)
        if p_NC.shape != shape:
            faults.append(f"probabilities of shape {p_NC.shape}, not {shape}")
        elif task.kind == "multilabel":
            if (bad := valid_N & ~((p_NC >= 0) & (p_NC <= 1)).all(axis=1)).any():
                faults.append(f"probabilities outside 0 … 1: {_first(p_NC, bad)}")
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
