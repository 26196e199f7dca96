"""What the parts of the extraction exchange.

Shapes: T frames, F features of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

Told = Literal[
    "no sound",
    "no picture",
    "no face",
    "no speech",
    "truncated",
    "unreadable",
    "too long",
    "empty",
    "timed out",
    "crashed",
]


class ClipError(ValueError):
    """A clip from which nothing can be extracted: `kind` is a word of :data:`Told`, the message says what to do."""

    def __init__(self, kind: Told, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[ClipError], tuple[Told, str]]:  # it comes out of another process
        return type(self), (self.kind, str(self))


@dataclass(frozen=True)
class Clip:
    """Seconds `start` to `end` of a media file; None: from its beginning, to its end."""

    path: Path
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Sound:
    """One channel of sound, float32 between -1 and 1, of the whole clip; silence where the file has a gap."""

    samples_n: np.ndarray
    sampling_rate: int


class Picture(NamedTuple):
    """One picture of a clip: seconds from the clip's beginning, and RGB bytes [height, width, 3], upright."""

    time: float
    rgb: np.ndarray


@dataclass(frozen=True)
class Note:
    """Something that a user should know about one clip: its kind, how many frames or seconds it concerns, and words."""

    kind: Told
    modality: Literal["audio", "video", "text"]
    text: str


class ModalityFeatures(NamedTuple):
    """Features float32 [T, F], at `rate` frames a second from the clip's beginning; where not `valid_T`, they are 0."""

    values_TF: np.ndarray
    valid_T: np.ndarray
    notes: Sequence[Note] = ()


@dataclass(frozen=True)
class Word:
    """One word that was heard, in seconds from the clip's beginning."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class ClipFeatures:
    """All that was extracted from one clip; a missing modality is None."""

    audio: ModalityFeatures | None
    video: ModalityFeatures | None
    text: str | None  # only where the recipe transcribes and none was given
    words: Sequence[Word] = ()
    seconds: float = 0.0
    notes: Sequence[Note] = field(default_factory=tuple)
