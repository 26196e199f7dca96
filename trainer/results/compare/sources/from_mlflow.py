"""Runs to compare, read from an MLflow store: by run id, by the id of a sweep, or by experiment."""

from __future__ import annotations

import os
import re
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.files import load_json
from trainer.results.compare.sources.compared_run import (
    REQUIRED_SETTINGS,
    ComparedRun,
    Cost,
    prediction_files,
    read_splits,
    tasks_of,
    with_defaults,
)
from trainer.results.run_folder import PREDICTIONS
from trainer.tracking.journal import MEDIAN_SPEED, SPEED
from trainer.tracking.mlflow_run import ENVIRONMENT
from trainer.tracking.sqlite_uri import sqlite_file, sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowEntity

KIND_TAG = "egmf.kind"  # of MLflow runs that are not trainings: sweep, compare
PARENT_TAG = "mlflow.parentRunId"
WORKERS = 8  # requests to a server at once


def default_uri(words: Sequence[str], folders: Sequence[Path]) -> str:
    """MLFLOW_TRACKING_URI, else ``mlflow.db`` beside the folders or in ``runs``; `words` are what is looked for in it.

    Raises:
        ValueError: there is no store.
    """
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return os.environ["MLFLOW_TRACKING_URI"]
    for place in [*(p for f in folders for p in (f, f.resolve().parent)), Path("runs"), Path()]:
        if (place / "mlflow.db").is_file():
            return sqlite_uri((place / "mlflow.db").resolve())
    raise ValueError(
        f"there is no folder {', '.join(words)}, and no MLflow store in which to look for such runs or experiments: give the "
        "store with --uri, such as sqlite:///runs/mlflow.db or http://host:5000"
    )


def connect(uri: str) -> MlflowClient:
    """A client of the store at `uri`.

    Raises:
        ValueError: an SQLite file that does not exist (MLflow would make an empty one).
    """
    if (file := sqlite_file(uri)) is not None and not file.is_file():
        raise ValueError(f"there is no MLflow store {file}: give another with --uri")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    return MlflowClient(uri)


def runs_from_mlflow(
    words: Sequence[str], splits: Sequence[str], uri: str
) -> tuple[list[ComparedRun], list[str], list[str]]:
    """The finished runs that `words` stand for, notes on those left out, and faults of words and runs.

    Raises:
        ValueError: the store cannot be read.
    """
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    experiments: dict[str, str] = {}
    entities: list[MlflowEntity] = []
    runs: list[ComparedRun] = []
    notes: list[str] = []
    faults: list[str] = []
    try:
        for word in words:
            matching = _entities(client, word)
            if matching is None:
                faults.append(f"{word} is not a folder, and neither a run nor an experiment of the MLflow store {uri}")
            else:
                entities += matching
        for entity in entities:
            experiment_id = entity.info.experiment_id
            if experiment_id not in experiments:
                experiments[experiment_id] = client.get_experiment(experiment_id).name
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri} cannot be read: {str(error).splitlines()[0]}") from error
    finished = []
    for entity in entities:
        if entity.info.status == "FINISHED":
            finished.append(entity)
        else:
            notes.append(f"{_label(entity)} is left out: it is not finished ({entity.info.status.lower()})")

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
                runs.append(outcome)
    return runs, notes, faults


def _entities(client: MlflowClient, word: str) -> list[MlflowEntity] | None:
    """The MLflow runs that a word stands for, by name; None where there is neither such a run nor such an experiment."""
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


def _search(client: MlflowClient, experiment_id: str, condition: str) -> list[MlflowEntity]:
    """The trainings of an experiment for which the condition holds, by name."""
    entities: list[MlflowEntity] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], condition, max_results=1000, page_token=token)
        entities += [run for run in page if KIND_TAG not in run.data.tags]
        token = page.token
        if not token:
            return sorted(entities, key=lambda run: (run.info.run_name, run.info.start_time))


def _run_from_mlflow(
    client: MlflowClient, uri: str, entity: MlflowEntity, experiment: str, splits: Sequence[str], folder: Path
) -> ComparedRun:
    info, config, tags = entity.info, dict(entity.data.params), entity.data.tags
    missing = REQUIRED_SETTINGS - set(config)
    if missing:
        raise ValueError(f"{_label(entity)} is not a run of egmf: it lacks the parameters {', '.join(sorted(missing))}")
    fingerprints = {key.removeprefix("data."): value for key, value in tags.items() if key.startswith("data.")}
    tasks = tasks_of(config, fingerprints)
    return ComparedRun(
        name=info.run_name or info.run_id,
        where=f"MLflow run {info.run_id}",
        seed=int(config["train.seed"]),
        tasks=tasks,
        config=with_defaults(config),
        fingerprints=fingerprints,
        answers=read_splits(_artifacts(client, entity, splits, folder), tasks),
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
        fold=load_json(tags["egmf.folds"]) if "egmf.folds" in tags else None,
    )


def _artifacts(client: MlflowClient, entity: MlflowEntity, splits: Sequence[str], folder: Path) -> dict[str, Path]:
    """Split -> file of predictions: read in place where the store keeps artifacts on this machine, else downloaded."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.file_utils import local_file_uri_to_path

    info = entity.info
    if info.artifact_uri.startswith(("file:", "/")):
        local = str(local_file_uri_to_path(info.artifact_uri))  # type: ignore[no-untyped-call]
        return prediction_files(Path(local), splits, _label(entity))
    out = folder / info.run_id
    out.mkdir()
    files = {}
    for split in splits:
        path = f"{PREDICTIONS}/{split}.parquet"
        try:
            files[split] = Path(client.download_artifacts(info.run_id, path, str(out)))
        except (MlflowException, OSError) as error:
            raise ValueError(f"{_label(entity)}: {path} cannot be downloaded from its artifacts: {error}") from error
    return files


def _speed(client: MlflowClient, entity: MlflowEntity) -> float | None:
    """The median over the run's steps; runs of earlier versions did not log it themselves."""
    metrics = entity.data.metrics
    if MEDIAN_SPEED in metrics:
        return float(metrics[MEDIAN_SPEED])
    if SPEED not in metrics:
        return None
    return statistics.median(metric.value for metric in client.get_metric_history(entity.info.run_id, SPEED))


def _label(entity: MlflowEntity) -> str:
    return f"the MLflow run {entity.info.run_name} ({entity.info.run_id})"
