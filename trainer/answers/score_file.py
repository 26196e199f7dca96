"""Scores of any system's predictions, from a file with the columns id, label and prediction."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from trainer.answers.metrics import compute
from trainer.encodings import EncodingError, decode_file
from trainer.tasks import Task

COLUMNS = ("id", "label", "prediction")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_BEYOND = 1e-6  # how far a truth may lie outside the task's numbers: float32 written as decimals
_SHOWN = 3

Row = tuple[str, tuple[Any, Any, Any]]  # its line or row, and its id, label and prediction


class ScoreError(ValueError):
    """A predictions file that cannot be scored; the message lists every fault."""


@dataclass
class FilePredictions:
    """The rows of a predictions file, in its order; a prediction that is not a label or number is nan."""

    ids: list[str]
    target_N: np.ndarray
    prediction_N: np.ndarray
    invalid: list[str]


def score_predictions(task: Task, path: str | Path) -> dict[str, Any]:
    """The metrics of :func:`trainer.answers.metrics.compute`, and ``invalid_examples``: the first different predictions
    that are invalid.

    Raises:
        ScoreError: see :func:`read_predictions`.
    """
    read = read_predictions(task, path)
    examples = list(dict.fromkeys(read.invalid))[:_SHOWN]
    return compute(task, read.target_N, read.prediction_N) | {"invalid_examples": examples}


def read_predictions(task: Task, path: str | Path) -> FilePredictions:
    """Read ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` (any other name: CSV); further columns are ignored.

    Of a Parquet file with a column ``task`` that names this task, its rows alone are read: a run's own predictions.
    Text is in any encoding that :mod:`trainer.encodings` can tell. Labels are the task's label words (both columns; letter for letter,
    white space around them aside) or finite decimal numbers: the truth one of the task's range, the prediction any. A
    prediction that is something else, or empty, is invalid, which is no fault.

    Raises:
        ScoreError: with every fault: no file, an unknown encoding, no rows, missing columns (and those found), rows cut short,
            duplicate or empty ids, truths that the task does not have.
    """
    path = Path(path)
    faults: list[str] = []
    rows = _read(task, path, faults)
    if not rows and not faults:
        faults.append("there are no rows")
    seen: dict[str, str] = {}
    duplicates, without_id, targets = [], [], []
    unknown: dict[str, list[str]] = {}
    predictions, invalid = [], []
    for where, (name, label, cell) in rows:
        name = _text(name)
        if not name:
            without_id.append(where)
        elif seen.setdefault(name, where) != where:
            duplicates.append(f"{name} ({seen[name]} and {where})")
        if (target := _truth(task, label)) is None:
            unknown.setdefault(_text(label), []).append(where)
        targets.append(target)
        value = _prediction(task, cell)
        predictions.append(math.nan if value is None else value)
        if value is None:
            invalid.append(_text(cell))
    if without_id:
        faults.append(f"without an id: {_some(without_id)}")
    if duplicates:
        faults.append(f"duplicate ids: {_some(duplicates)}")
    for label, places in list(unknown.items())[:_SHOWN]:
        faults.append(f"the truth {label!r} {_why(task, label)} ({_some(places)})")
    if len(unknown) > _SHOWN:
        faults.append(f"{len(unknown) - _SHOWN} more truths like these")
    if faults:
        raise ScoreError("\n  ".join([f"{path}: {len(faults)} fault{'s' if len(faults) > 1 else ''}", *faults]))
    return FilePredictions([_text(row[0]) for _, row in rows], np.array(targets), np.array(predictions), invalid)


def _read(task: Task, path: Path, faults: list[str]) -> list[Row]:
    if not path.exists() or path.is_dir():
        faults.append("is a folder: name the file" if path.is_dir() else "no such file")
        return []
    try:
        if path.suffix.lower() == ".parquet":
            return _read_parquet(task, path, faults)
        text, _ = decode_file(path.read_bytes(), task.language)
    except EncodingError as error:
        faults.append(str(error))
        return []
    except (OSError, pyarrow.ArrowException) as error:
        faults.append(f"cannot be read: {error}")
        return []
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _read_jsonl(text, faults)
    return _read_table(text, "\t" if path.suffix.lower() == ".tsv" else ",", faults)


def _read_table(text: str, delimiter: str, faults: list[str]) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    wrong: list[str] = []
    places: list[int] = []
    width = 0
    try:
        for fields in reader:
            if not fields:
                continue
            if not width:
                header = [name.strip() for name in fields]
                if not _check_columns(header, faults):
                    return []
                width, places = len(header), [header.index(name) for name in COLUMNS]
            elif len(fields) != width:
                wrong.append(f"line {reader.line_num} has {len(fields)}")
            else:
                name, label, prediction = (fields[i] for i in places)
                rows.append((f"line {reader.line_num}", (name, label, prediction)))
    except csv.Error as error:
        faults.append(f"line {reader.line_num}: {error} (is a quote left open, or the file cut short?)")
    if wrong:
        faults.append(
            f"not the header's {width} fields (cut short, or a {delimiter!r} in a text without quotes): {_some(wrong)}"
        )
    return rows


def _read_jsonl(text: str, faults: list[str]) -> list[Row]:
    rows: list[Row] = []
    broken: list[str] = []
    partial: dict[str, list[str]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
            value = None
        if not isinstance(value, dict):
            broken.append(f"line {number}")
        elif missing := [name for name in COLUMNS if name not in value]:
            partial.setdefault(", ".join(missing), []).append(f"line {number}")
        else:
            rows.append((f"line {number}", (value["id"], value["label"], value["prediction"])))
    if broken:
        faults.append(f"not a JSON object: {_some(broken)}")
    faults.extend(f"without {missing}: {_some(places)}" for missing, places in partial.items())
    return rows


def _read_parquet(task: Task, path: Path, faults: list[str]) -> list[Row]:
    file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if not _check_columns(names, faults):
        return []
    columns = file.read(columns=[*COLUMNS, *({"task"} & set(names))]).to_pydict()
    tasks = columns.get("task", [])
    keep = [name == task.name for name in tasks] if task.name in tasks else [True] * len(columns["id"])
    rows = zip(*(columns[name] for name in COLUMNS), strict=True)
    return [(f"row {i}", row) for i, (row, kept) in enumerate(zip(rows, keep, strict=True)) if kept]


def _check_columns(found: Sequence[str], faults: list[str]) -> bool:
    before = len(faults)
    for name in COLUMNS:
        if name not in found:
            lowered = {other.lower(): other for other in found}
            close = difflib.get_close_matches(name, lowered, n=1)
            near = f"; is {lowered[close[0]]!r} meant?" if close else ""
            faults.append(f"no column {name!r}{near}")
        elif list(found).count(name) > 1:
            faults.append(f"the column {name!r} occurs {list(found).count(name)} times")
    if len(faults) > before:
        faults.append(f"found the columns {', '.join(map(repr, found))}; needed: {', '.join(COLUMNS)}")
    return len(faults) == before


def _truth(task: Task, label: Any) -> float | None:
    if (value := _prediction(task, label)) is None or task.grid is None:
        return value
    return value if task.grid.low - _BEYOND <= value <= task.grid.high + _BEYOND else None


def _prediction(task: Task, cell: Any) -> float | None:
    text = _text(cell)
    if task.grid is None:
        return task.parse_word(text)
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    return value if math.isfinite(value) else None


def _why(task: Task, label: str) -> str:
    if task.grid is not None:
        return f"is not a number from {task.grid.low:g} to {task.grid.high:g}"
    close = difflib.get_close_matches(label, task.labels, n=1)
    near = f"; did you mean {close[0]}?" if close else ""
    return f"is not a label of {task.name}{near} Its labels are {', '.join(task.labels)}"


def _text(value: Any) -> str:
    """A cell as text; null is empty."""
    return "" if value is None else str(value).strip()


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:_SHOWN]) + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")
