"""Predictions for samples without labels: any known format in, JSON lines out, in chunks of bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from trainer.answers.prediction_table import SampleAnswer
from trainer.batch import Sample
from trainer.data.preparation.folder import exit_on_termination
from trainer.data.unlabelled.clips import ClipSettings
from trainer.data.unlabelled.inputs import PredictError, askable, open_input
from trainer.data.unlabelled.reader import CheckedSample, UnlabelledReader
from trainer.files import new_file
from trainer.run.evaluate import Scorer
from trainer.run.lengths import Use, measure
from trainer.run.model_parts import OpenedModel

CHUNK_SAMPLES = 512  # that are sorted by length together
CHUNK_BYTES = 256 << 20  # of features in a chunk

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


@torch.no_grad()
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
    tally, lengths = Tally(), _Lengths(run)
    with contextlib.ExitStack() as stack:
        chunks: Iterator[list[CheckedSample]] = iter(())
        write: Callable[[Iterable[Row]], None] = lambda rows: None  # noqa: E731
        if run.world.is_rank_zero:
            stack.enter_context(exit_on_termination())
            reader = stack.enter_context(_reader(run, sources, options, folder))
            for note in reader.notes:
                report(f"note: {note}")
            chunks = map(lengths.checked, _chunks(reader, CHUNK_SAMPLES))
            write = stack.enter_context(_writing(out))
        scorers = {name: Scorer(run.forward, run.parts, run.config, name, run.world) for name in run.parts.tasks}
        while (chunk := run.world.broadcast_object(next(chunks, None))) is not None:
            answered = _answered(run, scorers, chunk)
            if run.world.is_rank_zero:
                _report(chunk, report)
                write(_line(run, checked, name, answer, options) for checked, name, answer in answered)
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


def _chunks(samples: Iterable[CheckedSample], most: int) -> Iterator[list[CheckedSample]]:
    """Samples in lists of bounded length and bytes of features."""
    chunk: list[CheckedSample] = []
    size = 0
    for checked in samples:
        chunk.append(checked)
        size += _bytes(checked.sample)
        if len(chunk) >= most or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Lengths:
    """Leaves out samples that are longer than the model's positions, and counts those whose texts are cut; on rank 0."""

    def __init__(self, run: OpenedModel) -> None:
        self._run, self._cut, self._texts, self._longest, self._beyond = run, 0, 0, 0, 0

    def checked(self, chunk: list[CheckedSample]) -> list[CheckedSample]:
        """The same samples, those that are too long with their fault instead of what was read."""
        parts, config = self._run.parts, self._run.config
        use: Use = "generated" if config.eval.mode == "generate" else "scored"
        name, limit, most = config.model.backbone.name, parts.limit, config.data.max_text_tokens
        beyond: dict[int, int] = {}
        texts: dict[int, int] = {}
        for task in parts.tasks:
            places = [i for i, one in enumerate(chunk) if one.sample is not None and task in one.tasks]
            samples = [sample for i in places if (sample := chunk[i].sample) is not None]
            if not samples:
                continue
            found = measure(parts.collators[task], parts.tries[task], "input", samples, use, limit)
            texts |= {i: n for i, n in zip(places, found.text_N.tolist(), strict=True) if n}
            if limit is not None:
                needed = zip(places, found.positions_N.tolist(), strict=True)
                beyond |= {i: max(n, beyond.get(i, 0)) for i, n in needed if n > limit.positions}
        faults: dict[int, str] = {}
        if limit is not None and limit.hard:
            faults = {
                i: f"too long for {name} ({limit.reason}): {n} positions with the longest answer"
                for i, n in beyond.items()
            }
        else:
            self._beyond += len(beyond)
        answered = [n for i, n in texts.items() if i not in faults]
        self._texts += len(answered)
        self._cut += sum(n > most for n in answered)
        self._longest = max([self._longest, *answered])
        return [
            replace(one, sample=None, faults=[*one.faults, faults[i]]) if i in faults else one
            for i, one in enumerate(chunk)
        ]

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


def _bytes(sample: Sample | None) -> int:
    streams = () if sample is None else (sample.audio_TF, sample.video_TF)
    return sum(stream.nbytes for stream in streams if stream is not None)


def _answered(
    run: OpenedModel, scorers: dict[str, Scorer], chunk: Sequence[CheckedSample]
) -> list[tuple[CheckedSample, str, SampleAnswer]]:
    """The good samples of a chunk, the tasks asked of them and the answers, in order, on rank 0; batches are those of an
    evaluation of these samples."""
    mine: list[tuple[int, int, SampleAnswer]] = []
    for number, (name, scorer) in enumerate(scorers.items()):
        places = [i for i, checked in enumerate(chunk) if checked.sample is not None and name in checked.tasks]
        samples = [sample for i in places if (sample := chunk[i].sample) is not None]
        lengths = np.array([_length(sample) for sample in samples], dtype=np.int64)
        for micro in scorer.batches(samples, lengths):
            answers = scorer.answer([samples[i] for i in micro.indices], micro)
            if micro.weight:
                mine += [(places[i], number, answer) for i, answer in zip(micro.indices, answers, strict=True)]
    everyone = run.world.gather(mine) or []
    names = list(scorers)
    found = sorted(itertools.chain(*everyone), key=lambda one: one[:2])
    return [(chunk[i], names[number], answer) for i, number, answer in found]


def _length(sample: Sample) -> int:
    """As :meth:`trainer.data.dataset.SplitView.lengths`."""
    return len(sample.text) + sum(len(s) for s in (sample.audio_TF, sample.video_TF) if s is not None)


def _line(run: OpenedModel, checked: CheckedSample, name: str, answer: SampleAnswer, options: Options) -> Row:
    assert checked.sample is not None
    line: Row = {"id": checked.sample.id, "task": name}
    line |= {"prediction": answer.prediction, "valid": answer.valid, "answer": answer.answer}
    if options.probabilities:
        task, given = run.parts.tasks[name], answer.probabilities
        words = task.labels if task.kind == "multilabel" else task.answers()
        line["probabilities"] = None if given is None else dict(zip(words, given, strict=True))
    if options.gates:
        fusion = run.parts.model.fusion
        assert fusion is not None
        assert answer.gate_expert is not None
        assert answer.gate_modality is not None
        modality = [dict(zip(fusion.modalities, _finite(weights), strict=True)) for weights in answer.gate_modality]
        line["gate_expert"] = dict(zip(fusion.experts_built, _finite(answer.gate_expert), strict=True))
        line["gate_modality"] = dict(zip(fusion.experts_built, modality, strict=True))
    return line


def _finite(values: Sequence[float]) -> list[float | None]:
    """JSON has no nan: what a diverged model gives is null."""
    return [value if math.isfinite(value) else None for value in values]


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
