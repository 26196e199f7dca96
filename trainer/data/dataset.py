"""Opening a prepared dataset: memory-mapped, with features as views of the map, and histories of conversations.

Shapes: T frames, F features of a frame.
"""

from __future__ import annotations

import bisect
import difflib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.conversations import Conversations
from trainer.data.folds import FoldChoice, assign_folds, find_fold
from trainer.data.preparation.columns import STREAMS, answer_column
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.feature_statistics import Standardise, check_statistics, measure_frames, standardisations
from trainer.data.preparation.folder import FORMAT, RECORD, read_record
from trainer.data.preparation.frames import ZeroFrames
from trainer.data.preparation.record import DatasetRecord
from trainer.data.readers.raw import ALL
from trainer.files import load_json
from trainer.questions import Questions, define, questions_of
from trainer.tasks import Task, TaskError

if TYPE_CHECKING:  # it imports torch, which whoever reads whole samples has
    from trainer.batch import Sample, Standardisation

_ALIASES = {"dev": "valid", "val": "valid", "validation": "valid", "training": "train", "testing": "test"}


def open_dataset(
    path: str | Path, *, history: int = 0, choice: FoldChoice | None = None, question: str | None = None
) -> PreparedDataset:
    """Open what :func:`trainer.data.preparation.prepare.prepare` wrote; features stay on disk until they are read.

    Args:
        path: the folder.
        history: how many previous utterances of the conversation each sample gets.
        choice: the fold that is tested, of a dataset whose samples have folds; without one it has the split "all" only.
        question: the one of several that is asked; see :meth:`PreparedDataset.asking`.

    Raises:
        DataError: not a prepared dataset, one of a newer format, a damaged one, or one without the chosen fold or question.
    """
    opened = PreparedDataset(Path(path), history, choice)
    return opened if question is None else opened.asking(question)


class PreparedDataset:
    """A prepared dataset; ``dataset["train"]`` is a :class:`SplitView`. Pickling keeps the path and opens it again.

    `tasks` are its questions by name. Where there are several, :meth:`asking` gives the dataset of one; before that, samples have
    no target. `question` is the name of that one, and None of a dataset that has no other.

    `folds` are the names of its folds, if it has some, and `fold` that of the one that was chosen for test.
    """

    def __init__(self, path: Path, history: int = 0, choice: FoldChoice | None = None) -> None:
        if history < 0:
            raise DataError(f"history must be 0 or more, not {history}")
        self.path = path.resolve()
        self.history, self.choice = history, choice
        self.record = _checked_record(path)
        try:
            self.definition = define(self.record["task"], where=f"{path}/{RECORD}", saved=True)
            self.tasks: dict[str, Task] = {task.name: task for task in questions_of(self.definition)}
            self.question: str | None = None
            self._all: PreparedDataset | None = None
            self.fingerprint = str(self.record["fingerprint"])
            self.widths: dict[str, int] = {name: int(self.record["widths"][name]) for name in STREAMS}
            self.rates: dict[str, float | None] = {name: self.record["rates"][name] for name in STREAMS}
            self.zero_frames: ZeroFrames = "mask" if self.record.get("zero_frames") == "mask" else "keep"
            self.max_rate: float | None = self.record.get("max_rate")
            self.source_rates: dict[str, float | None] = self.record.get("source_rates", self.rates)
            if (statistics := self.record.get("standardisation")) is not None:
                check_statistics(statistics, self.widths)
            self.splits: list[str] = list(self.record["splits"])
            sizes = self.record["files"]
            self._views = {split: SplitView(self, split, _map(self.path, split, sizes)) for split in self.splits}
        except (TaskError, pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, TypeError)) else str(error)
            raise DataError(f"{path} is damaged ({reason}): prepare it again") from error
        self.folds: list[str] = list(self.record.get("folds", []))
        self.fold: str | None = None
        if choice is not None:
            self._cut(choice)

    def _cut(self, choice: FoldChoice) -> None:
        """Replace the view of all samples by those of the splits that follow from the choice of a fold."""
        if not self.folds:
            raise DataError(
                f"{self.path} has no folds, but the run names one (data.fold={choice.fold}): leave data.fold out, or prepare "
                "the dataset from samples with a fold (docs/data.md)"
            )
        whole = self._views.pop(ALL)
        try:
            self.fold = find_fold(choice.fold, self.folds)
            rows = assign_folds(choice, whole.folds(), whole.dialogues(), whole.speakers())
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from error
        self._views.update({split: FoldView(self, split, whole, of_split) for split, of_split in rows.items()})
        self.splits = list(self._views)

    @property
    def task(self) -> Task:
        """The question that is asked.

        Raises:
            DataError: there are several, and none was chosen.
        """
        if self.question is not None:
            return self.tasks[self.question]
        if len(self.tasks) > 1:
            raise DataError(f"{self.path} has the questions {', '.join(self.tasks)}: name the one that is meant")
        return next(iter(self.tasks.values()))

    @property
    def name(self) -> str:
        """The task's, or that of all questions."""
        return self.definition.name

    def asking(self, question: str) -> PreparedDataset:
        """The same dataset with the samples that answer one of its questions. Histories and standardisation stay those of all.

        Raises:
            DataError: it has no such question.
        """
        if question not in self.tasks:
            near = difflib.get_close_matches(question, self.tasks, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise DataError(f"{self.path} has no question {question!r}{hint}; it has {', '.join(self.tasks)}")
        if not isinstance(self.definition, Questions):
            return self
        out = PreparedDataset.__new__(PreparedDataset)  # a copy would open the files again
        vars(out).update(vars(self))
        out.question, out._all = question, self._all or self
        out._views = {split: QuestionView(out, split, view) for split, view in out._all._views.items()}
        return out

    @cached_property
    def standardisation(self) -> dict[str, Standardisation]:
        """Modality -> how its features are standardised; empty where they are not.

        Of a dataset with folds, measured over the frames of the training samples that follow from the choice of a fold.
        """
        if self._all is not None:
            return self._all.standardisation
        entry = self.record.get("standardisation")
        if self.fold is None or entry is None:
            return standardisations(entry, self.widths)
        train = self._views["train"]
        measured = measure_frames(train.valid_frames, self.widths, cast(Standardise, entry["mode"]))
        return standardisations(measured, self.widths)

    @property
    def measured(self) -> bool:
        """Whether the version that prepared the dataset knew statistics of features."""
        return "standardisation" in self.record

    def __getitem__(self, split: str) -> SplitView:
        if split not in self._views:
            if self.folds and self.choice is None and split != ALL:
                raise DataError(
                    f"{self.path} has folds ({', '.join(self.folds)}) and no split {split!r}: choose the fold that is tested, such as "
                    f"data.fold={self.folds[0]}; egmf sweep CONFIG --folds trains one run for each"
                )
            near = _ALIASES.get(split) or next(iter(difflib.get_close_matches(split, self.splits, n=1)), None)
            hint = f"; did you mean {near}?" if near in self._views else "."
            raise DataError(f"{self.path} has no split {split!r}{hint} It has {', '.join(self.splits)}")
        return self._views[split]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self.origin

    @property
    def origin(self) -> tuple[Any, ...]:
        """What :func:`_reopen` needs to open it again."""
        return self.path, self.history, self.fingerprint, self.choice, self.question


class SplitView:
    """The samples of one split, in the published order. Pickling keeps the path and opens it again."""

    def __init__(self, dataset: PreparedDataset, split: str, batches: list[pa.RecordBatch]) -> None:
        self._describe(dataset, split)
        self._batches = batches
        self._starts = [0, *np.cumsum([len(b) for b in batches]).tolist()]
        self._columns = [{name: batch.column(name) for name in batch.schema.names} for batch in batches]
        self._frames = {name: self._array(f"{name}_frames", np.int64) for name in STREAMS}
        self._values = {
            name: [(_numbers(columns[name].values), _numbers(columns[name].offsets)) for columns in self._columns]
            for name in STREAMS
        }
        self._check(dataset.record["splits"][split]["n"])

    def _describe(self, dataset: PreparedDataset, split: str) -> None:
        self.split, self._dataset = split, dataset
        self.widths, self.rates = dataset.widths, dataset.rates
        self._origin = dataset.origin

    @property
    def task(self) -> Task:
        """The question; raises as :attr:`PreparedDataset.task`."""
        return self._dataset.task

    def _check(self, n: int) -> None:
        if len(self) != n:
            raise ValueError(f"{self.split} has {len(self)} rows, its record says {n}")
        for name in STREAMS:
            for (values, offsets), start, stop in zip(self._values[name], self._starts, self._starts[1:], strict=False):
                frames = int(self._frames[name][start:stop].sum())
                if int(offsets[-1]) - int(offsets[0]) != frames * self.widths[name] or int(offsets[-1]) > len(values):
                    raise ValueError(
                        f"{self.split}: the {name} features are not {frames} frames of {self.widths[name]}"
                    )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Sample:
        """Sample `i`; its arrays are read-only views of the file."""
        from trainer.batch import Sample

        i = int(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        b = bisect.bisect_right(self._starts, i) - 1
        j, columns = i - self._starts[b], self._columns[b]
        audio, video = (self.stream(name, i) for name in STREAMS)
        return Sample(
            id=columns["id"][j].as_py(),
            text=columns["text"][j].as_py(),
            target=columns["target"][j].as_py() if "target" in columns else math.nan,
            audio_TF=audio[0],
            video_TF=video[0],
            audio_mask_T=audio[1],
            video_mask_T=video[1],
            speaker=columns["speaker"][j].as_py(),
            dialogue=columns["dialogue"][j].as_py(),
            turn=columns["turn"][j].as_py(),
            kind=columns["kind"][j].as_py(),
            share_C=_share(columns["shares"][j])
            if "shares" in columns
            else None,  # earlier versions had no such column
            history=self._history(i),
        )

    def stream(self, name: str, i: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """ "audio" or "video" of sample `i`, [T, F] and mask [T], as a :class:`trainer.batch.Sample` has them."""
        frames = int(self._frames[name][i])
        if not frames:
            return None, None
        b = bisect.bisect_right(self._starts, i) - 1
        j = i - self._starts[b]
        values, offsets = self._values[name][b]
        values_TF = values[offsets[j] : offsets[j + 1]].reshape(frames, self.widths[name])
        mask = self._columns[b][f"{name}_mask"][j]
        return values_TF, mask.values.to_numpy(zero_copy_only=False) if mask.is_valid else None

    def shares(self) -> list[list[float] | None]:
        """The shares of annotators that gave each label, of each sample; None where all gave one."""
        return self._list("shares") if self.shared else [None] * len(self)

    @cached_property
    def shared(self) -> bool:
        """Whether annotators disagree on some sample, whose target is then shares of the labels."""
        return self._filled("shares")

    def _filled(self, name: str) -> bool:
        """Whether a column is there and has any value."""
        return any(name in columns and columns[name].null_count < len(columns[name]) for columns in self._columns)

    @cached_property
    def ids(self) -> list[str]:
        return self._list("id")

    def lengths(self) -> np.ndarray:
        """A length per sample for putting like with like: characters of text + frames of audio and video."""
        return np.asarray(self._characters() + self._frames["audio"] + self._frames["video"])

    def frames(self, name: str) -> np.ndarray:
        """Frames of "audio" or "video" of every sample."""
        return self._frames[name]

    def valid_frames(self, name: str) -> Iterator[np.ndarray]:
        """The frames [T, F] of "audio" or "video" that are not masked, sample by sample."""
        for i in range(len(self)):
            values_TF, mask_T = self.stream(name, i)
            if values_TF is not None:
                yield values_TF if mask_T is None else values_TF[mask_T]

    def longest(self, n: int) -> list[int]:
        """`n` samples (all, if fewer), the longest text, audio and video among them: padded, the largest batch of `n`."""
        chosen: dict[int, None] = {}
        orders = [np.argsort(-x, kind="stable") for x in (self._characters(), *self._frames.values(), self.lengths())]
        for order in orders[:-1]:
            chosen.update(dict.fromkeys(order[:1].tolist()))
        chosen.update(dict.fromkeys(orders[-1][: n + len(chosen)].tolist()))
        return list(chosen)[:n]

    def _characters(self) -> np.ndarray:
        counts = [_numbers(pc.utf8_length(columns["text"])) for columns in self._columns]
        return _join(counts, np.int64)

    def targets(self) -> np.ndarray:
        """The label's index or the number as published, float64, one per sample."""
        return self._array("target", np.float64)

    def kinds(self) -> list[str | None] | None:
        """The kind of each sample, or None where the data has none."""
        kinds = self._list("kind")
        return kinds if any(kind is not None for kind in kinds) else None

    def texts(self) -> Iterator[str]:
        """The texts alone, in order."""
        return (text for columns in self._columns for text in columns["text"].to_pylist())

    def folds(self) -> np.ndarray:
        """The fold of each sample, where the dataset has folds."""
        return np.array(self._list("fold"), dtype=object)

    def dialogues(self) -> list[str | None]:
        """The dialogue of each sample."""
        return self._list("dialogue")

    def speakers(self) -> list[str | None]:
        """The speaker of each sample."""
        return self._list("speaker")

    def _list(self, name: str) -> list[Any]:
        return [value for columns in self._columns for value in columns[name].to_pylist()]

    def _array(self, name: str, dtype: Any) -> np.ndarray:
        return _join([_numbers(columns[name]) for columns in self._columns], dtype)

    def _history(self, i: int) -> list[tuple[str, str]]:
        limit = self._origin[1]
        if not limit or self._conversations is None:
            return []
        before = self._conversations.before(i, limit)
        return [(self._speakers[k] or "", self._texts[k]) for k in before]

    @cached_property
    def _texts(self) -> list[str]:
        return list(self.texts())

    @cached_property
    def _speakers(self) -> list[str | None]:
        return self._list("speaker")

    @cached_property
    def _conversations(self) -> Conversations | None:
        dialogues = self._list("dialogue")
        if all(name is None for name in dialogues):
            return None
        return Conversations(dialogues, self._list("turn"))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen_split, (self.split, *self._origin)


class RowsView(SplitView):
    """The samples `rows` of another view, in its order; their histories are those of that view."""

    def __init__(self, dataset: PreparedDataset, split: str, whole: SplitView, rows: np.ndarray) -> None:
        self._describe(dataset, split)
        self._whole, self._rows = whole, rows
        self._starts = [0, len(rows)]
        self._frames = {name: whole.frames(name)[rows] for name in STREAMS}

    def __getitem__(self, i: int) -> Sample:
        i = int(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self._changed(self._whole[int(self._rows[i])], i % len(self))

    def _changed(self, sample: Sample, i: int) -> Sample:
        """Sample `i` from the one that the other view has."""
        return sample

    def stream(self, name: str, i: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        return self._whole.stream(name, int(self._rows[i]))

    @cached_property
    def shared(self) -> bool:
        return self._filled("shares") and any(share is not None for share in self._list("shares"))

    def _filled(self, name: str) -> bool:
        return self._whole._filled(name)

    def texts(self) -> Iterator[str]:
        return iter(self._list("text"))

    def _characters(self) -> np.ndarray:
        return np.asarray(self._whole._characters()[self._rows])

    def _list(self, name: str) -> list[Any]:
        values = self._whole._list(name)
        return [values[k] for k in self._rows]

    def _array(self, name: str, dtype: Any) -> np.ndarray:
        return np.asarray(self._whole._array(name, dtype)[self._rows])


class FoldView(RowsView):
    """The samples `rows` of a dataset with folds, in the published order; histories hold samples of the view alone."""

    def _changed(self, sample: Sample, i: int) -> Sample:
        return replace(sample, history=self._history(i))


class QuestionView(RowsView):
    """The samples that answer `dataset.question`, one of several, with that answer; the others count in histories alone."""

    def __init__(self, dataset: PreparedDataset, split: str, whole: SplitView) -> None:
        self._own = {name: answer_column(name, dataset.task.name) for name in ("label", "target", "shares")}
        answered = whole._array(self._own["target"], np.float64)
        super().__init__(dataset, split, whole, np.flatnonzero(~np.isnan(answered)))
        self._target_N = answered[self._rows]

    def _changed(self, sample: Sample, i: int) -> Sample:
        share_C = (
            None if self._shares is None or self._shares[i] is None else np.array(self._shares[i], dtype=np.float32)
        )
        return replace(sample, target=float(self._target_N[i]), share_C=share_C)

    @cached_property
    def _shares(self) -> list[list[float] | None] | None:
        return self._list("shares") if self.shared else None

    def _filled(self, name: str) -> bool:
        return super()._filled(self._own.get(name, name))

    def _list(self, name: str) -> list[Any]:
        return super()._list(self._own.get(name, name))

    def _array(self, name: str, dtype: Any) -> np.ndarray:
        return super()._array(self._own.get(name, name), dtype)


def _checked_record(path: Path) -> DatasetRecord:
    record = read_record(path)
    if record is None:
        inside = sorted(p.parent.name for p in path.glob(f"*/{RECORD}")) if path.is_dir() else []
        hint = f"; the folder holds the prepared datasets {', '.join(inside)}" if inside else ""
        state = "no such folder" if not path.exists() else f"it has no {RECORD} that egmf wrote"
        if path.is_dir() and (path / RECORD).exists():
            state = f"its {RECORD} is damaged: remove the folder first"
        raise DataError(
            f"{path} is not a prepared dataset ({state}){hint}: make one with egmf prepare TASK --out {path}"
        )
    if not isinstance(record["format"], int) or record["format"] > FORMAT:
        raise DataError(
            f"{path} has format {record['format']}, newer than this version's {FORMAT}: update egmf-trainer"
        )
    return record


def _map(path: Path, split: str, sizes: dict[str, int]) -> list[pa.RecordBatch]:
    """The record batches of a split, memory-mapped; reads only their descriptions."""
    state = load_json((path / split / "state.json").read_text(encoding="utf-8"))
    batches: list[pa.RecordBatch] = []
    for name in (entry["filename"] for entry in state["_data_files"]):
        file = path / split / name
        size, expected = file.stat().st_size, sizes[f"{split}/{name}"]
        if size != expected:
            raise ValueError(f"{split}/{name} has {size} bytes instead of {expected}")
        with pa.ipc.open_stream(pa.memory_map(str(file))) as reader:
            batches += [batch for batch in reader if len(batch)]
    return batches


def _numbers(column: pa.Array) -> np.ndarray:
    """The numbers of a column, a view of them where none is null: pyarrow's own ``to_numpy`` imports pandas."""
    return column.to_numpy(zero_copy_only=False) if column.null_count else np.from_dlpack(column)


def _share(cell: pa.ListScalar) -> np.ndarray | None:
    return np.asarray(cell.values.to_numpy(zero_copy_only=False)) if cell.is_valid else None


def _join(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype=dtype)


def _reopen(
    path: Path, history: int, fingerprint: str, choice: FoldChoice | None, question: str | None
) -> PreparedDataset:
    dataset = open_dataset(path, history=history, choice=choice, question=question)
    if dataset.fingerprint != fingerprint:
        raise DataError(f"{path} was replaced by another dataset while it was in use")
    return dataset


def _reopen_split(split: str, *origin: Any) -> SplitView:
    return _reopen(*origin)[split]
