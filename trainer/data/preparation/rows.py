"""One raw sample -> one checked row, and rows -> Arrow files.

A row's features are flat float32, unpadded; its mask is null where every frame is fine. Every check of a single sample
is here; what needs several samples (ids, widths, empty splits) is in `prepare`. Nothing here imports `datasets`, so that
worker processes start quickly.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from trainer.data.preparation.columns import STREAMS, answer_column
from trainer.data.preparation.faults import Fault
from trainer.data.preparation.frames import FeatureSequence, ZeroFrames, clip_features
from trainer.data.preparation.labels import label_set, label_shares
from trainer.data.preparation.resampling import Resampling
from trainer.data.readers.raw import ALL, RawSample
from trainer.label_sets import encode_set
from trainer.questions import Definition, Questions
from trainer.tasks import Task

FLUSH_BYTES = 32 << 20
FLUSH_ROWS = 4096
TICK = 64  # samples between two reports of progress


class Metadata(NamedTuple):
    """What a sample may say of itself beside its content."""

    speaker: str | None
    dialogue: str | None
    turn: int | None
    kind: str | None
    language: str | None


class Answer(NamedTuple):
    """A sample's answer to one question: as a word (of labels), as a number, and the shares of annotators, if they disagree."""

    label: str | None
    target: float
    share_C: list[float] | None


@dataclass
class Row:
    """A checked sample. Where it has several questions, `answers` has those that it answers, and `target` is nan."""

    id: str
    text: str
    target: float
    label: str | None
    streams: dict[str, FeatureSequence | None]
    metadata: Metadata
    fold: str | None = None  # of a cross-validation; then the sample belongs to no split
    share_C: list[float] | None = None  # of the annotators that gave each label
    answers: dict[str, Answer] | None = None

    def digest(self) -> bytes:
        """sha256 over the row's content, the same on every machine."""
        head: list[Any] = [self.id, self.text, float(self.target).hex(), self.label, *self.metadata]
        head += [] if self.fold is None else [self.fold]
        head += [] if self.share_C is None else [[share.hex() for share in self.share_C]]
        for name, answer in sorted((self.answers or {}).items()):
            head.append([name, answer.label, answer.target.hex(), [share.hex() for share in answer.share_C or ()]])
        out = hashlib.sha256(json.dumps(head, ensure_ascii=True).encode())
        for name in STREAMS:
            stream = self.streams[name]
            if stream is None:
                out.update(b"-")
                continue
            out.update(json.dumps(stream.values_TF.shape).encode())
            out.update(np.ascontiguousarray(stream.values_TF, dtype="<f4").data)
            out.update(b"" if stream.mask_T is None else np.packbits(stream.mask_T).tobytes())
        return out.digest()


class Seen(NamedTuple):
    """What remains in memory of a sample. Without `digest` it was faulty and not written."""

    id: str
    where: str
    digest: bytes | None = None
    label: str | None = None
    target: float = 0.0
    characters: int = 0
    frames: tuple[int, int] = (0, 0)
    widths: tuple[int, int] = (0, 0)
    masked: tuple[int, int] = (0, 0)
    padding: tuple[int, int] = (0, 0)
    fold: str | None = None
    dialogue: str | None = None
    shared: bool = False  # whether annotators disagree
    answers: Mapping[str, tuple[float, bool]] | None = None  # of several questions: target and shared


@dataclass
class Shard:
    """A part of a split: its Arrow file holds the samples of `seen` that have a digest, in order."""

    split: str
    path: Path
    seen: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


class Checker:
    """Checks single samples of a task. Those that are not `labelled` have no label and nan for a target."""

    def __init__(self, task: Task, *, labelled: bool = True, zero_frames: ZeroFrames = "mask") -> None:
        self.task, self.labelled, self.zero_frames = task, labelled, zero_frames
        self._index = {label: i for i, label in enumerate(task.labels)}
        self._folded: dict[str, list[int]] = {}
        for label, i in self._index.items():
            self._folded.setdefault(label.casefold(), []).append(i)

    def check(self, raw: RawSample, split: str) -> tuple[Row | None, list[Fault]]:
        """The row, or None where a fault has no right repair; and the faults, repaired ones too."""
        faults: list[Fault] = []
        name = raw.id.strip() if isinstance(raw.id, str) else ""

        def fault(kind: str, detail: str = "", repair: str = "") -> None:
            faults.append(Fault(kind, split, _printable(name), raw.where, detail, repair))

        if not name:
            fault("no id")
        text = raw.text.strip() if isinstance(raw.text, str) else ""
        turn = raw.turn
        if turn is not None and not isinstance(turn, numbers.Integral):
            fault("turn that is no whole number", repr(turn)[:40])
        elif turn is not None and not -(2**63) <= int(turn) < 2**63:
            fault("turn beyond 64 bits")
        elif turn is not None:
            turn = int(turn)
        metadata = Metadata(raw.speaker, raw.dialogue, turn, raw.kind, raw.language)
        fold = raw.fold if split == ALL else None
        if split == ALL and not fold:
            fault("no fold")
        if raw.language is not None:
            self.check_language(raw.language, fault)
        if any(isinstance(s, str) and not _unicode(s) for s in (name, text, fold, *metadata)):
            fault("text that is no Unicode (a lone surrogate)")
        label, target, share_C = self.answer(raw, fault) if self.labelled else (None, math.nan, None)
        streams = {
            "audio": clip_features("audio", raw.audio, raw.audio_length, fault, self.zero_frames),
            "video": clip_features("video", raw.video, raw.video_length, fault, self.zero_frames),
        }
        if not text and not any(streams.values()):
            fault("no text, audio or video")
        if not all(f.repair for f in faults):
            return None, faults
        return Row(name, text, target, label, streams, metadata, fold, share_C), faults

    def check_language(self, language: str, fault: Callable[..., None]) -> None:
        """A fault where the task has no prompt in a sample's language."""
        if language not in self.task.prompts:
            known = ", ".join(self.task.prompts)
            fault("language without a prompt in the task", f"{language!r}; the task has {known}")

    def answer(self, raw: RawSample, fault: Callable[..., None]) -> tuple[str | None, float, list[float] | None]:
        """The label as a word, the target, and the shares of all labels where annotators disagree."""
        if self.task.grid is not None:
            return None, self._rate(raw, fault), None
        if self.task.kind == "multilabel":
            members = label_set(raw.label, self.task.labels, self._classify, fault)
            target = math.nan if members is None else encode_set(members)
            return None if members is None else str(self.task.word(target)), target, None
        if isinstance(raw.label, (Mapping, list, tuple)):
            share_C = label_shares(raw.label, self.task.labels, self._classify, fault)
            if share_C is None:
                return None, math.nan, None
            index = max(range(len(share_C)), key=lambda i: (share_C[i], -i))
            return self.task.labels[index], float(index), share_C if share_C[index] < 1 else None
        index_or_none = self._classify(raw.label, fault)
        return (
            (None, math.nan, None)
            if index_or_none is None
            else (self.task.labels[index_or_none], float(index_or_none), None)
        )

    def _classify(self, label: Any, fault: Callable[..., None]) -> int | None:
        """The index of a label."""
        word = "" if label is None or (isinstance(label, float) and math.isnan(label)) else str(label).strip()
        if not word:
            fault("no label")
            return None
        index = self._index.get(word)
        if index is None:
            alike = self._folded.get(word.casefold(), [])
            if len(alike) != 1:
                near = difflib.get_close_matches(word.casefold(), list(self._folded), n=1)
                hint = f" (did you mean {self.task.labels[self._folded[near[0]][0]]}?)" if near else ""
                if word.isdecimal() and not any(map(str.isdecimal, self.task.labels)):
                    hint = f" (a number, but labels are words: write {self.task.labels[0]!r} or another, or have the task list {word!r})"
                fault("unknown label", f"{_printable(word)!r}{hint}")
                return None
            index = alike[0]
            fault("label in another case", f"{word!r}", f"read as {self.task.labels[index]!r}")
        return index

    def _rate(self, raw: RawSample, fault: Callable[..., None]) -> float:
        grid = self.task.grid
        assert grid is not None
        if raw.label is None or (isinstance(raw.label, str) and not raw.label):
            fault("no label")
            return math.nan
        value = _number(raw.label)
        if value is None:
            several = ": several targets of one sample are questions of one task file (docs/data.md)"
            fault("label that is no number", repr(raw.label)[:40] + (several if isinstance(raw.label, Mapping) else ""))
        elif not math.isfinite(value):
            fault("label that is nan or inf")
        elif not grid.low - 1e-6 <= value <= grid.high + 1e-6:
            fault("out-of-range value", f"{value:g} is outside {grid.low:g} to {grid.high:g}")
        return math.nan if value is None else value


class QuestionsChecker:
    """Checks samples of which several questions are asked; as :class:`Checker`. A fault of an answer names its question."""

    def __init__(self, questions: Questions, *, labelled: bool = True, zero_frames: ZeroFrames = "mask") -> None:
        self._labelled = labelled
        self._content = Checker(questions.questions[0], labelled=False, zero_frames=zero_frames)
        self._checkers = [Checker(task, labelled=labelled) for task in questions.questions]

    def check(self, raw: RawSample, split: str) -> tuple[Row | None, list[Fault]]:
        """The row with the answers of its questions, or None where a fault has no right repair; and the faults."""
        row, faults = self._content.check(raw, split)
        name = raw.id.strip() if isinstance(raw.id, str) else ""
        answers: dict[str, Answer] = {}
        asked = 0
        for checker in self._checkers:
            question = checker.task.name

            def fault(kind: str, detail: str = "", repair: str = "", question: str = question) -> None:
                faults.append(Fault(f"{question}: {kind}", split, _printable(name), raw.where, detail, repair))

            if raw.language is not None and checker is not self._checkers[0]:
                checker.check_language(raw.language, fault)
            given = (raw.answers or {}).get(question)
            if self._labelled and not _is_absent(given, checker.task):
                asked += 1
                answers[question] = Answer(*checker.answer(replace(raw, label=given), fault))
        if self._labelled and not asked:
            names = ", ".join(checker.task.name for checker in self._checkers)
            faults.append(Fault("no label", split, _printable(name), raw.where, f"no answer to any of {names}"))
        if row is None or not all(f.repair for f in faults):
            return None, faults
        return replace(row, answers=answers), faults


def checker_of(
    definition: Definition, *, labelled: bool = True, zero_frames: ZeroFrames = "mask"
) -> Checker | QuestionsChecker:
    """The checker of one question or of several."""
    if isinstance(definition, Questions):
        return QuestionsChecker(definition, labelled=labelled, zero_frames=zero_frames)
    return Checker(definition, labelled=labelled, zero_frames=zero_frames)


def _is_absent(given: Any, task: Task) -> bool:
    """Whether a sample does not answer a question. An empty set of labels is an answer of a multi-label task."""
    if isinstance(given, (list, tuple, Mapping)):
        return not given and task.kind != "multilabel"
    return given is None or (isinstance(given, str) and not given.strip()) or given != given


def wrong_width(name: str, found: int, width: int, split: str, id: str, where: str) -> Fault:
    """The fault of a sample whose `name` stream has `found` features a frame where the dataset has `width`."""
    return Fault(f"wrong dimension of {name}", split, id, where, f"{found} features per frame instead of {width}")


def _number(label: Any) -> float | None:
    if isinstance(label, bool) or not isinstance(label, (str, numbers.Real)):
        return None
    try:
        return float(label)
    except ValueError:
        return None


def _unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text if _unicode(text) else text.encode(errors="backslashreplace").decode()


def convert(
    samples: Iterable[RawSample],
    task: Definition,
    split: str,
    path: Path,
    schema: pa.Schema,
    tick: Callable[[int], None] = lambda done: None,
    zero_frames: ZeroFrames = "mask",
    resampling: Resampling | None = None,
) -> Shard:
    """Check `samples` and write the good ones to the Arrow file `path`; memory holds one batch of rows.

    Raises:
        DataError: a stream that cannot be resampled.
    """
    checker, shard = checker_of(task, zero_frames=zero_frames), Shard(split, path)
    with RowWriter(path, schema) as writer:
        for raw in samples:
            row, faults = checker.check(raw, split)
            shard.faults += faults
            if row is None:
                name = raw.id.strip() if isinstance(raw.id, str) else ""
                shard.seen.append(Seen(name, raw.where))
            else:
                if resampling is not None:
                    row = replace(row, streams=resampling(row.streams))
                writer.write(row)
                shard.seen.append(_seen(row, raw.where))
            if len(shard.seen) % TICK == 0:
                tick(len(shard.seen))
    tick(len(shard.seen))
    return shard


def convert_shard(
    read: Callable[[str, int, int], Iterator[RawSample]],
    task: Definition,
    split: str,
    place: tuple[int, int],
    path: Path,
    schema: pa.Schema,
    zero_frames: ZeroFrames = "mask",
    resampling: Resampling | None = None,
) -> Shard:
    """:func:`convert` of the k-th of n parts, `place` = (k, n), for a worker process."""
    return convert(read(split, *place), task, split, path, schema, zero_frames=zero_frames, resampling=resampling)


def keep(shard: Shard, wanted: list[bool], schema: pa.Schema) -> None:
    """Rewrite a shard's file with the rows that are `wanted` (one flag per row of the file)."""
    fresh = shard.path.with_suffix(".kept")
    flags, start = np.asarray(wanted, dtype=bool), 0
    with pa.memory_map(str(shard.path)) as source, pa.ipc.new_stream(str(fresh), schema) as sink:
        for batch in pa.ipc.open_stream(source):
            sink.write_batch(batch.filter(pa.array(flags[start : start + len(batch)])))
            start += len(batch)
    fresh.replace(shard.path)


class RowWriter:
    """Writes rows to an Arrow stream file in record batches of bounded size."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._sink = pa.ipc.new_stream(str(path), schema)
        self._rows: list[Row] = []
        self._bytes = 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._sink.close()

    def write(self, row: Row) -> None:
        self._rows.append(row)
        self._bytes += sum(s.values_TF.nbytes for s in row.streams.values() if s is not None)
        if self._bytes >= FLUSH_BYTES or len(self._rows) >= FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._sink.write_batch(_batch(self._rows, self._schema))
        self._rows, self._bytes = [], 0


def _batch(rows: list[Row], schema: pa.Schema) -> pa.RecordBatch:
    columns: dict[str, list[Any] | pa.Array] = {
        name: [getattr(row.metadata, name) for row in rows] for name in Metadata._fields
    }
    columns.update({name: [getattr(row, name) for row in rows] for name in ("id", "text", "label", "target", "fold")})
    columns["shares"] = [row.share_C for row in rows]
    for name in {name for row in rows for name in row.answers or ()}:
        found = [(row.answers or {}).get(name) for row in rows]
        columns[answer_column("label", name)] = [None if one is None else one.label for one in found]
        columns[answer_column("target", name)] = [None if one is None else one.target for one in found]
        columns[answer_column("shares", name)] = [None if one is None else one.share_C for one in found]
    for name in STREAMS:
        streams = [row.streams[name] for row in rows]
        columns[name] = _lists([None if s is None else s.values_TF.reshape(-1) for s in streams], pa.float32())
        columns[f"{name}_mask"] = _lists([None if s is None else s.mask_T for s in streams], pa.bool_())
        columns[f"{name}_frames"] = [0 if s is None else len(s.values_TF) for s in streams]
    nothing = [None] * len(rows)  # of a question that no sample of the batch answers
    arrays = [
        column if isinstance(column := columns.get(f.name, nothing), pa.Array) else pa.array(column, f.type)
        for f in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _lists(values: list[np.ndarray | None], kind: pa.DataType) -> pa.ListArray:
    """A list array from one copy of all values, null where None."""
    missing = np.array([v is None for v in values])
    offsets = np.cumsum([0, *(0 if v is None else len(v) for v in values)])
    present = [v for v in values if v is not None]
    flat = np.concatenate(present) if present else np.empty(0, dtype=np.float32)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(flat, kind), mask=pa.array(missing) if missing.any() else None
    )


def _seen(row: Row, where: str) -> Seen:
    audio, video = (row.streams[name] for name in STREAMS)
    return Seen(
        row.id,
        where,
        row.digest(),
        row.label,
        row.target,
        len(row.text),
        (_size(audio, 0), _size(video, 0)),
        (_size(audio, 1), _size(video, 1)),
        (_masked(audio), _masked(video)),
        (_padding(audio), _padding(video)),
        row.fold,
        row.metadata.dialogue,
        row.share_C is not None,
        None
        if row.answers is None
        else {name: (one.target, one.share_C is not None) for name, one in row.answers.items()},
    )


def _size(stream: FeatureSequence | None, axis: int) -> int:
    return 0 if stream is None else int(stream.values_TF.shape[axis])


def _padding(stream: FeatureSequence | None) -> int:
    return 0 if stream is None else stream.padding


def _masked(stream: FeatureSequence | None) -> int:
    return 0 if stream is None or stream.mask_T is None else int((~stream.mask_T).sum())
