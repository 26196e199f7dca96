"""Squares that are cut out of pictures, turned and scaled; and a place to keep many of them.

Coordinates are pixels: (0, 0) is the upper left corner of the upper left pixel, x grows to the right and y downwards.

Shapes: H height and W width of a picture, S side of a square, L = 468 landmarks, P points.
"""

from __future__ import annotations

import math
import tempfile

import numpy as np

RIGHT_EYE, LEFT_EYE, MOUTH = (33, 133), (263, 362), (61, 291)  # corners; right and left are those of the person
# Of MediaPipe's canonical face, in centimetres from its middle: the eyes' and the mouth's middles (x to the right, y downwards), and its height.
_TEMPLATE_32 = np.array([[-3.15, -3.2], [3.15, -3.2], [0.0, 3.77]])
_FACE_HEIGHT = 17.66


def aligned(rgb_HW3: np.ndarray, points_LD: np.ndarray, size: int, margin: float) -> np.ndarray:
    """The face as a square [size, size, 3] of bytes: upright, chin and forehead `margin` of the face's height from the edges.

    The similarity transform (turn, scale, shift) that carries the middles of eyes and mouth to those of a mean face, with the least sum of squared
    distances; bilinear between pixels, the picture's edge is repeated outside of it.
    """
    middles_32 = np.stack([points_LD[list(pair), :2].mean(axis=0) for pair in (RIGHT_EYE, LEFT_EYE, MOUTH)])
    template_32 = size * (0.5 + _TEMPLATE_32 / (_FACE_HEIGHT * (1 + 2 * margin)))
    return warp(rgb_HW3, similarity(template_32, middles_32), size)


def similarity(from_P2: np.ndarray, to_P2: np.ndarray) -> np.ndarray:
    """The matrix [2, 3] of the similarity transform that carries points to others with the least sum of squared distances.

    With points as complex numbers it is z -> a z + b, and a the quotient of the centred points' inner products.
    """
    origin, target = from_P2 @ np.array([1, 1j]), to_P2 @ np.array([1, 1j])
    centred = origin - origin.mean()
    a = np.vdot(centred, target) / np.vdot(centred, centred)
    b = target.mean() - a * origin.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def warp(rgb_HW3: np.ndarray, matrix_23: np.ndarray, size: int) -> np.ndarray:
    """A square [size, size, 3] of bytes whose point (x, y) shows the picture's point matrix @ (x, y, 1).

    Bilinear between pixels; where the square shrinks the picture, whole pixels are averaged first; the picture's edge is repeated outside of it.
    """
    from PIL import Image

    corners_24 = matrix_23 @ np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]])
    zoom = max(1, int(math.sqrt(abs(np.linalg.det(matrix_23[:, :2])))))
    (x0, y0), (x1, y1) = np.floor(corners_24.min(axis=1)) - zoom, np.ceil(corners_24.max(axis=1)) + zoom
    rows = np.arange(int(y0), int(y1)).clip(0, rgb_HW3.shape[0] - 1)
    columns = np.arange(int(x0), int(x1)).clip(0, rgb_HW3.shape[1] - 1)
    region = Image.fromarray(rgb_HW3[rows[:, np.newaxis], columns])
    if zoom > 1:
        region = region.reduce(zoom)
    inner_23 = (matrix_23 - np.array([[0, 0, x0], [0, 0, y0]])) / zoom
    return np.asarray(
        region.transform(
            (size, size), Image.Transform.AFFINE, tuple(inner_23.reshape(6).tolist()), Image.Resampling.BILINEAR
        )
    )


class CropFile:
    """Squares of bytes in a temporary file without a name, so that memory does not grow with a clip's length; numbers name them."""

    def __init__(self, size: int) -> None:
        self._shape = (size, size, 3)
        self._file = tempfile.TemporaryFile(prefix="egmf-crops-")  # noqa: SIM115 - closed by __exit__
        self._count = 0

    def __enter__(self) -> CropFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, crop_SS3: np.ndarray) -> int:
        """Keep one; returns its number."""
        self._file.seek(self._count * math.prod(self._shape))
        self._file.write(np.ascontiguousarray(crop_SS3, np.uint8).tobytes())
        self._count += 1
        return self._count - 1

    def __getitem__(self, number: int) -> np.ndarray:
        length = math.prod(self._shape)
        self._file.seek(number * length)
        return np.frombuffer(self._file.read(length), np.uint8).reshape(self._shape)
