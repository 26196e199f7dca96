"""Missing and corrupted modalities of single samples, for evaluation.

What happens to a sample is a function of (seed, sample, modality) only, whatever batch or rank it is in. The draws do not
depend on the rate: what is corrupted at a low rate is corrupted at every higher one, so new draws add no noise to the curves.

Shapes: T frames, F features of a frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from trainer.batch import Sample
from trainer.config import Modality
from trainer.data.dataset import SplitView
from trainer.data.preparation.columns import STREAMS

Mode = Literal["missing", "noise", "frames"]
MEASURED = 2000  # training samples whose features' spread is measured
Spread = Mapping[str, np.ndarray]  # stream -> standard deviation of each of its features


@dataclass(frozen=True)
class Corruption:
    """How the samples of an evaluation are changed.

    Modes: ``missing`` takes the modality away, from a sample with probability `rate`. ``noise`` adds to a frame, with
    probability `rate`, normal noise of every feature's own standard deviation in `spread` (task -> stream -> `[F]`).
    ``frames`` drops a frame with probability `rate`.
    """

    mode: Mode
    modalities: tuple[Modality, ...]
    rate: float
    seed: int = 0
    spread: Mapping[str, Spread] = field(default_factory=dict)

    def __call__(self, task: str, sample: Sample) -> Sample:
        for modality in self.modalities:
            sample = self._one(task, sample, modality)
        return sample

    def _one(self, task: str, sample: Sample, modality: Modality) -> Sample:
        digest = hashlib.sha256(f"{self.mode} {modality} {sample.id}".encode()).digest()
        rng = np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little")])
        if self.mode == "missing":
            if rng.random() >= self.rate:
                return sample
            return replace(sample, text="") if modality == "text" else _with(sample, f"{modality}_TF", None)
        values_TF = getattr(sample, f"{modality}_TF")
        if values_TF is None:
            return sample
        hit_T = rng.random(len(values_TF)) < self.rate
        if self.mode == "noise":
            noise_TF = rng.standard_normal(values_TF.shape) * self.spread[task][modality]
            noisy_TF = (values_TF + np.where(hit_T[:, None], noise_TF, 0.0)).astype(np.float32)
            return _with(sample, f"{modality}_TF", noisy_TF)
        mask_T = getattr(sample, f"{modality}_mask_T")
        left_T = ~hit_T if mask_T is None else ~hit_T & np.asarray(mask_T)
        return _with(sample, f"{modality}_mask_T", left_T)


def _with(sample: Sample, name: str, value: np.ndarray | None) -> Sample:
    changes: dict[str, Any] = {name: value}
    return replace(sample, **changes)


def spread_of(view: SplitView) -> dict[str, np.ndarray]:
    """The standard deviation of every feature of audio and video over the valid frames of at most `MEASURED` samples.

    They are evenly spaced in the split. A modality without any frame has deviations of 0.
    """
    out: dict[str, np.ndarray] = {}
    chosen = np.unique(np.linspace(0, len(view) - 1, min(MEASURED, len(view))).astype(int)).tolist()
    for name in STREAMS:
        count, total_F, square_F = 0, np.zeros(view.widths[name]), np.zeros(view.widths[name])
        for i in chosen:
            sample = view[i]
            values_TF, mask_T = getattr(sample, f"{name}_TF"), getattr(sample, f"{name}_mask_T")
            if values_TF is None:
                continue
            kept = np.asarray(values_TF, dtype=np.float64)[slice(None) if mask_T is None else np.asarray(mask_T)]
            count += len(kept)
            total_F += kept.sum(0)
            square_F += (kept**2).sum(0)
        mean_F = total_F / max(count, 1)
        out[name] = np.sqrt(np.maximum(square_F / max(count, 1) - mean_F**2, 0.0))
    return out
