"""The formats that can be read: every `Reader` in the files of this folder, of installed packages and of plug-ins.

A format is one file with one subclass of :class:`Reader`. Nothing else lists formats: suffixes, choices in a folder, error messages
and what goes together are asked of the readers.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal, get_args

from trainer.data.readers.raw import Table, split_of
from trainer.encodings import MIXED, EncodingError, decode_file, first_line
from trainer.plugins import PluginError, installed_plugins, load_plugin, subclasses_in
from trainer.questions import is_built_in
from trainer.tasks import Task

ENTRY_POINTS = "egmf.readers"  # installed packages announce modules with readers under this group

Content = Literal["features", "annotations", "samples"]


@dataclass
class ReadContext:
    """What a reader is asked, and where it reports. A fault refuses the source, a note is shown and recorded.

    Attributes: `labelled`, whether samples need a label and a split (preparation) or may lack them (prediction); `check`, whether
    to look into files that samples refer to (False: another process did); `fold_column`, the column or key of samples that names
    their fold, where the user gave one. Where several questions are asked, `questions` has all of them, samples need `answers`, and
    `task` is the first under the name of all. `contained`: files that samples refer to must lie in the folder of the file that does.
    """

    task: Task
    labelled: bool = True
    check: bool = True
    fold_column: str | None = None
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    questions: tuple[Task, ...] = ()
    contained: bool = False

    def split_of(self, path: Path) -> str | None:
        """The split that a file is named after; "" for samples to be predicted, which need none."""
        return split_of(path.stem) or (None if self.labelled else "")


def decoded(path: Path, raw: bytes, context: ReadContext) -> str | None:
    """The text of a file; a note names an encoding other than UTF-8, and a fault says why there is none."""
    try:
        text, encoding = decode_file(raw, context.task.language)
    except EncodingError as error:
        context.faults.append(f"{path}: {error}")
        return None
    if encoding == MIXED:
        context.notes.append(f"{path.name}: some lines are not UTF-8 and were read as Windows-1252")
    elif encoding != "utf-8":
        context.notes.append(f"{path.name}: read as {encoding.upper()}")
    return text


def answer_columns(
    context: ReadContext, header: Collection[str], own: Callable[[Task], Sequence[str]]
) -> dict[str, str]:
    """Question -> its column, for each of several questions that has one.

    It is the `label_column` that the question names; else the one of the question's name, or of that name in other letters of
    case; else, for a built-in task, the first of the format's `own` columns of labels.
    """
    found = {}
    for task in context.questions:
        wanted = [task.label_column] if task.label_column is not None else [task.name]
        if task.label_column is None:
            wanted += [name for name in header if name.casefold() == task.name.casefold()]
            wanted += own(task) if is_built_in(task) else []
        if (column := next((name for name in wanted if name in header), None)) is not None:
            found[task.name] = column
    return found


def lacking_columns(context: ReadContext, found: Mapping[str, str]) -> list[str]:
    """Those of several questions that have no column, with the name that was looked for."""
    missing = [task for task in context.questions if task.name not in found]
    return [f"{task.label_column or task.name} (the question {task.name})" for task in missing]


def has_columns(path: Path, columns: Iterable[str]) -> bool:
    """Whether the header of a CSV file, in any encoding, has the columns."""
    with path.open("rb") as file:
        head = first_line(file.read(1 << 16))
    return set(columns) <= {name.strip().strip('"') for name in head.split(",")}


class Reader(ABC):
    """One format.

    Attributes:
        name: short and unique, such as ``"pickle"``; also how messages call it.
        title: what such files hold, for the dataset's record.
        suffixes: with the dot, in lower case.
        content: ``"samples"`` are whole. ``"features"`` and ``"annotations"`` may be given alone; given together, each split's are
            aligned and joined.
        one_file_per_split: several files of one split are refused rather than read one after the other.
        several_questions: samples get `answers` where the context has several questions; a reader that says nothing is not given
            any.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    content: ClassVar[Content] = "samples"
    one_file_per_split: ClassVar[bool] = False
    several_questions: ClassVar[bool] = False

    def recognise(self, path: Path) -> bool:
        """Whether a file with one of the suffixes is of this format; by its first bytes, where others share the suffix."""
        return True

    def choose(self, task: Task, files: list[Path]) -> list[Path]:
        """Those of a folder's files of this format that are meant: by default all."""
        return files

    @abstractmethod
    def read(self, path: Path, context: ReadContext) -> list[Table]:
        """A table for each split in the file, in published order; what is wrong goes to `context.faults`, nothing is raised.

        Rows may be read lazily: `Table.row(i)` is called in any order, for the whole source more than once.
        """

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.suffixes)})"


@lru_cache(maxsize=8)
def known_readers(plugins: tuple[str, ...] = ()) -> tuple[Reader, ...]:
    """A reader of each format, those that come with the package first.

    `plugins` are modules or ``.py`` files of the user's; packages that are installed may announce theirs as entry points.

    Raises:
        PluginError: a plug-in that cannot be imported, has no reader, or one whose name is taken.
    """
    found: dict[str, Reader] = {}
    package = importlib.import_module(__package__)
    modules = [importlib.import_module(f"{__package__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    for module in [*modules, *map(load_plugin, [*installed_plugins(ENTRY_POINTS), *plugins])]:
        readers = [one() for one in subclasses_in(module, Reader)]  # type: ignore[type-abstract]
        if not readers and module not in modules:
            raise PluginError(f"plug-in {module.__file__} defines no subclass of {__name__}.Reader")
        for reader in readers:
            _check_reader(reader, found)
            found[reader.name] = reader
    return tuple(found.values())


def _check_reader(reader: Reader, found: dict[str, Reader]) -> None:
    kind = type(reader)
    where = f"{kind.__module__}.{kind.__qualname__}"
    if missing := [name for name in ("name", "title", "suffixes") if not hasattr(kind, name)]:
        raise PluginError(f"{where} lacks {', '.join(missing)}")
    if isinstance(reader.suffixes, str) or not all(re.fullmatch(r"\.[^A-Z/]+", s) for s in reader.suffixes):
        raise PluginError(f"{where}: suffixes is a tuple such as ('.tsv',), in lower case, not {reader.suffixes!r}")
    if reader.content not in get_args(Content):
        raise PluginError(f"{where}: content is one of {', '.join(get_args(Content))}, not {reader.content!r}")
    if reader.name in found:
        raise PluginError(f"{where}: the name {reader.name!r} is taken by {type(found[reader.name]).__module__}")


def reader_of(path: Path, readers: Sequence[Reader]) -> Reader | None:
    """The reader of a file by suffix and content, plug-ins first; None where no format has the suffix.

    A file that no reader recognises goes to the first with its suffix, whose faults say what is missing.
    """
    having = [reader for reader in readers if path.suffix in reader.suffixes]
    return next((reader for reader in having[::-1] if _recognises(reader, path)), having[0] if having else None)


def in_folder(task: Task, folder: Path, readers: Sequence[Reader]) -> tuple[list[tuple[Path, Reader]], list[str]]:
    """The files of a folder that are meant, each with its reader; and the names of those left aside."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    files = [p for p in files if reader_of(p, readers) is not None]
    by_reader: dict[str, list[Path]] = {}
    for file in files:
        reader = reader_of(file, readers)
        if reader is not None and _recognises(reader, file):
            by_reader.setdefault(reader.name, []).append(file)
    order = sorted(readers, key=lambda reader: get_args(Content).index(reader.content))
    chosen = [(p, reader) for reader in order for p in reader.choose(task, by_reader.get(reader.name, []))]
    return chosen, [p.name for p in files if p not in [path for path, _ in chosen]]


def _recognises(reader: Reader, path: Path) -> bool:
    try:
        return reader.recognise(path)
    except OSError:  # reading says why
        return True


def prefer(files: list[Path], *tests: Callable[[Path], bool]) -> list[Path]:
    """The files that pass the first test that any passes; all, if none passes any."""
    for test in tests:
        if passed := [file for file in files if test(file)]:
            return passed
    return files
