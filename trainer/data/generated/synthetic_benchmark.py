"""Synthetic benchmarks, generated in place of the real ones: their tasks and languages, their shapes in small, evidence as in the diagnostic data.

They show that a training of several tasks works, and what it costs; they say nothing about the benchmarks themselves.

A sample has one of four classes and one of four kinds. In three of them the evidence stands in the frames, as in
:mod:`trainer.data.generated.diagnostic`; in the fourth, ``text``, an adverb tells. The classes are four labels of the task, for MELD
and CHERMA about as uneven as published, or four numbers of its grid. Every task has its own widths: the 16 features of the
planted evidence pass through a random matrix of orthonormal columns, the same for all samples of a task.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.generated import diagnostic
from trainer.data.preparation.feature_statistics import Standardise
from trainer.data.preparation.prepare import Progress, Summary, prepare_source
from trainer.data.readers.raw import RawSample, Source
from trainer.tasks import BUILT_IN, Language

VERSION = 1
KINDS = ("text", *diagnostic.KINDS)
SIZES = {"train": 8000, "valid": 400, "test": 1000}
TELLING = {"en": ("gladly", "angrily", "sadly", "calmly"), "zh": ("高兴地", "生气地", "难过地", "平静地")}
IDLE = {"en": ("today", "again", "slowly", "then"), "zh": ("今天", "慢慢地", "然后", "刚才")}


@dataclass(frozen=True)
class Shape:
    """What the synthetic benchmark of a task is like: the answers of the four classes, their shares, features of a frame."""

    answers: tuple[str | float, ...]
    shares: tuple[float, ...]
    audio: int
    video: int


SHAPES = {
    "meld": Shape(("joy", "anger", "sadness", "neutral"), (0.20, 0.16, 0.12, 0.52), 32, 40),
    "cherma": Shape(("高兴", "愤怒", "悲伤", "平静"), (0.24, 0.24, 0.22, 0.30), 40, 32),
    "mosei": Shape((2.0, -2.0, -1.0, 0.7), (0.25, 0.25, 0.25, 0.25), 24, 32),
    "mosi": Shape((2.0, -2.0, -1.0, 0.7), (0.25, 0.25, 0.25, 0.25), 24, 24),
    "simsv2": Shape((0.8, -0.8, -0.4, 0.4), (0.25, 0.25, 0.25, 0.25), 24, 48),
}


def generate(
    name: str,
    out: Path,
    *,
    seed: int = 0,
    sizes: dict[str, int] | None = None,
    standardise: Standardise = "mean",
    max_rate: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Generate the synthetic benchmark of a task and prepare it in `out`: a function of version, task, seed and sizes.

    Raises:
        ValueError: a task without one, or sizes under 16 (every kind with every class).
    """
    if name not in SHAPES:
        raise ValueError(f"no synthetic benchmark for task {name!r}; there is one for {', '.join(SHAPES)}")
    sizes = {**SIZES, **(sizes or {})}
    small = {split: n for split, n in sizes.items() if n < 16}
    if small:
        raise ValueError(f"too few samples to hold every kind and class: {small}; 16 at least")
    return prepare_source(
        BUILT_IN[name],
        _source(name, seed, sizes),
        out,
        standardise=standardise,
        max_rate=max_rate,
        force=force,
        progress=progress,
    )


def _source(name: str, seed: int, sizes: dict[str, int]) -> Source:
    return Source(
        name=f"stand-in for {name}, version {VERSION}, seed {seed}: generated, not the benchmark",
        samples=functools.partial(_samples, name, seed, sizes),
        splits=list(sizes),
        files=[],
        widths={"audio": SHAPES[name].audio, "video": SHAPES[name].video},
        rates=dict(diagnostic.RATES),
        notes=[],
    )


def _samples(name: str, seed: int, sizes: dict[str, int], split: str) -> Iterator[RawSample]:
    shape, language = SHAPES[name], BUILT_IN[name].language
    number = zlib.crc32(name.encode())
    spread = {
        m: _orthonormal(np.random.default_rng([VERSION, seed, number]), getattr(shape, m)) for m in ("audio", "video")
    }
    rng = np.random.default_rng([VERSION, seed, number, zlib.crc32(split.encode())])
    classes = _classes(shape.shares, sizes[split])
    order = rng.permutation(len(classes))
    for i, place in enumerate(order):
        kind, k = KINDS[place % 4], int(classes[place])
        frames = {m: rng.normal(0, diagnostic.NOISE, (diagnostic.FRAMES[m], diagnostic.WIDTHS[m])) for m in spread}
        if kind != "text":
            diagnostic.plant(kind, rng, k, frames["audio"], frames["video"])
        yield RawSample(
            id=f"{split}-{i:05d}",
            split=split,
            text=_say(rng, language, k if kind == "text" else None),
            label=shape.answers[k],
            audio=(frames["audio"] @ spread["audio"]).astype(np.float32),
            video=(frames["video"] @ spread["video"]).astype(np.float32),
            kind=kind,
            language=language,
        )


def _classes(shares: tuple[float, ...], n: int) -> np.ndarray:
    """The classes of n samples, as near to their shares as n allows in every run of four times the number of kinds."""
    edges = np.round(np.cumsum(shares) * n / 4).astype(int)  # of each kind
    return np.repeat(np.searchsorted(edges, np.arange(-(-n // 4)), side="right").clip(max=3), 4)[:n]


def _say(rng: np.random.Generator, language: Language, k: int | None) -> str:
    words = [rng.choice(diagnostic.SUBJECTS[language]), rng.choice(diagnostic.VERBS[language])]
    adverb = rng.choice(IDLE[language]) if k is None else TELLING[language][k]
    words.insert(2 if language == "en" else 1, adverb)
    return (" " if language == "en" else "").join(words)


def _orthonormal(rng: np.random.Generator, width: int) -> np.ndarray:
    """[16, width] with orthonormal rows, so that noise stays noise of the same size in its 16 directions."""
    return np.linalg.qr(rng.normal(size=(width, diagnostic.WIDTHS["audio"])))[0].T
