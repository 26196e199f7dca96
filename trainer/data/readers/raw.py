"""What every reader gives: raw samples, as published, and the source they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SPLITS = ("train", "valid", "test")


class ReaderError(ValueError):
    """A source that cannot be read; the message lists every fault with its file and row."""

    def __init__(self, head: str, faults: Sequence[str] = (), shown: int = 20) -> None:
        self.faults = list(faults)
        rest = [f"  … and {len(self.faults) - shown} more"] if len(self.faults) > shown else []
        super().__init__("\n".join([head, *(f"  {fault}" for fault in self.faults[:shown]), *rest]))


@dataclass
class RawSample:
    """One sample as published, before any check.

    `label` is the label's word (classification) or a number (regression), whatever the file says. Features are `[T, d]` of
    any real dtype and may be padded at the end, hold nan and inf, or have a wrong shape; None is a missing modality.
    `*_length` is the true length the file claims, None where it claims nothing. `where` names file and row.
    """

    id: str
    split: str
    text: str | None
    label: str | float | None
    audio: np.ndarray | None = None
    video: np.ndarray | None = None
    audio_length: int | None = None
    video_length: int | None = None
    speaker: str | None = None
    dialogue: str | None = None
    turn: int | None = None
    kind: str | None = None
    language: str | None = None
    where: str = ""


@dataclass
class Source:
    """An opened source. `samples(split)` reads that split anew at each call, in the published order.

    `widths` are features per frame where the format states them once (None: found by reading), `rates` frames per second
    where known, `notes` what the reader did that the user should see.

    `part(split, k, n)`, where a reader has it, gives the k-th of n contiguous parts of `samples(split)` without reading
    the others, so that several processes can share the work; it must be picklable (a `functools.partial` of a function of
    the module, say). None: one process reads.
    """

    name: str
    samples: Callable[[str], Iterator[RawSample]]
    splits: list[str]
    files: list[Path]
    widths: dict[str, int] | None = None
    rates: dict[str, float | None] = field(default_factory=lambda: {"audio": None, "video": None})
    notes: list[str] = field(default_factory=list)
    part: Callable[[str, int, int], Iterator[RawSample]] | None = None
