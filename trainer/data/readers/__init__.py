"""Published formats, one file each: `open_source` recognises them and gives raw samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

from trainer.data.readers.joined import join
from trainer.data.readers.jsonl import read_jsonl
from trainer.data.readers.meld_csv import is_annotation, read_meld_csv
from trainer.data.readers.pickles import read_pickle
from trainer.data.readers.raw import SPLIT_NAMES, SPLITS, RawSample, ReaderError, Source, Table, split_of
from trainer.tasks import Task

__all__ = ["SPLITS", "RawSample", "ReaderError", "Source", "open_source"]

_KINDS = {".pkl": "pickle", ".pickle": "pickle", ".csv": "annotations", ".jsonl": "samples"}
_NAMES = {
    ("pickle",): "pickled features",
    ("annotations",): "annotations",
    ("annotations", "pickle"): "pickled features with annotations",
    ("samples",): "own samples (JSONL)",
}


def open_source(task: Task, paths: Sequence[Path]) -> Source:
    """Recognise what lies at `paths` (files, or folders of them) and open it for `task`.

    Of several pickles in a folder those named after the task are read, else those named after a split, else all; of
    several annotation files those with MELD's own names, else all. Features and annotations given together are aligned.

    Raises:
        ReaderError: nothing readable there, or files that do not fit together, all problems at once.
    """
    source, _ = _open(task, [Path(path) for path in paths], check=True)
    source.part = partial(_part, task.model_dump_json(), tuple(str(path) for path in paths))
    return source


def _rows(tables: Sequence[Table], start: int = 0, stop: int | None = None) -> Iterator[RawSample]:
    """Rows `start` to `stop` of `tables`, one after the other."""
    stop = sum(table.n for table in tables) if stop is None else stop
    for table in tables:
        for i in range(max(start, 0), min(stop, table.n)):
            yield table.row(i)
        start, stop = start - table.n, stop - table.n


def _part(task: str, paths: tuple[str, ...], split: str, k: int, n: int) -> Iterator[RawSample]:
    tables = _reopen(task, paths).get(split, [])
    total = sum(table.n for table in tables)
    return _rows(tables, total * k // n, total * (k + 1) // n)


@lru_cache(maxsize=1)
def _reopen(task: str, paths: tuple[str, ...]) -> dict[str, list[Table]]:
    """The tables of a source that another process has checked; this one keeps them for the parts that follow."""
    return _open(Task.model_validate_json(task), [Path(path) for path in paths], check=False)[1]


def _open(task: Task, paths: Sequence[Path], check: bool) -> tuple[Source, dict[str, list[Table]]]:
    faults: list[str] = []
    notes: list[str] = []
    files = _gather(task, paths, faults, notes)
    found: dict[str, dict[str, list[Table]]] = {split: {} for split in SPLITS}  # split -> kind -> tables
    for file in files:
        kind = _KINDS[file.suffix]
        try:
            if kind == "pickle":
                tables = read_pickle(task, file, faults)
            elif kind == "annotations":
                tables = read_meld_csv(task, file, faults, notes)
            else:
                tables = read_jsonl(task, file, faults, notes, check)
        except OSError as error:
            faults.append(f"{file}: cannot be read: {error.strerror or error}")
            continue
        for table in tables:
            found[table.split].setdefault(kind, []).append(table)
    kinds = tuple(sorted({_KINDS[file.suffix] for file in files}))
    if kinds and kinds not in _NAMES:
        faults.append(f"{' and '.join(kinds)} do not go together: give pickles, annotations or both, or JSONL")
    tables_of = {
        split: _combine(split, found[split], len(kinds) > 1, faults, notes) for split in SPLITS if found[split]
    }
    widths = _agreed("features per frame", [t.widths or {} for ts in tables_of.values() for t in ts], faults)
    rates = _agreed("frames per second", [t.rates for ts in tables_of.values() for t in ts], faults)
    if not faults and not any(tables_of.values()):
        faults.append("nothing to read: give pickles (.pkl), MELD's annotations (.csv) or own samples (.jsonl)")
    if faults:
        many = f"{len(faults)} faults" if len(faults) > 1 else "a fault"
        raise ReaderError(f"{task.name}: the source cannot be read, {many}", faults)
    source = Source(
        name=_NAMES[kinds],
        samples=lambda split: _rows(tables_of.get(split, [])),
        splits=list(tables_of),
        files=files,
        widths={name: int(width) for name, width in widths.items()} or None,
        rates={"audio": rates.get("audio"), "video": rates.get("video")},
        notes=notes,
    )
    return source, tables_of


def _gather(task: Task, paths: Sequence[Path], faults: list[str], notes: list[str]) -> list[Path]:
    files: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            chosen = _in_folder(task, path, faults, notes)
        elif not path.exists():
            faults.append(f"{path}: does not exist")
            continue
        elif path.suffix not in _KINDS:
            faults.append(f"{path}: is none of {', '.join(_KINDS)}")
            continue
        else:
            chosen = [path]
        for file in chosen:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _in_folder(task: Task, folder: Path, faults: list[str], notes: list[str]) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _KINDS and not p.name.startswith("."))
    kinds: dict[str, list[Path]] = {}
    for file in files:
        kinds.setdefault(_KINDS[file.suffix], []).append(file)
    splits = "|".join(SPLIT_NAMES)
    chosen = [
        *_prefer(
            kinds.get("pickle", []),
            lambda p: re.fullmatch(rf"{re.escape(task.name)}[_-]({splits})", p.stem, re.IGNORECASE) is not None,
            lambda p: split_of(p.stem) is not None,
        ),
        *_prefer(
            [p for p in kinds.get("annotations", []) if is_annotation(p)],
            lambda p: re.fullmatch(rf"({splits})_sent_emo", p.stem) is not None,
        ),
        *kinds.get("samples", []),
    ]
    aside = [p.name for p in files if p not in chosen]
    if aside:
        notes.append(f"{folder.name}: left aside: {', '.join(aside)}")
    if not chosen:
        rest = f" (left aside: {', '.join(aside)})" if aside else ""
        faults.append(
            f"{folder}: holds no pickles (.pkl), annotations like MELD's (.csv) or own samples (.jsonl){rest}"
        )
    return chosen


def _prefer(files: list[Path], *tests: Callable[[Path], bool]) -> list[Path]:
    """The files that pass the first test that any passes; all, if none passes any."""
    for test in tests:
        passed = [file for file in files if test(file)]
        if passed:
            return passed
    return files


def _combine(split: str, kinds: dict[str, list[Table]], both: bool, faults: list[str], notes: list[str]) -> list[Table]:
    """The tables of one split made one sequence; `both`: other splits have features and annotations."""
    for kind in ("pickle", "annotations"):
        if len(tables := kinds.get(kind, [])) > 1:
            where = ", ".join(str(table.path) for table in tables)
            faults.append(f"{split} stands in several files, name the one you mean: {where}")
            return tables[:1]
    features, annotations = kinds.get("pickle", []), kinds.get("annotations", [])
    if features and annotations:
        return join(annotations[0], features[0], faults, notes)
    if both and (features or annotations):
        notes.append(f"{split}: has {'features' if features else 'annotations'} only")
    return features or annotations or kinds.get("samples", [])


def _agreed(what: str, found: list[dict[str, int]] | list[dict[str, float]], faults: list[str]) -> dict[str, float]:
    """The one value that all tables have; several are a fault."""
    values: dict[str, set[float]] = {}
    for one in found:
        for name, value in one.items():
            values.setdefault(name, set()).add(value)
    for name, several in values.items():
        if len(several) > 1:
            faults.append(f"{name} has several {what}: {', '.join(f'{value:g}' for value in sorted(several))}")
    return {name: next(iter(several)) for name, several in values.items()}
