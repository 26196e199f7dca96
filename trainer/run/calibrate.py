"""The temperature of a finished run: fitted on its validation predictions, written into its folder, recorded in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.answers.calibration import Calibration, Scored, calibrate
from trainer.files import write_json
from trainer.run.assemble import RunComponents
from trainer.run.evaluate import flatten_metrics
from trainer.tracking.tracker import Tracker

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

CALIBRATION = "calibration.json"


def calibrated(parts: RunComponents, tables: Mapping[str, pd.DataFrame]) -> dict[str, Calibration | None]:
    """Task -> what its temperature does; None without validation predictions that have probabilities.

    Args:
        tables: split -> a table that :func:`trainer.run.evaluate.evaluate` makes.
    """
    out = {}
    for name, task in parts.tasks.items():
        splits = {}
        for split, table in tables.items():
            rows = table[(table["task"] == name) & table["probabilities"].notna()]
            if len(rows):
                target_N, value_N = (rows[column].to_numpy(float) for column in ("target", "value"))
                splits[split] = Scored(target_N, value_N, np.array(rows["probabilities"].tolist(), dtype=float))
        out[name] = calibrate(task, splits)
    return out


def write_calibration(
    parts: RunComponents, tables: Mapping[str, pd.DataFrame], out: Path, checkpoint: str, tracker: Tracker, step: int
) -> None:
    """Write ``calibration.json``; predictions and metrics stay as they are."""
    calibrations = calibrated(parts, tables)
    write_json(
        out / CALIBRATION, {"checkpoint": checkpoint, "tasks": {n: c and asdict(c) for n, c in calibrations.items()}}
    )
    tracker.artifact(out / CALIBRATION)
    for name, calibration in calibrations.items():
        if parts.tasks[name].kind == "multilabel":
            continue  # one temperature is for one answer a sample
        if calibration is None:
            log.warning(
                "no temperature for %s: no validation predictions with probabilities (eval.splits, eval.mode)", name
            )
        else:
            log.info("temperature of %s, fitted on %s: %.3f", name, calibration.fitted_on, calibration.temperature)
    for split in tables:
        metrics = {name: c.splits.get(split, {}) if c is not None else {} for name, c in calibrations.items()}
        values = {n: {k: v for k, v in m.items() if k.endswith("_calibrated")} for n, m in metrics.items()}
        tracker.metrics(flatten_metrics(f"best/{split}", values), step)
