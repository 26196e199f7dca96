"""The logs of a run: readable for people, free of what a user can do nothing about."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.logging import RichHandler

from trainer.terminal import for_terminal, literal_console

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)

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
SILENT = {
    "bitsandbytes.backends.cpu.ops": logging.ERROR,  # a kernel of the hub is absent, and is not needed
    "mlflow.store.db.utils": logging.CRITICAL,  # a traceback; the sender logs one sentence
}


class LogFile(logging.FileHandler):
    """A log file that reports once that it cannot be written (a full disk), instead of a traceback per line."""

    _reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._reported:
            self._reported = True
            sys.stderr.write(f"{self.baseFilename} can no longer be written: {sys.exc_info()[1]}\n")


class PlainFormatter(logging.Formatter):
    """Lines without control characters, whoever wrote what they quote."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


def set_up_logging(out: Path | None, rank: int, *, debug: bool = False, console: Console | None = None) -> None:
    """Rank 0: readable lines on stderr and in ``log.txt``. Other ranks: warnings on stderr, all in ``log.rankN.txt``.

    Our libraries' chatter is kept to warnings; what a user can do nothing about is dropped. `debug` shows all of it.

    Raises:
        ValueError: the run folder cannot be written.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        if isinstance(handler, LogFile):
            handler.close()
    screen: logging.Handler
    if rank == 0:
        terminal = console or literal_console(stderr=True)
        if terminal.is_terminal:
            screen = RichHandler(console=terminal, show_path=debug, rich_tracebacks=False, omit_repeated_times=False)
            screen.setFormatter(PlainFormatter("%(message)s"))
        else:
            screen = logging.StreamHandler()
            screen.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    else:
        screen = logging.StreamHandler()
        screen.setFormatter(PlainFormatter(f"[rank {rank}] %(levelname)s %(message)s"))
        screen.setLevel(logging.DEBUG if debug else logging.WARNING)
    root.addHandler(screen)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = LogFile(out / ("log.txt" if rank == 0 else f"log.rank{rank}.txt"), encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"the run folder {out} cannot be written: {error.strerror}; make it writable, or choose another with --out"
            ) from error
        file.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name, level in SILENT.items():
        logging.getLogger(name).setLevel(level)
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


@contextlib.contextmanager
def captured_stdout() -> Iterator[None]:
    """Whatever Python code prints inside the block goes to the log at level debug."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield
    for line in printed.getvalue().splitlines():
        log.debug("%s", line)
