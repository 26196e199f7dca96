"""Head pose and the features of a face, against known turns and changed pictures."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import transform

from tests.features.face_pictures import MOUTH, NOSE_TIP, astronaut, similarity, warped
from trainer.features.recipe import Face
from trainer.features.video import landmarks
from trainer.features.video.faces import FaceFinder
from trainer.features.video.landmarks import FEATURES, POINTS, face_features, head_pose

OF_THE_FACE = slice(FEATURES.index("eye_opening_right"), None)


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return FaceFinder(Face())


@pytest.fixture(scope="module")
def points(finder: FaceFinder) -> np.ndarray:
    return finder.find(astronaut())[0].points_L3


def features_of(finder: FaceFinder, rgb: np.ndarray) -> dict[str, float]:
    (face,) = finder.find(rgb)
    return dict(zip(FEATURES, face_features(face.points_L3, rgb.shape[1], rgb.shape[0]).tolist(), strict=True))


def turned(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Matrix for axes x right, y up, z to the viewer, from its parts by hand."""
    cos, sin = np.cos, np.sin
    about_y = np.array([[cos(yaw), 0, sin(yaw)], [0, 1, 0], [-sin(yaw), 0, cos(yaw)]])  # +z goes to +x: right
    about_x = np.array([[1, 0, 0], [0, cos(pitch), sin(pitch)], [0, -sin(pitch), cos(pitch)]])  # +z goes to +y: up
    about_z = np.array([[cos(roll), -sin(roll), 0], [sin(roll), cos(roll), 0], [0, 0, 1]])  # +x goes to +y
    return np.asarray(about_z @ about_x @ about_y)


def reference_face() -> np.ndarray:
    """Landmarks, y downwards and depth away from the viewer, of which those of the pose's reference are in its places."""
    random = np.random.default_rng(0)
    face = random.normal(size=(468, 3)) * 5
    for right, left, x, y, z, _ in landmarks._REFERENCE:
        face[right], face[left] = (x, -y, -z), (-x if left != right else x, -y, -z)
    return face


def test_features_are_named_and_as_many_as_a_small_encoder_takes() -> None:
    assert len(set(FEATURES)) == len(FEATURES) == 151
    numbers = [i for part in POINTS.values() for i in part]
    assert len(numbers) == len(set(numbers)) == 60


@pytest.mark.parametrize(
    ("yaw", "pitch", "roll"), [(0, 0, 0), (0.5, 0, 0), (0, -0.4, 0), (0, 0, 0.7), (-0.6, 0.3, -0.5)]
)
def test_pose_of_a_turned_reference(yaw: float, pitch: float, roll: float) -> None:
    flip = np.array([1, -1, -1])
    seen = (37.0 * (reference_face() * flip) @ turned(yaw, pitch, roll).T) * flip + [300, 200, 7]
    pose = head_pose(seen)
    assert (pose.yaw, pose.pitch, pose.roll) == pytest.approx((yaw, pitch, roll), abs=1e-6)
    assert np.allclose(pose.rotation_33, turned(yaw, pitch, roll), atol=1e-6)


def test_features_of_the_face_do_not_see_pose_place_and_size(points: np.ndarray) -> None:
    flip = np.array([1, -1, -1])
    expected = face_features(points, 512, 512)
    moved = (0.6 * (points * flip) @ turned(0.4, -0.2, 0.3).T) * flip + [150, 90, 30]
    again = face_features(moved, 512, 512)
    assert np.allclose(again[OF_THE_FACE], expected[OF_THE_FACE], atol=1e-5)
    assert not np.allclose(again[:3], expected[:3], atol=0.1)
    assert again[5] == pytest.approx(0.6 * expected[5], rel=1e-5)


def test_place_and_openings_by_hand(points: np.ndarray) -> None:
    values = dict(zip(FEATURES, face_features(points, 512, 256).tolist(), strict=True))
    eyes = [points[[33, 133]].mean(axis=0), points[[263, 362]].mean(axis=0)]
    unit = np.linalg.norm(eyes[1] - eyes[0])
    middle = (eyes[0] + eyes[1]) / 2
    assert values["x"] == pytest.approx(middle[0] / 512 - 0.5, abs=1e-6)
    assert values["y"] == pytest.approx(0.5 - middle[1] / 256, abs=1e-6)
    assert values["size"] == pytest.approx(unit / 512, rel=1e-6)
    rotation = head_pose(points).rotation_33
    face = np.array([rotation.T @ (np.array([1, -1, -1]) * (p - middle)) for p in points]) / unit
    assert values["mouth_width"] == pytest.approx(np.hypot(*(face[61] - face[291])[:2]), rel=1e-5)
    opening = np.mean([np.hypot(*(face[i] - face[j])[:2]) for i, j in ((160, 144), (159, 145), (158, 153))])
    assert values["eye_opening_right"] == pytest.approx(opening, rel=1e-5)
    assert values["brow_outer_height_left"] == pytest.approx(face[300, 1] - face[263, 1], rel=1e-5)
    assert values["nose_1_y"] == pytest.approx(face[1, 1], rel=1e-5)
    assert values["brow_left_300_x"] > 0 > values["brow_right_70_x"]
    assert values["chin_152_y"] < values["lips_inner_14_y"] < 0 < values["brow_left_334_y"]
    assert values["brow_middle_height_right"] > 0


@pytest.mark.parametrize("degrees", [-30, -12, 10, 25])
def test_roll_follows_the_picture(finder: FaceFinder, points: np.ndarray, degrees: float) -> None:
    (face,) = finder.find(warped(astronaut(), similarity(1.0, degrees, (0, 40))))
    before, after = head_pose(points), head_pose(face.points_L3)
    assert np.rad2deg(after.roll - before.roll) == pytest.approx(-degrees, abs=3)  # clockwise is negative
    assert np.rad2deg(after.yaw - before.yaw) == pytest.approx(0, abs=4)


def test_mirroring_flips_yaw_and_roll(finder: FaceFinder, points: np.ndarray) -> None:
    tilted = warped(astronaut(), similarity(1.0, 15, (0, 40)))
    ((one,), (other,)) = finder.find(tilted), finder.find(np.ascontiguousarray(tilted[:, ::-1]))
    pose, mirrored = head_pose(one.points_L3), head_pose(other.points_L3)
    assert np.rad2deg(mirrored.yaw) == pytest.approx(-np.rad2deg(pose.yaw), abs=3)
    assert np.rad2deg(mirrored.roll) == pytest.approx(-np.rad2deg(pose.roll), abs=3)
    assert np.rad2deg(mirrored.pitch) == pytest.approx(np.rad2deg(pose.pitch), abs=3)


def test_mouth_opens_with_the_lower_lip(finder: FaceFinder) -> None:
    """Below the mouth's line pixels move down, most in its middle; between, they are stretched."""
    opened = []
    for most in (0.0, 6.0, 12.0):

        def source(xy: np.ndarray, most: float = most) -> np.ndarray:
            x, y = xy[:, 0], xy[:, 1]
            below = np.clip((y - MOUTH[1]) / (most + 4), 0, 1)
            fades = np.exp(-(((x - MOUTH[0]) / 45) ** 4)) * np.clip((230 - y) / 40, 0, 1)
            return np.column_stack([x, y - most * below * fades])

        rgb = transform.warp(astronaut(), source, order=1)
        opened.append(features_of(finder, (rgb * 255).astype(np.uint8)))
    for name in ("mouth_opening", "mouth_height", "nose_to_chin"):
        values = [one[name] for one in opened]
        assert values[0] < values[1] < values[2], name
    assert opened[2]["mouth_opening"] > opened[0]["mouth_opening"] + 0.05
    assert opened[2]["eye_opening_left"] == pytest.approx(opened[0]["eye_opening_left"], abs=0.02)


def test_place_and_size_follow_the_picture(finder: FaceFinder) -> None:
    rgb = warped(astronaut(), similarity(0.7, 0, (100, 200)), (600, 800))
    here, there = features_of(finder, astronaut()), features_of(finder, rgb)
    assert there["size"] * 800 == pytest.approx(0.7 * here["size"] * 512, rel=0.05)
    x, y = here["x"] * 512 + 256, 256 - here["y"] * 512
    assert (there["x"] + 0.5) * 800 == pytest.approx(0.7 * (x - NOSE_TIP[0]) + NOSE_TIP[0] + 100, abs=3)
    assert (0.5 - there["y"]) * 600 == pytest.approx(0.7 * (y - NOSE_TIP[1]) + NOSE_TIP[1] + 200, abs=3)
