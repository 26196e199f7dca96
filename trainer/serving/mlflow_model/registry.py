"""Logging a run's artefact as an MLflow model of the run it came from, registering a version of it, and finding one again."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.task_input import TaskInput
from trainer.features.recipe_record import RecipeRecord
from trainer.files import load_json
from trainer.results.compare.sources.from_mlflow import connect
from trainer.run.record import RecordValues, read_record
from trainer.saved_config import saved_config
from trainer.serving.mlflow_model import tags as names
from trainer.tracking.outbox import Outbox, tracking_uri
from trainer.tracking.sqlite_uri import sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as MlflowEntity
    from mlflow.entities.model_registry import ModelVersion

MODEL = "egmf"  # the name of the logged model in its run
PREFIX = "models:/"
SPLITS = ("valid", "test")  # whose metrics a version shows
METRICS = 1000  # of one request
_ID = re.compile(r"m-[0-9a-f]{32}")


@dataclass(frozen=True)
class Registered:
    """A registered version. `model_id` is that of the logged model, `run_id` that of the MLflow run it came from, at `uri`."""

    name: str
    version: str
    model_id: str
    run_id: str
    uri: str

    @property
    def address(self) -> str:
        return f"{PREFIX}{self.name}/{self.version}"


def is_address(source: object) -> bool:
    """Whether `source` is an address of MLflow's registry, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``."""
    return isinstance(source, str) and source.startswith("models:")


def log_model(
    run: Path,
    artefact: Path,
    name: str,
    inputs: Mapping[str, TaskInput],
    *,
    uri: str | None = None,
    requirement: str | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Registered:
    """Log an artefact into the MLflow run of its run folder as a pyfunc, and register it as a new version of `name`.

    The MLflow run itself keeps its times, its state and its numbers. A version is there whole or not at all.

    Args:
        run: the run folder from which `artefact` was exported.
        inputs: task -> what the model reads of it, for the signature and the example.
        uri: the MLflow store; default: where ``run.json`` says that the run was recorded.
        requirement: from what pip installs egmf-trainer; default: its code travels with the model.
        report: gets what is worth saying.

    Raises:
        ValueError: the run was never recorded in MLflow, or MLflow refuses.
    """
    check_name(name)
    record = read_record(run) or {}
    place, run_id = recorded_at(run, record, uri)
    from mlflow.exceptions import MlflowException

    client = connect(place)
    try:
        entity = _active_run(client, run, run_id, place)
        step = _step(run)
        tags = version_tags(run, record, step)
        with _logged(client, entity, tags) as model:
            with tempfile.TemporaryDirectory(prefix="egmf-mlflow-") as scratch:
                folder = Path(scratch) / "model"
                _save(folder, artefact, inputs, model, requirement)
                client.log_model_artifacts(model.model_id, str(folder))
            client.finalize_logged_model(model.model_id, "READY")
            _link(client, entity, model.model_id, step)
            version = _register(client, name, model, tags, run)
    except (MlflowException, OSError) as error:
        raise ValueError(f"MLflow at {place} does not take the model: {str(error).splitlines()[0]}") from error
    report(f"MLflow at {place}: version {version.version} of {name}, from run {run_id}")
    return Registered(name, str(version.version), model.model_id, run_id, place)


def check_name(name: str) -> None:
    """Refuse what MLflow does not take as the name of a registered model, and what would be an address.

    Raises:
        ValueError: it is such a name.
    """
    if not name.strip() or re.search(r"""[/:@"'.%\n]""", name):
        raise ValueError(
            f"{name!r} cannot name a registered model: choose one without / : @ . % and quotes, such as meld"
        )


def recorded_at(run: Path, record: RecordValues, uri: str | None) -> tuple[str, str]:
    """The MLflow store of a run and its id there, by ``run.json``, else by ``tracking.json``, which sending the journal later writes.

    Raises:
        ValueError: it was never recorded.
    """
    place = record.get("mlflow")
    if place is not None and place["run_id"]:
        return uri or place["uri"], place["run_id"]
    config = saved_config(run)
    found = uri or tracking_uri(config.track, run)
    run_id = Outbox(run, config.track, found).run_id
    if run_id is None:
        raise ValueError(
            f"{run} was never recorded in MLflow, so there is no MLflow run for the model to belong to: egmf track sync {run} sends "
            "its records now"
        )
    return found, run_id


def _active_run(client: MlflowClient, run: Path, run_id: str, uri: str) -> MlflowEntity:
    from mlflow.exceptions import MlflowException

    try:
        entity = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(
            f"MLflow at {uri} has no run {run_id}, as which {run} was recorded: name its store with --uri, or send its records to another "
            f"run (egmf track sync --new-run {run})"
        ) from error
    if entity.info.lifecycle_stage != "active":
        raise ValueError(
            f"the MLflow run {run_id} of {run} is deleted at {uri}: restore it (mlflow runs restore --run-id {run_id})"
        )
    return entity


def _metrics(run: Path) -> dict[str, Any]:
    """What ``metrics.json`` holds; nothing where there is none."""
    try:
        found = load_json((run / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{run / 'metrics.json'} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def _step(run: Path) -> int:
    """The step of the checkpoint that validation chose; 0 where the run does not say."""
    match = re.fullmatch(r"step-(\d+)", str(_metrics(run).get("checkpoint", "")))
    return int(match[1]) if match else 0


def version_tags(run: Path, record: RecordValues, step: int) -> dict[str, str]:
    """Metrics of all tasks on validation and test, fingerprints of the data, hashes of recipes, run, seed, step and commit."""
    tags = {names.RUN: run.resolve().name, names.STEP: str(step)}
    if "seed" in record:
        tags[names.SEED] = str(record["seed"])
    commit = (record.get("git") or {}).get("commit")
    if commit:
        tags[names.COMMIT] = f"{commit}{' (changed)' if (record.get('git') or {}).get('changed') else ''}"
    tags |= {names.data_tag(task): str(value) for task, value in (record.get("data") or {}).items()}
    recipes: Mapping[str, RecipeRecord] = record.get("recipe") or {}
    tags |= {names.recipe_tag(task): recipe["hash"] for task, recipe in recipes.items()}
    metrics = _metrics(run)
    for split in SPLITS:
        for task, scores in (metrics.get(split) or {}).items():
            for metric, value in scores.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    tags[names.metric_tag(split, task, metric)] = repr(value)
    return tags


@contextlib.contextmanager
def _logged(client: MlflowClient, entity: MlflowEntity, tags: dict[str, str]) -> Iterator[LoggedModel]:
    """A logged model of the run, which is taken away again where the block fails."""
    model = client.create_logged_model(
        entity.info.experiment_id,
        name=MODEL,
        source_run_id=entity.info.run_id,
        tags=tags,
        params=dict(entity.data.params),
    )
    try:
        yield model
    except BaseException:
        with contextlib.suppress(Exception):
            client.delete_logged_model(model.model_id)
        raise


def _save(
    folder: Path, artefact: Path, inputs: Mapping[str, TaskInput], model: LoggedModel, requirement: str | None
) -> None:
    """Write the MLflow model: code, artefact, signature, example and requirements."""
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # what lies in the current folder is no part of a model
    import mlflow.pyfunc
    from mlflow.models import Model

    from trainer.serving.mlflow_model.model import ARTEFACT, CONFIG
    from trainer.serving.mlflow_model.requirements import own_code, pinned
    from trainer.serving.mlflow_model.schema import input_example, signature

    code, more = own_code(requirement)
    clips = any(one.recipe is not None for one in inputs.values())
    with tempfile.TemporaryDirectory(prefix="egmf-mlflow-") as scratch:
        named = Path(scratch) / ARTEFACT  # MLflow calls the folder in the model as it is called here
        shutil.copytree(artefact, named, copy_function=_link_or_copy)
        mlflow.pyfunc.save_model(
            path=str(folder),
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                run_id=model.source_run_id,
                model_uuid=model.model_id,
                model_id=model.model_id,
            ),
            python_model=str(Path(__file__).parent / "pyfunc.py"),
            artifacts={ARTEFACT: str(named)},
            signature=signature({name: one.task for name, one in inputs.items()}),
            input_example=input_example(inputs),
            pip_requirements=[*pinned(clips=clips), *more],
            code_paths=code or None,
            model_config=dict(CONFIG),
        )


def _link_or_copy(source: str, target: str) -> None:
    """Have a file under a second name, which takes no space on the same disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _link(client: MlflowClient, entity: MlflowEntity, model_id: str, step: int) -> None:
    """Have MLflow show the model as what the run made, with the run's own numbers of the chosen step."""
    from mlflow.entities import LoggedModelOutput, Metric

    client.log_outputs(entity.info.run_id, [LoggedModelOutput(model_id, step=step)])
    found = [
        Metric(one.key, one.value, one.timestamp, one.step, model_id=model_id, run_id=entity.info.run_id)
        for key in entity.data.metrics
        if key.split("/")[0] in SPLITS
        for one in client.get_metric_history(entity.info.run_id, key)
        if one.step == step
    ]
    for start in range(0, len(found), METRICS):
        client.log_batch(entity.info.run_id, metrics=found[start : start + METRICS])


def _register(client: MlflowClient, name: str, model: LoggedModel, tags: Mapping[str, str], run: Path) -> ModelVersion:
    """A new version, named by where its files lie: ``models:/m-…`` would be looked up in the process's default store."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        name,
        source=model.artifact_location,
        run_id=model.source_run_id,
        tags=dict(tags),
        description=f"Exported from the run {run.resolve().name} by egmf-trainer",
        model_id=model.model_id,
    )


def registry_uri(named: str | None = None, folders: Sequence[Path] = ()) -> str:
    """The user's MLflow store: the `named` one, that of ``MLFLOW_TRACKING_URI``, or ``mlflow.db`` beside the folders, in ``runs`` or here.

    Raises:
        ValueError: there is none.
    """
    own = named or os.environ.get("MLFLOW_TRACKING_URI")
    if own:
        return own
    for place in [*(p for f in folders for p in (f, f.resolve().parent)), Path("runs"), Path()]:
        if (place / "mlflow.db").is_file():
            return sqlite_uri((place / "mlflow.db").resolve())
    raise ValueError(
        "there is no MLflow store: set MLFLOW_TRACKING_URI, or name one with --uri, such as sqlite:///runs/mlflow.db or http://host:5000"
    )


@contextlib.contextmanager
def downloaded(address: str, uri: str | None = None) -> Iterator[Path]:
    """The artefact's folder of a registered version, downloaded by MLflow; it is gone after the block.

    Args:
        address: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS`` or ``models:/m-…``, the id of a logged model.
        uri: as of :func:`registry_uri`.

    Raises:
        ValueError: no such version, one that egmf-trainer did not log, or a store that cannot be read.
    """
    place = registry_uri(uri)
    client = connect(place)
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    from trainer.serving.mlflow_model.model import ARTEFACT

    with tempfile.TemporaryDirectory(prefix="egmf-mlflow-") as scratch:
        try:
            source = _location(client, address)
            folder = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{source.rstrip('/')}/artifacts/{ARTEFACT}", dst_path=scratch, tracking_uri=place
            )
        except (MlflowException, OSError) as error:
            raise ValueError(
                f"{address} cannot be read from MLflow at {place}: {str(error).splitlines()[0]}"
            ) from error
        if not Path(folder).is_dir():
            raise ValueError(
                f"{address} of MLflow at {place} holds no artefact of egmf-trainer: egmf export RUN --mlflow NAME registers one"
            )
        yield Path(folder)


def _location(client: MlflowClient, address: str) -> str:
    """Where the files of a version lie.

    Raises:
        ValueError: an address of another form.
    """
    rest = address.removeprefix(PREFIX)
    if _ID.fullmatch(rest):
        return str(client.get_logged_model(rest).artifact_location)
    alias = re.fullmatch(r"([^/@:]+)@([^/@:]+)", rest)
    if alias is not None:
        version = client.get_model_version_by_alias(alias[1], alias[2]).version
        return str(client.get_model_version_download_uri(alias[1], str(version)))
    plain = re.fullmatch(r"([^/@:]+)/(\d+)", rest)
    if not address.startswith(PREFIX) or plain is None:
        raise ValueError(f"{address!r} is no address of a model: write models:/NAME/VERSION or models:/NAME@ALIAS")
    return str(client.get_model_version_download_uri(plain[1], plain[2]))
