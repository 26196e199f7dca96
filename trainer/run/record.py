"""The run folder's own record: ``run.json`` (what ran, on what, with what data, and how it ended) and its logs."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from trainer.files import write_json

RECORD = "run.json"


class RunRecord:
    """``run.json``, kept by rank 0 and written whole at every change. `state` is running, done, stopped or failed."""

    def __init__(self, out: Path, *, enabled: bool) -> None:
        self.path, self.enabled = out / RECORD, enabled
        self.values: dict[str, Any] = read_record(out) or {}

    def update(self, **values: Any) -> None:
        self.values.update(values)
        if self.enabled:
            write_json(self.path, self.values)


def read_record(out: Path) -> dict[str, Any] | None:
    """The record of a run folder, None where there is none.

    Raises:
        ValueError: it is there and cannot be read.
    """
    path = out / RECORD
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to start anew, the checkpoints stay") from error
    assert isinstance(value, dict)
    return value


def record_failure(out: Path, why: str) -> None:
    """Close the record of a run that is still said to be running; for a rank that stands in for rank 0."""
    record = RunRecord(out, enabled=True)
    if record.values.get("state") == "running":
        record.update(state="failed", failure=why, ended=now())


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
