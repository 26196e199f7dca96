"""A run's predictions analysed: scores beside a constant answer's, calibration, gate weights by group, best and worst samples.

Legend: N samples, C answers, E experts, M modalities. All numbers are plain and JSON-safe; what is undefined is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from trainer.answers.calibration import Scored, calibrate
from trainer.answers.metrics import MetricError, compute, reliability
from trainer.answers.prediction_table import label_shares
from trainer.answers.scores import TaskScores
from trainer.config import MODALITIES
from trainer.data.dataset import open_dataset
from trainer.data.folds import fold_choice
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.summary import SIGNS
from trainer.label_sets import NONE, decode_sets, encode_set
from trainer.results.run_folder import SPLITS, RunFolder, path_of_data
from trainer.results.saved_tasks import answers_of_split
from trainer.results.task_results import Example, GateGroup, Gates, Robustness, TaskResults
from trainer.run.expert_load import load_balance, warning
from trainer.tasks import Task

EXAMPLES = 6  # samples listed as best, and as many as worst
ANSWERS = 5  # most probable answers listed of an example
QUANTILES = np.arange(1, 20) / 20  # of the predicted distribution, at which coverage is counted


def analyse(run: RunFolder) -> list[TaskResults]:
    """The results of every task of a run; ``run.notes`` gets a line for everything that cannot be computed."""
    return [_task_results(run, task) for task in run.tasks.values()]


def _task_results(run: RunFolder, task: Task) -> TaskResults:
    read = {split: _rows(run, task, split) for split in SPLITS if split in run.predictions}
    tables = {split: rows for split, rows in read.items() if rows is not None and len(rows)}
    scores = {split: tasks[task.name] for split, tasks in run.results.items() if task.name in tasks}
    for split, rows in tables.items():
        if split not in scores:
            scores[split] = _score(task, rows)
    out = TaskResults(task, scores)
    if measured := run.robustness.get("tasks", {}).get(task.name):
        out.robustness = Robustness(measured, run.robustness["split"], run.robustness.get("reference"))
    if not tables:
        return out
    out.split, rows = next(iter(tables.items()))
    out.rows = rows
    out.constant, value = _constant(run, task, rows)
    out.constant_scores = compute(task, rows["target"].to_numpy(), np.full(len(rows), value), None, _shares(task, rows))
    scored = {split: found for split, table in tables.items() if (found := _scored(table)) is not None}
    if (displayed := scored.get(out.split)) is not None and task.kind != "multilabel":
        if task.kind == "classification":
            out.reliability = reliability(displayed.target_N, displayed.value_N, displayed.p_NC)
        else:
            out.coverage = coverage(task, displayed.target_N, displayed.p_NC)
    out.gates = _gates(run, task, rows)
    out.calibration = calibrate(task, scored)
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
    rows_N = np.arange(len(p_NC))
    below_N = np.cumsum(p_NC, axis=1)[rows_N, nearest_N] - p_NC[rows_N, nearest_N] / 2
    return [(float(q), float((below_N <= q).mean())) for q in QUANTILES]


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
        run.notes.append(f"predictions/{split}.parquet does not match the task {task.name} and is left out: {error}")
        return None
    rows.loc[~rows["valid"].astype(bool), "value"] = np.nan
    rows["valid"] = np.isfinite(rows["value"])
    return rows


def _number(task: Task, cell: str | float | None) -> float:
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return float("nan")
    if task.kind == "regression":
        return float(cell)
    if (value := task.parse_word(str(cell))) is None:
        raise ValueError(f"{cell!r} is no label of it")
    return value


def _stack(rows: pd.DataFrame) -> np.ndarray:
    return np.stack([np.asarray(p, dtype=float) for p in rows["probabilities"]])


def _scored(rows: pd.DataFrame) -> Scored | None:
    """The valid rows that have probabilities; None where no row has."""
    if "probabilities" not in rows:
        return None
    rows = rows[rows["valid"] & rows["probabilities"].notna()]
    return Scored(rows["target"].to_numpy(), rows["value"].to_numpy(), _stack(rows)) if len(rows) else None


def _score(task: Task, rows: pd.DataFrame) -> TaskScores:
    """The metrics of the rows; without those of probabilities where they do not fit the task."""
    target_N, value_N, p_NC = rows["target"].to_numpy(), rows["value"].to_numpy(), None
    if "probabilities" in rows and not rows.loc[rows["valid"], "probabilities"].isna().any():
        width = task.probabilities
        p_NC = np.array([[np.nan] * width if p is None else p for p in rows["probabilities"]], dtype=float)
    try:
        return compute(task, target_N, value_N, p_NC, _shares(task, rows))
    except MetricError:
        return compute(task, target_N, value_N)


def _shares(task: Task, rows: pd.DataFrame) -> np.ndarray | None:
    """`[N, C]`: the shares of annotators that gave each label; None where the data has none."""
    return label_shares(task, rows["target"].to_numpy(), rows["shares"]) if "shares" in rows else None


def _constant(run: RunFolder, task: Task, rows: pd.DataFrame) -> tuple[str, float]:
    """The constant answer that a model must beat, and its value: from the training data, else from the split itself."""
    train = answers_of_split(run.data[task.name], "train", task.name) if task.name in run.data else None
    source = "of train" if train else "of this split"
    if task.kind == "multilabel":
        member_NL = decode_sets(rows["target"].to_numpy(float), len(task.labels))
        having = train["labels"] if train else dict(zip(task.labels, member_NL.sum(0).tolist(), strict=True))
        n = train["n"] if train else len(rows)
        value = encode_set(i for i, label in enumerate(task.labels) if 2 * having.get(label, 0) >= n)
        return f"labels of at least half of the samples {source}: {task.word(value)}", value
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
        return GateGroup(name, int(chosen_N.sum()), _by_name(experts, weights[0]), _by_name(modalities, weights[1]))

    inside = {e: _by_name(modalities, w_M) for e, w_M in zip(experts, modality_NEM.mean(0), strict=True)}
    out = Gates(group("all", np.ones(len(rows), dtype=bool)), inside, expert_NE)
    target_N = rows["target"].to_numpy()
    if task.kind == "classification":
        classes = [(label, target_N == i) for i, label in enumerate(task.labels)]
    elif task.kind == "multilabel":
        classes = list(zip(task.labels, decode_sets(target_N, len(task.labels)).T, strict=True))
        classes.append((NONE, target_N == 0))
    else:
        classes = [(name, np.sign(target_N) == sign) for name, sign in zip(SIGNS, (-1, 0, 1), strict=True)]
    out.groups["class"] = [group(name, chosen) for name, chosen in classes if chosen.any()]
    if "kind" in rows and rows["kind"].notna().any():
        out.groups["kind"] = [group(k, (rows["kind"] == k).to_numpy()) for k in sorted(rows["kind"].dropna().unique())]
    return out


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, map(float, values), strict=True))


def _gate_names(run: RunFolder, experts: int, modalities: int) -> tuple[list[str], list[str]]:
    """The names of the gate's columns: what the config asked for, without what the fusion network leaves out.

    It leaves out modalities that no dataset has, and the semantic expert where there is one modality only.
    """
    expert_names = [name.removeprefix("gate/") for name in run.journal if name.startswith("gate/")]
    modality_names: list[str] = []
    if run.config is not None:
        fusion = run.config.model.fusion
        modality_names = [name for name in MODALITIES if name in fusion.modalities]
        if len(modality_names) != modalities:
            present = {name for record in run.data.values() for name, width in record["widths"].items() if width}
            modality_names = [name for name in modality_names if name == "text" or name in present]
        if len(expert_names) != experts:
            expert_names = [name for name in fusion.ordered_experts if name != "semantic" or modalities > 1]
    if len(expert_names) != experts:
        expert_names = [f"expert {i + 1}" for i in range(experts)]
    if len(modality_names) != modalities:
        modality_names = [f"modality {i + 1}" for i in range(modalities)]
    return expert_names, modality_names


def _examples(task: Task, rows: pd.DataFrame, gates: Gates | None) -> tuple[list[Example], list[Example]]:
    """The samples answered best and worst, no sample in both; ties by id."""
    ranked = sorted((_example(task, row, gates) for row in rows.to_dict("records")), key=lambda e: (e.error, e.id))
    if len(ranked) < 2 * EXAMPLES:
        half = (len(ranked) + 1) // 2
        return ranked[:half], ranked[half:][::-1]
    return ranked[:EXAMPLES], sorted(ranked[EXAMPLES:], key=lambda e: (-e.error, e.id))[:EXAMPLES]


def _example(task: Task, row: Mapping[Any, Any], gates: Gates | None) -> Example:
    """A row of predictions as an example."""
    cell = row.get("probabilities")
    p_C = np.asarray(cell, dtype=float) if isinstance(cell, (list, np.ndarray)) else None
    valid = bool(row["valid"])
    if not valid:
        error = float("inf")
    elif task.kind == "regression":
        error = abs(row["value"] - row["target"])
    elif task.kind == "multilabel":
        member_L, guess_L = decode_sets(np.array([row["target"], row["value"]]), len(task.labels))
        error = float(np.abs(member_L - (guess_L if p_C is None else p_C)).mean())
    elif p_C is not None:
        error = 1.0 - float(p_C[int(row["target"])])
    else:
        error = float(row["value"] != row["target"])
    most_probable: list[tuple[str, float]] = []
    if p_C is not None:
        answers = task.labels if task.kind == "multilabel" else task.answers()
        most_probable = [(answers[i], float(p_C[i])) for i in np.argsort(-p_C, kind="stable")[:ANSWERS]]
    expert: dict[str, float] = {}
    modality: dict[str, float] = {}
    if gates is not None and isinstance(row.get("gate_expert"), (list, np.ndarray)):
        expert_E = np.asarray(row["gate_expert"], float)
        modality_EM = np.stack(list(row["gate_modality"])).astype(float)
        expert = _by_name(list(gates.all.expert), expert_E)
        modality = _by_name(list(gates.all.modality), expert_E @ modality_EM)
    kind = row.get("kind")
    return Example(
        id=str(row["id"]),
        label=row["label"] if task.kind != "regression" else float(row["target"]),
        prediction=None if not valid else row["prediction"] if task.kind != "regression" else float(row["value"]),
        answer=row["answer"] if isinstance(row["answer"], str) else None,
        valid=valid,
        error=error,
        probabilities=most_probable,
        expert=expert,
        modality=modality,
        kind=kind if isinstance(kind, str) else None,
    )


def _add_texts(run: RunFolder, task: Task, split: str, examples: Sequence[Example]) -> None:
    """Add texts from the prepared dataset, if it is the one that the run was trained on."""
    path = path_of_data(run, task.name)
    if task.name not in run.data or path is None:
        return
    try:
        view = open_dataset(path, choice=None if run.config is None else fold_choice(run.config))[split]
    except DataError as error:
        run.notes.append(f"the texts of {task.name} cannot be shown: {error}")
        return
    index_of = {sample: i for i, sample in enumerate(view.ids)}
    for example in examples:
        if example.id in index_of:
            example.text = view[index_of[example.id]].text
