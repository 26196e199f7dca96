"""Published formats, one file each: `open_source` recognises them and gives raw samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.data.readers.raw import SPLITS, RawSample, ReaderError, Source
from trainer.tasks import Task

__all__ = ["SPLITS", "RawSample", "ReaderError", "Source", "open_source"]


def open_source(task: Task, paths: Sequence[Path]) -> Source:
    """Recognise what lies at `paths` (files, or folders of them) and open it for `task`.

    Raises:
        ReaderError: nothing readable there, or files that do not fit together, all problems at once.
    """
    raise ReaderError("no reader is written yet")
