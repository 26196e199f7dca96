"""The runs that are to be compared, from run folders or from MLflow, with what of them a comparison needs.

A run's config is dotted keys with values as text, as MLflow keeps parameters, whichever way the run was read.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml
from pyarrow import compute, parquet

from trainer.config import dotted
from trainer.data.folder import read_record as read_dataset_record
from trainer.results.run_folder import PREDICTIONS, RunFolder, is_run
from trainer.results.runs import state_of
from trainer.tasks import Task, TaskError, define_task, get_task
from trainer.tracking.journal import JOURNAL, MEDIAN_SPEED, SPEED, read_journal
from trainer.tracking.mlflow_run import ENVIRONMENT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowEntity

KIND_TAG = "egmf.kind"  # of MLflow runs that are no trainings: sweep, compare
PARENT_TAG = "mlflow.parentRunId"
ANSWERS = ("task", "id", "label", "prediction", "valid", "kind")  # columns of predictions that are read
DEPTH = 4  # folders below a given one in which runs are looked for
WORKERS = 8  # requests to a server at once


@dataclass(frozen=True)
class Cost:
    """What a run took; None where it is not known. `seconds` of a run that was continued are those of its last part."""

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


@dataclass
class ComparedRun:
    """A finished run. `group` names the group it belongs to, where the caller decides that; otherwise configs do."""

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


@dataclass
class Found:
    """Runs, and in words what was left out and why."""

    runs: list[ComparedRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_runs(what: Sequence[str], splits: Iterable[str], uri: str | None = None) -> Found:
    """The finished runs that `what` names: run folders, folders that hold some, MLflow run ids and experiment names.

    A run id of a sweep stands for its children. Unfinished runs are left out, and so is a run that is named twice.

    Args:
        splits: those whose predictions are wanted.
        uri: the MLflow store; by default MLFLOW_TRACKING_URI, else ``mlflow.db`` beside the folders or in ``runs``.

    Raises:
        ValueError: something is not found, cannot be read, or has no predictions of a split; all of them in one message.
    """
    found, splits = Found(), tuple(splits)
    faults: list[str] = []
    folders = [Path(word) for word in what if Path(word).is_dir()]
    words = [word for word in what if not Path(word).is_dir()]
    for folder in folders:
        try:
            _add_folders(found, folder, splits, faults)
        except ValueError as error:
            faults.append(str(error))
    if words:
        try:
            _add_mlflow(found, words, splits, uri or _default_uri(words, folders), faults)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n  ".join([f"{len(faults)} fault{'s' if len(faults) > 1 else ''}", *faults]))
    found.runs = _once(found)
    return found


def run_from_folder(path: Path, splits: Iterable[str] = ("test",), name: str | None = None) -> ComparedRun:
    """The finished run in a run folder; MLflow is not needed.

    Raises:
        ValueError: it is no run folder, not finished, damaged, or has no predictions of a split.
    """
    record = _read_json(path / "run.json")
    state = state_of(RunFolder(path, record=record))
    if state.name != "done":
        raise ValueError(f"{path} is not finished ({state}): continue it, or leave it out")
    config = _read_config(path / "config.yaml")
    fingerprints = {name: str(value) for name, value in (record.get("data") or {}).items()}
    started, ended = (_moment(record.get(key)) for key in ("started", "ended"))
    journal = read_journal(path / JOURNAL) if (path / JOURNAL).is_file() else {}
    tasks = _tasks(config["task"], fingerprints, config["data.path"])
    speeds = [speed for _, speed in journal.get(SPEED, [])]
    tracked = record.get("mlflow") or {}
    return ComparedRun(
        name=name or path.resolve().name,
        where=str(path),
        seed=int(config["train.seed"]),
        tasks=tasks,
        config=config,
        fingerprints=fingerprints,
        answers=_answers(_prediction_files(path, splits, str(path)), tasks),
        started=started or 0.0,
        cost=Cost(
            seconds=ended - started if started is not None and ended is not None else None,
            world=record.get("world"),
            device=record.get("device"),
            samples_per_second=statistics.median(speeds) if speeds else None,
        ),
        commit=(record.get("git") or {}).get("commit"),
        mlflow=(tracked["uri"], tracked["run_id"]) if tracked.get("uri") and tracked.get("run_id") else None,
        experiment=config.get("track.experiment"),
    )


def _add_folders(found: Found, folder: Path, splits: Sequence[str], faults: list[str]) -> None:
    paths = [folder] if is_run(folder) else _run_folders(folder)
    if not paths:
        raise ValueError(f"{folder} is no run folder and holds none: egmf train makes them, egmf runs lists them")
    for path in paths:
        name = str(path.relative_to(folder)) if path != folder else None
        try:
            state = state_of(RunFolder(path, record=_read_json(path / "run.json")))
            if state.name != "done":
                found.notes.append(f"{path} is left out: it is not finished ({state})")
                continue
            found.runs.append(run_from_folder(path, splits, name))
        except (ValueError, OSError) as error:
            faults.append(str(error))


def _run_folders(folder: Path, depth: int = DEPTH) -> list[Path]:
    """Run folders below `folder`, by name; those inside another run (an earlier run put aside) are not looked for."""
    paths = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if is_run(path):
            paths.append(path)
        elif depth > 1:
            paths += _run_folders(path, depth - 1)
    return paths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no record of a run")
    return value


def _read_config(path: Path) -> dict[str, str]:
    """The resolved config as MLflow has it: dotted keys, values as text."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        config = {key: str(value) for key, value in dotted(raw).items()}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    missing = {"task", "train.seed", "data.path"} - set(config)
    if missing:
        raise ValueError(f"{path} is no resolved config of a run: it lacks {', '.join(sorted(missing))}")
    return config


def _tasks(text: str, fingerprints: dict[str, str], data: str) -> dict[str, Task]:
    """The tasks of a config's `task`; one whose file is gone is read from its dataset, where that is the run's own."""
    value = yaml.safe_load(text)
    tasks = {}
    for name in value if isinstance(value, list) else [value]:
        try:
            task = get_task(str(name))
        except TaskError as error:
            stem = Path(str(name)).stem
            held = read_dataset_record(Path(data.replace("{task}", stem)))
            if held is None or held.get("fingerprint") != fingerprints.get(stem):
                raise ValueError(f"{error} (its dataset, which could tell, is gone or another one by now)") from error
            task = define_task(held["task"])
        tasks[task.name] = task
    return tasks


def _prediction_files(folder: Path, splits: Iterable[str], where: str) -> dict[str, Path]:
    files = {split: folder / PREDICTIONS / f"{split}.parquet" for split in splits}
    missing = [split for split, path in files.items() if not path.is_file()]
    if missing:
        raise ValueError(
            f"{where} has no predictions of {', '.join(missing)}: was it in the run's eval.splits? egmf evaluate makes them"
        )
    return files


def _answers(files: dict[str, Path], tasks: dict[str, Task]) -> dict[str, dict[str, Answers]]:
    return {split: read_answers(path, tasks) for split, path in files.items()}


def read_answers(path: Path, tasks: dict[str, Task]) -> dict[str, Answers]:
    """The predictions of each task in a run's file, by id.

    Raises:
        ValueError: it is damaged, or does not fit the tasks.
    """
    try:
        file = parquet.ParquetFile(path)
        table = file.read(columns=[c for c in ANSWERS if c in file.schema_arrow.names])
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise ValueError(f"{path} is damaged: {error}") from error
    if missing := set(ANSWERS) - {"kind", "prediction"} - set(table.column_names):
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}: it is no run's predictions")
    found = {}
    for name, task in tasks.items():
        rows = table.filter(compute.equal(table["task"], name)).sort_by("id")
        truth_N = _numbers(task, rows["label"])
        guess_N = (
            _numbers(task, rows["prediction"]) if "prediction" in rows.column_names else np.full(len(rows), np.nan)
        )
        guess_N = np.where(rows["valid"].to_numpy(), guess_N, np.nan)
        if not len(rows) or not np.isfinite(truth_N).all() or compute.count_distinct(rows["id"]).as_py() < len(rows):
            raise ValueError(f"{path} has no rows of {name}, truths that are not the task's, or an id twice")
        has_kinds = "kind" in rows.column_names and rows["kind"].null_count < len(rows)
        kind_N = np.array(rows["kind"].to_pylist(), dtype=object) if has_kinds else None
        found[name] = Answers(np.array(rows["id"].to_pylist(), dtype=object), truth_N, guess_N, kind_N)
    return found


def _numbers(task: Task, cells: pa.ChunkedArray) -> np.ndarray:
    """Label indices, or numbers, which a file of tasks of both kinds has as text; nan for anything else."""
    if task.kind == "classification":
        if pa.types.is_null(cells.type):  # no prediction at all
            return np.full(len(cells), np.nan)
        found = compute.index_in(cells, value_set=pa.array(task.labels, cells.type)).combine_chunks()
        return np.asarray(compute.fill_null(found.cast(pa.float64()), np.nan))
    return pd.to_numeric(pd.Series(cells.to_pylist(), dtype=object), errors="coerce").to_numpy(float)


def _default_uri(words: Sequence[str], folders: Sequence[Path]) -> str:
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return os.environ["MLFLOW_TRACKING_URI"]
    for place in [*(p for f in folders for p in (f, f.resolve().parent)), Path("runs"), Path()]:
        if (place / "mlflow.db").is_file():
            return f"sqlite:///{(place / 'mlflow.db').resolve()}"
    raise ValueError(
        f"there is no folder {', '.join(words)}, and no MLflow store to look for such runs or experiments: name the store "
        "with --uri, such as sqlite:///runs/mlflow.db or http://host:5000"
    )


def connect(uri: str) -> MlflowClient:
    """A client of the store at `uri`.

    Raises:
        ValueError: an SQLite file that does not exist (MLflow would make an empty one).
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ValueError(f"there is no MLflow store {uri.removeprefix('sqlite:///')}: name it with --uri")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _add_mlflow(found: Found, words: Sequence[str], splits: Sequence[str], uri: str, faults: list[str]) -> None:
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    experiments: dict[str, str] = {}
    entities: list[MlflowEntity] = []
    try:
        for word in words:
            some = _entities(client, word)
            if some is None:
                faults.append(f"{word} is no folder, and neither a run nor an experiment of the MLflow store {uri}")
            else:
                entities += some
        for entity in entities:
            number = entity.info.experiment_id
            if number not in experiments:
                experiments[number] = client.get_experiment(number).name
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri} does not answer as it should: {str(error).splitlines()[0]}") from error
    finished = []
    for entity in entities:
        if entity.info.status == "FINISHED":
            finished.append(entity)
        else:
            found.notes.append(f"{_told(entity)} is left out: it is not finished ({entity.info.status.lower()})")

    def read(entity: MlflowEntity) -> ComparedRun | str:
        try:
            return _run_from_mlflow(client, uri, entity, experiments[entity.info.experiment_id], splits, Path(folder))
        except (ValueError, OSError, MlflowException) as error:
            return str(error)

    with tempfile.TemporaryDirectory(prefix="egmf-compare-") as folder, ThreadPoolExecutor(WORKERS) as pool:
        for outcome in pool.map(read, finished):
            if isinstance(outcome, str):
                faults.append(outcome)
            else:
                found.runs.append(outcome)


def _entities(client: MlflowClient, word: str) -> list[MlflowEntity] | None:
    """The MLflow runs that a word names, by name; None where it names nothing."""
    from mlflow.exceptions import MlflowException

    if re.fullmatch(r"[0-9a-f]{32}", word):
        try:
            run = client.get_run(word)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if KIND_TAG not in run.data.tags:
            return [run]
        return _search(client, run.info.experiment_id, f"tags.`{PARENT_TAG}` = '{word}'")
    experiment = client.get_experiment_by_name(word)
    return None if experiment is None else _search(client, experiment.experiment_id, "")


def _search(client: MlflowClient, experiment: str, asked: str) -> list[MlflowEntity]:
    entities: list[MlflowEntity] = []
    token = None
    while True:
        page = client.search_runs([experiment], asked, max_results=1000, page_token=token)
        entities += [run for run in page if KIND_TAG not in run.data.tags]
        token = page.token
        if not token:
            return sorted(entities, key=lambda run: (run.info.run_name, run.info.start_time))


def _run_from_mlflow(
    client: MlflowClient, uri: str, entity: MlflowEntity, experiment: str, splits: Sequence[str], folder: Path
) -> ComparedRun:
    info, config, tags = entity.info, dict(entity.data.params), entity.data.tags
    missing = {"task", "train.seed", "data.path"} - set(config)
    if missing:
        raise ValueError(f"{_told(entity)} is no run of egmf: it lacks the parameters {', '.join(sorted(missing))}")
    fingerprints = {key.removeprefix("data."): value for key, value in tags.items() if key.startswith("data.")}
    tasks = _tasks(config["task"], fingerprints, config["data.path"])
    return ComparedRun(
        name=info.run_name or info.run_id,
        where=f"MLflow run {info.run_id}",
        seed=int(config["train.seed"]),
        tasks=tasks,
        config=config,
        fingerprints=fingerprints,
        answers=_answers(_artifacts(client, entity, splits, folder), tasks),
        started=info.start_time / 1000,
        cost=Cost(
            seconds=(info.end_time - info.start_time) / 1000 if info.end_time else None,
            world=int(tags["world_size"]) if "world_size" in tags else None,
            device=tags.get("device"),
            samples_per_second=_speed(client, entity),
        ),
        commit=tags.get("git.commit"),
        mlflow=(uri, info.run_id),
        experiment=experiment,
    )


def _artifacts(client: MlflowClient, entity: MlflowEntity, splits: Sequence[str], folder: Path) -> dict[str, Path]:
    """The files of predictions: read in place where the store's artifacts lie on this machine, else downloaded."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.file_utils import local_file_uri_to_path

    info = entity.info
    if info.artifact_uri.startswith(("file:", "/")):
        return _prediction_files(Path(local_file_uri_to_path(info.artifact_uri)), splits, _told(entity))
    out = folder / info.run_id
    out.mkdir()
    files = {}
    for split in splits:
        path = f"{PREDICTIONS}/{split}.parquet"
        try:
            files[split] = Path(client.download_artifacts(info.run_id, path, str(out)))
        except (MlflowException, OSError) as error:
            raise ValueError(f"{_told(entity)}: {path} cannot be had from its artifacts: {error}") from error
    return files


def _speed(client: MlflowClient, entity: MlflowEntity) -> float | None:
    """The median over the run's steps; runs of earlier versions do not state it themselves."""
    metrics = entity.data.metrics
    if MEDIAN_SPEED in metrics:
        return float(metrics[MEDIAN_SPEED])
    if SPEED not in metrics:
        return None
    return statistics.median(metric.value for metric in client.get_metric_history(entity.info.run_id, SPEED))


def _told(entity: MlflowEntity) -> str:
    return f"the MLflow run {entity.info.run_name} ({entity.info.run_id})"


def _once(found: Found) -> list[ComparedRun]:
    """Each run once: a folder and its MLflow run are the same."""
    seen: dict[str, ComparedRun] = {}
    for run in found.runs:
        key = run.mlflow[1] if run.mlflow else str(Path(run.where).resolve())
        if key in seen:
            found.notes.append(f"{run.where} is {seen[key].where}: it counts once")
        else:
            seen[key] = run
    return list(seen.values())


def _moment(text: Any) -> float | None:
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None
