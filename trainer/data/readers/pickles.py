"""Pickles of samples and of arrays.

- One list of samples per split, `meld_train.pkl`: `{"features": {"text", "audio", "video", "audio_len", "video_len"}, "label"}`
  (MELD, CHERMA, and own tasks of that layout; samples may also carry id, speaker, dialogue, turn, kind, language).
- One mapping of splits to columns, `unaligned_50.pkl`: `{"train": {"raw_text", "audio", "vision", "id", "regression_labels",
  "audio_lengths", "vision_lengths", …}, …}` (CMU-MOSEI, CMU-MOSI, CH-SIMS v2).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.pickles.unpickle import UnsafePickle, load_pickle
from trainer.data.readers.raw import (
    SPLIT_NAMES,
    RawSample,
    Table,
    as_features,
    as_label,
    as_length,
    as_text,
    split_of,
)
from trainer.data.readers.registry import ReadContext, Reader, answer_columns, lacking_columns, prefer
from trainer.encodings import EncodingError, decode_text
from trainer.tasks import Task

# what a column is for -> its published names, the first found is read
_COLUMNS = {
    "text": ("raw_text", "text"),
    "id": ("id", "ids"),
    "audio": ("audio",),
    "video": ("vision", "video"),
    "audio_length": ("audio_lengths",),
    "video_length": ("vision_lengths", "video_lengths"),
}
_NUMBERS = ("regression_labels", "labels")
_ANSWER = "answer to "  # of a use, in front of a question
_WORDS = ("labels", "label", "annotations")


class PickleReader(Reader):
    """Pickled features, of whole splits or of all of them; the content says which layout it is."""

    name = "pickle"
    title = "pickled features"
    suffixes = (".pkl", ".pickle")
    content = "features"
    one_file_per_split = True
    several_questions = True

    def choose(self, task: Task, files: list[Path]) -> list[Path]:
        """Those named after the task and a split, else those named after a split, else all."""
        named = re.compile(rf"{re.escape(task.name)}[_-]({'|'.join(SPLIT_NAMES)})", re.IGNORECASE)
        return prefer(files, lambda p: named.fullmatch(p.stem) is not None, lambda p: split_of(p.stem) is not None)

    def read(self, path: Path, context: ReadContext) -> list[Table]:
        try:
            content = load_pickle(path, partial(decode_text, language=context.task.language))
        except UnsafePickle as error:
            context.faults.append(str(error))
            return []
        if isinstance(content, dict):
            keys = {str(key): SPLIT_NAMES.get(str(key).lower()) for key in content}
            if any(keys.values()):
                return _splits(path, {str(key): value for key, value in content.items()}, keys, context)
        return _one_split(path, content, context)


def _splits(
    path: Path, content: Mapping[str, Any], keys: Mapping[str, str | None], context: ReadContext
) -> list[Table]:
    """The tables of a mapping whose `keys` name splits (None: something else, which is left aside)."""
    if aside := [key for key, split in keys.items() if split is None]:
        context.notes.append(f"{path.name}: left aside: {_listed(aside)}")
    known = len(context.faults)
    for split in dict.fromkeys(split for split in keys.values() if split is not None):
        several = [key for key, meant in keys.items() if meant == split]
        if len(several) > 1:
            context.faults.append(
                f"{path}: holds {' and '.join(several)}, which all mean the {split} split: leave one of them in the file"
            )
    if len(context.faults) > known:
        return []
    used = {key: split for key, split in keys.items() if split is not None}
    tables = [_columns(path, split, content[key], context) for key, split in used.items()]
    unread = {
        name: None
        for key in used
        if isinstance(content[key], dict)
        for name in map(str, content[key])
        if name not in _read_names(content[key], context)
    }
    if unread:
        context.notes.append(f"{path.name}: columns that are not read: {_listed(list(unread))}")
    return [table for table in tables if table is not None]


def _names(context: ReadContext, content: Mapping[Any, Any]) -> dict[str, tuple[str, ...]]:
    """What a column is for -> the names that it may have."""
    if context.questions:
        found = answer_columns(context, [str(name) for name in content], _usual)
        return {**_COLUMNS, **{f"{_ANSWER}{name}": (column,) for name, column in found.items()}}
    named = context.task.label_column
    return {**_COLUMNS, "label": _usual(context.task) if named is None else (named,)}


def _usual(task: Task) -> tuple[str, ...]:
    return _NUMBERS if task.kind == "regression" else _WORDS


def _read_names(content: Mapping[Any, Any], context: ReadContext) -> set[str]:
    return {next((n for n in found if n in content), "") for found in _names(context, content).values()}


def _one_split(path: Path, content: Any, context: ReadContext) -> list[Table]:
    split, faults = context.split_of(path), context.faults
    if not isinstance(content, (list, tuple, dict)) or (isinstance(content, dict) and "raw_text" not in content):
        faults.append(
            f"{path}: holds {_kind(content)}; a list of samples, or a mapping with train, valid and test, was expected"
        )
    elif split is None:
        name = f"{context.task.name}_train.pkl"
        faults.append(f"{path}: holds one split, but its name does not say which: name it {name} or so")
    else:
        read: Any = _columns if isinstance(content, dict) else _samples
        table = read(path, split, content, context)
        return [] if table is None else [table]
    return []


def _samples(path: Path, split: str, rows: Sequence[Any], context: ReadContext) -> Table | None:
    label_key = context.task.label_column or "label"
    known, label = len(context.faults), f" and {label_key}" if context.labelled and not context.questions else ""
    language = context.task.language
    keys = {str(key) for row in rows if isinstance(row, dict) for key in row} if context.questions else ()
    answers = answer_columns(context, keys, lambda task: ["label"])
    lacking = lacking_columns(context, answers) if context.labelled else []
    told = f"{path}: no row has {', '.join(lacking)}; they have {_listed(sorted(keys))}" if lacking else ""
    for i, row in enumerate(rows):
        features = row.get("features", row) if isinstance(row, dict) else None
        if (
            not isinstance(features, dict)
            or {"text", "audio", "video"}.isdisjoint(features)
            or (context.labelled and not context.questions and label_key not in row)
        ):
            context.faults.append(
                f"{path} row {i}: is {_kind(row)}; a mapping with features (text, audio, video, …){label} was expected"
            )
        else:
            words = {
                "text": features.get("text"),
                **{name: row.get(name) for name in (label_key, *answers.values(), "id", "speaker", "dialogue")},
            }
            context.faults += [f"{path} row {i}: {fault}" for fault in _undecodable(words, language)]

    def sample(i: int) -> RawSample:
        row = rows[i]
        features = row.get("features", row)
        return RawSample(
            id=as_text(row.get("id"), language) or f"{split or path.stem}-{i:05d}",
            split=split,
            text=as_text(features.get("text"), language),
            label=None if context.questions else as_label(row.get(label_key), language),
            audio=as_features(features.get("audio")),
            video=as_features(features.get("video")),
            audio_length=as_length(features.get("audio_len")),
            video_length=as_length(features.get("video_len")),
            speaker=as_text(row.get("speaker"), language),
            dialogue=as_text(row.get("dialogue"), language),
            turn=as_length(row.get("turn")),
            kind=as_text(row.get("kind")),
            language=as_text(row.get("language")),
            where=f"{path.name} row {i}",
            answers={name: as_label(row.get(key), language) for name, key in answers.items()}
            if context.questions
            else None,
        )

    return Table(path, split, len(rows), sample, lacking=told) if len(context.faults) == known else None


def _columns(path: Path, split: str, content: Any, context: ReadContext) -> Table | None:
    faults = context.faults
    if not isinstance(content, dict):
        faults.append(f"{path}: its {split} is {_kind(content)}; a mapping of columns was expected")
        return None
    names = _names(context, content)
    columns: dict[str, Any] = {
        use: next((content[n] for n in found if n in content), None) for use, found in names.items()
    }
    known = len(faults)
    if all(columns[use] is None for use in ("text", "audio", "video")):
        faults.append(f"{path}: {split} has no raw_text, text, audio, vision or video; it has {_listed(content)}")
    answers = [use for use in columns if use.startswith(_ANSWER)]
    named = {use.removeprefix(_ANSWER): "" for use in answers}
    lacking = lacking_columns(context, named) if context.labelled else []
    if context.labelled and not context.questions and columns["label"] is None:
        faults.append(f"{path}: {split} has no {' or '.join(names['label'])}; it has {_listed(content)}")
    if columns["text"] is not None and (shape := _array_shape(columns["text"])) is not None:
        where = next(name for name in names["text"] if name in content)
        faults.append(
            f"{path}: the {where} of {split} holds arrays of numbers {shape}, no words: the words were expected in "
            "raw_text or text (for a task without words, leave the column out)"
        )
    sizes: dict[str, int | None] = {}
    for use, column in columns.items():
        if column is not None:
            sized = isinstance(column, (list, tuple)) or (isinstance(column, np.ndarray) and column.ndim > 0)
            sizes[use] = len(column) if sized else None
    if len(set(sizes.values())) > 1 or None in sizes.values():
        found = ", ".join(f"{use} {'no list' if size is None else size}" for use, size in sizes.items())
        faults.append(f"{path}: the columns of {split} differ in length: {found}")
    else:
        language = context.task.language
        for use in ("text", "label", *answers, "id"):
            for i, value in enumerate(() if columns.get(use) is None else columns[use]):
                faults += [f"{path} {split} row {i}: {fault}" for fault in _undecodable({use: value}, language)]
    if len(faults) > known:
        return None

    def cell(use: str, i: int) -> Any:
        column = columns.get(use)
        return None if column is None else column[i]

    def sample(i: int) -> RawSample:
        return RawSample(
            id=_id(cell("id", i)) or f"{split or path.stem}-{i:05d}",
            split=split,
            text=as_text(cell("text", i), language),
            label=as_label(cell("label", i), language),
            audio=as_features(cell("audio", i)),
            video=as_features(cell("video", i)),
            audio_length=as_length(cell("audio_length", i)),
            video_length=as_length(cell("video_length", i)),
            where=f"{path.name} {split} row {i}",
            answers={use.removeprefix(_ANSWER): as_label(cell(use, i), language) for use in answers}
            if context.questions
            else None,
        )

    widths = {use: columns[use].shape[2] for use in ("audio", "video") if getattr(columns[use], "ndim", 0) == 3}
    told = f"{path}: {split} has no {', '.join(lacking)}; it has {_listed(content)}" if lacking else ""
    length = next(size for size in sizes.values() if size is not None)
    return Table(path, split, length, sample, widths or None, lacking=told)


def _undecodable(words: Mapping[str, Any], language: str) -> list[str]:
    """Byte strings whose encoding cannot be told."""
    faults = []
    for name, value in words.items():
        if isinstance(value, bytes):
            try:
                as_text(value, language)
            except EncodingError as error:
                faults.append(f"its {name} {error}")
    return faults


def _id(value: Any) -> str | None:
    """An id; published as one text, or as several parts (video, start, end)."""
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.size > 1):
        return "_".join(as_text(part) or "" for part in value)
    return as_text(value)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"a mapping of {_listed(value)}"
    return f"a {type(value).__name__}"


def _array_shape(column: Any) -> list[int] | None:
    """The shape of the first entry of a column of arrays; None where it is none."""
    first = column[0] if isinstance(column, (list, tuple, np.ndarray)) and len(column) else None
    if not isinstance(first, np.ndarray) or first.size < 2 or first.dtype.kind not in "fiub":
        return None
    return list(first.shape)


def _listed(content: Collection[Any]) -> str:
    keys = [str(key)[:40] for key in list(content)[:12]]
    return (", ".join(keys) or "nothing") + (", …" if len(content) > 12 else "")
