"""What a run's predictions say: scores beside a constant answer, calibration, gate weights by group, telling examples.

Legend: N samples, C answers, E experts, M modalities. All numbers are plain and JSON-safe; what is undefined is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from trainer.answers.calibration import Calibration, Scored, calibrate
from trainer.answers.metrics import MetricError, compute, reliability
from trainer.config import EXPERTS, MODALITIES
from trainer.data.dataset import open_dataset
from trainer.data.faults import DataError
from trainer.data.summary import SIGNS
from trainer.results.run_folder import SPLITS, RunFolder, dataset_path
from trainer.run.expert_load import LoadBalance, load_balance, warning
from trainer.tasks import Task

EXAMPLES = 6  # best and as many worst
ANSWERS = 5  # most probable answers shown of an example
LEVELS = np.arange(1, 20) / 20  # of the predicted distribution whose coverage is counted


@dataclass
class Example:
    """A sample and what the model answered. `probabilities` holds the most probable answers, most probable first."""

    id: str
    label: Any
    prediction: Any
    answer: str | None
    valid: bool
    error: float  # 1 - p(truth), |prediction - truth|, or 0 and 1 where there are no probabilities; inf when invalid
    probabilities: list[tuple[str, float]]
    expert: dict[str, float]
    modality: dict[str, float]
    kind: str | None = None
    text: str | None = None


@dataclass
class GateGroup:
    """Mean gate weights of `n` samples; `modality` is Σ_e expert_e · modality_em, from the means over slots."""

    name: str
    n: int
    expert: dict[str, float]
    modality: dict[str, float]


@dataclass
class Gates:
    """Gate weights of a split: over all samples, inside each expert, and by group ("class", "kind")."""

    all: GateGroup
    inside: dict[str, dict[str, float]]  # expert -> modality -> mean weight
    expert_NE: np.ndarray
    groups: dict[str, list[GateGroup]] = field(default_factory=dict)


@dataclass
class TaskResults:
    """One task of a run. What hangs on predictions is None where there are none."""

    task: Task
    scores: dict[str, dict[str, Any]]  # split -> metrics
    split: str | None = None  # of which everything below is told
    rows: pd.DataFrame | None = None
    constant: str | None = None  # what the constant answer is
    constant_scores: dict[str, Any] | None = None
    reliability: list[dict[str, Any]] | None = None
    coverage: list[tuple[float, float]] | None = None
    gates: Gates | None = None
    calibration: Calibration | None = None  # None too where validation has no probabilities
    balance: dict[str, LoadBalance] = field(default_factory=dict)  # split -> how the gate shares its weight
    robustness: dict[str, Any] | None = None  # the task's part of robustness.json; run: the reference's name
    warnings: list[str] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)


def analyse(run: RunFolder) -> list[TaskResults]:
    """The results of every task of a run; what cannot be told is added to ``run.notes``."""
    return [_task_results(run, task) for task in run.tasks.values()]


def _task_results(run: RunFolder, task: Task) -> TaskResults:
    found = {split: _rows(run, task, split) for split in SPLITS if split in run.predictions}
    tables = {split: rows for split, rows in found.items() if rows is not None and len(rows)}
    scores = {split: tasks[task.name] for split, tasks in run.results.items() if task.name in tasks}
    for split, rows in tables.items():
        if split not in scores:
            scores[split] = _score(task, rows)
    out = TaskResults(task, scores)
    if measured := run.robustness.get("tasks", {}).get(task.name):
        out.robustness = {**measured, "run": run.robustness.get("reference"), "split": run.robustness.get("split")}
    if not tables:
        return out
    out.split, rows = next(iter(tables.items()))
    out.rows = rows
    out.constant, value = _constant(run, task, rows)
    out.constant_scores = compute(task, rows["target"].to_numpy(), np.full(len(rows), value))
    if "probabilities" in rows:
        told = rows[rows["valid"] & rows["probabilities"].notna()]
        if len(told) and task.kind == "classification":
            out.reliability = reliability(told["target"].to_numpy(), told["value"].to_numpy(), _stack(told))
        elif len(told):
            out.coverage = coverage(task, told["target"].to_numpy(), _stack(told))
    out.gates = _gates(run, task, rows)
    out.calibration = calibrate(task, {s: scored for s, t in tables.items() if (scored := _scored(t)) is not None})
    for split, table in tables.items():
        gates = out.gates if split == out.split else _gates(run, task, table)
        if gates is not None:
            out.balance[split] = load_balance(list(gates.all.expert), gates.expert_NE)
    if out.split in out.balance and (dead := warning(task.name, out.split, out.balance[out.split])):
        out.warnings.append(dead)
    out.best, out.worst = _examples(task, rows, out.gates)
    _add_texts(run, task, out.split, [*out.best, *out.worst])
    return out


def coverage(task: Task, target_N: np.ndarray, p_NC: np.ndarray) -> list[tuple[float, float]]:
    """Calibration of a regression: (q, share of truths at or below the q-quantile of their predicted distribution).

    The predicted distribution is over the task's grid; half of the mass of the truth's own number counts as below it.
    A calibrated model gives share = q. Source: Kuleshov et al. 2018.
    """
    assert task.grid is not None
    nearest_N = np.array([task.grid.index(target) for target in target_N])
    p_NC = p_NC / p_NC.sum(axis=1, keepdims=True)
    here_N = p_NC[np.arange(len(p_NC)), nearest_N]
    below_N = np.cumsum(p_NC, axis=1)[np.arange(len(p_NC)), nearest_N] - here_N / 2
    return [(float(q), float((below_N <= q).mean())) for q in LEVELS]


def _rows(run: RunFolder, task: Task, split: str) -> pd.DataFrame | None:
    """The task's rows of a split with `target` and `value` as numbers: label indices, or the number itself."""
    rows = run.predictions[split]
    rows = rows[rows["task"] == task.name].reset_index(drop=True)
    for column in ("prediction", "answer"):
        if column not in rows:  # no row had one
            rows[column] = None
    try:
        for column, source in (("target", "label"), ("value", "prediction")):
            rows[column] = [_number(task, cell) for cell in rows[source]]
        if not np.isfinite(rows["target"]).all():
            raise ValueError("a row has no label")
    except (ValueError, TypeError) as error:
        run.notes.append(f"predictions/{split}.parquet does not fit the task {task.name} ({error}): it is left out")
        return None
    rows.loc[~rows["valid"].astype(bool), "value"] = np.nan
    rows["valid"] = np.isfinite(rows["value"])
    return rows


def _number(task: Task, cell: Any) -> float:
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return float("nan")
    return float(task.labels.index(cell)) if task.kind == "classification" else float(cell)


def _stack(rows: pd.DataFrame) -> np.ndarray:
    return np.stack([np.asarray(p, dtype=float) for p in rows["probabilities"]])


def _scored(rows: pd.DataFrame) -> Scored | None:
    """The valid rows that have probabilities, None where none has."""
    if "probabilities" not in rows:
        return None
    rows = rows[rows["valid"] & rows["probabilities"].notna()]
    return Scored(rows["target"].to_numpy(), rows["value"].to_numpy(), _stack(rows)) if len(rows) else None


def _score(task: Task, rows: pd.DataFrame) -> dict[str, Any]:
    p_NC = None
    if "probabilities" in rows and not rows.loc[rows["valid"], "probabilities"].isna().any():
        width = len(task.answers())
        p_NC = np.array([[np.nan] * width if p is None else p for p in rows["probabilities"]], dtype=float)
    try:
        return compute(task, rows["target"].to_numpy(), rows["value"].to_numpy(), p_NC)
    except MetricError:
        return compute(task, rows["target"].to_numpy(), rows["value"].to_numpy())


def _constant(run: RunFolder, task: Task, rows: pd.DataFrame) -> tuple[str, float]:
    """The constant answer that a model must beat: from the training data, else from the split itself, which is said."""
    train = run.data.get(task.name, {}).get("splits", {}).get("train")
    source = "of train" if train else "of this split"
    if task.kind == "classification":
        counts = [train["labels"].get(label, 0) for label in task.labels] if train else None
        if counts is None:
            counts = [int((rows["target"] == i).sum()) for i in range(len(task.labels))]
        best = int(np.argmax(counts))
        return f"majority class {source}: {task.labels[best]}", float(best)
    mean = train["target"]["mean"] if train else None
    value = float(rows["target"].mean()) if mean is None else float(mean)
    return f"mean {source}: {round(value, 3) + 0.0:.3f}", value


def _gates(run: RunFolder, task: Task, rows: pd.DataFrame) -> Gates | None:
    if "gate_expert" not in rows or "gate_modality" not in rows:
        return None
    rows = rows[rows["gate_expert"].notna() & rows["gate_modality"].notna()]
    if not len(rows):
        return None
    expert_NE = np.stack([np.asarray(g, dtype=float) for g in rows["gate_expert"]])
    modality_NEM = np.stack([np.stack(list(g)).astype(float) for g in rows["gate_modality"]])
    experts, modalities = _gate_names(run, *modality_NEM.shape[1:])
    joint_NM = (expert_NE[:, :, None] * modality_NEM).sum(axis=1)

    def group(name: str, chosen_N: np.ndarray) -> GateGroup:
        weights = (expert_NE[chosen_N].mean(0), joint_NM[chosen_N].mean(0))
        return GateGroup(name, int(chosen_N.sum()), _named(experts, weights[0]), _named(modalities, weights[1]))

    inside = {e: _named(modalities, w_M) for e, w_M in zip(experts, modality_NEM.mean(0), strict=True)}
    out = Gates(group("all", np.ones(len(rows), dtype=bool)), inside, expert_NE)
    target_N = rows["target"].to_numpy()
    if task.kind == "classification":
        classes = [(label, target_N == i) for i, label in enumerate(task.labels)]
    else:
        classes = [(name, np.sign(target_N) == sign) for name, sign in zip(SIGNS, (-1, 0, 1), strict=True)]
    out.groups["class"] = [group(name, chosen) for name, chosen in classes if chosen.any()]
    if "kind" in rows and rows["kind"].notna().any():
        out.groups["kind"] = [group(k, (rows["kind"] == k).to_numpy()) for k in sorted(rows["kind"].dropna().unique())]
    return out


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, map(float, values), strict=True))


def _gate_names(run: RunFolder, experts: int, modalities: int) -> tuple[list[str], list[str]]:
    """The names of the gate's columns: what the config asked for, less what the fusion network leaves out.

    It leaves out modalities that no dataset has, and the semantic expert where there is one modality only.
    """
    expert_names = [name.removeprefix("gate/") for name in run.journal if name.startswith("gate/")]
    modality_names: list[str] = []
    if run.config is not None:
        fusion = run.config.model.fusion
        modality_names = [name for name in MODALITIES if name in fusion.modalities]
        if len(modality_names) != modalities:
            had = {name for record in run.data.values() for name, width in record["widths"].items() if width}
            modality_names = [name for name in modality_names if name == "text" or name in had]
        if len(expert_names) != experts:
            expert_names = [
                name for name in EXPERTS if name in fusion.experts and (name != "semantic" or modalities > 1)
            ]
    if len(expert_names) != experts:
        expert_names = [f"expert {i + 1}" for i in range(experts)]
    if len(modality_names) != modalities:
        modality_names = [f"modality {i + 1}" for i in range(modalities)]
    return expert_names, modality_names


def _examples(task: Task, rows: pd.DataFrame, gates: Gates | None) -> tuple[list[Example], list[Example]]:
    """The samples answered best and worst, none of them twice; ties by id."""
    found = sorted((_example(task, row, gates) for row in rows.to_dict("records")), key=lambda e: (e.error, e.id))
    if len(found) < 2 * EXAMPLES:
        half = (len(found) + 1) // 2
        return found[:half], found[half:][::-1]
    return found[:EXAMPLES], sorted(found[EXAMPLES:], key=lambda e: (-e.error, e.id))[:EXAMPLES]


def _example(task: Task, row: dict[str, Any], gates: Gates | None) -> Example:
    held = row.get("probabilities")
    p_C = np.asarray(held, dtype=float) if isinstance(held, (list, np.ndarray)) else None
    valid = bool(row["valid"])
    if not valid:
        error = float("inf")
    elif task.kind == "regression":
        error = abs(row["value"] - row["target"])
    elif p_C is not None:
        error = 1.0 - float(p_C[int(row["target"])])
    else:
        error = float(row["value"] != row["target"])
    shown: list[tuple[str, float]] = []
    if p_C is not None:
        words = task.answers()
        shown = [(words[i], float(p_C[i])) for i in np.argsort(-p_C, kind="stable")[:ANSWERS]]
    expert: dict[str, float] = {}
    modality: dict[str, float] = {}
    if gates is not None and isinstance(row.get("gate_expert"), (list, np.ndarray)):
        expert_E, modality_EM = (
            np.asarray(row["gate_expert"], float),
            np.stack(list(row["gate_modality"])).astype(float),
        )
        expert, modality = (
            _named(list(gates.all.expert), expert_E),
            _named(list(gates.all.modality), expert_E @ modality_EM),
        )
    kind = row.get("kind")
    return Example(
        id=str(row["id"]),
        label=row["label"] if task.kind == "classification" else float(row["target"]),
        prediction=None if not valid else row["prediction"] if task.kind == "classification" else float(row["value"]),
        answer=row["answer"] if isinstance(row["answer"], str) else None,
        valid=valid,
        error=error,
        probabilities=shown,
        expert=expert,
        modality=modality,
        kind=kind if isinstance(kind, str) else None,
    )


def _add_texts(run: RunFolder, task: Task, split: str, examples: Sequence[Example]) -> None:
    """Texts from the prepared dataset, if it is the one that the run was made with."""
    if task.name not in run.data or run.config is None:
        return
    try:
        view = open_dataset(dataset_path(run.config, task.name))[split]
    except DataError as error:
        run.notes.append(f"texts of {task.name} cannot be shown: {error}")
        return
    place = {sample: i for i, sample in enumerate(view.ids)}
    for example in examples:
        if example.id in place:
            example.text = view[place[example.id]].text
