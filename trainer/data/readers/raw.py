"""What every reader gives: raw samples, as published, and the source they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.encodings import decode_text
from trainer.features.recipe_record import RecipeRecord
from trainer.own_samples import SPLIT_NAMES as SPLIT_NAMES
from trainer.own_samples import split_of as split_of

SPLITS = ("train", "valid", "test")
ALL = "all"  # the one split of a source whose samples have folds and no splits
CLIPS = "a manifest of clips goes to egmf extract, and the folder that this writes is read here"  # in messages


class ReaderError(ValueError):
    """A source that cannot be read; the message lists every fault with its file and row."""

    def __init__(self, head: str, faults: Sequence[str] = (), shown: int = 20) -> None:
        self.faults = list(faults)
        rest = [f"  … and {len(self.faults) - shown} more"] if len(self.faults) > shown else []
        super().__init__("\n".join([head, *(f"  {fault}" for fault in self.faults[:shown]), *rest]))


@dataclass
class RawSample:
    """One sample as published, before any check.

    `label` is the label's word (classification) or a number (regression), whatever the file says; several labels are a list
    of words, shares of labels a mapping from word to number, or a list of numbers in the task's order. Features are `[T, d]` of
    any real dtype and may be padded at the end, hold nan and inf, or have a wrong shape; None is a missing modality.
    `*_length` is the true length the file claims, None where it claims nothing. `fold` is the part of a cross-validation
    to which the sample belongs; its split is then :data:`ALL`. `where` names file and row. Where several questions are
    asked, `answers` has question -> what `label` would be, None or no entry where the sample does not answer, and `label` is None.
    """

    id: str
    split: str
    text: str | None
    label: str | float | Mapping[str, Any] | Sequence[Any] | None
    audio: np.ndarray | None = None
    video: np.ndarray | None = None
    audio_length: int | None = None
    video_length: int | None = None
    speaker: str | None = None
    dialogue: str | None = None
    turn: int | None = None
    kind: str | None = None
    language: str | None = None
    fold: str | None = None
    where: str = ""
    answers: Mapping[str, str | float | Mapping[str, Any] | Sequence[Any] | None] | None = None


@dataclass
class Source:
    """An opened source. `samples(split)` reads that split anew at each call, in the published order.

    `widths` are features per frame where the format states them once (None: found by reading), `rates` frames per second
    where known, `notes` what the reader did that the user should see.

    `part(split, k, n)`, where a reader has it, gives the k-th of n contiguous parts of `samples(split)` without reading
    the others, so that several processes can share the work; it must be picklable (a `functools.partial` of a function of
    the module, say). None: one process reads.

    `recipe` is the one by which all features were extracted, where that is known.
    """

    name: str
    samples: Callable[[str], Iterator[RawSample]]
    splits: list[str]
    files: list[Path]
    widths: dict[str, int] | None = None
    rates: dict[str, float | None] = field(default_factory=lambda: {"audio": None, "video": None})
    notes: list[str] = field(default_factory=list)
    part: Callable[[str, int, int], Iterator[RawSample]] | None = None
    recipe: RecipeRecord | None = None


@dataclass
class Table:
    """The rows of one split in one file: `row(i)` for 0 <= i < n, in any order. `text` and `label` of a row alone are cheap.

    `lacking` says which of several questions the file has no answers to: a fault, unless annotations are joined that have them.
    """

    path: Path
    split: str
    n: int
    row: Callable[[int], RawSample]
    widths: dict[str, int] | None = None
    rates: dict[str, float] = field(default_factory=dict)
    lacking: str = ""


def as_text(value: Any, language: str = "en") -> str | None:
    """Text as published; a number is written out, anything else is no text (None).

    Raises:
        EncodingError: bytes in no encoding that can be told.
    """
    value = _plain(value)
    if isinstance(value, bytes):
        return decode_text(value, language)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def as_label(value: Any, language: str = "en") -> str | float | dict[str, Any] | list[Any] | None:
    """A label's word or number, or several (see :class:`RawSample`); raises as :func:`as_text`."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.size > 1:
        value = value.tolist()
    if isinstance(value, dict):
        return {str(as_text(key, language)): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        found = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [as_label(one, language) for one in found]
    value = _plain(value)
    if isinstance(value, (bool, bytes)):
        return as_text(value, language) if isinstance(value, bytes) else str(value)
    return value if isinstance(value, (str, int, float)) else None


def as_length(value: Any) -> Any:
    """A claimed length: an integer where it is one, else the value itself, for the checks to name."""
    value = _plain(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_features(value: Any) -> np.ndarray | None:
    """An array of features; what is none becomes an array of dtype object, for the checks to name."""
    if value is None:
        return None
    try:
        array = np.asarray(value)
        return array if array.dtype.kind != "O" else np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError, RecursionError):
        return np.array([None], dtype=object)


def _plain(value: Any) -> Any:
    """A numpy scalar, or an array of one element, as the Python value it holds."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.item() if value.size == 1 else None
    return value
