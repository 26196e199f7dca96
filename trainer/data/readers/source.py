"""Opening a source: which files are meant, which reader each has, and what they make together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from trainer.data.readers.joined import join
from trainer.data.readers.raw import ALL, SPLITS, RawSample, ReaderError, Source, Table
from trainer.data.readers.registry import ReadContext, Reader, in_folder, known_readers, reader_of
from trainer.features.recipe_record import RecipeRecord, recipe_beside, several_recipes
from trainer.file_kinds import misnamed
from trainer.questions import Definition, Questions, define

Found = dict[str, dict[str, list[Table]]]  # split -> reader's name -> tables


def open_source(
    task: Definition,
    paths: Sequence[Path],
    *,
    labelled: bool = True,
    plugins: Sequence[str] = (),
    check: bool = True,
    fold_column: str | None = None,
    contained: bool = False,
) -> Source:
    """Recognise what lies at `paths` (files, or folders of them) and open it for `task`.

    Of several files of one format in a folder the reader says which are meant. Features and annotations given together are
    aligned. Samples that are not `labelled` may lack label and split (then ""). `plugins` bring further formats. `fold_column` names
    the column of the folds of a cross-validation; the source then has the one split "all". `contained` refuses feature files outside
    the folder of the file that names them.

    Raises:
        ReaderError: nothing readable there, or files that do not fit together, all problems at once.
        PluginError: a plug-in that cannot be used.
    """
    context = replace(_context(task, labelled, check, fold_column), contained=contained)
    source, _ = _open([Path(path) for path in paths], context, tuple(plugins))
    if labelled:
        names = tuple(str(path) for path in paths)
        source.part = partial(_part, task.model_dump_json(), names, tuple(plugins), fold_column)
    return source


def _context(task: Definition, labelled: bool, check: bool, fold_column: str | None) -> ReadContext:
    if not isinstance(task, Questions):
        return ReadContext(task, labelled, check, fold_column)
    first = task.questions[0].model_copy(update={"name": task.name})
    return ReadContext(first, labelled, check, fold_column, questions=task.questions)


def _rows(tables: Sequence[Table], start: int = 0, stop: int | None = None) -> Iterator[RawSample]:
    """Rows `start` to `stop` of `tables`, one after the other."""
    stop = sum(table.n for table in tables) if stop is None else stop
    for table in tables:
        for i in range(max(start, 0), min(stop, table.n)):
            yield table.row(i)
        start, stop = start - table.n, stop - table.n


def _part(
    task: str, paths: tuple[str, ...], plugins: tuple[str, ...], fold_column: str | None, split: str, k: int, n: int
) -> Iterator[RawSample]:
    tables = _reopen(task, paths, plugins, fold_column).get(split, [])
    total = sum(table.n for table in tables)
    return _rows(tables, total * k // n, total * (k + 1) // n)


@lru_cache(maxsize=1)
def _reopen(
    task: str, paths: tuple[str, ...], plugins: tuple[str, ...], fold_column: str | None
) -> dict[str, list[Table]]:
    """The tables of a source that another process has checked; this one keeps them for the parts that follow."""
    definition = define(json.loads(task), saved=True)  # checked before
    context = _context(definition, labelled=True, check=False, fold_column=fold_column)
    return _open([Path(path) for path in paths], context, plugins)[1]


def _open(
    paths: Sequence[Path], context: ReadContext, plugins: tuple[str, ...]
) -> tuple[Source, dict[str, list[Table]]]:
    readers = known_readers(plugins)
    files = _gather(paths, readers, context)
    used = list(dict.fromkeys(files.values()))
    found = _read(files, context)
    name = _name(used, context)
    tables = _combine(found, used, context)
    faults = context.faults
    recipe = _common_recipe(list(files), faults)
    widths = _common_values("features per frame", [t.widths or {} for ts in tables.values() for t in ts], faults)
    rates = _common_values("frames per second", [t.rates for ts in tables.values() for t in ts], faults)
    if not faults and not any(tables.values()):
        faults.append(f"nothing to read: give {_formats(readers)}")
    if faults:
        many = f"{len(faults)} faults" if len(faults) > 1 else "a fault"
        raise ReaderError(f"{context.task.name}: the source cannot be read, {many}", faults)
    source = Source(
        name=name,
        samples=lambda split: _rows(tables.get(split, [])),
        splits=list(tables),
        files=list(files),
        widths={stream: int(width) for stream, width in widths.items()} or None,
        rates={"audio": rates.get("audio"), "video": rates.get("video")},
        notes=context.notes,
        recipe=recipe,
    )
    return source, tables


def _common_recipe(files: Sequence[Path], faults: list[str]) -> RecipeRecord | None:
    """The recipe that is written down beside the files; several, or one of some files only, are a fault with the differences."""
    found: dict[str, RecipeRecord | None] = {}
    for file in files:
        try:
            found.setdefault(str(file.parent), recipe_beside(file))
        except ValueError as error:
            faults.append(str(error))
            found[str(file.parent)] = None
    faults += several_recipes(found)
    return next(iter(found.values()), None)


def _gather(paths: Sequence[Path], readers: Sequence[Reader], context: ReadContext) -> dict[Path, Reader]:
    """The files that are meant, in order, each once, and the reader of each."""
    files: dict[Path, tuple[Path, Reader]] = {}  # by what they resolve to
    for path in paths:
        chosen: list[tuple[Path, Reader]] = []
        if path.is_dir():
            chosen = _in_folder(path, readers, context)
        elif not path.exists():
            context.faults.append(f"{path}: does not exist")
        elif (reader := reader_of(path, readers)) is None:
            context.faults.append(
                f"{path}: is none of {', '.join(dict.fromkeys(s for r in readers for s in r.suffixes))}"
            )
        else:
            chosen = [(path, reader)]
        for file, reader in chosen:
            files.setdefault(file.resolve(), (file, reader))
    return dict(files.values())


def _in_folder(folder: Path, readers: Sequence[Reader], context: ReadContext) -> list[tuple[Path, Reader]]:
    chosen, aside = in_folder(context.task, folder, readers)
    if aside:
        context.notes.append(f"{folder.name}: left aside: {', '.join(aside)}")
    if not chosen:
        rest = f" (left aside: {', '.join(aside)})" if aside else ""
        context.faults.append(f"{folder}: holds no file of a known format: {_formats(readers)}{rest}")
    return chosen


def _formats(readers: Sequence[Reader]) -> str:
    return ", ".join(map(str, readers[:-1])) + f" or {readers[-1]}"


def _read(files: Mapping[Path, Reader], context: ReadContext) -> Found:
    found: Found = {}
    for file, reader in files.items():
        try:
            if (what := misnamed(file)) is not None:
                context.faults.append(f"{file}: {what}")
                continue
            if context.questions and not reader.several_questions:
                context.faults.append(
                    f"{file}: the reader {reader.name} gives one label a sample, and cannot read several questions: prepare a "
                    "dataset for each"
                )
                continue
            tables = reader.read(file, context)
        except OSError as error:
            context.faults.append(f"{file}: cannot be read: {error.strerror or error}")
            continue
        for table in tables:
            if context.fold_column is not None and table.split != ALL:
                context.faults.append(
                    f"{file}: the reader {reader.name} finds no column {context.fold_column!r} of folds: they are read from JSON "
                    "lines and from annotation CSVs"
                )
            elif table.split not in (*SPLITS, ALL) and (context.labelled or table.split):
                context.faults.append(
                    f"{file}: the reader {reader.name} gives a split {table.split!r}, not train, valid or test"
                )
            found.setdefault(table.split, {}).setdefault(reader.name, []).append(table)
    if ALL in found and len(found) > 1:
        others = ", ".join(split for split in found if split != ALL)
        context.faults.append(
            f"some samples have a fold and no split, others belong to {others}: give all samples folds, or all a split"
        )
    return found


def _name(used: Sequence[Reader], context: ReadContext) -> str:
    """What the source is called in the record; formats that cannot be joined are a fault."""
    by_content = {reader.content: reader for reader in used}
    if len(used) == 2 and by_content.keys() == {"features", "annotations"}:
        return f"{by_content['features'].title} with {by_content['annotations'].title}"
    if len(used) > 1:
        names = " and ".join(sorted(reader.name for reader in used))
        context.faults.append(
            f"{names} do not go together: give files of one format, or features and annotations of the same samples"
        )
    return used[0].title if used else ""


def _combine(found: Found, used: Sequence[Reader], context: ReadContext) -> dict[str, list[Table]]:
    """The tables of each split made one sequence: one after the other, or features joined with annotations."""
    out = {}
    for split in (*SPLITS, ALL, ""):
        of_reader = found.get(split, {})
        content = {reader.content: of_reader[reader.name] for reader in used if reader.name in of_reader}
        single = [r.name for r in used if r.one_file_per_split or len(used) > 1]
        repeated = [name for name in single if len(of_reader.get(name, [])) > 1]
        if repeated:
            where = ", ".join(str(table.path) for table in of_reader[repeated[0]])
            context.faults.append(f"{split} stands in several files, name the one you mean: {where}")
        elif "features" in content and "annotations" in content:
            out[split] = join(content["annotations"][0], content["features"][0], context.faults, context.notes)
        elif content:
            if len(used) > 1:
                context.notes.append(f"{split}: has {next(iter(content))} only")
            out[split] = next(iter(content.values()))
            context.faults += [table.lacking for table in out[split] if table.lacking]
    return out


def _common_values(
    what: str, found: list[dict[str, int]] | list[dict[str, float]], faults: list[str]
) -> dict[str, float]:
    """The one value that all tables have; several are a fault."""
    values: dict[str, set[float]] = {}
    for one in found:
        for name, value in one.items():
            values.setdefault(name, set()).add(value)
    for name, several in values.items():
        if len(several) > 1:
            faults.append(f"{name} has several {what}: {', '.join(f'{value:g}' for value in sorted(several))}")
    return {name: next(iter(several)) for name, several in values.items()}
