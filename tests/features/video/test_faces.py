"""Faces are found where they are, and stay found when the picture is moved, scaled, turned, brightened, mirrored or partly covered."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from skimage import data, transform

from tests.features.face_pictures import (
    BETWEEN_LIP_CORNERS,
    EYES,
    MOUTH,
    NOSE_TIP,
    astronaut,
    head,
    least_squares_similarity,
    place_on,
    similarity,
    warped,
)
from trainer.features.recipe import Face
from trainer.features.video import crops, faces
from trainer.features.video.faces import FaceFinder

EYE_DISTANCE = float(np.hypot(*np.subtract(*EYES)))


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return FaceFinder(Face())


@pytest.fixture(scope="module")
def found(finder: FaceFinder) -> faces.FoundFace:
    (face,) = finder.find(astronaut())
    return face


def brute_overlap(a: np.ndarray, b: np.ndarray) -> float:
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - across * down
    return float(across * down / total)


def middle(points: np.ndarray, pair: tuple[int, int]) -> np.ndarray:
    return np.asarray(points[list(pair), :2].mean(axis=0))


@pytest.mark.parametrize("detector", ["short_range", "full_range"])
def test_face_is_where_it_is_seen(detector: str) -> None:
    (detection,) = FaceFinder(Face(detector=detector)).detect(np.ascontiguousarray(astronaut()[:300, 80:380]))
    left, top, right, bottom = detection.box_4 + np.array([80, 0, 80, 0])
    assert left < EYES[0][0] < EYES[1][0] < right
    assert top < EYES[0][1] < MOUTH[1] < bottom
    assert 60 < right - left < 150
    truth = np.array([*EYES, NOSE_TIP, MOUTH])
    assert np.abs(detection.key_points_K2[:4] + np.array([80, 0]) - truth).max() < 0.25 * EYE_DISTANCE
    assert 0.5 <= detection.score <= 1


def test_landmarks_are_where_they_are_seen(found: faces.FoundFace) -> None:
    for pair, truth in ((crops.RIGHT_EYE, EYES[0]), (crops.LEFT_EYE, EYES[1]), (crops.MOUTH, BETWEEN_LIP_CORNERS)):
        assert np.linalg.norm(middle(found.points_L3, pair) - truth) < 0.05 * EYE_DISTANCE
    assert np.linalg.norm(found.points_L3[1, :2] - NOSE_TIP) < 0.1 * EYE_DISTANCE
    assert found.points_L3[1, 2] < found.points_L3[[234, 454], 2].min()  # the nose is nearer than the ears
    assert found.presence > 0.9


@pytest.mark.parametrize(
    ("scale", "degrees", "shift", "shape"),
    [
        (1.0, 0, (120, 60), (512, 512)),
        (1.0, 0, (200, 100), (600, 800)),
        (0.6, 0, (0, 0), (512, 512)),
        (2.0, 0, (100, 150), (720, 720)),
        (4.0, 0, (400, 500), (1080, 1400)),
        (1.0, 15, (0, 0), (512, 512)),
        (1.3, -25, (40, 40), (512, 640)),
        (1.0, 30, (20, 60), (512, 512)),
    ],
)
def test_face_moves_with_the_picture(
    finder: FaceFinder,
    found: faces.FoundFace,
    scale: float,
    degrees: float,
    shift: tuple[int, int],
    shape: tuple[int, int],
) -> None:
    forward = similarity(scale, degrees, shift)
    (moved,) = finder.find(warped(astronaut(), forward, shape))
    box = moved.detection.box_4
    centre = forward.inverse((box[:2] + box[2:])[np.newaxis] / 2)[0]
    half = (box[2:] - box[:2]) / scale / 2
    assert brute_overlap(np.concatenate([centre - half, centre + half]), found.detection.box_4) > 0.7
    back = forward.inverse(moved.points_L3[:, :2])
    errors = np.linalg.norm(back - found.points_L3[:, :2], axis=1)
    assert errors.mean() < 0.03 * EYE_DISTANCE
    assert np.abs(moved.points_L3[:, 2] / scale - found.points_L3[:, 2]).mean() < 0.06 * EYE_DISTANCE


@pytest.mark.parametrize(("degrees", "shift", "shape"), [(0, (400, 200), (720, 1280)), (40, (20, 60), (512, 512))])
def test_landmarks_need_the_face_more_than_its_box(
    finder: FaceFinder, found: faces.FoundFace, degrees: int, shift: tuple[int, int], shape: tuple[int, int]
) -> None:
    """Of a face of 15 pixels in the detector's input, and of one that is turned far, the box is rough; the landmarks are not."""
    forward = similarity(1.0, degrees, shift)
    (face,) = finder.find(warped(astronaut(), forward, shape))
    errors = np.linalg.norm(forward.inverse(face.points_L3[:, :2]) - found.points_L3[:, :2], axis=1)
    assert errors.mean() < 0.05 * EYE_DISTANCE


@pytest.mark.parametrize("light", [0.5, 1.4])
def test_light_changes_little(finder: FaceFinder, found: faces.FoundFace, light: float) -> None:
    (face,) = finder.find((astronaut() * light).clip(0, 255).astype(np.uint8))
    assert brute_overlap(face.detection.box_4, found.detection.box_4) > 0.7
    assert np.linalg.norm(face.points_L3[:, :2] - found.points_L3[:, :2], axis=1).mean() < 0.03 * EYE_DISTANCE


def test_mirrored(finder: FaceFinder, found: faces.FoundFace) -> None:
    (face,) = finder.find(np.ascontiguousarray(astronaut()[:, ::-1]))
    left, top, right, bottom = face.detection.box_4
    assert brute_overlap(np.array([512 - right, top, 512 - left, bottom]), found.detection.box_4) > 0.7
    errors = np.abs(512 - face.points_L3[[133, 362, 61, 291, 1], 0] - found.points_L3[[362, 133, 291, 61, 1], 0])
    assert errors[:4].max() < 0.05 * EYE_DISTANCE
    assert errors[4] < 0.1 * EYE_DISTANCE  # the model's nose tip lies a little to one side


@pytest.mark.parametrize("covered", [(slice(135, 165), slice(200, 250)), (slice(85, 120), slice(225, 280))])
def test_partly_covered(finder: FaceFinder, found: faces.FoundFace, covered: tuple[slice, slice]) -> None:
    """A hand's width over the mouth or over one eye."""
    rgb = astronaut().copy()
    rgb[covered] = (90, 110, 90)
    (detection,) = finder.detect(rgb)
    assert brute_overlap(detection.box_4, found.detection.box_4) > 0.7


def test_two_faces_the_largest_first() -> None:
    canvas = np.full((480, 640, 3), 127, np.uint8)
    both = place_on(place_on(canvas, head(150), 40, 200), head(260), 340, 100)
    found = FaceFinder(Face(choose="track")).find(both)
    assert len(found) == 2
    assert found[0].points_L3[1, 0] > 340 > 190 > found[1].points_L3[1, 0]
    assert found[0].detection.area > found[1].detection.area
    (largest,) = FaceFinder(Face(choose="largest")).find(both)
    assert np.array_equal(largest.points_L3, found[0].points_L3)


def test_no_face(finder: FaceFinder) -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (240, 320, 3), dtype=np.uint8)
    empty = [np.full((height, width, 3), 90, np.uint8) for height, width in ((1, 1), (8, 300), (200, 3))]
    for rgb in (np.asarray(data.coffee()), noise, *empty):
        assert finder.find(rgb) == []


def test_anchors_cover_the_grids_that_mediapipe_publishes() -> None:
    """896 of the short range model in 4 layers (strides 8, 16, 16, 16; 2 anchors each), 2304 of the full range model (stride 4)."""
    expected = []
    for cells, repeats in ((16, 2), (8, 6)):
        for y in range(cells):
            for x in range(cells):
                expected += [((x + 0.5) / cells, (y + 0.5) / cells)] * repeats
    assert len(expected) == 896
    assert np.allclose(faces.anchors(128, ((8, 2), (16, 6))), expected, atol=1e-12)
    full = faces.anchors(192, ((4, 1),))
    assert full.shape == (2304, 2)
    assert np.allclose(full[49], (1.5 / 48, 1.5 / 48))


def test_decoding_by_hand() -> None:
    raw = np.array([[3.0, -6.0, 20.0, 10.0, *range(12)]])
    boxes, points = faces.decode(raw, np.array([[0.5, 0.25]]), 128)
    assert np.allclose(boxes, [[64 + 3 - 10, 32 - 6 - 5, 64 + 3 + 10, 32 - 6 + 5]])
    assert np.allclose(points[0], [(64 + 2 * i, 32 + 2 * i + 1) for i in range(6)])


def test_merging_equals_a_plain_loop() -> None:
    random = np.random.default_rng(1)
    corners = random.uniform(0, 60, (40, 1, 2))
    coordinates = np.concatenate([corners, corners + random.uniform(10, 30, (40, 1, 2)), random.random((40, 6, 2))], 1)
    scores = random.uniform(0.5, 1, 40)
    rest = sorted(range(40), key=lambda i: -scores[i])
    expected = []
    while rest:
        best = coordinates[rest[0], :2].ravel()
        group = [i for i in rest if brute_overlap(best, coordinates[i, :2].ravel()) > 0.3]
        total = sum(scores[i] for i in group)
        expected.append((sum(scores[i] * coordinates[i] for i in group) / total, scores[group[0]]))
        rest = [i for i in rest if i not in group]
    merged = faces.merge_overlapping(coordinates, scores)
    assert 1 < len(merged) == len(expected) < 40
    for (mean, score), (true_mean, true_score) in zip(merged, expected, strict=True):
        assert np.allclose(mean, true_mean, atol=1e-10)
        assert score == true_score


def test_letterbox_maps_back(finder: FaceFinder) -> None:
    rgb = np.zeros((300, 500, 3), np.uint8)
    rgb[200:240, 100:140] = 255  # a bright square with its middle at (120, 220)
    square, shrink, offset = faces.letterbox(rgb, 192)
    weight = square[..., 0].astype(float)
    ys, xs = np.mgrid[:192, :192] + 0.5
    centre = np.array([(weight * xs).sum(), (weight * ys).sum()]) / weight.sum()
    assert np.allclose((centre - offset) / shrink, (120, 220), atol=0.6)


@pytest.mark.parametrize("zoom", [0.7, 1.0, 3.4])
def test_warp_equals_scikit_image(zoom: float) -> None:
    """Of a smooth picture, also outside of it, where the edge is repeated."""
    ys, xs = np.mgrid[:200, :300]
    smooth = np.stack([xs / 300, ys / 200, (np.sin(xs / 40) + 1) / 2], axis=-1)
    rgb = (smooth * 255).round().astype(np.uint8)
    matrix = np.array([[zoom * 0.9, -zoom * 0.43, 60.0], [zoom * 0.43, zoom * 0.9, -20.0]])
    ours = crops.warp(rgb, matrix, 64)
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # scikit-image counts from the middles of pixels
    indices = np.linalg.inv(half) @ np.vstack([matrix, [0, 0, 1]]) @ half
    theirs = transform.warp(rgb, transform.AffineTransform(indices), output_shape=(64, 64), order=1, mode="edge") * 255
    assert np.abs(ours - theirs).max() < 4


def test_similarity_is_that_of_least_squares() -> None:
    random = np.random.default_rng(2)
    source, target = random.normal(size=(5, 2)), random.normal(size=(5, 2))
    assert np.allclose(crops.similarity(source, target), least_squares_similarity(source, target), atol=1e-10)


def test_aligned_face_is_where_the_best_similarity_puts_it(finder: FaceFinder) -> None:
    """Middles of eyes and mouth as near as a similarity can bring them to those of a mean face, whatever the picture's turn and scale."""
    unit = 256 / (17.66 * 1.5)  # pixels a centimetre
    template = 128 + unit * np.array([[-3.15, -3.2], [3.15, -3.2], [0, 3.77]])
    pairs = (crops.RIGHT_EYE, crops.LEFT_EYE, crops.MOUTH)
    for scale, degrees in ((1.0, 0), (1.6, 20), (0.8, -30)):
        rgb = warped(astronaut(), similarity(scale, degrees, (60, 60)), (600, 640))
        (face,) = finder.find(rgb)
        square = crops.aligned(rgb, face.points_L3, 256, 0.25)
        assert square.shape == (256, 256, 3)
        (again,) = finder.find(square)
        before, after = (np.stack([middle(one.points_L3, pair) for pair in pairs]) for one in (face, again))
        matrix = least_squares_similarity(before, template)
        expected = before @ matrix[:, :2].T + matrix[:, 2]
        assert np.abs(after - expected).max() < 4
        assert abs(np.rad2deg(np.arctan2(*(after[1] - after[0])[::-1]))) < 3


def test_crops_come_back_from_their_file() -> None:
    random = np.random.default_rng(3)
    squares = [random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(20)]
    with crops.CropFile(32) as file:
        numbers = [file.add(square) for square in squares]
        for i in reversed(range(20)):
            assert np.array_equal(file[numbers[i]], squares[i])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'egmf-trainer\[clips\]' and pip install --no-deps face-detect"):
        FaceFinder(Face())
