"""Which checkpoint is the best so far, by its validation metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


class Selection:
    """Chooses between the best so far and each new validation; what was not chosen is not looked at again.

    With one task the better value is chosen. With several, tasks whose numbers have other units and ranges cannot be
    averaged: all validations so far are ranked in each task (1 is the best, equal values share the mean of their ranks),
    and the smaller mean rank over tasks is chosen. Where that is equal (accuracies often are) the smaller mean rank of the
    negative log-likelihoods decides, and then the earlier validation. A validation with a value that is undefined is
    never chosen and enters no ranking.

    Args:
        greater_is_better: task -> whether more of its metric is better.
    """

    def __init__(self, greater_is_better: Mapping[str, bool]) -> None:
        self._sign = {task: 1.0 if greater else -1.0 for task, greater in greater_is_better.items()}
        self._validations: dict[str, dict[str, float]] = {}
        self._nll: dict[str, dict[str, float | None]] = {}
        self.best: str | None = None

    def add(self, name: str, values: Mapping[str, float | None], nll: Mapping[str, float | None] | None = None) -> bool:
        """Take in the validation of checkpoint `name`; whether it is the best so far now.

        `nll` says of each task its mean negative log-likelihood; one that is not known counts as infinite.
        """
        known = {task: value for task, value in values.items() if value is not None and not math.isnan(value)}
        if len(known) < len(self._sign):
            return False
        self._validations[name] = known
        self._nll[name] = {task: (nll or {}).get(task) for task in self._sign}
        if self.best is None or self._ranks(name) < self._ranks(self.best):
            self.best = name
        return self.best == name

    def _ranks(self, name: str) -> tuple[float, float]:
        """Mean ranks over the tasks, by the metric and by the negative log-likelihood."""
        from scipy.stats import rankdata  # slow to import, and not needed before the second validation

        place = list(self._validations).index(name)
        by_metric = [
            rankdata([-sign * values[task] for values in self._validations.values()])[place]
            for task, sign in self._sign.items()
        ]
        by_nll = [
            rankdata([math.inf if (value := values[task]) is None else value for values in self._nll.values()])[place]
            for task in self._sign
        ]
        return float(np.mean(by_metric)), float(np.mean(by_nll))

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "validations": self._validations, "nll": self._nll}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best = state["best"]
        self._validations = {name: dict(values) for name, values in state["validations"].items()}
        self._nll = {name: dict(values) for name, values in state["nll"].items()}
