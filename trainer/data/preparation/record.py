"""``record.json`` of a prepared dataset, as types: what it says of the source, the samples, and what was wrong with them."""

from __future__ import annotations

from typing import TypedDict

from trainer.features.recipe_record import RecipeRecord


class TargetStatistics(TypedDict):
    """The truths of a regression split; None where it has no sample."""

    mean: float | None
    std: float | None
    min: float | None
    max: float | None


class LengthStatistics(TypedDict):
    """Of characters or frames of the samples that have any; None where none has."""

    mean: float | None
    p50: int | None
    p95: int | None
    max: int | None


class QuestionStatistics(TypedDict, total=False):
    """The answers to one of several questions in a split: `n` samples answer it, `unanswered` do not; the rest as in
    :class:`SplitStatistics`."""

    n: int
    unanswered: int
    labels: dict[str, int]
    target: TargetStatistics
    without_label: int
    shared: int


class SplitStatistics(TypedDict, total=False):
    """One split; `labels` is label (or sign, for regression) -> samples (those that have the label, of a multi-label task), by modality are `missing` samples,
    `masked_frames`, and `padding` frames that were cut where the source claims no lengths."""

    n: int
    labels: dict[str, int]
    target: TargetStatistics
    text_characters: LengthStatistics
    audio_frames: LengthStatistics
    video_frames: LengthStatistics
    missing: dict[str, int]
    masked_frames: dict[str, int]
    padding: dict[str, int]
    dropped: int
    without_label: int  # of a multi-label task: samples to which no label applies
    shared: int  # samples on whose label annotators disagree; absent where there are none
    questions: dict[
        str, QuestionStatistics
    ]  # of a dataset with several; `labels` and `target` are then those of the first
    folds: dict[str, int]  # only in what ``egmf data show --json`` prints


class FaultGroup(TypedDict):
    """The faults of one kind and `action`: `splits` and `details` are counts; `ids`, `where` the first few."""

    kind: str
    n: int
    splits: dict[str, int]
    ids: list[str]
    where: list[str]
    details: dict[str, int]
    action: str


class DroppedSample(TypedDict):
    """A sample that was left out."""

    split: str
    id: str
    where: str


class DroppedSamples(TypedDict):
    """What ``--drop-bad`` (`mode`) left out, with counts by split."""

    mode: str
    n: dict[str, int]
    samples: list[DroppedSample]


class SourceRecord(TypedDict):
    """Where the samples came from: the format's title, sha256 of each file by its path, the reader's notes."""

    name: str
    files: dict[str, str]
    notes: list[str]


class FeatureStatistics(TypedDict, total=False):
    """Of one modality's features over the valid frames of train; lists have one number per feature.

    `constant` are the features whose deviation is rounding alone. Robust statistics have `median`, `iqr` (interquartile
    range) of `sampled` frames, and `narrow`: features whose quartiles are equal, which mean and deviation standardise.
    """

    frames: int
    mean: list[float]
    deviation: list[float]
    minimum: list[float]
    maximum: list[float]
    constant: list[int]
    median: list[float]
    iqr: list[float]
    narrow: list[int]
    sampled: int


class StandardisationRecord(TypedDict):
    """How features are standardised: `mode` is none, mean or robust; `clip` in deviations; None: no valid frame in train."""

    mode: str
    clip: float | None
    features: dict[str, FeatureStatistics | None]


class DatasetRecord(TypedDict, total=False):
    """The whole file. `task` is the task's definition, or `name` and `questions` where samples have several (format 2), `files` the size in bytes of each Arrow file.

    A record that was read has `format`, `fingerprint`, `task` and `splits`; nothing else of it is checked. One of an earlier
    version has no `standardisation`.
    """

    format: int
    task: dict[str, object]
    fingerprint: str
    zero_frames: str  # what became of frames of zeros inside a clip; absent before 0.2: they count
    widths: dict[str, int]
    rates: dict[str, float | None]
    max_rate: float  # to which streams were resampled, and
    source_rates: dict[str, float | None]  # what they had before; both absent where nothing was asked for
    splits: dict[str, SplitStatistics]
    faults: list[FaultGroup]
    dropped: DroppedSamples
    source: SourceRecord
    files: dict[str, int]
    folds: dict[str, int]  # fold -> samples, in order; where the samples have folds and the one split is "all"
    standardisation: StandardisationRecord
    recipe: RecipeRecord  # by which the features were extracted; absent where that is not known
