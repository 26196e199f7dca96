"""The MLflow run that stands above the runs of a sweep."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from trainer.config import TrackConfig
from trainer.tracking.mlflow_run import MlflowRun
from trainer.tracking.outbox import tracking_uri

log = logging.getLogger(__name__)


class ParentRun:
    """Created once, found again by its `key` or `run_id`. A server that does not answer costs the sweep its parent, no more."""

    def __init__(self, folder: Path, track: TrackConfig, key: str, run_id: str | None) -> None:
        self.uri = tracking_uri(track, folder)
        self.run_id: str | None = None
        self._folder, self._track, self._key, self._known = folder, track, key, run_id
        self._remote: MlflowRun | None = None

    def begin(self, params: Mapping[str, str], record: Path) -> None:
        """Create or find the run, and mark it as running; `record` is kept with it."""
        if not self._track.mlflow:
            return
        try:
            remote = MlflowRun(self.uri, self._track, self._folder, self._key)
            if self._known is None or not remote.exists(self._known):
                remote.find_or_create(time.time())
            self._remote, self.run_id = remote, remote.run_id
            remote.start(dict(params), {"egmf.kind": "sweep", **self._track.tags})
            remote.artifact(record, None)
        except Exception as error:  # noqa: BLE001 - whatever it is, the runs go on
            what = "does not record the sweep" if self.run_id else "does not answer: the runs have no parent there"
            log.warning("MLflow at %s %s. It says: %s", self.uri, what, _first_line(error))

    def end(self, state: str) -> None:
        """`state` as in run.json: done, stopped or failed."""
        if self._remote is None:
            return
        try:
            self._remote.end(state, time.time())
        except Exception as error:  # noqa: BLE001
            log.warning("MLflow at %s did not record the sweep's end: %s", self.uri, _first_line(error))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
