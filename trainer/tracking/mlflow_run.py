"""One run in MLflow, as the outbox needs it: found or created; sending a record twice does no harm."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from trainer.config import TrackConfig
from trainer.tracking.journal import Record
from trainer.tracking.sqlite_uri import sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

KEY_TAG = "egmf.journal"  # finds the run of a journal again when the answer to its creation was lost
METRICS = 1000  # of one request, as MLflow limits it
PARAMETERS = 100  # of one request; tags too
STATUS = {"done": "FINISHED", "stopped": "KILLED"}  # of MLflow, by the state in run.json; all others have failed
ENVIRONMENT = {  # of MLflow, unless the user has set them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds; MLflow's 120 would hide a hanging server for long
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the outbox tries again
}
Item = TypeVar("Item")


class MlflowRun:
    """The MLflow run of the journal with this `key`. Every method may raise what the server or the network does.

    What the server refuses for good (a name it does not allow) is left out with a warning and counted in `refused`:
    it must not hold up the rest.
    """

    def __init__(self, uri: str, track: TrackConfig, folder: Path, key: str) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.client: MlflowClient = MlflowClient(uri)
        self.uri, self.track, self.folder, self.key = uri, track, folder, key
        self.run_id = ""
        self.refused = 0
        self._refused_names: set[str] = set()

    def exists(self, run_id: str) -> bool:
        """Whether the server knows `run_id`, which is used from now on if so.

        Raises:
            ValueError: it was deleted there; MLflow keeps it until its garbage is collected.
        """
        from mlflow.exceptions import MlflowException

        try:
            info = self.client.get_run(run_id).info
            if info.lifecycle_stage != "active":
                raise ValueError(
                    f"the run {run_id} was deleted there: restore it (MLFLOW_TRACKING_URI={shlex.quote(self.uri)} mlflow runs restore "
                    f"--run-id {run_id}), or, when the training has ended, send all records to another run (egmf track sync --new-run "
                    f"{shlex.quote(str(self.folder))})"
                )
            self.run_id = info.run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def find_or_create(self, started: float) -> str:
        """The id of this journal's run; a new one, begun at `started` (seconds since the epoch), where there is none."""
        from mlflow.tracking.context.registry import resolve_tags

        experiment = self._experiment()
        if not self._same_journal(experiment):
            tags = {**resolve_tags(), KEY_TAG: self.key}
            name = self.track.run_name or self.folder.resolve().name
            self.client.create_run(experiment, start_time=_milliseconds(started), tags=tags, run_name=name)
        self.run_id = self._same_journal(experiment)[0]
        return self.run_id

    def remove_twins(self) -> None:
        """Delete empty runs of the same journal: a server that hung may create one after its request was given up."""
        experiment = self.client.get_run(self.run_id).info.experiment_id
        for twin in self._same_journal(experiment):
            if twin != self.run_id:
                self.client.delete_run(twin)

    def start(self, params: dict[str, str], tags: dict[str, str]) -> None:
        """Parameters that the run does not have yet (MLflow never changes one), tags, and the state running.

        A value that is longer than MLflow takes is cut, and that is told when it is first sent.
        """
        from mlflow.entities import Param, RunTag
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

        run = self.client.get_run(self.run_id)
        known = run.data.params
        short, short_tags = _cut(params, MAX_PARAM_VAL_LENGTH), _cut(tags, MAX_TAG_VAL_LENGTH)
        news = _news_of_cut(params, short, known, "parameter") + _news_of_cut(tags, short_tags, run.data.tags, "tag")
        if news:
            log.warning("MLflow gets the beginning of %s; config.yaml has all of it", ", ".join(news))
        params, tags = short, short_tags
        changed = [key for key, value in params.items() if known.get(key, value) != value]
        if changed:
            log.warning("MLflow keeps the first values of parameters that have changed: %s", ", ".join(changed))
        fresh = [Param(key, value) for key, value in params.items() if key not in known]
        for some in _chunks(fresh, PARAMETERS):
            self._deliver("parameter", some, lambda items: self.client.log_batch(self.run_id, params=items))
        for some_tags in _chunks([RunTag(key, value) for key, value in tags.items()], PARAMETERS):
            self._deliver("tag", some_tags, lambda items: self.client.log_batch(self.run_id, tags=items))
        if run.info.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")

    def metrics(self, records: Iterable[Record], *, in_doubt: bool) -> None:
        """The numbers of journal records, with the journal's times; `in_doubt`: only those the server does not have."""
        from mlflow.entities import Metric

        batch = [
            Metric(name, value, _milliseconds(record["time"]), record["step"])
            for record in records
            for name, value in record["metrics"].items()
        ]
        if in_doubt:
            batch = self._missing(batch)
        for some in _chunks(batch, METRICS):
            self._deliver("metric", some, lambda items: self.client.log_batch(self.run_id, metrics=items))

    def artifact(self, path: Path, folder: str | None) -> None:
        """Upload a file or folder as it is now; one that is no longer there is left out with a warning."""
        if not os.access(path, os.R_OK):
            self._refuse("artifact", str(path), "it is not there, or not readable")
            return
        self._deliver("artifact", [path], lambda items: self.client.log_artifact(self.run_id, str(items[0]), folder))

    def end(self, state: str, ended: float) -> None:
        """End the run with the status that stands for `state` of run.json, at `ended` (seconds since the epoch)."""
        self.client.set_terminated(self.run_id, STATUS.get(state, "FAILED"), _milliseconds(ended))

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.track.experiment
        found = self.client.get_experiment_by_name(name)
        if found is None:
            local = sqlite_file(self.uri) is not None
            location = (self.folder.resolve().parent / "mlartifacts").as_uri() if local else None
            try:
                return str(self.client.create_experiment(name, location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)  # another run was faster
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise ValueError(f"the experiment {name!r} is deleted: restore it, or set track.experiment to another name")
        return str(found.experiment_id)

    def _same_journal(self, experiment: str) -> list[str]:
        runs = self.client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{self.key}'")
        return sorted(run.info.run_id for run in runs)

    def _missing(self, batch: list[Metric]) -> list[Metric]:
        """Those of `batch` whose (metric, step) the server does not have."""
        latest = {metric.key: metric.step for metric in self.client.get_run(self.run_id).data._metric_objs}
        had = {
            (name, metric.step)
            for name in {m.key for m in batch if m.step <= latest.get(m.key, -1)}
            for metric in self.client.get_metric_history(self.run_id, name)
        }
        return [metric for metric in batch if (metric.key, metric.step) not in had]

    def _deliver(self, what: str, items: list[Item], send: Callable[[list[Item]], object]) -> None:
        """Send `items` in one request; where the server refuses one of them, find it by halves and go on without it."""
        from mlflow.exceptions import MlflowException

        try:
            send(items)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or not self._active():
                raise
            if len(items) == 1:
                self._refuse(what, str(getattr(items[0], "key", items[0])), str(error))
                return
            half = len(items) // 2
            self._deliver(what, items[:half], send)
            self._deliver(what, items[half:], send)

    def _active(self) -> bool:
        """Whether the run takes records at all: one that was deleted on the server refuses everything."""
        return str(self.client.get_run(self.run_id).info.lifecycle_stage) == "active"

    def _refuse(self, what: str, name: str, why: str) -> None:
        self.refused += 1
        if name not in self._refused_names:
            self._refused_names.add(name)
            log.warning("MLflow does not get the %s %s: %s", what, name, why)


def _cut(values: Mapping[str, str], longest: int) -> dict[str, str]:
    """The values, those that are too long cut."""
    return {key: value if len(value) <= longest else f"{value[: longest - 1]}…" for key, value in values.items()}


def _news_of_cut(given: Mapping[str, str], cut: Mapping[str, str], known: Mapping[str, str], what: str) -> list[str]:
    """The values that were cut, and that the server does not have so yet."""
    return [
        f"{what} {key} ({len(value)} characters, at most {len(cut[key])})"
        for key, value in given.items()
        if cut[key] != value and known.get(key) != cut[key]
    ]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _chunks(items: list[Item], size: int) -> Iterable[list[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
