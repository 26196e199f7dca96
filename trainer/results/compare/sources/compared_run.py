"""A finished run with what a comparison needs of it, and its predictions read from parquet.

A run's config is dotted keys with values as text, as MLflow keeps parameters, wherever the run was read from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml
from pyarrow import compute, parquet

from trainer.data.folds import FoldRecord
from trainer.questions import RunTask
from trainer.results.run_folder import PREDICTIONS
from trainer.results.saved_tasks import find_saved_tasks
from trainer.saved_config import unsaid
from trainer.tasks import Task, TaskError, select_by

COLUMNS = ("task", "id", "label", "prediction", "valid", "kind")  # of predictions, those that are read
OPTIONAL = {"prediction", "kind"}  # a file lacks them where no row has a value
REQUIRED_SETTINGS = {"task", "train.seed", "data.path"}


@dataclass(frozen=True)
class Cost:
    """What a run took; None where unknown. `seconds` of a continued run are those of its last part."""

    seconds: float | None = None
    world: int | None = None
    device: str | None = None  # as in run.json: "cpu x 2 threads", or the GPU's name
    samples_per_second: float | None = None

    @property
    def unit(self) -> str | None:
        if self.device is None:
            return None
        return "core-hours" if self.device.startswith("cpu") else "GPU-hours"

    @property
    def amount(self) -> float | None:
        """Hours times processes; on CPUs times the threads of each."""
        if self.seconds is None or self.world is None or self.device is None:
            return None
        threads = re.fullmatch(r"cpu x (\d+) threads", self.device)
        return self.seconds / 3600 * self.world * (int(threads[1]) if threads else 1)


@dataclass(frozen=True)
class Answers:
    """A task's predictions on one split, by id: label indices, or numbers; nan is an invalid prediction."""

    ids_N: np.ndarray
    truth_N: np.ndarray
    guess_N: np.ndarray
    kind_N: np.ndarray | None = None  # where the data has kinds
    fold_N: np.ndarray | None = None  # where the predictions of several folds are together


@dataclass
class ComparedRun:
    """A finished run. `group` is the name of its group, where the caller decides that; otherwise configs do.

    Of a baseline `baseline` is its name; it has no config, and its `seed` of 0 says nothing.
    """

    name: str
    where: str
    seed: int
    tasks: dict[str, Task]
    config: dict[str, str]
    fingerprints: dict[str, str]
    answers: dict[str, dict[str, Answers]]  # split -> task
    started: float = 0.0
    cost: Cost = field(default_factory=Cost)
    commit: str | None = None
    mlflow: tuple[str, str] | None = None  # the store's uri and the run's id there
    experiment: str | None = None
    group: str | None = None
    fold: FoldRecord | None = None  # of a run on a dataset with folds
    baseline: str | None = None


def same_samples(a: Answers, b: Answers) -> bool:
    """Whether both are answers to the same samples, with the same labels."""
    return np.array_equal(a.ids_N, b.ids_N) and np.array_equal(a.truth_N, b.truth_N)


def with_defaults(config: Mapping[str, str]) -> dict[str, str]:
    """A run's config in which a key that its version did not know is what that version did, as continuing it would give it."""
    return {**config, **{key: str(value) for key, value in unsaid(config).items()}}


def tasks_of(config: Mapping[str, str], fingerprints: Mapping[str, str]) -> dict[str, Task]:
    """The tasks of a run. One whose YAML file is gone is read from its dataset, if that is the run's own.

    Raises:
        ValueError: a task that cannot be found.
    """
    found, lost = _asked(config, fingerprints)
    for error in lost.values():
        raise ValueError(f"{error} (its dataset, which defines it too, is gone or has changed)") from error
    return select_by({one.task.name: one.task for one in found}, _selecting(config))


def data_path_of(run: ComparedRun, task: str) -> str:
    """Where the config of a run says that the dataset of a task is."""
    template = run.config.get("data.path", "DIR")
    found, _ = _asked(run.config, run.fingerprints) if "task" in run.config else ([], {})
    return next((one.path(template) for one in found if one.task.name == task), template.replace("{task}", task))


def _asked(config: Mapping[str, str], fingerprints: Mapping[str, str]) -> tuple[list[RunTask], dict[str, TaskError]]:
    value = yaml.safe_load(config["task"])
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    return find_saved_tasks(names, config["data.path"], fingerprints)


def _selecting(config: Mapping[str, str]) -> str | dict[str, str]:
    """`eval.select` of a flat config: one metric for all tasks, or those of single tasks."""
    key = "eval.select"
    name = config.get(key, "{}")
    own = {k.removeprefix(f"{key}."): metric for k, metric in config.items() if k.startswith(f"{key}.")}
    return own if name == "{}" else name


def prediction_files(folder: Path, splits: Iterable[str], where: str) -> dict[str, Path]:
    """Split -> file of a run's predictions; `where` is the run's name in errors.

    Raises:
        ValueError: a split without predictions.
    """
    files = {split: folder / PREDICTIONS / f"{split}.parquet" for split in splits}
    missing = [split for split, path in files.items() if not path.is_file()]
    if missing:
        raise ValueError(
            f"{where} has no predictions of {', '.join(missing)}: was it in the run's eval.splits? egmf evaluate makes them"
        )
    return files


def read_splits(files: Mapping[str, Path], tasks: Mapping[str, Task]) -> dict[str, dict[str, Answers]]:
    """:func:`read_answers` of each split's file."""
    return {split: read_answers(path, tasks) for split, path in files.items()}


def read_answers(path: Path, tasks: Mapping[str, Task]) -> dict[str, Answers]:
    """The predictions of each task in a run's file, by id.

    Raises:
        ValueError: it is damaged, or does not match the tasks.
    """
    try:
        file = parquet.ParquetFile(path)
        table = file.read(columns=[name for name in COLUMNS if name in file.schema_arrow.names])
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise ValueError(f"{path} is damaged: {error}") from error
    if missing := set(COLUMNS) - OPTIONAL - set(table.column_names):
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}: it does not hold a run's predictions")
    return {name: _answers_of_task(path, table, task) for name, task in tasks.items()}


def _answers_of_task(path: Path, table: pa.Table, task: Task) -> Answers:
    rows = table.filter(compute.equal(table["task"], task.name)).sort_by("id")
    truth_N = _numbers(task, rows["label"])
    guess_N = np.full(len(rows), np.nan)
    if "prediction" in rows.column_names:
        guess_N = np.where(rows["valid"].to_numpy(), _numbers(task, rows["prediction"]), np.nan)
    if not len(rows) or not np.isfinite(truth_N).all() or compute.count_distinct(rows["id"]).as_py() < len(rows):
        raise ValueError(f"{path} has no rows of {task.name}, labels that the task does not have, or an id twice")
    has_kinds = "kind" in rows.column_names and rows["kind"].null_count < len(rows)
    kind_N = np.array(rows["kind"].to_pylist(), dtype=object) if has_kinds else None
    return Answers(np.array(rows["id"].to_pylist(), dtype=object), truth_N, guess_N, kind_N)


def _numbers(task: Task, cells: pa.ChunkedArray) -> np.ndarray:
    """Label indices, or numbers, which a file of tasks of both kinds has as text; nan for anything else."""
    if task.kind == "classification":
        if pa.types.is_null(cells.type):  # no prediction at all
            return np.full(len(cells), np.nan)
        indices = compute.index_in(cells, value_set=pa.array(task.labels, cells.type)).combine_chunks()
        return np.asarray(compute.fill_null(indices.cast(pa.float64()), np.nan))
    if task.kind == "multilabel":
        sets = [None if cell is None else task.parse_word(str(cell)) for cell in cells.to_pylist()]
        return np.array([np.nan if value is None else value for value in sets])
    numbers: np.ndarray = pd.to_numeric(pd.Series(cells.to_pylist(), dtype=object), errors="coerce").to_numpy(float)
    return numbers
