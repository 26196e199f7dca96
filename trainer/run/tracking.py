"""What a run tells: the journal in its folder, and from there MLflow, without the training ever waiting for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import RunConfig, flatten
from trainer.run.journal import JOURNAL, Journal, entries
from trainer.run.outbox import PROGRESS, Outbox, Sender, tracking_uri
from trainer.run.system import SystemMetrics

log = logging.getLogger(__name__)

PARAMETER_LIMIT = 6000  # characters of a parameter's value that every MLflow store takes
TRAINING = ("task", "data.", "model.", "train.", "deepspeed")  # keys of the config that say what is trained


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
        if _begins_anew(config, out):
            _set_aside(out)
            run_id = None
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

    def start(self, config: RunConfig, tags: dict[str, Any]) -> None:
        """The resolved config as parameters (long ones cut, and said so) and `tags`."""
        if self._journal is None:
            return
        params = {key: _shorten(key, value) for key, value in flatten(config).items()}
        texts = {key: str(value) for key, value in {**tags, **config.track.tags}.items()}
        self._journal.note("start", params=params, tags=texts)

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        """Numbers at `step`; what is undefined is left out, and what the journal has already is only compared."""
        if self._journal is None:
            return
        system = {} if self._system is None else self._system.due()
        self._journal.metrics({**values, **system}, step)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file with the record, as it is when it is sent; `folder` is its place among the artifacts."""
        if self._journal is None:
            return
        if not path.exists():
            log.warning("%s does not exist: it is not recorded", path)
            return
        whole, run = path.resolve(), self._out.resolve()
        place = whole.relative_to(run) if whole.is_relative_to(run) else whole
        self._journal.note("artifact", path=str(place), folder=folder)

    def finish(self, state: str) -> None:
        """End the record: `state` is that of run.json. Waits up to ``track.flush_seconds`` for the server."""
        if self._journal is None:
            return
        try:
            self._journal.note("state", state=state)
        finally:
            self._journal.close()
            if self._journal.differences:
                log.warning("%d values of steps trained again were different", self._journal.differences)
            self._journal = None
            if self._sender is not None:
                self._flush(self._sender)
            self.enabled = False

    def _flush(self, sender: Sender) -> None:
        if not sender.finish(self._track.flush_seconds):
            log.warning(
                "%d records of this run are not in MLflow at %s; once it answers, send them with: egmf track sync %s",
                sender.outbox.unsent(),
                self.uri,
                self._out,
            )


def _begins_anew(config: RunConfig, out: Path) -> bool:
    """Whether the folder's journal belongs to a training that this one does not continue.

    It does when ``train.resume: never`` says so, or when there is no checkpoint to continue from and the config is
    another: its values at the same steps have nothing to do with those in the journal.
    """
    if not (out / JOURNAL).is_file():
        return False
    if config.train.resume == "never":
        return True
    if any((out / "checkpoints").glob("step-*")):
        return False
    started = (record for _, record in entries(out / JOURNAL) if record is not None and record.get("kind") == "start")
    before = next(started, None)
    return before is not None and _what_is_trained(before["params"]) != _what_is_trained(flatten(config))


def _what_is_trained(params: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: str(value)[: PARAMETER_LIMIT - 1]
        for key, value in params.items()
        if key.startswith(TRAINING) and key != "train.resume"
    }


def _set_aside(out: Path) -> None:
    """Give the journal and what was sent of it other names; a run that begins anew gets new ones."""
    number = 1 + sum(1 for _ in out.glob("journal-*.jsonl"))
    kept = out / f"journal-{number}.jsonl"
    (out / JOURNAL).rename(kept)
    if (out / PROGRESS).is_file():
        (out / PROGRESS).rename(out / f"tracking-{number}.json")
    log.warning("this training begins anew: the journal of the one before is kept as %s", kept)


def _shorten(key: str, value: Any) -> str:
    text = str(value)
    if len(text) > PARAMETER_LIMIT:
        log.warning("parameter %s is cut to %d characters in MLflow; config.yaml has it whole", key, PARAMETER_LIMIT)
        text = text[: PARAMETER_LIMIT - 1] + "…"
    return text
