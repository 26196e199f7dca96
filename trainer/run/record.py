"""The run folder's own record, ``run.json``: what ran, on what, with what data, and how it ended; and how a run is closed."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from trainer.files import load_json, write_json

if TYPE_CHECKING:  # egmf runs reads records without loading torch
    from trainer.data.folds import FoldRecord
    from trainer.distributed.versions import GitState
    from trainer.features.recipe_record import RecipeRecord
    from trainer.run.lengths import TextCuts
    from trainer.tracking.tracker import Tracker

log = logging.getLogger(__name__)
Report = Callable[[Path], list[Path]]  # draws the pictures of a run folder and returns their paths

RECORD = "run.json"
State = Literal["running", "done", "stopped", "failed"]


class SkippedSteps(TypedDict):
    """How many steps moved nothing: their loss or gradient was not finite, or a gradient overflowed at fp16's loss scale."""

    not_finite: int
    loss_scale: int


class MlflowPlace(TypedDict):
    """Where a run is recorded; `run_id` is None while the server has not been reached."""

    uri: str
    run_id: str | None


class _BaselineValues(TypedDict):
    name: str
    model: str
    modalities: list[str]
    ngrams: str | None
    setting: str | None
    value: float | None
    tried: dict[str, float | None]
    data: str  # path of the prepared dataset


class BaselineValues(_BaselineValues, total=False):
    """What a baseline is, which no training made; the settings are None where it has none.

    `setting` is C or alpha, `value` the one used, `tried` value -> selecting metric on valid where it was chosen there. On a
    dataset with folds, `fold_valid` is what validates (:class:`trainer.data.folds.FoldChoice`), `fold_seed` draws a share.
    """

    fold_valid: str | float
    fold_seed: int


class RecordValues(TypedDict, total=False):
    """What ``run.json`` holds. Of a run that did not get far, some are absent; `baseline` stands in baselines only."""

    state: State
    baseline: BaselineValues
    started: str  # of the last process; ISO 8601, UTC
    ended: str | None
    failure: str | None
    versions: dict[str, str | None]
    platform: str
    device: str
    git: GitState
    command: list[str]
    pid: int
    host: str
    precision: str
    deterministic: bool  # a continuation, or another run on the same devices, gives the same bits
    seed: int
    steps: int
    steps_skipped: SkippedSteps
    mlflow: MlflowPlace | None
    tasks: list[str]
    select: dict[str, str]  # task -> the metric that chooses the checkpoint
    data: dict[str, str]  # task -> fingerprint
    recipe: dict[str, RecipeRecord]  # task -> by what its features were extracted; of tasks where that is known
    fold: FoldRecord  # of a run, or baseline, on a dataset with folds
    base: str  # hash of the frozen backbone
    world: int
    zero: int
    texts: dict[str, dict[str, TextCuts]]  # task -> split -> how many texts are cut to data.max_text_tokens


def baseline_of(record: RecordValues) -> BaselineValues | None:
    """What a record says of its baseline; None where it is of a run, or is damaged."""
    value: object = record.get("baseline")
    if not isinstance(value, Mapping) or not set(BaselineValues.__required_keys__) <= set(value):
        return None
    return cast(BaselineValues, value)


class RunRecord:
    """``run.json``, kept by rank 0 and written whole at every change."""

    def __init__(self, out: Path, *, enabled: bool) -> None:
        self.path, self.enabled = out / RECORD, enabled
        self.values: RecordValues = read_record(out) or {}

    def update(self, values: RecordValues) -> None:
        self.values.update(values)
        if self.enabled:
            write_json(self.path, self.values)


def read_record(out: Path) -> RecordValues | None:
    """The record of a run folder, None where there is none.

    Raises:
        ValueError: it is there and cannot be read.
    """
    path = out / RECORD
    if not path.is_file():
        return None
    try:
        value = load_json(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to start anew, the checkpoints stay") from error
    assert isinstance(value, dict)
    return cast(RecordValues, value)


def record_failure(out: Path, why: str) -> None:
    """Close a record whose state is still running; called by another rank where rank 0 does not answer."""
    record = RunRecord(out, enabled=True)
    if record.values.get("state") == "running":
        record.update({"state": "failed", "failure": why, "ended": now()})


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def close_run(out: Path, record: RunRecord, tracker: Tracker | None, state: State, report: Report | None) -> None:
    """Close the record however the run ended; an error here is a warning, so that it does not hide what ended the run.

    A failed run closes its MLflow run first and draws its report last: its other ranks, and the launcher, do not wait long.
    """
    with warn_only("the run's end could not be recorded"):
        record.update({"state": state, "ended": now()})
    if state == "failed":
        _close_tracker(out, record, tracker, state, [])
    pictures: list[Path] = []
    with warn_only("the run's report could not be written"):
        pictures = report(out) if report is not None else []
    if state != "failed":
        _close_tracker(out, record, tracker, state, pictures)


def close_stuck_run(out: Path, record: RunRecord, tracker: Tracker, why: str) -> None:
    """Close the record of a run whose main thread hangs; called by the watch."""
    record.update({"failure": f"StuckError: {why}", "state": "failed", "ended": now()})
    _close_tracker(out, record, tracker, "failed", [])


def _close_tracker(out: Path, record: RunRecord, tracker: Tracker | None, state: State, pictures: list[Path]) -> None:
    if tracker is None:
        return
    with warn_only("the run's end could not be recorded in MLflow"):
        tracked = tracker.enabled
        for path in [out / "run.json", *pictures]:
            tracker.artifact(path, "report" if path in pictures else None)
        tracker.finish(state)
        if tracked:
            record.update({"mlflow": {"uri": tracker.uri, "run_id": tracker.run_id}})


@contextlib.contextmanager
def warn_only(what: str) -> Iterator[None]:
    """An exception inside the block is a warning that begins with `what`."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        log.warning("%s: %s: %s", what, type(error).__name__, error)
