"""A run folder read as it is: finished, in progress or damaged. What cannot be read is noted and left out, never guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import pandas as pd

from trainer.answers.scores import TaskScores
from trainer.config import RunConfig, load_config
from trainer.data.preparation.folder import read_record
from trainer.data.preparation.record import DatasetRecord
from trainer.data.sampling import GlobalBatchSampler
from trainer.files import load_json
from trainer.questions import RunTask
from trainer.results.records import RobustnessRecord, number_or_none
from trainer.results.saved_tasks import answers_of_split, find_saved_tasks, prepared_tasks
from trainer.run.record import BaselineValues, RecordValues, baseline_of
from trainer.tasks import Task, TaskError, select_by
from trainer.tracking.journal import JOURNAL, read_journal

Series = list[tuple[int, float]]  # (step, value)
Record = TypeVar("Record")

PREDICTIONS = "predictions"
_RUN_ID = re.compile(r"[0-9a-f]{32}")  # of MLflow
SPLITS = ("test", "valid", "train")  # in order of preference: the first that a run has predictions of is shown


@dataclass
class RunFolder:
    """What a run folder holds. `notes` has a sentence for everything that is missing or cannot be read."""

    path: Path
    config: RunConfig | None = None
    record: RecordValues = field(default_factory=RecordValues)
    results: dict[str, dict[str, TaskScores]] = field(default_factory=dict)  # split -> task, of metrics.json
    checkpoint: str | None = None  # the name of the one that validation chose
    journal: dict[str, Series] = field(default_factory=dict)
    predictions: dict[str, pd.DataFrame] = field(default_factory=dict)
    robustness: RobustnessRecord = field(default_factory=RobustnessRecord)  # empty where it is of another checkpoint
    tasks: dict[str, Task] = field(default_factory=dict)
    data: dict[str, DatasetRecord] = field(default_factory=dict)  # task -> record of the very dataset of the run
    places: dict[str, Path] = field(default_factory=dict)  # task -> where its prepared dataset was
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def baseline(self) -> BaselineValues | None:
        """What `egmf baseline` wrote, which made the folder; None of a run."""
        return baseline_of(self.record)

    @property
    def is_baseline(self) -> bool:
        """Whether `egmf baseline` made it, and no training."""
        return self.baseline is not None

    @property
    def chosen_step(self) -> int | None:
        """The step of the chosen checkpoint."""
        found = re.fullmatch(r"step-(\d+)", self.checkpoint or "")
        return int(found[1]) if found else None

    @property
    def step(self) -> int | None:
        """The last step that is known to have ended."""
        steps = [series[-1][0] for name, series in self.journal.items() if name.startswith("train/") and series]
        steps += [int(p.name[5:]) for p in (self.path / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
        return max(steps, default=None)

    @property
    def steps(self) -> int | None:
        """The steps of the whole training; None where they can no longer be known."""
        if (steps := number_or_none(self.record.get("steps"))) is not None:
            return int(steps)
        if self.config is None:
            return None
        train = self.config.train
        if train.steps is not None:
            return train.steps
        answers = {name: answers_of_split(record, "train", name) for name, record in self.data.items()}
        lengths = {name: np.zeros(found["n"]) for name, found in answers.items() if found is not None}
        if not lengths or len(lengths) < max(len(self.tasks), len(self.config.tasks)):
            return None
        order = GlobalBatchSampler.of_training(self.config, lengths)
        return math.ceil(train.epochs * order.steps_per_epoch)

    def selected(self) -> dict[str, Series]:
        """Task -> its selecting metric on the validation split, by step."""
        middle = {name: f"{name}/" if len(self.tasks) > 1 else "" for name in self.tasks}
        names = {name: f"valid/{middle[name]}{task.select}" for name, task in self.tasks.items()}
        return {name: self.journal[key] for name, key in names.items() if key in self.journal}


def read_run(path: Path, *, predictions: bool = True) -> RunFolder:
    """Everything a run folder holds; with `predictions` false the tables of predictions are not opened.

    Raises:
        ValueError: `path` is not a run folder at all.
    """
    if not is_run(path):
        why = "no such folder" if not path.exists() else "it has neither config.yaml nor run.json"
        raise ValueError(f"{path} is not a run folder ({why}): egmf train makes one, egmf runs lists them")
    run = RunFolder(path)
    run.record = _read_json(run, "run.json", "the run's state and environment", RecordValues) or {}
    if not run.is_baseline:  # which has neither config nor steps
        run.config = _config(run)
        run.journal = _journal(run)
    run.results, run.checkpoint = _results(run)
    asked, lost = _asked(run)
    run.places = {one.task.name: Path(one.path(_data_template(run) or "")) for one in asked}
    run.data = _datasets(run)
    run.tasks = _tasks(run, asked, lost)
    run.robustness = _robustness(run)
    if predictions:
        run.predictions = _predictions(run)
    return run


def is_artifact_store(folder: Path) -> bool:
    """Whether a folder holds what MLflow runs have logged: copies of runs, which are no runs themselves.

    It is one of MLflow's by name, the artifacts of one run (``<32 hexadecimal digits>/artifacts``), or an experiment's folder of them.
    """
    if folder.name in ("mlartifacts", "mlruns") or (
        folder.name == "artifacts" and _RUN_ID.fullmatch(folder.parent.name)
    ):
        return True
    return bool(_RUN_ID.fullmatch(folder.name)) and (folder / "artifacts").is_dir()


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "run.json").is_file()


def path_of_data(run: RunFolder, task: str) -> Path | None:
    """Where the prepared dataset of a task was when the run started, or the baseline was made; None where nothing says it."""
    template = _data_template(run)
    return run.places.get(task) or (None if template is None else Path(template.replace("{task}", task)))


def _data_template(run: RunFolder) -> str | None:
    """`data.path` of the run's config, or the folder of a baseline's data."""
    if run.config is not None:
        return run.config.data.path
    return None if run.baseline is None else run.baseline["data"]


def _asked(run: RunFolder) -> tuple[list[RunTask], dict[str, TaskError]]:
    """The run's tasks as its config, or a baseline's record, names them."""
    fingerprints = run.record.get("data")
    names = run.config.tasks if run.config else run.record.get("tasks", [])
    return find_saved_tasks(names, _data_template(run) or "", fingerprints if isinstance(fingerprints, Mapping) else {})


def _config(run: RunFolder) -> RunConfig | None:
    try:
        return load_config(run.path / "config.yaml")
    except (ValueError, OSError) as error:
        run.notes.append(f"the config cannot be read: {error}")
        return None


def _read_json(run: RunFolder, name: str, what: str, kind: Callable[[], Record]) -> Record | None:
    """A JSON object of the run folder as a `kind`; None, and a note on `what` cannot be shown, where it cannot be read."""
    try:
        value = load_json((run.path / name).read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return cast(Record, value)
        run.notes.append(f"{name} is damaged: {what} cannot be shown")
    except FileNotFoundError:
        run.notes.append(f"no {name}: {what} cannot be shown yet")
    except (OSError, ValueError) as error:
        run.notes.append(f"{name} is damaged ({error}): {what} cannot be shown")
    return None


def _results(run: RunFolder) -> tuple[dict[str, dict[str, TaskScores]], str | None]:
    metrics = _read_json(run, "metrics.json", "the final scores", dict[str, object]) or {}
    checkpoint = metrics.pop("checkpoint", None)
    chosen = run.path / "checkpoints" / "best"
    if checkpoint is None and chosen.is_file():
        checkpoint = chosen.read_text(encoding="utf-8", errors="replace").strip()
    if checkpoint is None and not run.is_baseline:
        run.notes.append("validation has chosen no checkpoint yet")
    results = {
        split: {task: cast(TaskScores, values) for task, values in tasks.items() if isinstance(values, dict)}
        for split, tasks in metrics.items()
        if isinstance(tasks, dict)
    }
    return results, str(checkpoint) if checkpoint else None


def _robustness(run: RunFolder) -> RobustnessRecord:
    """What egmf robustness measured, if it was run on the chosen checkpoint."""
    name = "robustness.json"
    if not (run.path / name).is_file():
        return {}
    record = _read_json(run, name, "missing and corrupted modalities", RobustnessRecord) or {}
    if record and record.get("checkpoint") != run.checkpoint:
        run.notes.append(
            f"{name} was measured on {record.get('checkpoint')}, not on the chosen checkpoint: run egmf robustness again"
        )
        return {}
    return record


def _journal(run: RunFolder) -> dict[str, Series]:
    path = run.path / JOURNAL
    lost = "the training curves cannot be shown"
    if not path.is_file():
        run.notes.append(f"no {JOURNAL}: {lost}")
        return {}
    try:
        journal = read_journal(path)
    except OSError as error:
        run.notes.append(f"{JOURNAL} cannot be read ({error}): {lost}")
        return {}
    if not journal:
        run.notes.append(f"{JOURNAL} has no metrics: {lost}")
    return journal


def _datasets(run: RunFolder) -> dict[str, DatasetRecord]:
    """Records of the run's datasets, those that still exist unchanged."""
    fingerprints = run.record.get("data")
    if not isinstance(fingerprints, Mapping):
        return {}
    found = {}
    for name, fingerprint in fingerprints.items():
        path = path_of_data(run, name)
        if path is None:
            continue
        record = read_record(path)
        if record is None:
            run.notes.append(f"the dataset {path} no longer exists: the texts of {name} cannot be shown")
        elif record.get("fingerprint") != fingerprint:
            run.notes.append(f"the dataset {path} has changed since the run: the texts of {name} cannot be shown")
        else:
            found[name] = record
    return found


def _tasks(run: RunFolder, asked: Sequence[RunTask], lost: Mapping[str, TaskError]) -> dict[str, Task]:
    """The run's tasks, each with the metric that the run selects by."""
    run.notes += [f"the task cannot be shown: {error}" for error in lost.values()]
    tasks: dict[str, Task] = {}
    recorded = run.record.get("select")  # absent where an older version wrote the record
    for task in (one.task for one in asked):
        prepared = prepared_tasks(run.data[task.name]).get(task.name) if task.name in run.data else None
        if recorded is None and prepared is not None:  # its scores are of the metrics that the dataset's record has
            task = task if task.family == prepared.family else prepared
        tasks[task.name] = task
    select = run.config.eval.select if run.config else {}
    if isinstance(recorded, Mapping):
        select = {name: str(metric) for name, metric in recorded.items() if name in tasks}
    try:
        return select_by(tasks, select)
    except TaskError as error:
        run.notes.append(f"the selecting metric cannot be shown: {error}")
        return tasks


def _predictions(run: RunFolder) -> dict[str, pd.DataFrame]:
    found = {}
    for split in SPLITS:
        path = run.path / PREDICTIONS / f"{split}.parquet"
        if not path.is_file():
            continue
        try:
            table = pd.read_parquet(path)
            missing = {"task", "id", "label", "valid"} - set(table.columns)
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            found[split] = table
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these
            run.notes.append(
                f"{PREDICTIONS}/{path.name} is damaged ({error}): what is computed from it cannot be shown"
            )
    if not found:
        run.notes.append("no predictions yet: they are written when the training ends")
    return found
