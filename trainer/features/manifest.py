"""Manifests: which clips are meant, and what is known of each; JSON lines or CSV, one row a sample.

`{"clip": "clips/a1.mp4", "start": 2.5, "end": 6.0, "text": "…", "label": "joy", "split": "train"}`. The clip's path is relative to the manifest;
`start` and `end` are seconds. All other keys are those of own data (`docs/data.md`) and are passed on as they are.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.encodings import EncodingError, decode_file
from trainer.features.types import Clip
from trainer.files import load_json
from trainer.own_samples import ANSWERS, FOLD, Line, describe_errors, split_of

SUFFIXES = (".jsonl", ".csv")
CLIP_KEYS = ("clip", "start", "end")
WRITTEN = ("audio", "video", "audio_length", "video_length", "rate")  # by the extraction itself
_LONGEST = 1e6  # seconds
_LONGEST_HEADER = 1 << 16  # bytes
_LONGEST_NAME = 1000  # characters of a path in a message
_NEAR = 0.7  # of difflib: how alike a key and a known one are where it is taken for a misspelt one


class ClipLine(Line):
    """One sample as written, which may name a clip; whether its three keys make one is checked where it is used (:func:`clip_of`)."""

    clip: Any = None
    start: Any = None
    end: Any = None
    task: str | None = None


KNOWN = tuple(dict.fromkeys([*CLIP_KEYS, *ClipLine.model_fields, *ANSWERS, FOLD]))


class ManifestError(ValueError):
    """A manifest that cannot be used; the message lists every fault with its line."""

    def __init__(self, path: Path, faults: Sequence[str], shown: int = 20) -> None:
        self.faults = list(faults)
        many = f"{len(self.faults)} faults" if len(self.faults) > 1 else "a fault"
        rest = [f"  … and {len(self.faults) - shown} more"] if len(self.faults) > shown else []
        super().__init__(
            "\n".join([f"the manifest {path} has {many}:", *(f"  {one}" for one in self.faults[:shown]), *rest])
        )


@dataclass(frozen=True)
class ManifestRow:
    """One row: its `place` in the manifest from 0, the line where it stands, its id, and the clip it names.

    `values` has every key as written, `clip`, `start` and `end` left out and `id` always there.
    """

    place: int
    line: int
    id: str
    name: str  # the clip's path as written
    clip: Clip
    values: Mapping[str, Any]

    @property
    def text(self) -> str | None:
        """The text that the manifest gives; None where there is none but blanks."""
        given = self.values.get("text")
        return given if isinstance(given, str) and given.strip() else None


@dataclass(frozen=True)
class Manifest:
    """The rows of a manifest in their order; `notes` is what the user should see of the whole."""

    path: Path
    rows: Sequence[ManifestRow]
    notes: Sequence[str] = ()


def read_manifest(path: Path, language: str = "en") -> Manifest:
    """All rows of a manifest, checked together.

    A row without an `id` gets one of its clip's name and its number from 1 (`a1-00007`). A manifest that is named after a split
    (`train.csv`) gives it to rows without one. In a CSV an empty cell is no value, `start`, `end`, `turn` and `target` are numbers, an object or a
    list in JSON is one, and all else is text.

    Args:
        language: of the texts, for files that are not UTF-8 (:mod:`trainer.encodings`).

    Raises:
        ManifestError: every fault, with its line: what is not a row at all, unknown keys that are like a known one, clips that are not
            there, `start` not before `end`, ids that stand twice, keys that the extraction writes itself.
    """
    text = _read(path, language)
    rows: list[ManifestRow] = []
    faults: list[str] = []
    unknown: Counter[str] = Counter()
    named = split_of(path.stem)
    first: dict[str, int] = {}
    found = _csv_rows(text, faults) if path.suffix.lower() == ".csv" else _json_rows(text, faults)
    for place, (number, values) in enumerate(found):
        mine: list[str] = []
        row = _row(path.parent, place, number, values, named, mine, unknown)
        if row is not None and first.setdefault(row.id, number) != number:
            mine.append(f"duplicate id ({row.id!r} is that of line {first[row.id]})")
        faults += [f"line {number}: {fault}" for fault in mine]
        if row is not None:
            rows.append(row)
    if not rows and not faults:
        faults.append("it has no rows")
    if faults:
        raise ManifestError(path, faults)
    notes = [
        f"{path.name}: {key!r} of {n} row(s) is no key of own data: passed on" for key, n in unknown.most_common(20)
    ]
    return Manifest(path, rows, notes)


def is_table_of_clips(path: Path) -> bool:
    """Whether a file is a CSV with a column `clip`."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return False
    with path.open("rb") as file:
        header = file.readline(_LONGEST_HEADER).lstrip(b"\xef\xbb\xbf").decode("utf-8", errors="replace")
    return "clip" in [name.strip() for name in next(csv.reader([header]), [])]


def table_as_lines(path: Path, language: str = "en") -> bytes:
    """The rows of a CSV as JSON lines; each stands in the line in which it ends in the CSV, other lines are empty.

    Raises:
        ManifestError: every row that is none, with its line.
    """
    faults: list[str] = []
    lines: list[str] = []
    for number, values in _csv_rows(_read(path, language), faults):
        lines += [""] * (number - 1 - len(lines))
        lines.append(json.dumps(values, ensure_ascii=False))
    if faults:
        raise ManifestError(path, faults)
    return "\n".join(lines).encode()


def clip_of(line: ClipLine, folder: Path, faults: list[str], *, contained: bool = False) -> Clip | None:
    """The clip that a line names, its path relative to `folder`; None, and the reasons in `faults`, where it cannot be used.

    `contained`: a clip outside the folder, also by a link, is a fault.
    """
    known = len(faults)
    path = folder / line.clip if isinstance(line.clip, str) else folder
    if not isinstance(line.clip, str) or not line.clip or "\0" in line.clip:
        what = "missing" if line.clip is None or line.clip == "" else f"not {str(line.clip)[:40]!r}"
        faults.append(f"clip: {what}, it is the path of a media file")
    elif contained and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        faults.append(f"clip {line.clip} leads out of {folder}, which --contained refuses")
    elif not os.path.isfile(path):  # also where its name is too long, or its folder may not be read
        shown = str(path) if len(str(path)) <= _LONGEST_NAME else f"{str(path)[:_LONGEST_NAME]}…"
        faults.append(f"clip {shown} " + ("is no regular file" if os.path.exists(path) else "does not exist"))
    start, end = (_seconds(name, getattr(line, name), faults) for name in ("start", "end"))
    if end is not None and (start or 0.0) >= end:
        faults.append(f"start ({start or 0:g}) is not before end ({end:g})")
    faults += [f"{key}: is written by the extraction, leave it out beside a clip" for key in written_keys(line)]
    return Clip(path, start, end) if len(faults) == known else None


def id_of(line: ClipLine, place: int) -> str:
    """The id of a line; without one, that of its clip's name and its place among the rows from 0."""
    return str(line.id) if line.id is not None else f"{Path(str(line.clip or '')).stem}-{place + 1:05d}"


def _seconds(name: str, value: Any, faults: list[str]) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        faults.append(f"{name}: {str(value)[:40]!r} is not a number of seconds")
    elif not 0 <= value <= _LONGEST:
        faults.append(f"{name}: {str(value)[:40]} is not a number of seconds from 0 to {_LONGEST:g}")
    else:
        return float(value)
    return None


def written_keys(line: Line) -> list[str]:
    """The keys of a line that say what only an extraction can know."""
    return [key for key in WRITTEN if key in line.model_fields_set and getattr(line, key) is not None]


def misspelt(key: str, given: Mapping[str, Any]) -> str | None:
    """The known key that an unknown one is like and that the row lacks; None where there is none."""
    free = [known for known in KNOWN if known not in given and known not in WRITTEN]
    near = difflib.get_close_matches(key.lower(), free, n=1, cutoff=_NEAR)
    return near[0] if near else None


def _read(path: Path, language: str) -> str:
    if path.suffix.lower() not in SUFFIXES:
        raise ManifestError(path, [f"its name ends in {path.suffix!r}: a manifest is a .jsonl or a .csv"])
    if not path.is_file():
        raise ManifestError(path, ["it is a folder, a manifest is a file" if path.is_dir() else "it does not exist"])
    try:
        return decode_file(path.read_bytes(), language)[0]
    except OSError as error:
        raise ManifestError(path, [f"it cannot be read: {error.strerror}"]) from error
    except EncodingError as error:
        raise ManifestError(path, [str(error)]) from error


def _json_rows(text: str, faults: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    if text.lstrip().startswith("["):
        faults.append("it is one JSON list; one row a line was expected (JSON lines)")
        return
    for number, raw in enumerate(io.StringIO(text, newline=None), 1):
        if not raw.strip():
            continue
        try:
            values = load_json(raw)
        except ValueError as error:
            faults.append(f"line {number}: is no JSON: {error}")
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            faults.append(f"line {number}: is no JSON object")


def _csv_rows(text: str, faults: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if "clip" not in header:
            faults.append(f"line 1: has no column clip; it has {', '.join(header) or 'none'}{_other_separator(header)}")
            return
        if twice := [name for name, n in Counter(filter(None, header)).items() if n > 1]:
            faults.append(f"line 1: has the column(s) {', '.join(twice)} twice")
            return
        for cells in reader:
            number = reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                faults.append(f"line {number}: has {len(cells)} fields, the header {len(header)}")
                continue
            filled = {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
            if "" in filled:  # spreadsheets write empty columns, too
                faults.append(f"line {number}: {filled['']!r} stands in a column without a name")
                continue
            mine: list[str] = []
            values = {name: _cell(name, cell, mine) for name, cell in filled.items()}
            faults += [f"line {number}: {fault}" for fault in mine]
            if not mine:
                yield number, values
    except csv.Error as error:
        faults.append(f"line {reader.line_num}: is not valid CSV: {error}")


def _other_separator(header: Sequence[str]) -> str:
    """What to do where columns are separated by something else than commas, as spreadsheets do in some countries; else ""."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if "clip" in [part.strip() for part in ",".join(header).split(separator)]:
            return f" (its columns are separated by {name}: commas are needed, and points in numbers)"
    return ""


def _cell(name: str, cell: str, faults: list[str]) -> Any:
    """What a cell of a CSV says, in which everything is text."""
    if cell.strip()[0] in "[{" and name in ANSWERS:
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    if name not in ("start", "end", "turn", "target"):
        return cell if name == "text" else cell.strip()
    try:
        return int(cell) if name == "turn" else float(cell)
    except ValueError:
        faults.append(f"{name}: {cell!r} is not a {'whole ' if name == 'turn' else ''}number")
        return None


def _row(
    folder: Path,
    place: int,
    number: int,
    values: dict[str, Any],
    named: str | None,
    faults: list[str],
    unknown: Counter[str],
) -> ManifestRow | None:
    try:
        line = ClipLine.model_validate(values)
    except ValidationError as error:
        faults += describe_errors(error)
        return None
    for key in line.model_extra or {}:
        if key in KNOWN:
            continue
        if near := misspelt(key, values):
            faults.append(f"unknown key {key[:40]!r} (did you mean {near}?)")
        else:
            unknown[key] += 1
    clip = clip_of(line, folder, faults)
    id = id_of(line, place)
    if clip is None:
        return None
    kept = {key: value for key, value in values.items() if key not in (*CLIP_KEYS, *WRITTEN)}
    if named is not None and line.split is None and FOLD not in values:
        kept["split"] = named
    return ManifestRow(place, number, id, str(line.clip), clip, kept if line.id is not None else {"id": id, **kept})
