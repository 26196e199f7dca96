"""Own samples without labels, to be predicted: JSON lines read one after the other, checked as `egmf prepare` checks them.

Nothing that grows with the file is held in memory: what must be remembered of earlier lines (ids; what was said, for
histories) lies in a temporary database on disk.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from trainer.batch import Sample
from trainer.data.faults import DataError, Fault
from trainer.data.readers.jsonl import Line, feature_faults, parse_line, raw_sample
from trainer.data.readers.raw import ReaderError
from trainer.data.rows import STREAMS, Checker, Row, wrong_width
from trainer.tasks import Task

LONGEST = 16 << 20  # bytes of a line
_TOLD = ("id", "text", "audio", "video", "audio_length", "video_length", "speaker", "dialogue", "turn", "task")


class PredictError(ValueError):
    """A request that cannot be answered, or an output that cannot be written."""


def check_places(source: Path | None, out: Path | None) -> None:
    """Refuse what can be refused before a model is loaded; None stands for stdin and stdout.

    Raises:
        PredictError: no such input, an output that is a folder or the input itself.
    """
    if source is not None and not source.exists():
        raise PredictError(f"{source} does not exist: --input is a JSONL file of samples, or - for stdin")
    if source is not None and source.is_dir():
        raise PredictError(f"{source} is a folder: --input is a JSONL file of samples, or - for stdin")
    if out is not None and out.is_dir():
        raise PredictError(f"{out} is a folder: --out is the file of predictions, or - for stdout")
    if source is not None and out is not None and out.exists() and out.samefile(source):
        raise PredictError(f"--out is the input itself, {source}: choose another file")


class UnlabelledLine(Line):
    """One sample as written; label, target, split and kind are not needed and not read."""

    task: str | None = None


@dataclass(frozen=True)
class Asked:
    """What a model knows of one of its tasks: `widths` (features a frame, 0: none) and `rates` (frames a second, None:
    unknown) are those of the data it was trained with."""

    task: Task
    widths: Mapping[str, int]
    rates: Mapping[str, float | None]


@dataclass
class Checked:
    """A line that was read. `sample` is None where `faults` cost it; `notes` are repairs, and keys that are not used."""

    number: int
    task: str = ""
    sample: Sample | None = None
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class UnlabelledReader:
    """Reads `file`; iterating gives a :class:`Checked` for every line that is not blank. Use as a context.

    Args:
        file: open for reading; a copy on disk is made of one that cannot be read twice, where a history is needed.
        folder: paths in the lines are relative to it.
        asked: task -> what its model knows.
        task: of lines that name none; may be None where `asked` has only one.
        history: previous utterances of the dialogue that a sample gets. All lines of the file that can be read count,
            also later ones, and those whose features are faulty.
    """

    def __init__(
        self, file: BinaryIO, folder: Path, asked: Mapping[str, Asked], *, task: str | None = None, history: int = 0
    ) -> None:
        self._file, self._folder, self._asked, self._history = file, folder, asked, history
        self._task = next(iter(asked)) if task is None and len(asked) == 1 else task
        self._checkers = {name: Checker(known.task, labelled=False) for name, known in asked.items()}
        self._stack = contextlib.ExitStack()
        self._memory: _Memory

    def __enter__(self) -> UnlabelledReader:
        with contextlib.ExitStack() as stack:
            self._memory = stack.enter_context(contextlib.closing(_Memory()))
            if self._history and not self._file.seekable():
                copy = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(self._file, copy)
                copy.seek(0)
                self._file = copy
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[Checked]:
        """Raises DataError where the input, or what is remembered of it on disk, fails."""
        try:
            yield from self._read()
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"the input cannot be read on: {error}") from error

    def _read(self) -> Iterator[Checked]:
        if self._history:
            for number, line, _ in self._lines():
                if line is not None:
                    self._memory.say(self._task_of(line), number, line)
            self._file.seek(0)
        for number, line, faults in self._lines():
            yield Checked(number, faults=faults) if line is None else self._check(number, line)

    def _lines(self) -> Iterator[tuple[int, UnlabelledLine | None, list[str]]]:
        """Number, line and faults of every line that is not blank."""
        number = 0
        while raw := self._file.readline(LONGEST):
            number += 1
            if len(raw) == LONGEST and not raw.endswith(b"\n"):
                while (rest := self._file.readline(LONGEST)) and not rest.endswith(b"\n"):
                    pass
                yield number, None, [f"is longer than {LONGEST >> 20} MiB"]
                continue
            raw = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
            if raw:
                faults: list[str] = []
                line = parse_line(raw, "", faults, UnlabelledLine)
                yield number, line, [fault.removeprefix(": ") for fault in faults]

    def _task_of(self, line: UnlabelledLine) -> str | None:
        return self._task if line.task is None else line.task

    def _check(self, number: int, line: UnlabelledLine) -> Checked:
        name = self._task_of(line)
        asked = self._asked.get(name or "")
        out = Checked(number, name or "")
        self._check_keys(line, out)
        if asked is None:
            names = ", ".join(self._asked)
            out.faults.append(
                f"task {name!r} is none of the run's: {names}" if name else f"names no task, the run has {names}"
            )
            return out
        id = "" if line.id is None else str(line.id).strip()
        if id and (first := self._memory.first(asked.task.name, id, number)) is not None:
            out.faults.append(f"duplicate id ({id!r} is that of line {first})")
        out.faults += _rate_faults(line, asked)
        row = self._row(line, id, asked, out)
        if row is not None and not out.faults:
            history = self._memory.before(name, number, line, self._history) if self._history else []
            out.sample = _sample(row, history)
        return out

    def _row(self, line: UnlabelledLine, id: str, asked: Asked, out: Checked) -> Row | None:
        if unreadable := feature_faults(self._folder, line):
            out.faults += unreadable
            return None
        try:
            raw = raw_sample(asked.task, self._folder, line, id, "", "")
            row, faults = self._checkers[asked.task.name].check(raw, "")
        except ReaderError as error:
            out.faults.append(str(error))
            return None
        if row is not None:
            faults += _fit(row, asked, out.notes)
        out.faults += [_shown(fault) for fault in faults if not fault.repair]
        out.notes += [_shown(fault) for fault in faults if fault.repair]
        return row

    def _check_keys(self, line: UnlabelledLine, out: Checked) -> None:
        """A key that is probably a misspelt one costs the line: without it, a part of the sample would be missing."""
        for key in line.model_extra or {}:
            near = difflib.get_close_matches(key, [k for k in _TOLD if k not in line.model_fields_set], n=1)
            if near:
                out.faults.append(f"unknown key {key[:40]!r} (did you mean {near[0]}?)")
            else:
                out.notes.append(f"unknown key {key[:40]!r}: not used")


class _Memory:
    """Ids, and what was said, of a file's lines: a temporary SQLite database that moves to disk as it grows."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("")
        self._base.execute("CREATE TABLE ids (task, id, line, PRIMARY KEY (task, id)) WITHOUT ROWID")
        self._base.execute("CREATE TABLE said (task, id, dialogue, turn, line, speaker, text, UNIQUE (task, id))")
        self._base.execute("CREATE INDEX place ON said (dialogue, turn, line)")

    def close(self) -> None:
        self._base.close()

    def first(self, task: str, name: str, line: int) -> int | None:
        """Remember an id; the line that had it before, if one did."""
        done = self._base.execute("INSERT OR IGNORE INTO ids VALUES (?, ?, ?)", (task, name, line))
        if done.rowcount:
            return None
        found = self._base.execute("SELECT line FROM ids WHERE task = ? AND id = ?", (task, name)).fetchone()
        return int(found[0])

    def say(self, task: str | None, number: int, line: UnlabelledLine) -> None:
        """Remember what a line of a dialogue says."""
        text = (line.text or "").strip()
        if line.dialogue is not None and line.id is not None and text:
            row = (task, str(line.id), _dialogue(task, line), line.turn, number, _word(line.speaker), text)
            self._base.execute("INSERT OR IGNORE INTO said VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def before(self, task: str | None, number: int, line: UnlabelledLine, limit: int) -> list[tuple[str, str]]:
        """(speaker, text) of the at most `limit` utterances before a line, oldest first.

        As in :class:`trainer.data.dataset.Conversations`: by turn, or by line where the dialogue has no turns.
        """
        if line.dialogue is None:
            return []
        dialogue = _dialogue(task, line)
        where, place = "turn IS NOT NULL AND turn < ?", line.turn
        if place is None:
            numbered = "SELECT 1 FROM said WHERE dialogue = ? AND turn IS NOT NULL LIMIT 1"
            if self._base.execute(numbered, (dialogue,)).fetchone():
                return []
            where, place = "line < ?", number
        query = f"SELECT speaker, text FROM said WHERE dialogue = ? AND {where} ORDER BY turn DESC, line DESC LIMIT ?"
        return self._base.execute(query, (dialogue, place, limit)).fetchall()[::-1]


def _dialogue(task: str | None, line: UnlabelledLine) -> str:
    """A dialogue's name, told apart by task and split: the corpora count anew in each."""
    return json.dumps([task, line.split, str(line.dialogue)])


def _word(value: str | int | None) -> str:
    return "" if value is None else str(value)


def _rate_faults(line: UnlabelledLine, asked: Asked) -> list[str]:
    known = {name: asked.rates.get(name) for name in STREAMS}
    return [
        f"another rate of {name} ({rate:g} frames a second, the run's data have {known[name]:g}: resample)"
        for name, rate in line.rate.items()
        if known[name] is not None and rate != known[name]
    ]


def _fit(row: Row, asked: Asked, notes: list[str]) -> list[Fault]:
    """The faults of streams of another width than the model's; one that it was trained without is left out, with a note."""
    faults = []
    for name in STREAMS:
        stream, width = row.streams[name], asked.widths.get(name) or 0
        if stream is not None and not width:
            row.streams[name] = None
            notes.append(f"{name}: not used, the run's data have none")
        elif stream is not None and stream.values_TF.shape[1] != width:
            faults.append(wrong_width(name, stream.values_TF.shape[1], width, "", row.id, ""))
    return faults


def _shown(fault: Fault) -> str:
    detail = f" ({fault.detail})" if fault.detail else ""
    return fault.kind + detail + (f": {fault.repair}" if fault.repair else "")


def _sample(row: Row, history: list[tuple[str, str]]) -> Sample:
    audio, video = (row.streams[name] for name in STREAMS)
    return Sample(
        id=row.id,
        text=row.text,
        target=row.target,
        audio_TF=None if audio is None else audio.values_TF,
        video_TF=None if video is None else video.values_TF,
        audio_mask_T=None if audio is None else audio.mask_T,
        video_mask_T=None if video is None else video.mask_T,
        history=history,
    )
