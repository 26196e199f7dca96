"""The run folder's own record: ``run.json`` (what ran, on what, with what data, and how it ended) and its logs."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.files import write_json

PACKAGES = ("egmf-trainer", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "mlflow", "numpy")
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


def environment() -> dict[str, Any]:
    """Versions, platform and git state, for the record."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu x {torch.get_num_threads()} threads",
        "git": git_state(),
        "command": sys.argv,
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def git_state() -> dict[str, Any]:
    """Commit and whether files differ from it, of the source this package runs from; empty when it is no checkout."""

    def ask(*arguments: str) -> str:
        where = str(Path(__file__).parent)
        done = subprocess.run(["git", "-C", where, *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
