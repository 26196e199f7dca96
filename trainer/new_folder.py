"""A folder that appears whole or not at all, and never in place of something that is not ours."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.termination import exit_on_termination


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that is written whole.

    Attributes:
        title: what messages call it, such as "a prepared dataset".
        doing: what is being done while it is written, such as "preparing"; a part of the temporary folder's name.
        is_ours: whether a folder is of this kind, and may be replaced.
        error: of faults.
    """

    title: str
    doing: str
    is_ours: Callable[[Path], bool]
    error: type[ValueError]

    @property
    def lock(self) -> str:
        """The file in the temporary folder that its writer holds."""
        return f".egmf-{self.doing}"


def check_free(out: Path, kind: FolderKind) -> None:
    """Refuse an `out` that is neither absent, empty nor of the kind."""
    if out.is_dir():
        if any(out.iterdir()) and not kind.is_ours(out):
            raise kind.error(f"{out} exists and is not {kind.title}, so it is not replaced: choose another --out")
    elif out.exists():
        raise kind.error(f"{out} is a file: choose another --out")


@contextlib.contextmanager
def new_folder(out: Path, kind: FolderKind) -> Iterator[NewFolder]:
    """A temporary folder beside `out`, gone at the end, whatever happens, unless it was put in place.

    What an earlier process left behind when it was killed is removed first. SIGTERM and SIGHUP end the block like Ctrl-C does.

    Raises:
        ValueError: of the kind: `out` is taken, another process is writing it, or the place cannot be written.
    """
    out = out.resolve()
    check_free(out, kind)
    made = [parent for parent in out.parents if not parent.exists()]
    with exit_on_termination():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _clean(out, kind)
            folder = _beside(out, kind.doing)
            folder.mkdir()
        except OSError as error:
            raise kind.error(f"cannot write beside {out}: {error.strerror}") from error
        new = NewFolder(out, folder, kind)
        try:
            yield new
        finally:
            new.close()
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()


class NewFolder:
    """See :func:`new_folder`. `path` is where to write."""

    def __init__(self, out: Path, path: Path, kind: FolderKind) -> None:
        self.out, self.path, self.kind = out, path, kind
        self._lock = os.open(path / kind.lock, os.O_CREAT | os.O_WRONLY)
        with contextlib.suppress(OSError):  # a file system without locks: a leftover is then never removed
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def put_in_place(self) -> None:
        """Rename to `out`; a folder of the kind that is there gives way."""
        check_free(self.out, self.kind)
        (self.path / self.kind.lock).unlink()
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


def _clean(out: Path, kind: FolderKind) -> None:
    """Remove what killed processes left; put back a folder that one had moved aside for its successor."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.{kind.doing}-*"):
        try:
            lock = os.open(left / kind.lock, os.O_WRONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise kind.error(f"another process is {kind.doing} {out} now ({left.name}): wait for it to end") from error
        except OSError:
            continue
        else:
            shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(lock)
    for old in out.parent.glob(f".{glob.escape(out.name)}.replaced-*"):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif kind.is_ours(old):
            old.rename(out)


def _beside(out: Path, use: str) -> Path:
    return out.with_name(f".{out.name}.{use}-{secrets.token_hex(4)}")
