"""The benchmarks' metrics as their published code computes them, and what every prediction is worth beside them.

Legend: N samples, C answers of the task. `docs/metrics.md` defines every key, with its source. The rules for all:

- An invalid prediction (None, nan, inf) is wrong in every accuracy and F1, and left out of MAE, Corr, R2 and calibration.
- What is undefined is None, never nan and never 0. Metrics are unrounded fractions.
- Numbers are put into classes in float32, as published code does: the 0.1 of a float32 label is no more than 0.1 there,
  but is more than it in float64. Sums run in float64.

Sources: MOSEI and MOSI: thuiar/MMSA, `src/MMSA/utils/metricsTop.py`. SIMS v2: thuiar/ch-sims-v2, `utils/metricsTop.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from scipy.stats import pearsonr
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    mean_absolute_error,
    precision_recall_fscore_support,
    r2_score,
)

from trainer.tasks import Task

INVALID = -100  # the class of an invalid prediction: no truth has it
BINS = 15
_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 3

Formula = Literal["accuracy", "weighted F1", "macro F1", "MAE", "Corr", "R2"]
Rule = Callable[[np.ndarray], np.ndarray]  # float32 numbers to classes, or to whether they count


def _cut(*edges: float) -> Rule:
    """Classes between `edges`, which belong to the class below them."""
    cuts = np.array(edges, dtype=np.float32)
    return lambda x: np.digitize(x, cuts, right=True)


def _rounded(limit: int) -> Rule:
    return lambda x: np.round(np.clip(x, -limit, limit))  # np.round: half to even


def _nonzero(x: np.ndarray) -> np.ndarray:
    return x != 0


def _positive(x: np.ndarray) -> np.ndarray:
    return x > 0


def _not_negative(x: np.ndarray) -> np.ndarray:
    return x >= 0


def _weak(x: np.ndarray) -> np.ndarray:
    return np.abs(x) <= np.float32(0.4)


# family -> metric -> formula, how numbers become classes, and by which truths a sample counts (None: all)
_DEFINITIONS: dict[str, dict[str, tuple[Formula, Rule | None, Rule | None]]] = {
    "emotion": {
        "acc": ("accuracy", None, None),
        "wf1": ("weighted F1", None, None),
        "macro_f1": ("macro F1", None, None),
    },
    "mosei": {
        "has0_acc": ("accuracy", _not_negative, None),
        "has0_f1": ("weighted F1", _not_negative, None),
        "non0_acc": ("accuracy", _positive, _nonzero),
        "non0_f1": ("weighted F1", _positive, _nonzero),
        "acc7": ("accuracy", _rounded(3), None),
        "acc5": ("accuracy", _rounded(2), None),
        "mae": ("MAE", None, None),
        "corr": ("Corr", None, None),
    },
    "sims": {
        "acc2": ("accuracy", _cut(0.0), None),
        "acc3": ("accuracy", _cut(-0.1, 0.1), None),
        "acc5": ("accuracy", _cut(-0.7, -0.1, 0.1, 0.7), None),
        "f1": ("weighted F1", _cut(0.0), None),
        "weak_acc2": ("accuracy", _cut(0.0), _weak),
        "mae": ("MAE", None, None),
        "corr": ("Corr", None, None),
        "r2": ("R2", None, None),
    },
}

Values = Sequence[float] | Sequence[float | None] | np.ndarray


class MetricError(ValueError):
    """Truth, predictions or probabilities that do not belong together or to the task; the message lists every fault."""


def compute(
    task: Task, targets: Values, predictions: Values, probabilities: np.ndarray | None = None
) -> dict[str, Any]:
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
    valid_N: np.ndarray = np.abs(guess_N) <= _LARGEST  # False for nan; more than float32 holds is inf to published code
    _check(task, truth_N, guess_N, valid_N, p_NC)
    out: dict[str, Any] = {"n": len(truth_N), "invalid_rate": float(np.mean(~valid_N)) if len(truth_N) else None}
    out |= {name: _value(ingredients(task, name, truth_N, guess_N)) for name in task.metrics}
    if task.kind == "classification":
        truth_N = truth_N.astype(int)
        guess_N = np.where(valid_N, guess_N, INVALID).astype(int)
        out |= _emotion(task, truth_N, guess_N)
    if p_NC is not None:
        out |= _calibration(task, truth_N[valid_N], guess_N[valid_N], p_NC[valid_N])
    return out


@dataclass(frozen=True)
class Ingredients:
    """What one metric is computed from: `formula` over truth and prediction of the samples that `counted_N` names.

    Of an accuracy or F1 both are classes, `classes` those that F1 averages over, and an invalid prediction is INVALID.
    Of MAE, Corr and R2 they are numbers, and invalid predictions are not counted. What is not counted has no meaning.
    """

    formula: Formula
    truth_N: np.ndarray
    guess_N: np.ndarray
    counted_N: np.ndarray
    classes: int = 0


def ingredients(task: Task, metric: str, truth_N: np.ndarray, guess_N: np.ndarray) -> Ingredients:
    """The one place that says what each metric of a task is: which samples, which classes, which formula.

    Args:
        truth_N: label indices, or the unrounded truth.
        guess_N: label indices or numbers; nan, and what float32 cannot hold, is invalid.
    """
    formula, rule, subset = _DEFINITIONS[task.family][metric]
    valid_N: np.ndarray = np.abs(guess_N) <= _LARGEST
    if task.family == "sims":
        truth_N, guess_N = np.clip(truth_N, -1, 1), np.clip(guess_N, -1, 1)
    counted_N = np.ones(len(truth_N), dtype=bool) if subset is None else subset(truth_N.astype(np.float32))
    if rule is None and task.kind == "regression":
        return Ingredients(formula, truth_N, guess_N, counted_N & valid_N)
    classes = len(task.labels) or 2
    return Ingredients(formula, *_classes(truth_N, guess_N, valid_N, rule or (lambda x: x)), counted_N, classes)


def primary(task: Task, metrics: Mapping[str, Any]) -> float | None:
    """The metric that selects a checkpoint of `task`, None where it is undefined."""
    return metrics[task.select]


def better(task: Task, a: float | None, b: float | None) -> bool:
    """Whether the selecting metric `a` beats `b`: strictly, and what is undefined (None, nan) beats nothing."""
    if a is None or np.isnan(a):
        return False
    if b is None or np.isnan(b):
        return True
    return a > b if task.maximise else a < b


def reliability(
    targets: Values, predictions: Values, probabilities: np.ndarray, bins: int = BINS, adaptive: bool = False
) -> list[dict[str, Any]]:
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
    rows: list[dict[str, Any]] = []
    for i, (low, high) in enumerate(pairwise(edges)):
        here = bin_N == i
        n = int(here.sum())
        if n or not adaptive:
            confidence, accuracy = (float(v[here].mean()) if n else None for v in (confidence_N, hit_N))
            rows.append({"low": low, "high": high, "n": n, "confidence": confidence, "accuracy": accuracy})
    return rows


def calibration_error(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """ECE = Σ_b n_b / N · |accuracy_b - confidence_b| over the bins of :func:`reliability`; None without samples."""
    total = sum(row["n"] for row in rows)
    gaps = (row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows if row["n"])
    return sum(gaps) / total if total else None


def _emotion(task: Task, truth_N: np.ndarray, guess_N: np.ndarray) -> dict[str, Any]:
    """What is told of a classification beside its metrics, by class."""
    classes = list(range(len(task.labels)))
    if len(truth_N) == 0:
        return {}
    columns = precision_recall_fscore_support(truth_N, guess_N, labels=classes, zero_division=np.nan)
    names = ("precision", "recall", "f1")
    out: dict[str, Any] = {}
    out["per_class"] = {
        label: {name: _defined(column[c]) for name, column in zip(names, columns, strict=False)}
        | {"support": int(columns[3][c])}
        for c, label in enumerate(task.labels)
    }
    matrix = confusion_matrix(truth_N, guess_N, labels=[*classes, INVALID])
    out["confusion"] = {
        "labels": list(task.labels),
        "matrix": matrix[:-1, :-1].tolist(),
        "invalid": matrix[:-1, -1].tolist(),
    }
    return out


def _calibration(task: Task, truth_N: np.ndarray, guess_N: np.ndarray, p_NC: np.ndarray) -> dict[str, float | None]:
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


def _value(of: Ingredients) -> float | None:
    truth, guess = of.truth_N[of.counted_N], of.guess_N[of.counted_N]
    if of.formula in ("weighted F1", "macro F1"):
        return _f1(truth, guess, list(range(of.classes)), of.formula.split()[0])
    return {"accuracy": _accuracy, "MAE": _mae, "Corr": _corr, "R2": _r2}[of.formula](truth, guess)


def _classes(
    truth_N: np.ndarray, guess_N: np.ndarray, valid_N: np.ndarray, rule: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction as classes by `rule`, which sees float32."""
    out_N = np.full(len(guess_N), INVALID)
    out_N[valid_N] = rule(guess_N[valid_N].astype(np.float32)).astype(int)
    return rule(truth_N.astype(np.float32)).astype(int), out_N


def _accuracy(truth_N: np.ndarray, guess_N: np.ndarray) -> float | None:
    return float(accuracy_score(truth_N, guess_N)) if len(truth_N) else None


def _f1(truth_N: np.ndarray, guess_N: np.ndarray, classes: list[int], average: str = "weighted") -> float | None:
    """F1 averaged over the `classes` that occur in truth or prediction; the invalid class is never one of them."""
    if len(truth_N) == 0:
        return None
    return _defined(f1_score(truth_N, guess_N, labels=classes, average=average, zero_division=np.nan))


def _mae(truth_N: np.ndarray, guess_N: np.ndarray) -> float | None:
    return float(mean_absolute_error(truth_N, guess_N)) if len(truth_N) else None


def _corr(truth_N: np.ndarray, guess_N: np.ndarray) -> float | None:
    if _constant(truth_N) or _constant(guess_N):
        return None
    return _defined(pearsonr(truth_N, guess_N).statistic)


def _r2(truth_N: np.ndarray, guess_N: np.ndarray) -> float | None:
    return None if _constant(truth_N) else _defined(r2_score(truth_N, guess_N, force_finite=False))


def _constant(values_N: np.ndarray) -> bool:
    """Whether all values are one in float32; so are none and a single one."""
    return len(np.unique(values_N.astype(np.float32))) < 2


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _numbers(values: Values) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _check(task: Task, truth_N: np.ndarray, guess_N: np.ndarray, valid_N: np.ndarray, p_NC: np.ndarray | None) -> None:
    faults = []
    if truth_N.shape != guess_N.shape or truth_N.ndim != 1:
        raise MetricError(f"{task.name}: truth of shape {truth_N.shape} against predictions of {guess_N.shape}")
    if not np.isfinite(truth_N).all():
        faults.append(f"truth that is no finite number: {_first(truth_N, ~np.isfinite(truth_N))}")
    if task.kind == "classification":
        count = len(task.labels)
        for name, values_N, there_N in (("truth", truth_N, np.isfinite(truth_N)), ("prediction", guess_N, valid_N)):
            bad = there_N & ~np.isin(values_N, np.arange(count))
            if bad.any():
                faults.append(f"{name} that is no label index 0 … {count - 1}: {_first(values_N, bad)}")
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
    shown = ", ".join(f"{values[i].tolist()} at {i}" for i in places[:_SHOWN])
    return shown + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")
