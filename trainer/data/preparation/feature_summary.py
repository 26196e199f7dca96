"""What the statistics of a dataset's features say, in a few lines: their scales, constant features, far values."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from trainer.data.preparation.feature_statistics import centre_and_spread
from trainer.data.preparation.record import DatasetRecord, FeatureStatistics

OFFSET = 10.0  # |mean| / deviation above which a feature is listed as far from 0
FAR = 100.0  # deviations between centre and a value, beyond which a feature is warned of
WILD = 1e6  # largest deviation / smallest, beyond which it is said that the features have different units
LISTED = 8  # features named in a line


class FeatureSummary(TypedDict):
    """One modality's features over the valid training frames; features are numbered from 0.

    `offset` have a mean further than 10 deviations from 0, `far` a value further than 100 deviations from the centre;
    `furthest` is the largest such distance (of features that are not constant; None where all are).
    """

    frames: int
    mean: tuple[float, float]
    deviation: tuple[float, float] | None
    constant: list[int]
    narrow: list[int]
    offset: list[int]
    far: list[int]
    furthest: float | None
    statistics: FeatureStatistics


class StandardisationSummary(TypedDict):
    """`mode` is none, mean or robust; None for a dataset of an earlier version, which has no statistics."""

    mode: str | None
    clip: float | None
    features: dict[str, FeatureSummary | None]


def standardisation_json(record: DatasetRecord) -> StandardisationSummary:
    """How features are standardised, and what is remarkable about them; ranges are (smallest, largest)."""
    entry = record.get("standardisation")
    if entry is None:
        return {"mode": None, "clip": None, "features": {}}
    features = {name: None if stats is None else _summary(stats) for name, stats in entry["features"].items()}
    return {"mode": entry["mode"], "clip": entry["clip"], "features": features}


def standardisation_lines(record: DatasetRecord) -> list[str]:
    """The same in words."""
    summary = standardisation_json(record)
    if not any(record["widths"].values()):
        return []
    if summary["mode"] is None:
        return ["features: not standardised (prepared by an earlier version; prepare again to have their statistics)"]
    if summary["mode"] == "none":
        return ["features: not standardised (--standardise=none)"]
    if "folds" in record:
        return [f"features: standardised ({summary['mode']}) by the training frames of each fold that is chosen"]
    by = "mean and deviation" if summary["mode"] == "mean" else "median and interquartile range"
    lines = [f"features: standardised by {by} of train, cut at {summary['clip']:g} deviations"]
    for name, one in summary["features"].items():
        if one is not None:
            lines += _lines(name, one)
        elif record["widths"][name]:
            lines.append(f"warning: {name}: not standardised, train has no valid frame")
    return lines


def _summary(stats: FeatureStatistics) -> FeatureSummary:
    mean_F, deviation_F = np.array(stats["mean"]), np.array(stats["deviation"])
    centre_F, spread_F = centre_and_spread(stats)
    varies_F = np.ones(len(mean_F), dtype=bool)
    varies_F[stats["constant"]] = False
    reach_F = np.maximum(np.array(stats["maximum"]) - centre_F, centre_F - np.array(stats["minimum"])) / spread_F
    some = bool(varies_F.any())
    return {
        "frames": stats["frames"],
        "mean": (float(mean_F.min()), float(mean_F.max())),
        "deviation": (float(deviation_F[varies_F].min()), float(deviation_F[varies_F].max())) if some else None,
        "constant": stats["constant"],
        "narrow": stats.get("narrow", []),
        "offset": np.flatnonzero(varies_F & (np.abs(mean_F) > OFFSET * deviation_F)).tolist(),
        "far": np.flatnonzero(varies_F & (reach_F > FAR)).tolist(),
        "furthest": float(reach_F[varies_F].max()) if some else None,
        "statistics": stats,
    }


def _lines(name: str, one: FeatureSummary) -> list[str]:
    parts = [f"{name}: {one['frames']} frames, means {_range(one['mean'])}"]
    if one["deviation"] is not None:
        parts.append(f"deviations {_range(one['deviation'])}, furthest value {one['furthest']:.3g} deviations")
    for key, words in (
        ("constant", "constant"),
        ("narrow", "with equal quartiles (by mean and deviation)"),
        ("offset", f"with |mean| above {OFFSET:g} deviations"),
    ):
        if one[key]:  # type: ignore[literal-required]
            parts.append(f"{_named(one[key])} {words}")  # type: ignore[literal-required]
    lines = ["; ".join(parts)]
    if one["deviation"] is not None and one["deviation"][1] > WILD * one["deviation"][0]:
        ratio = one["deviation"][1] / one["deviation"][0]
        lines.append(f"warning: {name}: deviations differ by a factor of {ratio:.2g}: are all of these features meant?")
    if one["far"]:
        lines.append(
            f"warning: {name}: {_named(one['far'])} with values beyond {FAR:g} deviations (up to {one['furthest']:.3g}): "
            "see them; --standardise=robust is not moved by few of them"
        )
    return lines


def _range(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3g} to {pair[1]:.3g}"


def _named(features: list[int]) -> str:
    listed = ", ".join(map(str, features[:LISTED])) + (", …" if len(features) > LISTED else "")
    return f"{len(features)} of them ({listed})"
