"""Logging a run's artefact as an MLflow model of the run it came from, registering a version of it, and finding one again."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import load_json
from trainer.results.compare.sources.from_mlflow import connect
from trainer.run.record import RecordValues, read_record
from trainer.saved_config import saved_config
from trainer.serving.artefact.description import Description, check_files, read_description
from trainer.serving.mlflow_model import tags as names
from trainer.serving.mlflow_model.store import PREFIX
from trainer.serving.mlflow_model.tags import check_name
from trainer.tracking.outbox import Outbox, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as MlflowEntity
    from mlflow.entities.model_registry import ModelVersion

MODEL = "egmf"  # the name of the logged model in its run
VERSIONS = "mlflow.modelVersions"  # a tag of a logged model, from which MLflow's pages link its versions
SPLITS = ("valid", "test")  # whose metrics a version shows
METRICS = 1000  # of one request


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


def log_model(
    run: Path,
    artefact: Path,
    name: str,
    *,
    uri: str | None = None,
    requirement: str | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Registered:
    """Log an artefact into the MLflow run of its run folder as a pyfunc, and register it as a new version of `name`.

    The MLflow run itself keeps its times, its state and its numbers. A version is there whole or not at all.

    Args:
        run: the run folder from which `artefact` was exported.
        artefact: the folder of :func:`trainer.serving.artefact.export.export_run`.
        uri: the MLflow store; default: where ``run.json`` says that the run was recorded.
        requirement: from what pip installs egmf-trainer; default: its code travels with the model.
        report: gets what is worth saying.

    Raises:
        ValueError: an artefact that is damaged, of another run, or has the merged backbone too; a run that was never recorded in MLflow;
            or MLflow refuses.
    """
    check_name(name)
    description = read_description(artefact)
    check_files(artefact, description)
    _check_artefact(run, artefact, description)
    record = read_record(run) or {}
    place, run_id = recorded_at(run, record, uri)
    from mlflow.exceptions import MlflowException

    client = connect(place)
    try:
        entity = _active_run(client, run, run_id, place)
        step = description.run.step
        tags = version_tags(run, record, description)
        with _logged(client, entity, tags) as model:
            with tempfile.TemporaryDirectory(prefix="egmf-mlflow-") as scratch:
                folder = Path(scratch) / "model"
                _save(folder, artefact, description, model, requirement)
                client.log_model_artifacts(model.model_id, str(folder))
            client.finalize_logged_model(model.model_id, "READY")
            _link(client, entity, model.model_id, step)
            version = _register(client, name, model, tags, run)
    except (MlflowException, OSError) as error:
        raise ValueError(f"MLflow at {place} does not take the model: {str(error).splitlines()[0]}") from error
    report(f"MLflow at {place}: version {version.version} of {name}, from run {run_id}")
    return Registered(name, str(version.version), model.model_id, run_id, place)


def _check_artefact(run: Path, artefact: Path, description: Description) -> None:
    """Refuse an artefact that another run, or another checkpoint of this one, made, and one that carries its base along twice."""
    chosen = _metrics(run).get("checkpoint")
    about = description.run
    if about.name != run.resolve().name or (chosen is not None and chosen != about.checkpoint):
        raise ValueError(
            f"{artefact} was exported from {about.name}, {about.checkpoint}, and the run is {run.resolve().name}"
            f"{'' if chosen is None else f', {chosen}'}: export it anew"
        )
    if description.merged is not None:
        raise ValueError(
            f"{artefact} holds the merged backbone, and a registry keeps the adapter alone: export without --merge"
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


def version_tags(run: Path, record: RecordValues, description: Description) -> dict[str, str]:
    """Metrics of all tasks on validation and test, fingerprints of the data, hashes of recipes and artefact, run, seed, step and commit."""
    about = description.run
    tags = {
        names.RUN: about.name,
        names.STEP: str(about.step),
        names.SEED: str(about.seed),
        names.ARTEFACT: description.hash,
    }
    if about.commit:
        tags[names.COMMIT] = f"{about.commit}{' (changed)' if (record.get('git') or {}).get('changed') else ''}"
    tags |= {names.data_tag(task): entry.fingerprint for task, entry in description.tasks.items()}
    tags |= {
        names.recipe_tag(task): str(entry.recipe["hash"])
        for task, entry in description.tasks.items()
        if entry.recipe is not None
    }
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


def _save(folder: Path, artefact: Path, description: Description, model: LoggedModel, requirement: str | None) -> None:
    """Write the MLflow model: code, artefact, signature, example and requirements."""
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # what lies in the current folder is no part of a model
    import mlflow.pyfunc
    from mlflow.models import Model

    from trainer.serving.artefact.config import opened_config
    from trainer.serving.artefact.opening import task_inputs
    from trainer.serving.mlflow_model.model import ARTEFACT, CONFIG
    from trainer.serving.mlflow_model.requirements import own_code, pinned
    from trainer.serving.mlflow_model.schema import input_example, signature

    inputs = task_inputs(description, opened_config(artefact, description))
    code, more = own_code(requirement)
    clips = any(one.recipe is not None for one in inputs.values())
    with tempfile.TemporaryDirectory(prefix="egmf-mlflow-") as scratch:
        named = Path(scratch) / ARTEFACT  # MLflow calls the folder in the model as it is called here
        shutil.copytree(artefact, named, copy_function=_link_or_copy)
        code_file = Path(scratch) / "pyfunc.py"  # MLflow writes down where it was: not where this package lies
        shutil.copyfile(Path(__file__).parent / "pyfunc.py", code_file)
        mlflow.pyfunc.save_model(
            path=str(folder),
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                run_id=model.source_run_id,
                model_uuid=model.model_id,
                model_id=model.model_id,
            ),
            python_model=str(code_file),
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
    version = client.create_model_version(
        name,
        source=model.artifact_location,
        run_id=model.source_run_id,
        tags=dict(tags),
        description=f"Exported from the run {run.resolve().name} by egmf-trainer",
        model_id=model.model_id,
    )
    client.set_logged_model_tags(model.model_id, {VERSIONS: json.dumps([{"name": name, "version": version.version}])})
    return version
