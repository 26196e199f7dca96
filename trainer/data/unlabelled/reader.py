"""Checks of samples to be predicted: those of `egmf prepare`, and that they are such as the model was trained with.

Nothing that grows with the input is held in memory: what must be remembered of earlier samples lies in a temporary database.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from trainer.batch import Sample
from trainer.data.preparation.columns import STREAMS
from trainer.data.preparation.faults import DataError, Fault
from trainer.data.preparation.resampling import Resampling
from trainer.data.preparation.rows import Checker, QuestionsChecker, Row, checker_of, wrong_width
from trainer.data.task_input import TaskInput
from trainer.data.unlabelled.history import SeenSamples
from trainer.data.unlabelled.inputs import askable, rate_faults, usual
from trainer.data.unlabelled.lines import SampleInput, UncheckedSample
from trainer.questions import Questions


@dataclass
class CheckedSample:
    """A sample that was read. `sample` is None where `faults` cost it; `notes` are repairs, and keys that are not used; `tasks`
    are asked of it; `id` is "" where it has none that could be read."""

    where: str
    tasks: tuple[str, ...] = ()
    sample: Sample | None = None
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    id: str = ""


class UnlabelledReader:
    """Iterating gives a :class:`CheckedSample` for every sample of the input that is wanted. Use as a context.

    Args:
        given: the input; one that can be read twice, where a history is needed.
        tasks: name -> what the model reads of it.
        task: of samples that name none, or the dataset of several questions; may be None where there is only one.
        history: previous utterances of the dialogue that a sample gets. All samples of the input that can be read count,
            also later ones, and those whose features are faulty.
        seen: what is remembered of samples before these; it is not closed.
    """

    def __init__(
        self,
        given: SampleInput,
        tasks: Mapping[str, TaskInput],
        *,
        task: str | None = None,
        history: int = 0,
        seen: SeenSamples | None = None,
    ) -> None:
        self._given, self._tasks, self._history = given, tasks, history
        self._task = usual(tasks) if task is None else task
        self._askable = askable(tasks)
        self._checkers = {name: _checker(name, [tasks[one] for one in asked]) for name, asked in self._askable.items()}
        self._stack = contextlib.ExitStack()
        self._before = seen
        self._seen: SeenSamples

    def __enter__(self) -> UnlabelledReader:
        with contextlib.ExitStack() as stack:
            self._seen = self._before or stack.enter_context(contextlib.closing(SeenSamples()))
            stack.enter_context(self._given)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def notes(self) -> list[str]:
        """What the user should see of the whole input."""
        return self._given.notes

    def __iter__(self) -> Iterator[CheckedSample]:
        """Raises DataError where the input, or what is remembered of it on disk, fails."""
        try:
            yield from self._read()
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"the input cannot be read on: {error}") from error

    def _read(self) -> Iterator[CheckedSample]:
        if self._history:
            for sample in self._given.samples():
                if sample.raw is not None:
                    self._seen.remember_utterance(self._data_of(self._task_of(sample)), sample.order, sample.raw)
        for sample in self._given.samples():
            if self._given.wanted(sample):
                yield self._check(sample)

    def _task_of(self, sample: UncheckedSample) -> str | None:
        return self._task if sample.task is None else sample.task

    def _data_of(self, name: str | None) -> str | None:
        """What the dialogues of samples that name this task go by: questions of one dataset have the same."""
        known = self._tasks.get(name or "")
        return name if known is None or known.dataset is None else known.dataset

    def _check(self, given: UncheckedSample) -> CheckedSample:
        name = self._task_of(given) if given.raw is not None else None
        out = CheckedSample(given.where, faults=list(given.faults), notes=list(given.notes))
        if given.raw is None:
            return out
        out.id = given.raw.id.strip()
        out.tasks = self._askable.get(name or "", ())
        if name is None or not out.tasks:
            names = ", ".join(self._tasks)
            out.faults.append(
                f"task {name!r} is none of the run's: {names}" if name else f"names no task, the run has {names}"
            )
            return out
        expected, id = self._tasks[out.tasks[0]], out.id
        for task in out.tasks if id else ():
            if (first := self._seen.first_place(task, id, given.where)) is not None:
                out.faults.append(f"duplicate id ({id!r} is that of {first})")
                break
        out.faults += rate_faults(given.rates, expected)
        row = self._row(given, name, expected, out)
        if row is not None and not out.faults:
            data = self._data_of(name)
            history = self._seen.history(data, given.order, given.raw, self._history) if self._history else []
            out.sample = _sample(row, history)
        return out

    def _row(self, given: UncheckedSample, name: str, expected: TaskInput, out: CheckedSample) -> Row | None:
        raw = given.load(out.faults)
        if raw is None:
            return None
        row, faults = self._checkers[name].check(raw, "")
        if row is not None:
            faults += _fit(row, expected, out.notes)
            if expected.max_rate is not None:
                row.streams = Resampling(expected.max_rate, {**expected.source_rates, **given.rates})(row.streams)
        out.faults += [_describe(fault) for fault in faults if not fault.repair]
        out.notes += [_describe(fault) for fault in faults if fault.repair]
        return row


def _checker(name: str, asked: Sequence[TaskInput]) -> Checker | QuestionsChecker:
    definition = asked[0].task if len(asked) == 1 else Questions(name=name, questions=tuple(one.task for one in asked))
    return checker_of(definition, labelled=False, zero_frames=asked[0].zero_frames)


def _fit(row: Row, expected: TaskInput, notes: list[str]) -> list[Fault]:
    """The faults of streams of another width than the model's; one that it was trained without is left out, with a note."""
    faults = []
    for name in STREAMS:
        stream, width = row.streams[name], expected.widths.get(name) or 0
        if stream is not None and not width:
            row.streams[name] = None
            notes.append(f"{name}: not used, the run's data have none")
        elif stream is not None and stream.values_TF.shape[1] != width:
            faults.append(wrong_width(name, stream.values_TF.shape[1], width, "", row.id, ""))
    return faults


def _describe(fault: Fault) -> str:
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
