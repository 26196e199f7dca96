"""Which checkpoint is the best so far, by what its validation said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import rankdata


class Selection:
    """Chooses between the best so far and each new validation; what was not chosen is not looked at again.

    With one task the better value is chosen, the earlier one where they are equal. With several, tasks whose numbers have
    other units and ranges cannot be averaged: all validations so far are ranked in each task (1 is the best, equal values
    share the mean of their ranks), and the smaller mean rank over tasks is chosen, the earlier one where they are equal.
    A validation with a value that is undefined is never chosen and enters no ranking.

    Args:
        maximise: task -> whether more of its metric is better.
    """

    def __init__(self, maximise: Mapping[str, bool]) -> None:
        self._sign = {task: 1.0 if more else -1.0 for task, more in maximise.items()}
        self._validations: dict[str, dict[str, float]] = {}
        self.best: str | None = None

    def add(self, name: str, values: Mapping[str, float | None]) -> bool:
        """Take in the validation of checkpoint `name`; whether it is the best so far now."""
        known = {task: value for task, value in values.items() if value is not None}
        if len(known) < len(self._sign):
            return False
        self._validations[name] = known
        if self.best is None or self._mean_rank(name) < self._mean_rank(self.best):
            self.best = name
        return self.best == name

    def _mean_rank(self, name: str) -> float:
        place = list(self._validations).index(name)
        return float(np.mean([
            rankdata([-sign * values[task] for values in self._validations.values()])[place]
            for task, sign in self._sign.items()
        ]))  # fmt: skip

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "validations": self._validations}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best = state["best"]
        self._validations = {name: dict(values) for name, values in state["validations"].items()}
