"""How the gate shares its weight among the experts, and which of them it has given up.

Shapes: N samples, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

DEAD = 0.02  # mean weight below which an expert is dead


@dataclass(frozen=True)
class LoadBalance:
    """Of N samples: every expert's mean and largest weight, and the coefficient of variation of the means (0: even).

    An expert is `dead` if its mean weight is below `DEAD`, or if no sample gives it more than 1 / (4 E).
    """

    n: int
    mean: dict[str, float]
    largest: dict[str, float]
    variation: float
    dead: list[str]


def load_balance(names: Sequence[str], expert_NE: np.ndarray) -> LoadBalance:
    """The balance of these gate weights. The measure is the importance of Shazeer et al. 2017 ("Outrageously large neural
    networks"): standard deviation over mean of the experts' mean weights."""
    mean_E, largest_E = expert_NE.mean(0), expert_NE.max(0)
    dead_E = (mean_E < DEAD) | (largest_E <= 1 / (4 * len(names)))
    return LoadBalance(
        len(expert_NE),
        dict(zip(names, mean_E.tolist(), strict=True)),
        dict(zip(names, largest_E.tolist(), strict=True)),
        float(mean_E.std() / mean_E.mean()) if mean_E.any() else 0.0,
        [name for name, dead in zip(names, dead_E, strict=True) if dead] if len(names) > 1 else [],
    )


def warn_of_dead(tasks: Sequence[str], experts: Sequence[str], split: str, table: pd.DataFrame) -> None:
    """Log a warning for each task whose gate has given up an expert, by the predictions of a split."""
    for task in tasks:
        weights = table.loc[table["task"] == task, "gate_expert"].dropna()
        text = warning(task, split, load_balance(experts, np.array(weights.tolist()))) if len(weights) else None
        if text is not None:
            log.warning("%s", text)


def warning(task: str, split: str, balance: LoadBalance) -> str | None:
    """A sentence about dead experts, None where there are none."""
    if not balance.dead:
        return None
    dead = ", ".join(f"{e} (mean weight {balance.mean[e]:.3f}, at most {balance.largest[e]:.3f})" for e in balance.dead)
    return (
        f"dead expert{'s' if len(balance.dead) > 1 else ''} of {task} on {split}: {dead}; its input may carry nothing for this task, or "
        "model.fusion.gate.balance_weight is too small"
    )
