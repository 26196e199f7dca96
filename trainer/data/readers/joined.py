"""Features and annotations of the same utterances, in two files without common ids, made one.

Rows are aligned in order (`trainer/data/readers/align.py`). A paired row has the annotation's id, text, speaker and place and the other file's
features; a row on one side only is kept without the other's fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from trainer.data.readers.align import AlignmentError, Key, align
from trainer.data.readers.raw import RawSample, Table

_SHOWN = 20  # rows listed with their text; the others by their place alone


def join(annotations: Table, features: Table, faults: list[str], notes: list[str]) -> list[Table]:
    """One table of both; where they do not align the reason goes to `faults`."""
    try:
        alignment = align(_keys(annotations), _keys(features))
    except AlignmentError as error:
        faults.append(f"{annotations.path} and {features.path} ({annotations.split}): {error}")
        return []
    for table, only, lacks in (
        (annotations, alignment.left_only, "features: kept without audio and video"),
        (features, alignment.right_only, "annotation: kept without speaker and dialogue"),
    ):
        if only:
            rows = [_shown(table.row(i)) for i in only[:_SHOWN]] + [table.row(i).where for i in only[_SHOWN:]]
            notes.append(f"{annotations.split}: {len(only)} row(s) without {lacks}: {'; '.join(rows)}")
    row = partial(_row, annotations, features, alignment.pairs)
    return [Table(annotations.path, annotations.split, len(alignment.pairs), row, features.widths, features.rates)]


def _keys(table: Table) -> list[Key]:
    samples = (table.row(i) for i in range(table.n))
    return [(sample.text or "", str(sample.label)) for sample in samples]


def _row(annotations: Table, features: Table, pairs: Sequence[tuple[int | None, int | None]], at: int) -> RawSample:
    i, j = pairs[at]
    if i is None or j is None:
        return annotations.row(i) if i is not None else features.row(j or 0)
    annotation, feature = annotations.row(i), features.row(j)
    return replace(
        annotation,
        audio=feature.audio,
        video=feature.video,
        audio_length=feature.audio_length,
        video_length=feature.video_length,
        where=f"{annotation.where}, {feature.where}",
    )


def _shown(sample: RawSample) -> str:
    text = sample.text or ""
    return f"{sample.where} {text if len(text) <= 40 else text[:40] + '…'!r} [{sample.label}]"
