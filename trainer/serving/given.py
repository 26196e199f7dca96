"""Samples given as Python objects: dictionaries, dataclasses, rows of pandas tables, and paths of clips.

They are read as `egmf predict` reads a line of JSON, with the same checks and messages; features may stand in them as arrays.
Legend: T frames, F features of a frame.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from trainer.data.preparation.columns import STREAMS
from trainer.data.readers.raw import RawSample, as_features
from trainer.data.unlabelled.clips import ClipExtraction, load_line
from trainer.data.unlabelled.lines import UncheckedSample, take_line
from trainer.features.manifest import ClipLine, id_of
from trainer.own_samples import describe_errors

_WHOLE = (
    "id",
    "turn",
    "dialogue",
    "speaker",
    "audio_length",
    "video_length",
)  # a table makes 3.0 of 3 where a cell is empty


def samples_in(given: Iterable[Any]) -> Iterator[Any]:
    """The samples one after the other; of a pandas table its rows, as dictionaries without the cells that are empty.

    Raises:
        ValueError: one sample where several are expected.
    """
    if isinstance(given, (Mapping, str, bytes, os.PathLike)) or dataclasses.is_dataclass(given):
        raise ValueError("one sample was given where several are expected: put it into a list, as in predict([sample])")
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(given, pandas.Series) and {"clip", "text", *STREAMS} & set(given.index):
        raise ValueError("one row of a table was given where several are expected: give the table, or predict([row])")
    if pandas is None or not isinstance(given, pandas.DataFrame):
        yield from given
        return
    names = list(given.columns)
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise ValueError(f"the table has the column(s) {', '.join(twice)} twice")
    for row in given.itertuples(index=False, name=None):
        yield _without_empty(dict(zip(names, row, strict=True)))


def chunks_of_given(given: Iterable[Any], most: int, most_bytes: int) -> Iterator[list[Any]]:
    """Samples as given, in lists of bounded length and bytes of the arrays in them."""
    chunk: list[Any] = []
    size = 0
    for value in given:
        chunk.append(value)
        values = _as_mapping(value) or {}
        size += sum(int(getattr(values.get(name), "nbytes", 0)) for name in STREAMS)
        if len(chunk) >= most or size >= most_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def has_features(value: Any) -> bool:
    """Whether a sample as given has audio or video of its own."""
    values = _as_mapping(value) or {}
    return any(values.get(name) is not None for name in STREAMS)


class GivenSamples:
    """The input of a :class:`trainer.data.unlabelled.reader.UnlabelledReader` that samples of Python make. A sample without an id gets
    one of its clip's name, or `sample`, and its number from 1.

    Args:
        values: samples; paths in them are relative to the working folder.
        clips: extracts the clips among them.
        task: of samples that name none.
        answers: keys that may hold answers.
        first: how many samples came before.
    """

    def __init__(
        self,
        values: Sequence[Any],
        clips: ClipExtraction,
        *,
        task: str | None = None,
        answers: frozenset[str] = frozenset(),
        first: int = 0,
    ) -> None:
        self._values, self._clips, self._task, self._answers, self._first = values, clips, task, answers, first
        self.notes: list[str] = []

    def __enter__(self) -> GivenSamples:
        self._clips.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._clips.__exit__()

    def samples(self) -> Iterator[UncheckedSample]:
        return self._clips.resolved(self._unchecked(), self.wanted)

    def wanted(self, sample: UncheckedSample) -> bool:
        return True

    def _unchecked(self) -> Iterator[UncheckedSample]:
        for place, value in enumerate(self._values, self._first):
            sample = UncheckedSample(place + 1, f"samples[{place}]")
            self._take(value, sample, place)
            yield sample

    def _take(self, value: Any, sample: UncheckedSample, place: int) -> None:
        values = _as_mapping(value)
        if values is None:
            kind = type(value).__name__
            sample.faults.append(f"is of type {kind}: a sample is a dictionary, a dataclass, or the path of a clip")
            return
        if odd := [key for key in values if not isinstance(key, str)]:
            sample.faults.append(f"has the key {str(odd[0])[:40]!r}, which is no text")
            return
        arrays = {name: values[name] for name in STREAMS if _is_array(values.get(name))}
        try:
            line = ClipLine.model_validate({key: "" if key in arrays else _plain(one) for key, one in values.items()})
        except ValidationError as error:
            sample.faults += describe_errors(error)
            return
        id = f"sample-{place + 1:05d}" if line.id is None and line.clip is None else id_of(line, place)
        take_line(sample, line, id, Path(), task=self._task, answers=self._answers)
        if arrays and sample.raw is not None:
            rest = line.model_copy(update=dict.fromkeys(arrays))
            sample.load = partial(_load, sample.raw, rest, arrays)


def _load(raw: RawSample, line: ClipLine, arrays: Mapping[str, Any], faults: list[str]) -> RawSample | None:
    """The sample with its arrays, and with those that lie in files."""
    found = load_line(raw, Path(), line, False, faults)
    if found is None:
        return None
    audio, video = (
        _features(arrays[name]) if name in arrays else own
        for name, own in (("audio", found.audio), ("video", found.video))
    )
    return replace(found, audio=audio, video=video)


def _features(value: Any) -> np.ndarray | None:
    """The array [T, F] that a value is; what is none becomes one of objects, for the checks to name."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()  # a column of a table has an array of arrays
    try:
        return as_features(_of_torch(value))
    except Exception:  # noqa: BLE001 - of `__array__` of a type that is not ours; it costs this sample alone
        return np.array([None], dtype=object)


def _of_torch(value: Any) -> Any:
    """A tensor on the CPU, without its gradient, and in a type that numpy has; anything else as it is."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return value.float() if value.dtype is torch.bfloat16 else value


def _is_array(value: Any) -> bool:
    if isinstance(value, (str, bytes, os.PathLike, np.generic)):
        return False
    return isinstance(value, (np.ndarray, list, tuple)) or hasattr(value, "__array__")


def _as_mapping(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (str, os.PathLike)):
        return {"clip": os.fspath(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {key: one for key, one in own.items() if one is not None}
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.Series):
        return _without_empty(value.to_dict())
    return None


def _without_empty(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The cells of a table's row that are not empty."""
    kept = {key: one for key, one in values.items() if not _is_empty(one)}
    return {
        key: int(one) if key in _WHOLE and isinstance(one, (float, np.floating)) and one.is_integer() else one
        for key, one in kept.items()
    }


def _is_empty(value: Any) -> bool:
    """Whether a cell holds None, nan, NA or NaT."""
    if value is None or isinstance(value, (float, np.floating)):
        return value is None or bool(np.isnan(value))
    return type(value).__name__ in ("NAType", "NaTType")


def _plain(value: Any) -> Any:
    """A value as JSON would have it: numbers of numpy as Python's, paths as text."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    return value
