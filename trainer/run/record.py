"""The run folder's own record: ``run.json`` (what ran, on what, with what data, and how it ended) and its logs."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.logging import RichHandler

from trainer.run.checkpoint import write_json

PACKAGES = ("egmf-trainer", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "mlflow", "numpy")
RECORD = "run.json"
NOISY = (
    "DeepSpeed",
    "deepspeed",
    "mlflow",
    "alembic",
    "datasets",
    "transformers",
    "peft",
    "bitsandbytes",
    "urllib3",
    "git",
)


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


def set_up_logging(out: Path | None, rank: int, *, debug: bool = False, console: Console | None = None) -> None:
    """Rank 0: readable lines on stderr and in ``log.txt``. Other ranks: warnings on stderr, all in ``log.rankN.txt``.

    Our libraries' chatter is kept to warnings; what a user can do nothing about is dropped. `debug` shows all of it.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    screen: logging.Handler
    if rank == 0:
        shown = console or Console(stderr=True)
        if shown.is_terminal:
            screen = RichHandler(console=shown, show_path=debug, rich_tracebacks=False, omit_repeated_times=False)
        else:
            screen = logging.StreamHandler()
            screen.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    else:
        screen = logging.StreamHandler()
        screen.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(message)s"))
        screen.setLevel(logging.DEBUG if debug else logging.WARNING)
    root.addHandler(screen)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(out / ("log.txt" if rank == 0 else f"log.rank{rank}.txt"), encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    if debug:
        return
    for name in NOISY:
        library = logging.getLogger(name)
        library.setLevel(logging.WARNING)
        for handler in list(library.handlers):  # some print beside the root logger, DeepSpeed to stdout
            library.removeHandler(handler)
        library.propagate = True
    warnings.simplefilter("default")
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    logging.captureWarnings(True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
