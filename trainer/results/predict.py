"""Predictions for samples without labels: any known format in, JSON lines out, in chunks of bounded memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from trainer.answers.prediction_table import SampleAnswer
from trainer.data.unlabelled.clips import ClipSettings
from trainer.data.unlabelled.inputs import PredictError, askable, open_input
from trainer.data.unlabelled.reader import CheckedSample, UnlabelledReader
from trainer.files import new_file
from trainer.results.answering import Answering, chunks
from trainer.run.model_parts import OpenedModel
from trainer.termination import exit_on_termination

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is asked: `task` of samples that name none, or the dataset of several questions; the only `split` to be answered, of those the input has; whether
    probabilities and gate weights are wanted; `plugins` with readers of further formats; `contained`, whether feature files and clips must lie in the folder of the input;
    `clips`, how these are extracted."""

    task: str | None = None
    probabilities: bool = False
    gates: bool = False
    split: str | None = None
    plugins: tuple[str, ...] = ()
    contained: bool = False
    clips: ClipSettings = field(default_factory=ClipSettings)


@dataclass
class Tally:
    """How many samples were answered and left out."""

    answered: int = 0
    bad: int = 0


def predict(
    run: OpenedModel,
    sources: Sequence[Path] | BinaryIO,
    out: Path | int,
    options: Options,
    *,
    report: Callable[[str], None],
    advance: Callable[[int], None] = lambda n: None,
    folder: Path = Path(),
) -> Tally:
    """Answer every good sample of `sources` and write one line each to `out`, in the order of the input; of several questions
    about the same samples, a line for each question. Clips are extracted by the recipe of the run's data.

    An answered line holds `id`, `task`, `prediction` (a label or a number; null where not valid), `valid` and `answer`;
    on request `probabilities` (answer -> p; null for generated text) and `gate_expert`, `gate_modality` (means over the
    slots: expert -> weight, and expert -> modality -> weight). Bad samples are left out; `report` gets their place and reasons.

    Every rank calls this; rank 0 reads, writes and reports. A file appears whole at the end or not at all.

    Args:
        sources: files, or folders of them, in any format that `egmf prepare` reads, or an open file of JSON lines; see
            `docs/data.md`. Read on rank 0 alone.
        out: a file to be made, or an open file descriptor.
        advance: called with the number of samples done, now and then.
        folder: what paths in the lines of an open file are relative to.

    Raises:
        PredictError: options that the run cannot answer, no samples at all, or an output that cannot be written.
        ReaderError: files of another format than JSON lines that cannot be read.
        ClipsError: clips, and the run has no recipe, or another than this machine gives.
    """
    _check_options(run, options)
    answering = Answering(run)
    tally, lengths = Tally(), _Lengths(answering)
    with contextlib.ExitStack() as stack:
        parts: Iterator[list[CheckedSample]] = iter(())
        write: Callable[[Iterable[Row]], None] = lambda rows: None  # noqa: E731
        if run.world.is_rank_zero:
            stack.enter_context(exit_on_termination())
            reader = stack.enter_context(_reader(run, sources, options, folder))
            for note in reader.notes:
                report(f"note: {note}")
            parts = map(lengths.checked, chunks(reader))
            write = stack.enter_context(_writing(out))
        while (chunk := run.world.broadcast_object(next(parts, None))) is not None:
            answered = answering.answers(chunk)
            if run.world.is_rank_zero:
                _report(chunk, report)
                write(_line(answering, chunk[i], name, answer, options) for i, name, answer in answered)
                tally.answered += sum(checked.sample is not None for checked in chunk)
                tally.bad += sum(bool(checked.faults) for checked in chunk)
                advance(len(chunk))
        if run.world.is_rank_zero and not tally.answered + tally.bad:
            raise PredictError("the input holds no samples: it is empty; nothing was written")
        for note in lengths.notes():
            report(f"note: {note}")
    total: Tally = run.world.broadcast_object(tally)
    return total


def _reader(run: OpenedModel, sources: Sequence[Path] | BinaryIO, options: Options, folder: Path) -> UnlabelledReader:
    history = run.config.data.history
    tasks = run.parts.inputs
    given = open_input(
        sources,
        tasks,
        task=options.task,
        split=options.split,
        reread=history > 0,
        plugins=options.plugins,
        folder=folder,
        contained=options.contained,
        clips=options.clips,
    )
    return UnlabelledReader(given, tasks, task=options.task, history=history)


def _check_options(run: OpenedModel, options: Options) -> None:
    faults = []
    known = askable(run.parts.inputs)
    if options.task is not None and options.task not in known:
        faults.append(f"--task {options.task} is none of the run's tasks: {', '.join(known)}")
    if options.probabilities and run.config.eval.mode == "generate":
        faults.append("--probabilities: generated answers have none; score them instead (eval.mode=score)")
    if options.gates and run.parts.model.fusion is None:
        faults.append("--gates: the run has no fusion network (model.fusion.pseudo_tokens=0), so no gates")
    if options.gates and run.config.eval.mode == "generate":
        faults.append("--gates: answers are generated without gate weights; score them instead (eval.mode=score)")
    if faults:
        raise PredictError("\n".join(faults))


class _Lengths:
    """Leaves out samples that are longer than the model's positions, and counts those whose texts are cut; on rank 0."""

    def __init__(self, answering: Answering) -> None:
        self._answering, self._run = answering, answering.run
        self._cut, self._texts, self._longest, self._beyond = 0, 0, 0, 0

    def checked(self, chunk: list[CheckedSample]) -> list[CheckedSample]:
        """The same samples, those that are too long with their fault instead of what was read."""
        limit, most = self._run.parts.limit, self._run.config.data.max_text_tokens
        out = []
        for one, length in zip(chunk, self._answering.lengths(chunk), strict=True):
            if (fault := self._answering.too_long(length)) is not None:
                out.append(replace(one, sample=None, faults=[*one.faults, fault]))
                continue
            out.append(one)
            if length is not None:
                self._beyond += limit is not None and length.positions > limit.positions
                self._texts += length.text > 0
                self._cut += length.text > most
                self._longest = max(self._longest, length.text)
        return out

    def notes(self) -> list[str]:
        """What is to be said of the whole input."""
        most, limit = self._run.config.data.max_text_tokens, self._run.parts.limit
        notes = []
        if self._cut:
            notes.append(
                f"{self._cut} of {self._texts} texts were cut to their last {most} tokens (data.max_text_tokens of the run), "
                f"the longest had {self._longest}"
            )
        if self._beyond and limit is not None:
            notes.append(
                f"{self._beyond} samples need more positions than {self._run.config.model.backbone.name} was trained on "
                f"({limit.positions}), where it may answer worse"
            )
        return notes


def _line(answering: Answering, checked: CheckedSample, name: str, answer: SampleAnswer, options: Options) -> Row:
    assert checked.sample is not None
    line: Row = {"id": checked.sample.id, "task": name}
    line |= {"prediction": answer.prediction, "valid": answer.valid, "answer": answer.answer}
    if options.probabilities:
        line["probabilities"] = answering.probabilities(name, answer)
    if options.gates:
        weights = answering.gates(answer)
        assert weights is not None
        line["gate_expert"], line["gate_modality"] = weights
    return line


def _report(chunk: Iterable[CheckedSample], report: Callable[[str], None]) -> None:
    for checked in chunk:
        if checked.faults:
            report(f"{checked.where}: left out: {'; '.join(checked.faults)}")
        elif checked.notes:
            report(f"{checked.where}: {'; '.join(checked.notes)}")


@contextlib.contextmanager
def _writing(out: Path | int) -> Iterator[Callable[[Iterable[Row]], None]]:
    """A function that writes rows to `out`; a file appears when the block ends well."""
    try:
        if isinstance(out, Path):
            out.parent.mkdir(parents=True, exist_ok=True)
        with new_file(out) if isinstance(out, Path) else os.fdopen(os.dup(out), "w", encoding="utf-8") as stream:

            def write(rows: Iterable[Row]) -> None:
                for row in rows:
                    stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                stream.flush()

            yield write
    except BrokenPipeError:  # `| head`: the command ends quietly
        raise
    except OSError as error:
        where = (
            f"{out}: {error.strerror}; nothing was"
            if isinstance(out, Path)
            else f"to stdout: {error.strerror}; not all was"
        )
        raise PredictError(f"cannot write {where} written") from error
