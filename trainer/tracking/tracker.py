"""What a run records: its journal, and from there MLflow, without the training ever waiting for a server."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from trainer.config import RunConfig, flatten
from trainer.tracking.journal import JOURNAL, Journal
from trainer.tracking.outbox import Outbox, Sender, tracking_uri
from trainer.tracking.system_metrics import SystemMetrics

log = logging.getLogger(__name__)


class Tracker:
    """The record of a run, on rank 0: every number goes to ``journal.jsonl``, and from there to MLflow by a thread.

    The default store is an SQLite file, ``mlflow.db``, beside the run folder, with artifacts in ``mlartifacts``; with
    ``track.mlflow: false`` there is the journal alone. On other ranks (`enabled` false) nothing is done.

    A server that is slow, absent or refusing costs the training nothing and raises nothing: what it misses is sent when
    it is back, or later by ``egmf track sync``. A run continued in the same folder continues its journal and its MLflow
    run; `run_id` names the latter where the folder does not (``tracking.json``).

    Raises (every method too):
        OSError: the run folder cannot be written.
    """

    def __init__(self, config: RunConfig, out: Path, *, enabled: bool, run_id: str | None = None) -> None:
        self.enabled = enabled and config.track.mlflow
        self.uri = tracking_uri(config.track, out)
        self._track, self._out = config.track, out
        self._journal: Journal | None = None
        self._sender: Sender | None = None
        self._system: SystemMetrics | None = None
        if not enabled:
            return
        self._journal = Journal(out / JOURNAL)
        if config.track.system_metrics:
            self._system = SystemMetrics(out)
        if self.enabled:
            self._sender = Sender(Outbox(out, config.track, self.uri, run_id))
            self._sender.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None while the server has not been reached."""
        return None if self._sender is None else self._sender.outbox.run_id

    @property
    def differences(self) -> int:
        """Values of steps trained again that were not equal to those in the journal."""
        return 0 if self._journal is None else self._journal.differences

    def start(self, config: RunConfig, tags: Mapping[str, object]) -> None:
        """Record the resolved config as parameters (long ones cut, with a warning) and `tags`."""
        if self._journal is None:
            return
        params = {key: str(value) for key, value in flatten(config).items()}
        texts = {key: str(value) for key, value in {**tags, **config.track.tags}.items()}
        self._journal.note({"kind": "start", "params": params, "tags": texts})

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        """Numbers at `step`; what is undefined is left out, and what the journal has already is only compared."""
        if self._journal is None:
            return
        system = {} if self._system is None else self._system.due()
        self._journal.metrics({**values, **system}, step)
        if self._sender is not None:
            self._sender.begin()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file with the record, as it is when it is sent; `folder` is its place among the artifacts."""
        if self._journal is None:
            return
        if not path.exists():
            log.warning("%s does not exist: it is not recorded", path)
            return
        whole, run = path.resolve(), self._out.resolve()
        place = whole.relative_to(run) if whole.is_relative_to(run) else whole
        self._journal.note({"kind": "artifact", "path": str(place), "folder": folder})

    def finish(self, state: str) -> None:
        """End the record: `state` is that of run.json. Waits up to ``track.flush_seconds`` for the server.

        A run that failed waits 5 s at most, or 10 s where the server was not reached yet: its other ranks wait for it to end.
        """
        if self._journal is None:
            return
        try:
            self._journal.note({"kind": "state", "state": state})
        finally:
            self._journal.close()
            if self._journal.differences:
                log.warning("%d values of steps trained again were different", self._journal.differences)
            self._journal = None
            if self._sender is not None:
                seconds = self._track.flush_seconds
                most = 5.0 if self.run_id is not None else 10.0
                self._flush(self._sender, min(seconds, most) if state == "failed" else seconds)
            self.enabled = False

    def _flush(self, sender: Sender, seconds: float) -> None:
        if not sender.finish(seconds):
            log.warning(
                "%d records of this run are not in MLflow at %s; once it answers, send them with: egmf track sync %s",
                sender.outbox.unsent(),
                self.uri,
                self._out,
            )
