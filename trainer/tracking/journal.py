"""The journal of a run: every number of a training, on disk before anything is sent anywhere. The source of truth.

``journal.jsonl`` in the run folder is append-only, one JSON object per line, in the order things happened:

    {"step": 20, "time": 1763722935.12, "metrics": {"train/loss": 0.52}}               numbers at a step
    {"kind": "start", "time": …, "params": {key: text}, "tags": {key: text}}           a process begins or continues
    {"kind": "artifact", "time": …, "path": "metrics.json", "folder": null}            a file to keep; relative to the run
    {"kind": "state", "time": …, "state": "done"}                                      how the process ended the run

Times are seconds since the epoch. A (metric, step) is written once: a run that was killed trains the steps after its last
checkpoint again, must come to the same values, and does not write them a second time.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict, cast

from trainer.files import load_json

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
SPEED, MEDIAN_SPEED = "train/samples_per_second", "train/median_samples_per_second"
TIMED = ("_per_second",)  # suffixes of metrics that depend on time: training a step again gives another value
SYSTEM = "system/"  # prefix of those that describe the machine


class Record(TypedDict, total=False):
    """One line: `step` and `metrics`, or a `kind` (start, artifact, state) and what belongs to it; `time` always."""

    time: float
    step: int
    metrics: dict[str, float]
    kind: str
    params: dict[str, str]
    tags: dict[str, str]
    path: str
    folder: str | None
    state: str


class Journal:
    """The journal of one run, open for writing; `differences` counts retrained values that were not the same.

    Opening it repairs what a process killed in the middle of a write left behind.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.differences = 0
        self._seen: dict[str, dict[int, float]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        for end, record in entries(path):
            whole = end
            for name, step, value in _numbers(record, path, end):
                self._seen.setdefault(name, {}).setdefault(step, value)
        self._file = path.open("ab", buffering=0)
        if self._file.tell() > whole:
            log.warning("%s ended in the middle of a line: the torn line is removed", path)
            self._file.truncate(whole)

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        """Write numbers at `step`. Undefined and non-finite ones are left out, and so is what was written before.

        Raises:
            OSError: they cannot be written; the journal is as it was before.
        """
        fresh = {}
        for name, value in values.items():
            if value is None or not math.isfinite(value):
                continue
            number = float(value)
            before = self._seen.get(name, {}).get(step)
            if before is None:
                fresh[name] = number
            elif before != number and not depends_on_time(name):
                self._differs(name, step, before, number)
        if fresh:
            self._append({"step": step, "time": time.time(), "metrics": fresh})
            for name, number in fresh.items():
                self._seen.setdefault(name, {})[step] = number

    def note(self, record: Record) -> None:
        """Append a record of another kind than metrics; the time is added.

        Raises:
            OSError: it cannot be written; the journal is as it was before.
        """
        stamped: Record = {"kind": record["kind"], "time": time.time()}
        stamped.update(record)
        self._append(stamped)

    def close(self) -> None:
        self._file.close()

    def _append(self, record: Record) -> None:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        start, written = self._file.seek(0, os.SEEK_END), 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(start)
            raise

    def _differs(self, name: str, step: int, before: float, now: float) -> None:
        self.differences += 1
        if self.differences == 1:
            log.warning(
                "step %d, trained again, gives another %s: %r, and %r before; the first is kept, and further differences "
                "are only counted (equal values need the same world size, devices, code and libraries, and on a GPU train.deterministic=true)",
                step,
                name,
                now,
                before,
            )


def depends_on_time(name: str) -> bool:
    """Whether a metric measures time or the machine, so that training a step again gives another value."""
    return name.startswith(SYSTEM) or name.endswith(TIMED)


def read_journal(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a journal as (step, value), sorted by step; the first value of a step counts.

    A torn last line is left out; so are damaged lines, with a warning. Empty where there is no file.
    """
    found: dict[str, dict[int, float]] = {}
    for end, record in entries(path):
        for name, step, value in _numbers(record, path, end):
            found.setdefault(name, {}).setdefault(step, value)
    return {name: sorted(values.items()) for name, values in found.items()}


def entries(path: Path, start: int = 0) -> Iterator[tuple[int, Record | None]]:
    """(offset of the line's end, record) of each whole line from the offset `start` on; None for a damaged line."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        end = file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                record = load_json(line)
            except ValueError:
                record = None
            yield end, cast(Record, record) if isinstance(record, dict) else None


def _numbers(record: Record | None, path: Path, end: int) -> Iterator[tuple[str, int, float]]:
    """(metric, step, value) of a metrics record; nothing for other kinds."""
    try:
        if record is None:
            raise ValueError
        numbers = (
            [(n, int(record["step"]), float(v)) for n, v in record["metrics"].items()] if "metrics" in record else []
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        log.warning("%s: the line that ends at byte %d is damaged and left out", path, end)
        numbers = []
    yield from numbers
