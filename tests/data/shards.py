"""Samples that worker processes read in parts; apart from the tests, so that a worker imports little."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np

from trainer.data.readers.raw import RawSample


def read_part(split: str, k: int, n: int) -> Iterator[RawSample]:
    """30 samples of each split; in train also three with nan and one whose id is taken."""
    count = 34 if split == "train" else 30
    cuts = np.linspace(0, count, n + 1).astype(int)
    for i in range(cuts[k], cuts[k + 1]):
        audio = np.random.default_rng(i).standard_normal((9, 4)).astype("f4")
        audio[i % 9, 0] = np.nan if 30 <= i < 33 else 0.0
        audio[1 + i % 9 :] = 0.0
        name = f"{split}/{3 if i == 33 else i}"
        yield RawSample(name, split, f"text {i}", "joy", audio, audio_length=1 + i % 9, where=f"row {i}")


def broken_part(split: str, k: int, n: int) -> Iterator[RawSample]:
    if k == 1:
        raise ValueError("cannot read row 7")
    yield from read_part(split, k, n)


def killed_part(split: str, k: int, n: int) -> Iterator[RawSample]:
    """As the kernel does to a process when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield from read_part(split, k, n)
