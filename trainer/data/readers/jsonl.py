"""Own data: a JSONL with one sample a line, features in `.npy` or `.npz` files beside it.

`{"id": "a1", "text": "…", "label": "joy", "audio": "a1.npy", "video": "a1.npz", "split": "train", "speaker": "Ann",
"dialogue": "d7", "turn": 3, "rate": {"audio": 100, "video": 25}}`. Only text and label (or `target`, a number) are needed. Paths are relative to the
JSONL. The split may be the file's name instead; or samples have a `fold` and no split. `docs/data.md` has the whole list.
"""

from __future__ import annotations

import difflib
import mmap
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.data.readers.array_files import UnreadableArrayError, array_header, check_member, check_size, reading
from trainer.data.readers.raw import ALL, CLIPS, SPLIT_NAMES, RawSample, ReaderError, Table, as_label
from trainer.data.readers.registry import ReadContext, Reader, decoded
from trainer.encodings import is_plain_utf_8
from trainer.own_samples import ANSWERS, FOLD, Label, Line, Word, parse_line
from trainer.questions import is_built_in
from trainer.tasks import Task


class JsonlReader(Reader):
    """One's own samples, one JSON object a line."""

    name = "JSON lines"
    title = "own samples (JSONL)"
    suffixes = (".jsonl",)
    several_questions = True

    def read(self, path: Path, context: ReadContext) -> list[Table]:
        faults = context.faults
        if path.stat().st_size == 0:
            faults.append(f"{path}: is empty")
            return []
        with path.open("rb") as file:
            data: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not is_plain_utf_8(data):
            text = decoded(path, bytes(data), context)
            if text is None:
                return []
            data = text.encode()
        start = 3 if data[:3] == b"\xef\xbb\xbf" else 0
        if data[start : start + 4096].lstrip().startswith(b"["):
            faults.append(f"{path}: is one JSON list; one sample a line was expected (JSON lines)")
            return []
        index = _Index(path, context.split_of(path), context.fold_column)
        number, end = 0, b"\n" if data.find(b"\n") >= 0 else b"\r"  # a file of the classic Mac OS has CR alone
        while start < len(data):
            stop = data.find(end, start) + 1 or len(data)
            number += 1
            if raw := data[start:stop].strip():
                index.add(_Place(number, start, stop), raw, context)
            start = stop
        rates = index.close(context)
        return [
            Table(
                path,
                split,
                len(places),
                partial(
                    _sample, context.task, context.questions, path, data, split, places, context.fold_column or FOLD
                ),
                rates=rates,
            )
            for split, places in index.places.items()
        ]


class _Place(NamedTuple):
    """Where a line stands in its file: its number from 1, and its bytes."""

    number: int
    start: int
    stop: int


class _Index:
    """Where the lines of each split stand, and what the lines say of the whole file."""

    def __init__(self, path: Path, named: str | None, fold_column: str | None) -> None:
        self.path, self.named, self.fold_column = path, named, fold_column
        self.folds = False  # whether some line has one
        self.features = False  # whether some line has audio or video
        self.places: dict[str, list[_Place]] = {}
        self.rates: dict[str, Counter[float]] = {"audio": Counter(), "video": Counter()}
        self.unknown: Counter[str] = Counter()

    def add(self, place: _Place, raw: bytes, context: ReadContext) -> None:
        where = f"{self.path} line {place.number}"
        line = parse_line(raw, where, context.faults, Line)
        if line is None:
            return
        split = SPLIT_NAMES.get(line.split.lower()) if line.split is not None else self.named
        unused = list(line.model_extra or {})
        fold = _fold(line, self.fold_column or FOLD)
        if self.fold_column is not None or (line.split is None and split is None and fold is not None):
            split = ALL
            self.folds = self.folds or fold is not None
            unused = [key for key in unused if key != (self.fold_column or FOLD)]
        if context.questions:
            unused = _unused_answers(context.questions, line, unused)
        else:
            unused = [key for key in unused if key != context.task.label_column]
        if split is None:
            context.faults.append(f"{where}: {_no_split(line)}")
        else:
            self.places.setdefault(split, []).append(place)
        self.unknown.update(unused)
        self.features = self.features or line.audio is not None or line.video is not None
        for stream, rate in line.rate.items():
            self.rates[stream][rate] += 1
        if context.check:
            context.faults += [
                f"{where}: {fault}" for fault in feature_faults(self.path.parent, line, contained=context.contained)
            ]

    def close(self, context: ReadContext) -> dict[str, float]:
        """Faults and notes of the whole file; returns the rates."""
        for name, found in self.rates.items():
            if len(found) > 1:
                several = ", ".join(f"{rate:g}" for rate in found)
                context.faults.append(f"{self.path}: {name} has several rates ({several}): resample to one")
        if self.fold_column is not None and not self.folds:
            close = difflib.get_close_matches(self.fold_column, [*self.unknown, *Line.model_fields], n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            context.faults.append(
                f"{self.path}: no line has a fold: --fold-column {self.fold_column} names no key{hint}"
            )
        if self.unknown:
            known = list(Line.model_fields)
            known += [f"{head}{task.name}" for task in context.questions for head in ("", *(f"{k}." for k in ANSWERS))]
            unused = ", ".join(_unused(key, n, known) for key, n in self.unknown.most_common(20))
            context.notes.append(f"{self.path.name}: not used: {unused}")
        if "clip" in self.unknown and not self.features:
            context.notes.append(f"{self.path.name}: no sound and no pictures; {CLIPS}")
        return {name: next(iter(found)) for name, found in self.rates.items() if found}


def _no_split(line: Line) -> str:
    if line.split is None:
        return (
            "no split: give every sample one, or name the file train.jsonl, valid.jsonl or test.jsonl; "
            "for cross-validation give every sample a fold"
        )
    return f"split {line.split!r} is none of train, valid, test"


def _unused(key: str, n: int, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"{key[:40]!r} of {n} line(s)" + (f" (did you mean {close[0]}?)" if close else "")


def _fold(line: Line, column: str) -> str | None:
    """The fold of a line: a word or a whole number; None where it has none."""
    value: object = getattr(line, column, None) if column in Line.model_fields else (line.model_extra or {}).get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return str(value).strip() or None


def _sample(
    task: Task,
    questions: Sequence[Task],
    path: Path,
    data: mmap.mmap | bytes,
    split: str,
    places: list[_Place],
    fold_column: str,
    i: int,
) -> RawSample:
    number, start, stop = places[i]
    line = Line.model_validate_json(data[start:stop].strip())
    prefix = path.stem if split in ("", ALL) else split
    name = f"{prefix}-{number:05d}" if line.id is None else str(line.id)
    sample = labelled_sample(task, questions, line, name, split, f"{path.name} line {number}")
    if split == ALL:
        sample = replace(sample, fold=_fold(line, fold_column))
    return with_features(sample, path.parent, line)


def labelled_sample(task: Task, questions: Sequence[Task], line: Line, name: str, split: str, where: str) -> RawSample:
    """The sample `name` of a line with its label, or its answers to the `questions` where there are some; without its features."""
    sample = plain_sample(line, name, split, where, None if questions else _label(task, line))
    return replace(sample, answers={one.name: _answer(one, line)[1] for one in questions}) if questions else sample


def _label(task: Task, line: Line) -> Label:
    """Under the key that the task names; else `label`, or `target` of a regression task, whichever is there."""
    if task.label_column is not None:
        return as_label(getattr(line, task.label_column, None))
    first, second = (line.target, line.label) if task.kind == "regression" else (line.label, line.target)
    return second if first is None else first


def _answer(task: Task, line: Line) -> tuple[str | None, Label]:
    """The key of a sample's answer to one of several questions (dotted where it is in an object), and the answer.

    Under the key that the question names; else under its name in an object `label`, `labels` or `target`; else under its name; else,
    for a built-in task, the label that is no object. None where the sample has none of them.
    """
    if task.label_column is not None:
        return task.label_column, as_label(getattr(line, task.label_column, None))
    for key in ANSWERS:
        given = getattr(line, key, None)
        if isinstance(given, dict) and task.name in given:
            return f"{key}.{task.name}", given[task.name]
    if task.name in (line.model_extra or {}):
        return task.name, as_label(getattr(line, task.name))
    if is_built_in(task) and not isinstance(label := _label(task, line), dict):
        return None if label is None else "target" if label is line.target else "label", label
    return None, None


def _unused_answers(questions: Sequence[Task], line: Line, unused: list[str]) -> list[str]:
    """The keys that hold no answer: of the line, those that `unused` has; of labels, also what an object has beside the questions."""
    read = {_answer(task, line)[0] for task in questions} | {task.label_column for task in questions}
    out = [key for key in unused if key not in read and key != "labels"]
    for key in ANSWERS:
        given = getattr(line, key, None)
        if isinstance(given, dict) and key not in read:
            out += [f"{key}.{name}" for name in given if f"{key}.{name}" not in read]
        elif given is not None and key not in read:
            out.append(key)
    return out


def plain_sample(line: Line, name: str, split: str, where: str, label: Label = None) -> RawSample:
    """The sample `name` of a line, without its features."""
    return RawSample(
        id=name,
        split=split,
        text=line.text,
        label=label,
        audio_length=line.audio_length,
        video_length=line.video_length,
        speaker=_word(line.speaker),
        dialogue=_word(line.dialogue),
        turn=line.turn,
        kind=line.kind,
        language=line.language,
        where=where,
    )


def with_features(sample: RawSample, folder: Path, line: Line) -> RawSample:
    """The sample with the features of its line, whose paths are relative to `folder`.

    Raises:
        ReaderError: a feature file cannot be read, though its header can.
    """
    features: dict[str, np.ndarray | None] = {}
    for stream in ("audio", "video"):
        file = getattr(line, stream)
        try:
            features[stream] = None if file is None else load_features(folder / file, stream)
        except (OSError, ValueError) as error:
            at = f"{sample.where}: " if sample.where else ""
            raise ReaderError(f"{at}{stream} file {folder / file} cannot be read: {error}") from error
    return replace(sample, audio=features["audio"], video=features["video"])


def _word(value: Word) -> str | None:
    return None if value is None else str(value)


def feature_faults(folder: Path, line: Line, *, contained: bool = False) -> list[str]:
    """What is wrong with the line's feature files, by their headers; paths are relative to `folder`.

    `contained`: one outside the folder, also by a link, is a fault, and is not looked into.
    """
    faults = []
    for name in ("audio", "video"):
        file = getattr(line, name)
        if file is not None:
            try:
                if contained and not (folder / file).resolve().is_relative_to(folder.resolve()):
                    faults.append(f"{name} file {file} leads out of {folder}, which --contained refuses")
                    continue
                load_features(folder / file, name, check=True)
            except FileNotFoundError:
                faults.append(f"no {name} file {folder / file}")
            except (OSError, ValueError) as error:
                faults.append(f"{name} file {folder / file}: {error}")
    return faults


def load_features(path: Path, name: str, *, check: bool = False) -> np.ndarray | None:
    """The array in an `.npy` file (mapped, not read), or in an `.npz`: the one called `name`, or the only one.

    `check` looks at the header alone and returns nothing.

    Raises:
        OSError, ValueError: no such file, or no array of numbers; objects (pickles) are never read.
    """
    if path.exists() and not path.is_file():  # a pipe, which nobody may ever write into
        raise ValueError("is not a regular file")
    if path.suffix == ".npy":
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise ValueError("is not a .npy array")
            file.seek(0)
            with reading("array"):
                shape, dtype = array_header(file)
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                check_size(shape, dtype)
        return None if check else array
    if path.suffix != ".npz":
        raise ValueError("features are .npy or .npz files")
    if not path.is_file():
        raise FileNotFoundError(path)
    with reading(".npz"):
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist()]
            key = name if name in names else names[0] if len(names) == 1 else None
            if key is None:
                stored = ", ".join(names[:8]) or "nothing"
                raise UnreadableArrayError(f"holds {stored}; one array, or one called {name!r}, was expected")
            info = archive.getinfo(f"{key}.npy")
            with archive.open(info) as member:
                check_member(member, info)
        if check:
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[key])
