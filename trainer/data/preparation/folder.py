"""The folder of a prepared dataset: its record, and how it appears whole or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import cast

from trainer import new_folder as folders
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.record import DatasetRecord
from trainer.files import load_json
from trainer.new_folder import FolderKind, NewFolder
from trainer.questions import Definition, Questions

RECORD = "record.json"
FORMAT = 2  # the newest that this version reads


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


DATASET = FolderKind("a prepared dataset", "preparing", lambda folder: read_record(folder) is not None, DataError)


def check_free(out: Path) -> None:
    """Refuse an `out` that is neither absent, empty nor a prepared dataset."""
    folders.check_free(out, DATASET)


def new_folder(out: Path) -> contextlib.AbstractContextManager[NewFolder]:
    """See :func:`trainer.new_folder.new_folder`."""
    return folders.new_folder(out, DATASET)
