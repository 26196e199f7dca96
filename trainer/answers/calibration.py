"""Temperature scaling: one number, fitted on validation only, that calibrates probabilities.

Source: Guo et al. 2017, "On calibration of modern neural networks", section 4.2. Shapes: N samples, C answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.special import log_softmax, softmax

from trainer.answers.metrics import BINS, compute, reliability
from trainer.answers.scores import ReliabilityBin, metric_value
from trainer.tasks import Task

LIMITS = (0.05, 20.0)  # of the temperature
FITTED_ON = "valid"
_SMALLEST = 1e-300  # probability; 0 has no logarithm


@dataclass(frozen=True)
class Scored:
    """Predictions of one split: label indices or numbers, and probabilities of all answers; nan rows are invalid."""

    target_N: np.ndarray
    value_N: np.ndarray
    p_NC: np.ndarray

    def valid(self) -> Scored:
        """Without invalid predictions."""
        kept = np.isfinite(self.value_N) & np.isfinite(self.p_NC).all(axis=1)
        return Scored(self.target_N[kept], self.value_N[kept], self.p_NC[kept])


@dataclass
class Calibration:
    """What the temperature does. `splits`: split -> ``n``, and ``nll``, ``ece`` as given and ``nll_calibrated``,
    ``ece_calibrated`` at the temperature; `bins`: split -> bins at the temperature. Regression has nll alone."""

    temperature: float
    at_limit: bool  # the best temperature lies at or beyond LIMITS
    fitted_on: str
    n: int  # samples it was fitted on
    edges: list[float]  # of the bins of ECE; empty for regression
    splits: dict[str, dict[str, float | None]] = field(default_factory=dict)
    bins: dict[str, list[ReliabilityBin]] = field(default_factory=dict)


def tempered(p_NC: np.ndarray, temperature: float) -> np.ndarray:
    """``p^(1/T)``, normalised. The order of a sample's answers stays."""
    return np.asarray(softmax(np.log(np.maximum(p_NC, _SMALLEST)) / temperature, axis=1))


def fit_temperature(answer_N: np.ndarray, p_NC: np.ndarray) -> tuple[float, bool]:
    """The temperature within `LIMITS` at which the true answers are most probable, and whether it lies at a limit.

    The mean of -log p is convex in 1/T, so the minimum is the only one.
    """
    from scipy.optimize import minimize_scalar  # slow to import, and used at the end of a run

    log_NC = np.log(np.maximum(p_NC, _SMALLEST))
    rows_N = np.arange(len(answer_N))

    def nll(log_temperature: float) -> float:
        return -float(log_softmax(log_NC / np.exp(log_temperature), axis=1)[rows_N, answer_N].mean())

    low, high = np.log(LIMITS)
    log_temperature = float(minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x)
    return float(np.exp(log_temperature)), bool(min(log_temperature - low, high - log_temperature) < 1e-3)


def calibrate(task: Task, splits: Mapping[str, Scored]) -> Calibration | None:
    """Fit the temperature on the validation split and measure what it does on every split.

    Predictions stay as they are: a label is the most probable one at any temperature, and a number is the expectation at
    temperature 1. None where validation has no predictions with probabilities: no other split is used instead. None too for
    tasks whose samples have several labels.
    """
    if task.kind == "multilabel":
        return None
    valid_splits = {split: scored.valid() for split, scored in splits.items()}
    if FITTED_ON not in valid_splits or not len(valid_splits[FITTED_ON].target_N):
        return None
    valid = valid_splits[FITTED_ON]
    answer_N = np.array([task.answer_index(target) for target in valid.target_N])
    temperature, at_limit = fit_temperature(answer_N, valid.p_NC)
    classes = task.kind == "classification"
    edges = (np.arange(BINS + 1) / BINS).tolist() if classes else []
    out = Calibration(temperature, at_limit, FITTED_ON, len(answer_N), edges)
    for split, scored in valid_splits.items():
        if not len(scored.target_N):
            continue
        after_NC = tempered(scored.p_NC, temperature)
        before, after = (compute(task, scored.target_N, scored.value_N, p_NC) for p_NC in (scored.p_NC, after_NC))
        measured: dict[str, float | None] = {"n": len(scored.target_N)}
        for name in ("nll", *(("ece",) if classes else ())):
            measured |= {name: metric_value(before, name), f"{name}_calibrated": metric_value(after, name)}
        out.splits[split] = measured
        if classes:
            out.bins[split] = reliability(scored.target_N, scored.value_N, after_NC)
    return out
