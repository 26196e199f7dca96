"""From the journal of a run to MLflow: what was not sent yet, in order, each record once.

Written by hand, since MLflow's own asynchronous logging keeps what is not sent in memory: a killed run, or a server that is
down when the run ends, would lose it.

``tracking.json`` in the run folder holds how far it came: the MLflow run's id, and the offset in the journal up to which
all is on the server. A process that is killed, or a request that times out although the server took it, leaves at most
one batch in doubt; it is compared with what the server has before it is sent again. The time of a value is the
journal's own, so that a store which sees a value twice nevertheless sees the same, and keeps one.

:class:`Sender` does this in a thread during the training, :func:`sync` (``egmf track sync``) later, in its own process.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

from trainer.config import TrackConfig
from trainer.files import load_json, write_json
from trainer.saved_config import saved_config
from trainer.tracking.journal import JOURNAL, Record, entries
from trainer.tracking.mlflow_run import METRICS, MlflowRun
from trainer.tracking.sqlite_uri import sqlite_uri

log = logging.getLogger(__name__)

PROGRESS = "tracking.json"
LOCK = ".tracking.lock"
SEND_SECONDS = 2.0  # between two readings of the journal: numbers of all steps in between share a request
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts while the server does not answer
HOLD_SECONDS = 20.0  # that the first step is waited for, at most: importing MLflow takes seconds of a core from it
LAST_PAUSE = 1.0  # the same while the end of the training waits for it
PATIENCE = (1.0, 2.0)  # seconds between the attempts of egmf track sync


class OutboxBusy(RuntimeError):
    """Another process is sending this run's records."""


@dataclass
class RecordBatch:
    """Records of one request: many with metrics, or a single one of another kind; `end` is the offset behind them."""

    records: list[Record]
    end: int


@dataclass
class SendProgress:
    """``tracking.json``: how far a journal is sent."""

    key: str  # of the journal, a tag of its MLflow run
    run_id: str | None = None
    creations: int = 0  # requests to create the MLflow run; more than one may have left an empty twin
    sent: int = 0  # offset in the journal up to which all is on the server


class Outbox:
    """Sends the journal of the run folder `run` to the MLflow server or store at `uri`; `close` it afterwards."""

    def __init__(self, run: Path, track: TrackConfig, uri: str, run_id: str | None = None) -> None:
        self.run, self.track, self.uri = run, track, uri
        self.journal = run / JOURNAL
        self.sent = 0  # records, by this object
        self._progress = _read_progress(run / PROGRESS) or SendProgress(uuid.uuid4().hex, run_id)
        self._remote: MlflowRun | None = None
        self._found = False  # whether the MLflow run was there when we last looked
        self._lock: IO[str] | None = None
        self._in_doubt = True  # whether the server may have the next metrics already
        self._compared_until = 0  # offset up to which they all are in doubt: a run of which we do not know what it has
        if run_id is not None and not (run / PROGRESS).is_file() and self.journal.is_file():
            self._compared_until = self.journal.stat().st_size

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None while the server has not been reached."""
        return self._progress.run_id

    @property
    def refused(self) -> int:
        """Records, or parts of one, that the server does not take."""
        return 0 if self._remote is None else self._remote.refused

    def unsent(self) -> int:
        """Records of the journal that are not known to be on the server."""
        return sum(record is not None for _, record in entries(self.journal, self._progress.sent))

    def forget_run(self) -> None:
        """Send everything anew, to an MLflow run that is made for it.

        Raises:
            OutboxBusy: another process is sending.
        """
        self._acquire()
        self._note(key=uuid.uuid4().hex, run_id=None, sent=0)
        self._remote, self._found, self._compared_until = None, False, 0

    def send(self, given_up: threading.Event | None = None) -> None:
        """Send all that the journal holds by now, or until `given_up` is set, which is checked between requests.

        Raises:
            OutboxBusy: another process is sending.
            Exception: any error of the server or the network. What was sent is recorded; the rest is sent next time.
        """
        self._acquire()
        try:
            remote = self._open()
            for batch in self._batches():
                if given_up is not None and given_up.is_set():
                    return
                self._send_batch(remote, batch)
                self._note(sent=batch.end)
                self.sent += len(batch.records)
        except Exception:
            self._found, self._in_doubt = False, True
            raise

    def close(self) -> None:
        """Let other processes send."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _acquire(self) -> None:
        if self._lock is not None:
            return
        lock = (self.run / LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise OutboxBusy(f"another process is sending the records of {self.run}") from error
        self._lock = lock
        self._progress = _read_progress(self.run / PROGRESS) or self._progress  # as the last holder left it

    def _open(self) -> MlflowRun:
        """The MLflow run: the one we know if the server has it, otherwise one found or created, with all to be sent."""
        if self._progress.sent > self.journal.stat().st_size:
            log.warning("%s is shorter than what was uploaded; uploading to a new MLflow run", self.journal)
            self._note(key=uuid.uuid4().hex, run_id=None, sent=0)
            self._remote, self._found = None, False
        if self._remote is None:
            self._remote = MlflowRun(self.uri, self.track, self.run, self._progress.key)
        if self._found:
            return self._remote
        if self.run_id is None or not self._remote.exists(self.run_id):
            if self.run_id is not None:
                log.warning("MLflow at %s has no run %s: uploading everything to a new one", self.uri, self.run_id)
            # written before the run is created, so that it is found again if the answer is lost
            self._note(run_id=None, sent=0, creations=self._progress.creations + 1)
            self._note(run_id=self._remote.find_or_create(self._started()))
        self._found = True
        return self._remote

    def _send_batch(self, remote: MlflowRun, batch: RecordBatch) -> None:
        record = batch.records[0]
        if "metrics" in record:
            in_doubt = self._in_doubt or self._progress.sent < self._compared_until
            remote.metrics(batch.records, in_doubt=in_doubt)
            self._in_doubt = False
            return
        kind = record["kind"]
        if kind == "start":
            remote.start(record["params"], record["tags"])
        elif kind == "artifact":
            remote.artifact(self.run / record["path"], record["folder"])
        elif kind == "state":
            if self._progress.creations > 1:
                remote.remove_twins()
            remote.end(record["state"], record["time"])
        else:
            log.warning("%s: records of kind %r are unknown and left out", self.journal, kind)

    def _batches(self) -> Iterator[RecordBatch]:
        batch, values = RecordBatch([], 0), 0
        for end, record in entries(self.journal, self._progress.sent):
            if record is None:
                continue
            size = len(record.get("metrics", ()))
            if batch.records and (not size or values + size > METRICS):
                yield batch
                batch, values = RecordBatch([], 0), 0
            if size:
                batch, values = RecordBatch([*batch.records, record], end), values + size
            else:
                yield RecordBatch([record], end)
        if batch.records:
            yield batch

    def _started(self) -> float:
        return next((record["time"] for _, record in entries(self.journal) if record is not None), time.time())

    def _note(self, **changes: Any) -> None:
        self._progress = replace(self._progress, **changes)
        write_json(self.run / PROGRESS, asdict(self._progress))


class Sender(threading.Thread):
    """Sends a run's journal during the training, from the first step on; retries, ever more rarely, while the server does not take it."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(name="mlflow-sender", daemon=True)
        self.outbox = outbox
        self._may_begin = threading.Event()
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._trouble: float | None = None  # since when

    def begin(self) -> None:
        """Send from now on: the first step is done."""
        self._may_begin.set()

    def finish(self, seconds: float) -> bool:
        """Wait up to `seconds` for the rest to be sent, then give up; whether all was."""
        self._closing.set()
        self.begin()
        self.join(seconds)
        self._given_up.set()
        return not self.is_alive() and self._trouble is None

    def run(self) -> None:
        self._may_begin.wait(HOLD_SECONDS)
        pause = SEND_SECONDS
        while not self._given_up.is_set():
            last = self._closing.is_set()  # before sending: nothing is written after it was set
            try:
                self.outbox.send(self._given_up)
            except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
                pause = FIRST_PAUSE if self._trouble is None else min(2 * pause, LONGEST_PAUSE)
                self._failed(error)
            else:
                self._worked()
                pause = SEND_SECONDS
                if last:
                    break
            if self._closing.is_set():
                self._given_up.wait(min(pause, LAST_PAUSE) if self._trouble else 0)
            else:
                self._closing.wait(pause)
        self.outbox.close()

    def _failed(self, error: Exception) -> None:
        if self._trouble is None:
            self._trouble = time.monotonic()
            log.warning(
                "MLflow at %s does not take the run's records; training goes on, they wait in %s and are sent when it "
                "does. Its answer: %s",
                self.outbox.uri,
                self.outbox.journal,
                _short(error),
            )
        else:
            log.debug("MLflow: %s", error)

    def _worked(self) -> None:
        if self._trouble is not None and not self._given_up.is_set():
            waited = time.monotonic() - self._trouble
            log.warning(
                "MLflow at %s takes records again, after %.0f s; all that waited is sent", self.outbox.uri, waited
            )
            self._trouble = None


@dataclass(frozen=True)
class Synced:
    """What :func:`sync` did: records sent, left, and refused by the server; `trouble` in words where some are left."""

    uri: str
    run_id: str | None
    sent: int
    left: int
    refused: int
    trouble: str | None


def sync(run: Path, uri: str | None = None, *, new_run: bool = False) -> Synced:
    """Send what MLflow does not have of the run folder `run`, to `uri` or where :func:`tracking_uri` says; with `new_run` all of it, to
    another MLflow run, which is the run's own from then on.

    Raises:
        ValueError: no run folder, no journal, or the run is sending by itself.
    """
    config = saved_config(run)
    if not (run / JOURNAL).is_file():
        raise ValueError(f"{run} has no {JOURNAL}: nothing was recorded there")
    outbox = Outbox(run, config.track, uri or tracking_uri(config.track, run))
    trouble = None
    try:
        for pause in (*PATIENCE, None):
            before = outbox.sent
            try:
                if new_run:
                    outbox.forget_run()
                    new_run = False
                outbox.send()
            except OutboxBusy as error:
                raise ValueError(f"{run} is running and sends its records itself: {error}") from error
            except Exception as error:  # noqa: BLE001 - any trouble of the server's is reported as what is left
                trouble = _short(error)
                if pause is not None:
                    time.sleep(pause)
            else:
                trouble = None
                break
            log.debug("%d records sent", outbox.sent - before)
        return Synced(outbox.uri, outbox.run_id, outbox.sent, outbox.unsent(), outbox.refused, trouble)
    finally:
        outbox.close()


def tracking_uri(track: TrackConfig, run: Path) -> str:
    """Where the records go: ``track.uri``, else ``MLFLOW_TRACKING_URI``, else an SQLite file beside the run folder."""
    return track.uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(run.resolve().parent / "mlflow.db")


def source_of_uri(track: TrackConfig) -> str:
    """What :func:`tracking_uri` follows, for people."""
    if track.uri:
        return "track.uri"
    return "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "default: beside the run folder"


def _read_progress(path: Path) -> SendProgress | None:
    """The progress in the file `path`; None where it does not exist.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        raw = load_json(path.read_text(encoding="utf-8"))
        return SendProgress(**{field.name: raw[field.name] for field in fields(SendProgress) if field.name in raw})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and all is sent to a new MLflow run") from error


def _short(error: Exception) -> str:
    """What went wrong, without the libraries' nesting: the innermost reason of a failed request, or the first line."""
    cause = error.__cause__ or error.__context__
    inner = cause.args[0] if cause is not None and cause.args else None
    text = str(getattr(inner, "reason", None) or error).strip()
    text = next(iter(text.splitlines()), "") or type(error).__name__
    if isinstance(error, ValueError):  # ours
        return str(error)
    return text if len(text) <= 300 else text[:299] + "…"
