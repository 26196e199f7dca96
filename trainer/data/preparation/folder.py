"""A folder that appears whole or not at all, and never in place of something that is not ours."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from trainer.data.preparation.faults import DataError
from trainer.data.preparation.record import DatasetRecord
from trainer.files import load_json
from trainer.questions import Definition, Questions
from trainer.termination import exit_on_termination as exit_on_termination

RECORD = "record.json"
FORMAT = 2  # the newest that this version reads
_LOCK = ".egmf-preparing"


def format_of(definition: Definition) -> int:
    """The format of a dataset: 2 where samples have several questions, which older versions cannot read, else 1."""
    return FORMAT if isinstance(definition, Questions) else 1


def read_record(folder: Path) -> DatasetRecord | None:
    """The record of the prepared dataset at `folder`; None if it is no such dataset."""
    try:
        record = load_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_record = isinstance(record, dict) and {"format", "fingerprint"} <= set(record)
    whole = is_record and all(isinstance(record.get(key), dict) for key in ("task", "splits"))
    return cast(DatasetRecord, record) if whole else None


def check_free(out: Path) -> None:
    """Refuse an `out` that is neither absent, empty nor a prepared dataset."""
    if out.is_dir():
        if any(out.iterdir()) and read_record(out) is None:
            raise DataError(f"{out} exists and is not a prepared dataset, so it is not replaced: choose another --out")
    elif out.exists():
        raise DataError(f"{out} is a file: choose another --out")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[NewFolder]:
    """A temporary folder beside `out`, gone at the end, whatever happens, unless it was put in place.

    What an earlier process left behind when it was killed is removed first. SIGTERM and SIGHUP end the block like Ctrl-C does.

    Raises:
        DataError: `out` is taken, another process is writing it, or the place cannot be written.
    """
    out = out.resolve()
    check_free(out)
    made = [parent for parent in out.parents if not parent.exists()]
    with exit_on_termination():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _clean(out)
            folder = _beside(out, "preparing")
            folder.mkdir()
        except OSError as error:
            raise DataError(f"cannot write beside {out}: {error.strerror}") from error
        new = NewFolder(out, folder)
        try:
            yield new
        finally:
            new.close()
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()


class NewFolder:
    """See :func:`new_folder`. `path` is where to write."""

    def __init__(self, out: Path, path: Path) -> None:
        self.out, self.path = out, path
        self._lock = os.open(path / _LOCK, os.O_CREAT | os.O_WRONLY)
        with contextlib.suppress(OSError):  # a file system without locks: a leftover is then never removed
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def put_in_place(self) -> None:
        """Rename to `out`; a prepared dataset that is there gives way."""
        check_free(self.out)
        (self.path / _LOCK).unlink()
        if not self.out.exists():
            self.path.rename(self.out)
            return
        old = _beside(self.out, "replaced")
        self.out.rename(old)
        try:
            self.path.rename(self.out)
        except OSError:
            old.rename(self.out)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _clean(out: Path) -> None:
    """Remove what killed processes left; put back a dataset that one had moved aside for its successor."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.preparing-*"):
        try:
            lock = os.open(left / _LOCK, os.O_WRONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is preparing {out} now ({left.name}): wait for it to end") from error
        except OSError:
            continue
        else:
            shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(lock)
    for old in out.parent.glob(f".{glob.escape(out.name)}.replaced-*"):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif read_record(old) is not None:
            old.rename(out)


def _beside(out: Path, use: str) -> Path:
    return out.with_name(f".{out.name}.{use}-{secrets.token_hex(4)}")
