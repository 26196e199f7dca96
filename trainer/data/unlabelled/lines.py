"""From a sample of own data, as its user writes it, to an unchecked sample: its keys, its clip, and how its features are loaded."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from trainer.data.readers.jsonl import plain_sample
from trainer.data.readers.raw import RawSample
from trainer.data.unlabelled.clips import PendingClip, load_line, pending_clip
from trainer.features.manifest import ClipLine

_KNOWN_KEYS = ("id", "text", "audio", "video", "audio_length", "video_length", "speaker", "dialogue", "turn", "task")
_LIKE_CLIP = 0.74  # of difflib: `cilp` is a misspelt `clip`, `clip_id` is none


@dataclass
class UncheckedSample:
    """A sample as given. `raw` has everything but features, None where it cannot be read; `load(faults)` has the features
    too, or reports why it cannot be had. A `clip` is still to be extracted. `order` counts all samples of the input, `where` names the place for the user."""

    order: int
    where: str
    task: str | None = None
    raw: RawSample | None = None
    load: Callable[[list[str]], RawSample | None] = lambda faults: None
    rates: Mapping[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    clip: PendingClip | None = None


class SampleInput(Protocol):
    """Samples to be predicted. `notes` is what the user should see of the whole input."""

    notes: list[str]

    def __enter__(self) -> SampleInput: ...
    def __exit__(self, *_: object) -> None: ...

    def samples(self) -> Iterator[UncheckedSample]:
        """All samples in order. A second call reads anew, where `reread` was asked for."""
        ...

    def wanted(self, sample: UncheckedSample) -> bool:
        """Whether the sample is to be answered; the others count for histories alone."""
        ...


def take_line(
    sample: UncheckedSample,
    line: ClipLine,
    id: str,
    folder: Path,
    *,
    task: str | None,
    split: str = "",
    answers: frozenset[str] = frozenset(),
    contained: bool = False,
) -> None:
    """Fill `sample` with what a line says.

    Args:
        folder: paths are relative to it, and with `contained` lead nowhere else.
        task: of a line that names none.
        answers: keys that may hold answers: they are not read, and not misspelt.
    """
    _check_keys(line, sample, answers)
    sample.task = task if line.task is None else line.task
    sample.rates = {str(name): rate for name, rate in line.rate.items()}
    sample.raw = plain_sample(line, id, split, "")
    if line.clip is not None and (line.audio is not None or line.video is not None):
        sample.notes.append("clip: not used beside audio or video")
    elif line.clip is not None:
        if not sample.faults:
            sample.clip = pending_clip(line, folder, sample.faults, contained=contained)
        return
    sample.load = partial(load_line, sample.raw, folder, line, contained)


def _check_keys(line: ClipLine, sample: UncheckedSample, answers: frozenset[str]) -> None:
    """A key that is probably a misspelt one costs the line: without it, a part of the sample would be missing."""
    for key in (key for key in line.model_extra or {} if key not in answers):
        near = difflib.get_close_matches(key, [k for k in _KNOWN_KEYS if k not in line.model_fields_set], n=1)
        if not near and line.audio is None and line.video is None:
            known = ("clip",) if line.clip is None else ("start", "end")
            near = difflib.get_close_matches(key, known, n=1, cutoff=_LIKE_CLIP)
        if near:
            sample.faults.append(f"unknown key {key[:40]!r} (did you mean {near[0]}?)")
        else:
            sample.notes.append(f"unknown key {key[:40]!r}: not used")
