"""Features of one clip as published, padded and damaged -> the clip's own frames, and which of them count.

Shapes: T frames, F features of a frame.

Published arrays are padded with zero frames behind (CH-SIMS v2, MELD), or in front (CMU-MOSI and CMU-MOSEI as MulT and MMSA
have them), and lengths beside them are sometimes counted wrong: a widespread script writes the index of the first zero
frame. So padding is found on either side, and a length is believed only where no frame beyond it holds anything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

ZeroFrames = Literal["mask", "keep"]  # what becomes of a frame of zeros inside a clip
MASKED = "frames masked"
MISSING = "counted as missing"
KEPT = "all of them kept"
ONE_FRAME = "read as one frame"


class FeatureSequence(NamedTuple):
    """The features of one clip: `values_TF` without padding, `mask_T` False on frames that do not count (None: all do).

    `padding` is the number of zero frames that were cut where the source claims no length.
    """

    values_TF: np.ndarray
    mask_T: np.ndarray | None
    padding: int = 0


class Extent(NamedTuple):
    """The frames `start` to `stop` of an array are the clip's; `contradicted`: the claimed length had cut some of them."""

    start: int
    stop: int
    contradicted: bool = False


def find_extent(filled_T: np.ndarray, length: int | None) -> Extent:
    """Where in a padded array the clip lies.

    Without a length: from the first to the last filled frame. With one: the first `length` frames, if no other frame is
    filled; else the last `length` frames, if these hold all that are filled; else the length is wrong, and the clip lies
    from the first to the last filled frame.

    Args:
        filled_T: whether a frame holds anything but zeros; at least one does.
        length: the frames that the source claims; None where it claims nothing.
    """
    places = np.flatnonzero(filled_T)
    first, stop, total = int(places[0]), int(places[-1]) + 1, len(filled_T)
    if length is None:
        return Extent(first, stop)
    if stop <= length:
        return Extent(0, length)
    if total - length <= first:
        return Extent(total - length, total, contradicted=True)
    return Extent(first, stop, contradicted=True)


def clip_features(
    name: str, array: Any, length: Any, fault: Callable[..., None], zero_frames: ZeroFrames = "mask"
) -> FeatureSequence | None:
    """The clip's frames; None for a missing modality, and where a `fault` without a repair was reported.

    Padding is cut. Frames that hold nan, inf or what float32 cannot hold are masked, and so are, unless they are to be kept,
    frames of zeros inside the clip: extractors write them where they saw no face or heard nothing. A vector [F] is one frame.
    """
    array = np.empty(0) if array is None else np.asarray(array)
    if array.size == 0:
        if length:
            fault(f"length beyond the array in {name}", f"claims {length} frames of an array without any")
        return None
    if array.dtype.kind not in "fiub":
        fault(f"{name} that is no array of numbers", f"dtype {array.dtype}")
        return None
    if array.ndim == 1:
        array, length = array[None], None
        fault(f"one vector for the whole clip in {name}", repair=ONE_FRAME)
    if array.ndim != 2:
        fault(f"wrong dimension of {name}", f"shape {list(array.shape)} instead of [frames, features]")
        return None
    try:
        claimed = None if length is None else operator.index(length)
    except TypeError:
        fault(f"length of {name} that is no whole number", repr(length)[:40])
        return None
    if claimed is not None and claimed < 0:
        fault(f"negative length of {name}", f"{claimed}")
        return None
    if claimed is not None and claimed > len(array):
        fault(f"length beyond the array in {name}", f"claims {claimed} of {len(array)} frames")
        return None
    return _cut(name, array, claimed, fault, zero_frames)


def _cut(
    name: str, array_TF: np.ndarray, claimed: int | None, fault: Callable[..., None], zero_frames: ZeroFrames
) -> FeatureSequence | None:
    filled_T = (array_TF != 0).any(axis=1)  # nan differs from 0
    if not filled_T.any():
        if claimed != 0:
            fault(f"nothing but zeros in {name}", repair=MISSING)
        return None
    if claimed is not None:  # what lies beyond the length and holds no number is padding too
        number_T = filled_T & np.isfinite(array_TF).any(axis=1)
        extent = find_extent(number_T, claimed) if number_T.any() else Extent(0, claimed)
    else:
        extent = find_extent(filled_T, None)
    if extent.start == extent.stop:
        return None
    if extent.contradicted:
        where = "padded in front" if extent.start and extent.stop == len(array_TF) else "length too short"
        fault(f"frames beyond the length in {name}", where, repair=KEPT)
    cut_TF, filled_T = array_TF[extent.start : extent.stop], filled_T[extent.start : extent.stop]
    padding = len(array_TF) - len(cut_TF) if claimed is None else 0
    with np.errstate(over="ignore"):
        values_TF = np.array(cut_TF, dtype=np.float32, order="C")
    finite_T = np.asarray(np.isfinite(values_TF).all(axis=1))
    if not finite_T.all():
        large = np.isfinite(cut_TF[~finite_T].astype(np.float64)).all(axis=1).any()
        if not (finite_T & filled_T).any():
            fault(
                f"no frame in {name} that float32 can hold" if large else f"no finite frame in {name}", repair=MISSING
            )
            return None
        fault(f"more than float32 can hold in {name}" if large else f"nan or inf in {name}", repair=MASKED)
        values_TF[~finite_T] = 0.0
    if zero_frames == "mask" and not filled_T.all():
        fault(f"frames of zeros inside the clip in {name}", repair=MASKED)
        finite_T &= filled_T
    return FeatureSequence(values_TF, None if finite_T.all() else finite_T, padding)
