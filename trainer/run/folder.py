"""The run folder as a whole: who may write in it, and what happens to an earlier run's files when one starts anew."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.distributed.world import World

LOCK = ".lock"
RESULTS = (
    "backbone",
    "checkpoints",
    "config.yaml",
    "journal*",
    "metrics.json",
    "nonfinite",
    "predictions",
    "probe.json",
    "report*",
    "run.json",
    "track*",
)


@contextlib.contextmanager
def open_folder(out: Path, world: World) -> Iterator[None]:
    """Make the run folder and hold it: a second training in the same folder is refused, on any machine that shares it.

    The lock ends with the process, however it ends. Called by all ranks.

    Raises:
        ValueError: it cannot be written, or another process trains in it.
    """
    with contextlib.ExitStack() as stack:
        with world.on_rank_zero() as first:
            if first:
                stack.enter_context(hold(out))
        yield


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Make a folder and hold it for this process alone, on any machine that shares it; see :func:`open_folder`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = (out / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"the run folder {out} cannot be written: {error.strerror}; choose another with --out"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            raise ValueError(
                f"another training is running in {out} ({handle.read().strip() or 'unknown'}): wait for it, stop it, or choose another --out"
            ) from error
        handle.truncate(0)
        try:
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
        except OSError as error:
            raise ValueError(f"the run folder {out} cannot be written: {error.strerror}; make room first") from error
        yield


def archive_previous_run(out: Path) -> Path | None:
    """Move an earlier run's files into ``before-TIME`` inside the folder; None where there are none. Logs stay."""
    found = sorted(path for pattern in RESULTS for path in out.glob(pattern))
    if not found:
        return None
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
    archive = out / f"before-{stamp}"
    archive.mkdir()
    for path in found:
        path.rename(archive / path.name)
    return archive
