"""Which face of each picture of a clip is read.

A track is one face from picture to picture. Faces of successive pictures are matched by overlap and distance of their boxes; the position of a
face says who it is, not its looks, so two people who change places while nobody is found change their tracks too.

Shapes: N faces of a picture, R tracks; a box is left, top, right, bottom in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from scipy.optimize import linear_sum_assignment

Kept = TypeVar("Kept")
LONGEST_GAP = 1.0  # seconds for which a face may be lost and go on as the same track
_MOST_GROWTH = 2.0  # of a face's side, from one picture to the next
_REFUSED = 1e3  # cost of a match that is none


@dataclass
class _Track(Generic[Kept]):
    """One face: where and when it was seen last, the sum of its areas, and what is kept of it by the picture's number."""

    box_4: np.ndarray
    time: float
    area: float
    kept: dict[int, Kept]

    @property
    def rank(self) -> tuple[int, float, int]:
        """The most pictures, then the largest mean area, then the earliest."""
        return len(self.kept), self.area / len(self.kept), -min(self.kept)


class Tracks(Generic[Kept]):
    """Takes the faces of one picture after another, the largest first, and something to keep of each; says at the end which are read."""

    def __init__(self, choose: Literal["largest", "track"]) -> None:
        self._choose = choose
        self._open: list[_Track[Kept]] = []
        self._best: _Track[Kept] | None = None  # of those that have ended
        self._largest: dict[int, Kept] = {}
        self.pictures = 0

    def add(self, time: float, boxes: Sequence[np.ndarray], kept: Sequence[Kept]) -> None:
        """The faces of the next picture, `time` seconds from the clip's beginning."""
        number = self.pictures
        self.pictures += 1
        if self._choose == "largest":
            if kept:
                self._largest[number] = kept[0]
            return
        self._end(time, number)
        pairs = _matches([track.box_4 for track in self._open], boxes)
        for j, (box_4, one) in enumerate(zip(boxes, kept, strict=True)):
            area = float(np.prod(box_4[2:] - box_4[:2]))
            if j in pairs:
                track = self._open[pairs[j]]
                track.box_4, track.time, track.area = box_4, time, track.area + area
                track.kept[number] = one
            else:
                self._open.append(_Track(box_4, time, area, {number: one}))

    def chosen(self) -> dict[int, Kept]:
        """What was kept of the chosen face, by the picture's number: the largest of each, or the track that is seen in most pictures."""
        if self._choose == "largest":
            return self._largest
        tracks = [*self._open, *([self._best] if self._best else [])]
        return max(tracks, key=lambda track: track.rank).kept if tracks else {}

    def _end(self, time: float, number: int) -> None:
        """Close the tracks that were lost for too long; of all those only the best is kept, so that memory stays bounded."""
        still = []
        for track in self._open:
            if time - track.time <= LONGEST_GAP or max(track.kept) == number - 1:
                still.append(track)
            elif self._best is None or track.rank > self._best.rank:
                self._best = track
        self._open = still


def _matches(tracks: Sequence[np.ndarray], faces: Sequence[np.ndarray]) -> dict[int, int]:
    """The track of each face that goes on one, by their places in the lists; the sum of costs is the least.

    The cost of a match is the distance of the centres over the mean side, less intersection over union. A match needs a distance below the mean
    side, and sides that differ by less than :data:`_MOST_GROWTH`.
    """
    if not tracks or not faces:
        return {}
    old_R14, new_N4 = np.stack(tracks)[:, np.newaxis], np.stack(faces)
    old_side_R1, new_side_N = (
        np.sqrt(np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)) for boxes in (old_R14, new_N4)
    )
    side_RN = (old_side_R1 + new_side_N) / 2
    moved_RN2 = (old_R14[..., :2] + old_R14[..., 2:] - new_N4[:, :2] - new_N4[:, 2:]) / 2
    distance_RN = np.linalg.norm(moved_RN2, axis=-1) / side_RN
    common_RN = np.prod(
        np.maximum(np.minimum(old_R14[..., 2:], new_N4[:, 2:]) - np.maximum(old_R14[..., :2], new_N4[:, :2]), 0),
        axis=-1,
    )
    union_RN = old_side_R1**2 + new_side_N**2 - common_RN
    growth_RN = np.maximum(old_side_R1 / new_side_N, new_side_N / old_side_R1)
    allowed_RN = (distance_RN < 1) & (growth_RN < _MOST_GROWTH)
    cost_RN = np.where(allowed_RN, distance_RN - common_RN / union_RN, _REFUSED)
    return {int(j): int(i) for i, j in zip(*linear_sum_assignment(cost_RN), strict=True) if allowed_RN[i, j]}
