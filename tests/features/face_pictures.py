"""Pictures of a real face, transformed by scikit-image, whose true places are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from skimage import data, transform

from trainer.features.types import Picture

# Of the astronaut (512 x 512), in pixels, measured by eye.
EYES, NOSE_TIP = ((203, 101), (247, 103)), (225, 127)
MOUTH, BETWEEN_LIP_CORNERS = (223, 146), (224, 140)


def astronaut() -> np.ndarray:
    return np.asarray(data.astronaut())


def warped(rgb: np.ndarray, forward: Any, shape: tuple[int, int] | None = None) -> np.ndarray:
    """`rgb` with each point carried by the transform `forward`, on gray."""
    out = transform.warp(rgb, forward.inverse, output_shape=shape or rgb.shape[:2], order=1, cval=0.5)
    return np.asarray((out * 255).round().astype(np.uint8))


def similarity(scale: float, degrees: float, shift: tuple[float, float], about: tuple[float, float] = NOSE_TIP) -> Any:
    """Scaled and turned about a point (clockwise as one sees it), then shifted."""
    to_origin = transform.SimilarityTransform(translation=(-about[0], -about[1]))
    turned = transform.SimilarityTransform(scale=scale, rotation=np.deg2rad(degrees))
    back = transform.SimilarityTransform(translation=(about[0] + shift[0], about[1] + shift[1]))
    return to_origin + turned + back


def least_squares_similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The matrix [2, 3] (a, -b, c; b, a, d) that carries points nearest to others, as a linear system in a, b, c, d."""
    rows, values = [], []
    for (x, y), (to_x, to_y) in zip(source, target, strict=True):
        rows += [(x, -y, 1, 0), (y, x, 0, 1)]
        values += [to_x, to_y]
    a, b, c, d = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0]
    return np.array([[a, -b, c], [b, a, d]])


def place_on(canvas: np.ndarray, face: np.ndarray, x: int, y: int) -> np.ndarray:
    out = canvas.copy()
    out[y : y + face.shape[0], x : x + face.shape[1]] = face
    return out


def head(size: int) -> np.ndarray:
    """The astronaut's head, as a square of `size` pixels."""
    square = astronaut()[:230, 110:340]
    return np.asarray((transform.resize(square, (size, size), anti_aliasing=True) * 255).astype(np.uint8))


def pictures(shown: Sequence[np.ndarray], rate: float) -> Iterator[Picture]:
    return (Picture((k + 0.5) / rate, rgb) for k, rgb in enumerate(shown))
