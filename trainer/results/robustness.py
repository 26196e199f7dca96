"""Robustness of a trained run to missing and corrupted modalities: the model is loaded once, each corruption is one pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd

from trainer.answers.metrics import metric_of, scalars
from trainer.answers.prediction_table import write_table
from trainer.config import MODALITIES, Modality
from trainer.files import write_json
from trainer.results.compare.sources.compared_run import Answers
from trainer.results.compare.sources.from_folders import run_from_folder
from trainer.results.compare.statistics import estimate, resample_counts
from trainer.results.corruption import Corruption, Mode, spread_of
from trainer.results.records import CurveRecord, DifferenceRecord, RobustnessRecord
from trainer.run.saved import SavedRun
from trainer.tasks import Task

log = logging.getLogger(__name__)

RESULT, TABLE = "robustness.json", "robustness.parquet"
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
RESAMPLES, LEVEL = 2000, 0.95
KEPT = ["mode", "modality", "rate", "task", "id", "label", "prediction", "valid", "answer", "kind"]


@dataclass(frozen=True)
class Options:
    """What is tried: every mode on every one of `modalities`, and on all of them together, at every rate."""

    split: str = "test"
    rates: tuple[float, ...] = RATES
    modes: tuple[Mode, ...] = ("missing", "noise")
    modalities: tuple[Modality, ...] = ()  # empty: audio and video, where the run reads them
    seed: int = 0


def check_options(options: Options) -> None:
    """Refuse what no run can do; every fault in one message.

    Raises:
        ValueError: see there.
    """
    faults = []
    for name, given, known in (
        ("modes", options.modes, get_args(Mode)),
        ("modalities", options.modalities, MODALITIES),
    ):
        unknown = [word for word in given if word not in known]
        if unknown:
            faults.append(f"{name}: {', '.join(unknown)} is none of {', '.join(known)}")
    if not options.modes or not options.rates:
        faults.append("name at least one mode and one rate")
    if any(not 0 <= rate <= 1 for rate in options.rates):
        faults.append(f"rates are probabilities from 0 to 1, not {', '.join(f'{r:g}' for r in options.rates)}")
    if "text" in options.modalities and set(options.modes) - {"missing"}:
        faults.append("text has no frames to corrupt: with modality text the only mode is missing")
    if faults:
        raise ValueError("\n".join(faults))


def robustness(
    opened: SavedRun,
    options: Options,
    reference: Path | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[RobustnessRecord, pd.DataFrame]:
    """Evaluate under all corruptions of `options`; every rank calls this, rank 0's result counts.

    Args:
        reference: the folder of a finished run on the same data, usually one that reads text only: every point is
            compared with its predictions.

    Returns:
        What ``robustness.json`` holds, and every prediction.

    Raises:
        ValueError: modalities that the run does not read, or a reference that cannot be compared.
    """
    check_options(options)
    modalities = _modalities(opened, options.modalities)
    expected = {} if reference is None else _reference(opened, reference, options.split)
    spread = {}
    if "noise" in options.modes:
        spread = {name: spread_of(data["train"]) for name, data in opened.parts.data.items()}
    rates = sorted({0.0, *options.rates})
    combinations = [(name,) for name in modalities] + ([modalities] if len(modalities) > 1 else [])
    clean, clean_scores = opened.evaluate(options.split, advance)
    tables = [_marked(clean, "none", "", 0.0)]
    curves: dict[str, list[CurveRecord]] = {name: [] for name in opened.parts.tasks}
    for mode in options.modes:
        for chosen in combinations:
            made: dict[str, CurveRecord] = {
                name: {"mode": mode, "modality": "+".join(chosen), "points": []} for name in curves
            }
            for rate in rates:
                table, scores = clean, clean_scores
                if rate:
                    corruption = Corruption(mode, chosen, rate, options.seed, spread)
                    table, scores = opened.evaluate(options.split, advance, corruption)
                    tables.append(_marked(table, mode, "+".join(chosen), rate))
                for name, curve in made.items():
                    rows, task = table[table["task"] == name], opened.parts.tasks[name]
                    against = _against(task, rows, expected[name], options.seed) if expected else None
                    curve["points"].append({"rate": rate, "scores": scalars(scores[name]), "against": against})
            for name, curve in made.items():
                curves[name].append(curve)
    _warn(curves, reference)
    result: RobustnessRecord = {
        "checkpoint": opened.checkpoint.name,
        "split": options.split,
        "modes": list(options.modes),
        "seed": options.seed,
        "modalities": list(modalities),
        "rates": rates,
        "reference": None if reference is None else reference.absolute().name,
        "tasks": {
            name: {
                "metric": task.select,
                "reference": _value(task, expected[name]) if expected else None,
                "curves": curves[name],
            }
            for name, task in opened.parts.tasks.items()
        },
    }
    return result, pd.concat(tables, ignore_index=True)[KEPT]


def write_robustness(run: Path, result: RobustnessRecord, table: pd.DataFrame) -> None:
    """Put the result into the run folder."""
    write_table(table, run / TABLE)
    write_json(run / RESULT, result)


def _modalities(opened: SavedRun, asked: Sequence[Modality]) -> tuple[Modality, ...]:
    """Those to be corrupted: the asked ones, or audio and video; all must be among what the run reads."""
    fusion = opened.parts.model.fusion
    read: tuple[Modality, ...] = ("text",) if fusion is None else fusion.modalities
    chosen = tuple(name for name in MODALITIES if name in (asked or [m for m in read if m != "text"]))
    unread = [name for name in chosen if name not in read]
    if unread or not chosen:
        what = f"{', '.join(unread)} is" if unread else "audio and video are"
        raise ValueError(f"{what} not read by this run, which reads {', '.join(read)}: name others with --modalities")
    return chosen


def _reference(opened: SavedRun, folder: Path, split: str) -> dict[str, Answers]:
    """The reference's predictions, checked to be of the same data."""
    run = run_from_folder(folder, [split])
    faults = [f"it has no task {name}" for name in opened.parts.tasks if name not in run.tasks]
    fingerprints = opened.parts.fingerprints
    faults += [
        f"its data of {name} have the fingerprint {run.fingerprints[name]}, these {fingerprints[name]}"
        for name in fingerprints
        if name in run.fingerprints and run.fingerprints[name] != fingerprints[name]
    ]
    if not faults and split not in run.answers:
        faults.append(f"it has no predictions of {split}: train it with eval.splits that name {split}")
    if faults:
        raise ValueError(f"{folder} cannot be the reference: {'; '.join(faults)}")
    return run.answers[split]


def _against(task: Task, rows: pd.DataFrame, reference: Answers, seed: int) -> DifferenceRecord:
    """The run against the reference, on the same samples."""
    rows = rows.sort_values("id", kind="stable")
    ids = rows["id"].to_numpy(object)
    if len(ids) != len(reference.ids_N) or (ids != reference.ids_N).any():
        raise ValueError("the reference answered other samples: compare runs of the same data")
    counts_BN = resample_counts(len(ids), RESAMPLES, np.random.default_rng(seed))
    run = metric_of(task, task.select, rows["target"].to_numpy(float), rows["value"].to_numpy(float))
    other = metric_of(task, task.select, reference.truth_N, reference.guess_N)
    whole = np.array([run.value() - other.value()])
    resampled = run.weighted(counts_BN) - other.weighted(counts_BN)
    found = estimate(whole, resampled, len(ids), LEVEL)
    far = found.high if task.greater_is_better else None if found.low is None else -found.low
    return {"value": found.value, "low": found.low, "high": found.high, "worse": far is not None and far < 0}


def _value(task: Task, answers: Answers) -> float | None:
    found = metric_of(task, task.select, answers.truth_N, answers.guess_N).value()
    return found if np.isfinite(found) else None


def _marked(table: pd.DataFrame, mode: str, modality: str, rate: float) -> pd.DataFrame:
    return table.assign(mode=mode, modality=modality, rate=rate)


def _warn(curves: dict[str, list[CurveRecord]], reference: Path | None) -> None:
    for name, of_task in curves.items():
        for curve in of_task:
            bad = [f"{p['rate']:g}" for p in curve["points"] if p["against"] is not None and p["against"]["worse"]]
            if bad:
                log.warning(
                    "%s: with %s %s at rate %s the run is worse than %s by more than noise",
                    name, curve["modality"], curve["mode"], ", ".join(bad), reference,
                )  # fmt: skip
