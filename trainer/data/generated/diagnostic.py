"""Generated data whose label hangs on planted evidence of three kinds, each made for one expert.

A sample has one of four labels, k = 0..3, and one kind. Everything else is noise, N(0, 0.3²) on every feature.

- *local*: four audio frames in a row at a random place hold the corners of a tetrahedron in an order that depends on k.
  The corners sum to zero and each occurs once for every k: neither a mean nor a maximum over time tells the orders apart.
- *cross-modal*: audio holds four key-value symbols, a frame each, in random order, the round said eight times at a random
  place. A key is one of four random orthonormal vectors drawn anew for every sample, so keys cannot be learned by heart.
  Every value occurs. Video shows one key all along; k is the value bound to it. Symbols stand closer together than the
  global expert's stride, and no single modality knows anything.
- *long-range*: video holds four broad events, one of each type, a quarter of the clip each, in random order; k is the
  type that comes first. The events stand clear of the clip's ends, so that no short window knows where it is.

The text, English and Chinese, is drawn apart from the label. ``diagnostic-regression`` asks for a number instead:
-0.9, -0.3, 0.3, 0.9 for k. See docs/diagnostic.md for the probes.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from trainer.data.preparation.feature_statistics import Standardise
from trainer.data.preparation.folder import read_record
from trainer.data.preparation.prepare import Progress, Summary, prepare_source
from trainer.data.readers.raw import RawSample, Source
from trainer.tasks import BUILT_IN

VERSION = 1
KINDS = ("local", "cross-modal", "long-range")
SIZES = {"train": 12000, "valid": 600, "test": 1500}
LEVELS = (-0.9, -0.3, 0.3, 0.9)
WIDTHS = {"audio": 16, "video": 16}
FRAMES = {"audio": 48, "video": 48}
RATES: dict[str, float | None] = {"audio": 10.0, "video": 10.0}
NOISE, LOCAL, KEY, VALUE, CARRIER, EVENT = 0.3, 1.5, 1.5, 1.5, 0.5, 1.5  # amplitudes
KEY_WIDTH, ROUNDS, EVENT_FRAMES, MARGIN = 4, 8, 7, 4

CORNERS = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
ORDERS = np.array(
    [[0, 1, 2, 3], [1, 3, 0, 2], [2, 0, 3, 1], [3, 2, 1, 0]]
)  # a Latin square that balances neighbours too

SUBJECTS = {"en": ("he", "she", "the guest", "our friend", "the man"), "zh": ("他", "她", "客人", "朋友", "那个人")}
VERBS = {
    "en": ("said it again", "came in", "sat down", "called today", "looked up"),
    "zh": ("又说了一遍", "走了进来", "坐了下来", "今天来电话", "抬起头"),
}


def generate(
    variant: Literal["diagnostic", "diagnostic-regression"] | str,
    out: Path,
    *,
    seed: int = 0,
    sizes: dict[str, int] | None = None,
    standardise: Standardise = "mean",
    max_rate: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Generate the data of `variant` and prepare them in `out`: a function of version, variant, seed and sizes.

    Raises:
        ValueError: another variant, or sizes under 12 (every kind with every label).
    """
    if variant not in ("diagnostic", "diagnostic-regression"):
        raise ValueError(f"no generated task {variant!r}: diagnostic or diagnostic-regression")
    sizes = {**SIZES, **(sizes or {})}
    small = {split: n for split, n in sizes.items() if n < 12}
    if small:
        raise ValueError(f"too few samples to hold every kind and label: {small}; 12 at least")
    return prepare_source(
        BUILT_IN[variant],
        diagnostic_source(variant, seed, sizes),
        out,
        standardise=standardise,
        max_rate=max_rate,
        force=force,
        progress=progress,
    )


def is_generated(variant: str, out: Path) -> bool:
    """Whether the folder `out` says that it holds what :func:`generate` makes by default, all files as long as they were then."""
    record = read_record(out)
    if record is None:
        return False
    statistics = record.get("standardisation")
    return (
        record["source"]["name"] == diagnostic_source(variant, 0, SIZES).name
        and {split: about["n"] for split, about in record["splits"].items()} == SIZES
        and statistics is not None
        and statistics["mode"] == "mean"
        and all((out / name).is_file() and (out / name).stat().st_size == n for name, n in record["files"].items())
    )


def diagnostic_source(variant: str, seed: int, sizes: dict[str, int]) -> Source:
    """The generated samples in the form of a published source."""
    return Source(
        name=f"{variant} version {VERSION}, seed {seed}",
        samples=functools.partial(_samples, variant, seed, sizes),
        splits=list(sizes),
        files=[],
        widths=dict(WIDTHS),
        rates=dict(RATES),
        notes=[],
    )


def _samples(variant: str, seed: int, sizes: dict[str, int], split: str) -> Iterator[RawSample]:
    rng = np.random.default_rng([VERSION, seed, zlib.crc32(split.encode())])
    task = BUILT_IN[variant]
    n = sizes[split]
    order = rng.permutation(n)  # kinds and labels as even as n allows, in random order
    for i, place in enumerate(order):
        kind, k = KINDS[place % 3], int(place // 3) % 4
        audio_TF = rng.normal(0, NOISE, (FRAMES["audio"], WIDTHS["audio"]))
        video_TF = rng.normal(0, NOISE, (FRAMES["video"], WIDTHS["video"]))
        plant(kind, rng, k, audio_TF, video_TF)
        language = "en" if rng.random() < 0.5 else "zh"
        words = [rng.choice(SUBJECTS[language]), rng.choice(VERBS[language])]
        yield RawSample(
            id=f"{split}-{i:05d}",
            split=split,
            text=(" " if language == "en" else "").join(words),
            label=task.labels[k] if task.kind == "classification" else LEVELS[k],
            audio=audio_TF.astype(np.float32),
            video=video_TF.astype(np.float32),
            kind=kind,
            language=language,
        )


def plant(kind: str, rng: np.random.Generator, k: int, audio_TF: np.ndarray, video_TF: np.ndarray) -> None:
    """Add the evidence of `kind` for class `k` to the frames, in place."""
    _PLANT[kind](rng, k, audio_TF, video_TF)


def _local(rng: np.random.Generator, k: int, audio_TF: np.ndarray, video_TF: np.ndarray) -> None:
    start = rng.integers(0, len(audio_TF) - 3)
    audio_TF[start : start + 4, :3] += LOCAL * CORNERS[ORDERS[k]]


def _cross_modal(rng: np.random.Generator, k: int, audio_TF: np.ndarray, video_TF: np.ndarray) -> None:
    keys, _ = np.linalg.qr(rng.normal(size=(KEY_WIDTH, 4)))
    keys = keys.T * rng.choice([-1.0, 1.0], (4, 1))  # value v is bound to keys[v]
    order = rng.permutation(4)
    start = rng.integers(0, len(audio_TF) - 4 * ROUNDS + 1)
    for offset, value in enumerate(np.tile(order, ROUNDS)):
        audio_TF[start + offset, 3 : 3 + KEY_WIDTH] += KEY * keys[value]
        audio_TF[start + offset, 7 + value] += VALUE
        audio_TF[start + offset, 11] += CARRIER
    video_TF[:, :KEY_WIDTH] += KEY * keys[k]
    video_TF[:, 4] += CARRIER


def _long_range(rng: np.random.Generator, k: int, audio_TF: np.ndarray, video_TF: np.ndarray) -> None:
    order = [k, *rng.permutation([other for other in range(4) if other != k])]
    quarter = (len(video_TF) - 2 * MARGIN) // 4
    for block, event in enumerate(order):
        start = MARGIN + block * quarter + rng.integers(0, quarter - EVENT_FRAMES + 1)
        video_TF[start : start + EVENT_FRAMES, 6 + event] += EVENT


_PLANT: dict[str, Callable[[np.random.Generator, int, np.ndarray, np.ndarray], None]] = {
    "local": _local,
    "cross-modal": _cross_modal,
    "long-range": _long_range,
}
