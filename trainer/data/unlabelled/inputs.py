"""Where samples to be predicted come from: JSON lines, streamed, or files of any other format that preparation reads."""

from __future__ import annotations

import contextlib
import io
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trainer.data.preparation.columns import STREAMS
from trainer.data.preparation.resampling import resampled_rate
from trainer.data.readers.jsonl import JsonlReader
from trainer.data.readers.raw import SPLIT_NAMES, RawSample, Source, split_of
from trainer.data.readers.registry import Reader, in_folder, known_readers, reader_of
from trainer.data.readers.source import open_source
from trainer.data.task_input import TaskInput
from trainer.data.unlabelled.clips import ClipExtraction, ClipSettings, other_recipes
from trainer.data.unlabelled.lines import SampleInput, UncheckedSample, take_line
from trainer.encodings import EncodingError, decode_file, is_plain_utf_8
from trainer.features.manifest import ClipLine, id_of
from trainer.features.recipe_record import RecipeRecord, name_of
from trainer.own_samples import ANSWERS, parse_line
from trainer.tasks import Task

log = logging.getLogger(__name__)

LONGEST = 16 << 20  # bytes of a line


class PredictError(ValueError):
    """A request that cannot be answered, or an output that cannot be written."""


def askable(tasks: Mapping[str, TaskInput]) -> dict[str, tuple[str, ...]]:
    """What a sample may name -> the tasks that it is then asked: each alone, and all questions of one dataset by its name."""
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in tasks}
    for name, known in tasks.items():
        if known.dataset is not None:
            found[known.dataset] = (*found.get(known.dataset, ()), name)
    return found


def usual(tasks: Mapping[str, TaskInput]) -> str | None:
    """What a sample that names nothing is asked: everything, where that is one task or the questions of one dataset."""
    return next((name for name, asked in askable(tasks).items() if len(asked) == len(tasks)), None)


def check_places(sources: Sequence[Path], out: Path | None, plugins: Sequence[str] = ()) -> None:
    """Refuse what can be refused before a model is loaded; no source stands for stdin, no `out` for stdout.

    Raises:
        PredictError: no such input, a folder without a file of a known format, an output that is a folder or an input.
    """
    readers = known_readers(tuple(plugins))
    for source in sources:
        if not source.exists():
            raise PredictError(f"{source} does not exist: --input is a file or folder of samples, or - for stdin")
        if source.is_dir() and not any(reader_of(path, readers) for path in source.iterdir() if path.is_file()):
            known = ", ".join(map(str, readers))
            raise PredictError(f"{source} is a folder without a file of a known format: {known}")
        if source.is_file() and reader_of(source, readers) is None and b"\0" in _head(source):
            known = ", ".join(map(str, readers))
            raise PredictError(f"{source} is neither text (JSON lines) nor of another known format: {known}")
        if out is not None and out.exists() and out.samefile(source) and not out.is_dir():
            raise PredictError(f"--out is the input itself, {source}: choose another file")
    if out is not None and out.is_dir():
        raise PredictError(f"{out} is a folder: --out is the file of predictions, or - for stdout")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


def open_input(
    sources: Sequence[Path] | BinaryIO,
    tasks: Mapping[str, TaskInput],
    *,
    task: str | None = None,
    split: str | None = None,
    reread: bool = False,
    plugins: Sequence[str] = (),
    folder: Path = Path(),
    contained: bool = False,
    clips: ClipSettings | None = None,
) -> SampleInput:
    """The input at `sources`: JSON lines (also an open file, and files with an unknown suffix), or another format.

    Args:
        tasks: what the model reads; `task` is that of samples which name none, and may be None where there is only one.
        split: the only split to be answered.
        reread: whether the samples will be read more than once.
        folder: what paths in the lines of an open file are relative to; those in a named file are relative to its own.
        contained: whether a feature file, or clip, outside that folder is a fault.
        clips: how clips are extracted.

    Raises:
        PredictError: a format whose samples name no task, where the model has several; features of another recipe than the model's.
    """
    chosen = usual(tasks) if task is None else task
    asked = askable(tasks).get(chosen or "", tuple(tasks))
    unsure = _check_recipes(sources, {name: tasks[name].recipe for name in asked})
    extraction = ClipExtraction(partial(recipe_of, tasks, chosen), clips or ClipSettings(), keep=reread)
    if not isinstance(sources, Sequence):
        return JsonLinesInput(
            [(sources, folder, "")], task, split, reread, "en", answer_keys(tasks), contained, extraction, unsure
        )
    readers = known_readers(tuple(plugins))
    first = tasks[askable(tasks)[chosen][0]] if chosen else next(iter(tasks.values()))
    files = _files(sources, readers, first.task)
    if all(reader is None or isinstance(reader, JsonlReader) for _, reader in files):
        named = [(path, path.parent, f"{path.name} " if len(files) > 1 else "") for path, _ in files]
        chinese = any(one.task.language == "zh" for one in tasks.values())
        language = "zh" if chinese else "en"
        return JsonLinesInput(named, task, split, reread, language, answer_keys(tasks), contained, extraction, unsure)
    if chosen is None:
        raise PredictError(
            f"samples of {sources[0]} name no task, and the run has {', '.join(tasks)}: give one with --task"
        )
    if unsure:
        log.warning("%s", unsure)
    return SourceInput(sources, chosen, first, split, plugins, contained)


def _check_recipes(sources: Sequence[Path] | BinaryIO, recipes: Mapping[str, RecipeRecord | None]) -> str:
    """What is to be said where nothing tells by what given features were extracted, but it does of the run's; else "".

    Raises:
        PredictError: features of another recipe than the run's.
    """
    try:
        faults, unknown = other_recipes(sources, recipes) if isinstance(sources, Sequence) else ([], True)
    except ValueError as error:
        raise PredictError(str(error)) from error
    if faults:
        raise PredictError("\n".join(faults))
    return unsure_of(recipes) if unknown else ""


def unsure_of(recipes: Mapping[str, RecipeRecord | None]) -> str:
    """What is to be said of features of which no recipe is known, where those of the run have one; else ""."""
    known = next((recipe for recipe in recipes.values() if recipe is not None), None)
    if known is None:
        return ""
    return (
        f"the run's data were extracted by {name_of(known)}, and nothing says by what the features of the input were: predictions mean "
        "something only where it was the same (egmf extract writes recipe.json beside them)"
    )


def recipe_of(tasks: Mapping[str, TaskInput], chosen: str | None, task: str | None) -> RecipeRecord | None:
    """By what the data were extracted that a sample which names `task` is like."""
    asked = askable(tasks).get((chosen if task is None else task) or "", ())
    return tasks[asked[0]].recipe if asked else None


def answer_keys(tasks: Mapping[str, TaskInput]) -> frozenset[str]:
    """Keys in which prepared samples of several questions have their answers: they are not read, and not misspelt."""
    several = [known.task for known in tasks.values() if known.dataset is not None]
    return frozenset(
        [*ANSWERS, *(key for task in several for key in (task.name, task.label_column) if key)] if several else []
    )


def _files(sources: Sequence[Path], readers: Sequence[Reader], task: Task) -> list[tuple[Path, Reader | None]]:
    files: list[tuple[Path, Reader | None]] = []
    for source in sources:
        files += in_folder(task, source, readers)[0] if source.is_dir() else [(source, reader_of(source, readers))]
    return files


# ── JSON lines ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _OpenFile(NamedTuple):
    file: BinaryIO
    folder: Path  # paths in the lines are relative to it
    label: str  # in front of "line 7", where there are several files
    split: str | None  # that the file is named after


class JsonLinesInput:
    """One's own samples, a line at a time, so that memory does not grow with the input; a faulty line costs only itself.

    A file that cannot be read twice, such as a pipe, is copied to disk where that is needed.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path | BinaryIO, Path, str]],
        task: str | None,
        split: str | None = None,
        reread: bool = False,
        language: str = "en",
        answers: frozenset[str] = frozenset(),
        contained: bool = False,
        clips: ClipExtraction | None = None,
        unsure: str = "",
    ) -> None:
        self._clips, self._unsure = clips or ClipExtraction(lambda task: None, keep=reread), unsure
        self._given, self._task, self._split, self._reread, self._language = files, task, split, reread, language
        self._answers, self._contained = answers, contained
        self._files: list[_OpenFile] = []
        self._stack = contextlib.ExitStack()
        self.notes: list[str] = []

    def __enter__(self) -> JsonLinesInput:
        with contextlib.ExitStack() as stack:
            for given, folder, label in self._given:
                file = stack.enter_context(self._opened(given)) if isinstance(given, Path) else given
                if self._reread and not file.seekable():
                    copy = stack.enter_context(tempfile.TemporaryFile())
                    shutil.copyfileobj(file, copy)
                    copy.seek(0)
                    file = copy
                name = split_of(given.stem) if isinstance(given, Path) else None
                self._files.append(_OpenFile(file, folder, label, name))
            stack.enter_context(self._clips)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _opened(self, path: Path) -> BinaryIO:
        """The file as UTF-8; where its encoding cannot be told, as it is, so that each line of it is refused by itself."""
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return path.open("rb")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if is_plain_utf_8(data):
                    return path.open("rb")
                try:
                    text, encoding = decode_file(bytes(data), self._language)
                except EncodingError:
                    return path.open("rb")
        if encoding != "utf-8":
            self.notes.append(f"{path.name}: read as {encoding.upper()}")
        return io.BytesIO(text.encode())

    def samples(self) -> Iterator[UncheckedSample]:
        return self._clips.resolved(self._lines(), self.wanted)

    def _lines(self) -> Iterator[UncheckedSample]:
        order = 0
        for source in self._files:
            if self._reread:
                source.file.seek(0)
            for place, (number, raw, fault) in enumerate(_lines(source.file)):
                order += 1
                sample = UncheckedSample(order, f"{source.label}line {number}", faults=[fault] if fault else [])
                if not fault:
                    self._parse(raw, source, sample, place)
                yield sample

    def _parse(self, raw: bytes, source: _OpenFile, sample: UncheckedSample, place: int) -> None:
        faults: list[str] = []
        line = parse_line(raw, "", faults, ClipLine)
        sample.faults += [fault.removeprefix(": ") for fault in faults]
        if line is None:
            return
        id = "" if line.id is None and line.clip is None else id_of(line, place)
        split = line.split if line.split is not None else source.split if self._split is not None else None
        if self._split is not None and SPLIT_NAMES.get((split or "").lower()) is None:
            sample.faults.append(f"split {split!r} is none of train, valid, test, and --split asks for {self._split}")
        take_line(
            sample,
            line,
            id,
            source.folder,
            task=self._task,
            split=split or "",
            answers=self._answers,
            contained=self._contained,
        )
        if self._unsure and (line.audio is not None or line.video is not None):
            log.warning("%s", self._unsure)
            self._unsure = ""

    def wanted(self, sample: UncheckedSample) -> bool:
        if self._split is None or sample.raw is None:
            return True
        return SPLIT_NAMES.get(sample.raw.split.lower(), self._split) == self._split


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes, str]]:
    """Number and content of every line that is not blank, or the fault of one that is too long."""
    number = 0
    while raw := file.readline(LONGEST):
        number += 1
        if len(raw) == LONGEST and not raw.endswith(b"\n"):
            while (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
                pass
            yield number, b"", f"is longer than {LONGEST >> 20} MiB"
            continue
        raw = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
        if raw:
            yield number, raw, ""


# ── other formats ────────────────────────────────────────────────────────────────────────────────────────────────────


class SourceInput:
    """Files that :func:`trainer.data.readers.source.open_source` reads; labels and splits may be absent.

    Files that cannot be read refuse the whole input, a faulty sample costs only itself.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        task: str,
        expected: TaskInput,
        split: str | None,
        plugins: Sequence[str],
        contained: bool = False,
    ) -> None:
        self._paths, self._task, self._expected, self._split = paths, task, expected, split
        self._plugins, self._contained = plugins, contained
        self._source: Source
        self._rates: Mapping[str, float] = {}
        self.notes: list[str] = []

    def __enter__(self) -> SourceInput:
        """Raises ReaderError, or PredictError for a split that is not there or features of another rate."""
        self._source = open_source(
            self._expected.task, self._paths, labelled=False, plugins=self._plugins, contained=self._contained
        )
        self.notes = list(self._source.notes)
        if self._split is not None and self._split not in self._source.splits:
            known = ", ".join(filter(None, self._source.splits)) or "none; the file's name may say it (test.pkl)"
            raise PredictError(f"--split {self._split}: the input has no such split, it has {known}")
        rates = {name: rate for name, rate in self._source.rates.items() if rate is not None}
        if faults := rate_faults(rates, self._expected):
            raise PredictError("\n".join(faults))
        self._rates = rates
        return self

    def __exit__(self, *_: object) -> None:
        del self._source

    def samples(self) -> Iterator[UncheckedSample]:
        order = 0
        for split in self._source.splits if self._split is None else [self._split]:
            for raw in self._source.samples(split):
                order += 1
                yield UncheckedSample(order, raw.where, self._task, raw, partial(_given, raw), self._rates)

    def wanted(self, sample: UncheckedSample) -> bool:
        return True


def _given(raw: RawSample, faults: list[str]) -> RawSample:
    return raw


def rate_faults(rates: Mapping[str, float], expected: TaskInput) -> list[str]:
    """Where features have, after resampling, other rates than those the model was trained with."""
    known = {name: expected.rates.get(name) for name in STREAMS}
    return [
        f"another rate of {name} ({rate:g} frames a second, the run's data have {known[name]:g}: resample)"
        for name, rate in rates.items()
        if known[name] is not None and resampled_rate(rate, expected.max_rate) != known[name]
    ]
