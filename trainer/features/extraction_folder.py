"""The folder that an extraction fills: arrays, a record of each finished row, and at the end own data.

    recipe.json              the identity of the recipe, written first
    arrays/ab/abcd….audio.npy   one array for each row and modality, named after a hash of the row's id
    rows/ab/abcd….json          what was made of the row, and by what key it is known to be up to date
    samples.jsonl            own data, in the order of the manifest
    report.json, report.txt  what was missing, and which rows were left out

Every file appears whole: it is written under a temporary name and renamed. Shapes: T frames, F features of a frame.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from trainer.features.recipe_record import (
    RECIPE,
    RecipeRecord,
    described,
    differences_of,
    read_recipe_record,
    write_recipe_record,
)
from trainer.features.types import Told
from trainer.files import load_json, write_text

if TYPE_CHECKING:
    import numpy as np

ARRAYS, ROWS, SAMPLES, REPORT, REPORT_TEXT = "arrays", "rows", "samples.jsonl", "report.json", "report.txt"
_LOCK = ".lock"
_RESULTS = (SAMPLES, REPORT, REPORT_TEXT)


class NoteRecord(TypedDict):
    """A :class:`trainer.features.types.Note`."""

    kind: Told
    modality: str
    text: str


class ArrayRecord(TypedDict):
    """One array: `frames` T of `width` F at `rate` a second, of which `valid` are no zeros; its file's size."""

    frames: int
    width: int
    rate: float
    valid: int
    bytes: int


class WordRecord(TypedDict):
    """A :class:`trainer.features.types.Word`."""

    text: str
    start: float
    end: float


class RowRecord(TypedDict):
    """What was made of a row. `left_out` is None, or the kind of the trouble and words; `text` only where it was transcribed."""

    id: str
    key: str
    left_out: list[str] | None
    arrays: dict[str, ArrayRecord]
    text: str | None
    words: list[WordRecord]
    seconds: float
    notes: list[NoteRecord]


def empty_row(kind: str, why: str) -> RowRecord:
    """The record of a row of which nothing was made; its id and key are still to be filled in."""
    return {
        "id": "", "key": "", "left_out": [kind, why], "arrays": {}, "text": None, "words": [], "seconds": 0.0, "notes": [],
    }  # fmt: skip


def digest(value: Any) -> str:
    """The first 32 hex digits of a sha256 over canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def json_line(value: Any, **options: Any) -> str:
    """One line of JSON, in ASCII where it holds what UTF-8 cannot (lone surrogates, as in names of files that are not UTF-8)."""
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, **options)
    return text + "\n"


def write_array(path: Path, values_TF: np.ndarray) -> int:
    """Write a `.npy` file whole or not at all; its size in bytes."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with temporary.open("wb") as file:
        np.save(file, values_TF, allow_pickle=False)
        size = file.tell()
    temporary.replace(path)
    return size


class ExtractionFolder:
    """The places in such a folder, and what lies there. Several processes, also of other machines, may fill one together."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def name(self, id: str) -> str:
        """The first part of the names of a row's files, with the folder of its first two hex digits."""
        found = hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return f"{found[:2]}/{found}"

    def array_name(self, id: str, modality: str) -> str:
        """Relative to the folder."""
        return f"{ARRAYS}/{self.name(id)}.{modality}.npy"

    def _row(self, id: str) -> Path:
        return self.path / ROWS / f"{self.name(id)}.json"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and wait until no other process is beginning or ending an extraction there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error.strerror}; choose another --out") from error
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def begin(self, recipe: RecipeRecord, *, force: bool) -> None:
        """Make the folder one of this recipe; what it holds of the same recipe stays.

        Raises:
            ValueError: it holds something else, or, without `force`, what another recipe extracted; with the differences.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: choose another --out")
        if self.path.exists():  # nothing is left in a folder of something else
            self._check_ours()
        with self.held():
            there = read_recipe_record(self.path / RECIPE)
            if there is None:
                self._check_ours()
            elif lines := differences_of(there, recipe):
                if not force:
                    head = f"{self.path} holds what another recipe extracted; choose another --out, or replace it with --force"
                    raise ValueError(described(head, lines))
                for name in _RESULTS:  # a kill leaves recipe.json, which refuses what is left
                    (self.path / name).unlink(missing_ok=True)
                for name in (ROWS, ARRAYS):
                    shutil.rmtree(self.path / name, ignore_errors=True)
            else:
                return
            write_recipe_record(self.path / RECIPE, recipe)

    def _check_ours(self) -> None:
        """Raises ValueError: the folder holds something, and no extraction made it."""
        if (self.path / RECIPE).exists():
            return
        others = sorted(one.name for one in self.path.iterdir() if not one.name.startswith("."))
        if others:
            raise ValueError(
                f"{self.path} exists and no extraction made it (it holds {', '.join(others[:3])}): choose another --out"
            )

    def read_row(self, id: str) -> RowRecord | None:
        """The record of a row; None where there is none that can be read."""
        try:
            found = load_json(self._row(id).read_bytes())
        except (OSError, ValueError):
            return None
        whole = isinstance(found, dict) and set(found) == set(RowRecord.__required_keys__)
        return cast(RowRecord, found) if whole else None

    def finished(self, id: str, key: str) -> RowRecord | None:
        """The record of a row, if it was made under this key and its arrays are there; None where it must be extracted."""
        found = self.read_row(id)
        if found is None or found["key"] != key or found["id"] != id:
            return None
        return found if all(self._is_there(id, name, array) for name, array in found["arrays"].items()) else None

    def _is_there(self, id: str, modality: str, array: ArrayRecord) -> bool:
        try:
            return (self.path / self.array_name(id, modality)).stat().st_size == array["bytes"]
        except OSError:
            return False

    def write_row(self, record: RowRecord) -> None:
        """The last of a row's files: from here on it is finished."""
        path = self._row(record["id"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json_line(record, allow_nan=False, sort_keys=True))

    def forget_row(self, id: str) -> None:
        """A row is not finished while its arrays are written anew."""
        self._row(id).unlink(missing_ok=True)

    def forget_result(self) -> None:
        """Own data that no longer tell what was extracted."""
        for name in _RESULTS:
            (self.path / name).unlink(missing_ok=True)

    def clean(self, ids: Collection[str], arrays: Collection[str]) -> None:
        """Remove the rows and arrays of other ids, and what killed processes left; `arrays` are names as :meth:`array_name` gives them."""
        kept = {f"{ROWS}/{self.name(id)}.json" for id in ids} | set(arrays)
        for top in (ROWS, ARRAYS):
            for folder in sorted((self.path / top).glob("*")):
                for file in folder.iterdir() if folder.is_dir() else ():
                    if f"{top}/{folder.name}/{file.name}" not in kept:
                        file.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # it holds something
                    folder.rmdir()
        for name in (RECIPE, *_RESULTS):
            for left in self.path.glob(f".{name}.*"):
                left.unlink(missing_ok=True)
