"""What a process runs with: versions of libraries, this package's source and commit, platform and device."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

DECIDING = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "egmf-trainer")
RECORDED = ("egmf-trainer", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "mlflow", "numpy")
ABSENT = "none"


class GitState(TypedDict, total=False):
    """Of the source that a process runs from; empty when it is no checkout."""

    commit: str
    changed: bool  # tracked files differ from the commit


class Environment(TypedDict):
    """What a run's record holds of the process that wrote it."""

    versions: dict[str, str | None]
    platform: str
    device: str
    allocator: str | None  # settings of torch's on a GPU
    git: GitState
    command: list[str]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a run's numbers, and of this package's own source."""
    found = {"python": platform.python_version()}
    for name in DECIDING:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ABSENT
    found["egmf's commit"] = git_state().get("commit", ABSENT)[:12]
    found["egmf's source"] = _source_digest()
    return found


def environment() -> Environment:
    """Versions, platform and git state, for the record."""
    import torch

    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in RECORDED}},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu x {torch.get_num_threads()} threads",
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF")),
        "git": git_state(),
        "command": sys.argv,
    }


@functools.cache
def git_state() -> GitState:
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


def _source_digest() -> str:
    """Digest of the Python files of this package, as they lie on this machine."""
    root = Path(__file__).parent.parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
