"""Features of one face: head pose, place, openings and distances, and landmarks in the face's own coordinates.

The face's axes are those of a frontal face as it is seen in the picture: x to the picture's right (the person's left), y up, z to the viewer. Right
and left in names are the person's. Unit of all lengths but `size` is the distance of the eyes: that of the middles between their corners, in space.

The pose is the rotation that carries a frontal face to the landmarks: points that the mouth does not move, of MediaPipe's canonical face model (file
`canonical_face_model.obj`), with the weights of its face geometry (`geometry_pipeline_metadata_landmarks.pbtxt`), by Kabsch's method.

Shapes: L = 468 landmarks, R points of the reference, P points whose coordinates are features, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trainer.features.video.crops import LEFT_EYE, RIGHT_EYE

# landmark on the person's right, its mirror image (the same one in the middle), x, y, z in centimetres, weight
_REFERENCE = (
    (4, 4, 0.00, -0.46, 7.59, 0.0709),
    (6, 6, 0.00, 2.47, 5.79, 0.0321),
    (10, 10, 0.00, 8.26, 4.48, 0.0084),
    (33, 263, -4.45, 2.66, 3.17, 0.0587),
    (54, 284, -6.28, 6.62, 1.43, 0.0077),
    (67, 297, -3.52, 8.01, 3.73, 0.0091),
    (117, 346, -5.26, 0.95, 2.97, 0.0098),
    (119, 348, -3.30, 0.86, 3.87, 0.0146),
    (121, 350, -1.82, 1.47, 4.22, 0.0186),
    (127, 356, -7.74, 2.36, -2.01, 0.0052),
    (129, 358, -1.79, -0.98, 4.85, 0.1206),
    (133, 362, -1.86, 2.59, 3.76, 0.0533),
    (143, 372, -6.41, 2.24, 1.56, 0.0148),
    (198, 420, -1.25, 0.23, 5.68, 0.0255),
)
_LIPS = (13, 14)  # inner edges of the upper and the lower lip

# Mean distance of pairs of landmarks in the face's x and y.
DISTANCES: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = (
    ("eye_opening_right", ((160, 144), (159, 145), (158, 153))),
    ("eye_opening_left", ((387, 373), (386, 374), (385, 380))),
    ("brow_gap", ((107, 336),)),
    ("mouth_opening", (_LIPS,)),
    ("mouth_height", ((0, 17),)),
    ("mouth_width", ((61, 291),)),
    ("inner_mouth_width", ((78, 308),)),
    ("upper_lip_thickness", ((0, 13),)),
    ("lower_lip_thickness", ((14, 17),)),
    ("nose_to_upper_lip", ((2, 0),)),
    ("lower_lip_to_chin", ((17, 152),)),
    ("nose_to_chin", ((2, 152),)),
    ("lip_corner_to_eye_right", ((61, 33),)),
    ("lip_corner_to_eye_left", ((291, 263),)),
    ("nose_wing_to_eye_right", ((129, 133),)),
    ("nose_wing_to_eye_left", ((358, 362),)),
    ("nose_width", ((129, 358),)),
)
# How much higher (y, up) the first landmark is than the mean of the others.
HEIGHTS: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    ("brow_inner_height_right", 107, (133,)),
    ("brow_inner_height_left", 336, (362,)),
    ("brow_middle_height_right", 105, RIGHT_EYE),
    ("brow_middle_height_left", 334, LEFT_EYE),
    ("brow_outer_height_right", 70, (33,)),
    ("brow_outer_height_left", 300, (263,)),
    ("lip_corner_height_right", 61, _LIPS),
    ("lip_corner_height_left", 291, _LIPS),
)
POINTS: dict[str, tuple[int, ...]] = {
    "brow_right": (70, 63, 105, 66, 107),
    "brow_left": (336, 296, 334, 293, 300),
    "eye_right": (33, 160, 159, 158, 133, 153, 145, 144),
    "eye_left": (362, 385, 386, 387, 263, 373, 374, 380),
    "lips_outer": (61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91),
    "lips_inner": (78, 80, 81, 13, 311, 310, 308, 318, 402, 14, 178, 88),
    "nose": (168, 1, 2, 129, 358),
    "chin": (176, 152, 400),
    "cheeks": (205, 425),
}
FEATURES: tuple[str, ...] = (
    *("yaw", "pitch", "roll", "x", "y", "size"),
    *(name for name, _ in DISTANCES),
    *(name for name, _, _ in HEIGHTS),
    *(f"{part}_{i}_{axis}" for part, points in POINTS.items() for i in points for axis in "xy"),
)
"""Names of the features, in order.

`yaw`, `pitch`, `roll`: radians; positive where the face turns to the picture's right, looks up, and is turned counter-clockwise in the picture.
`x`, `y`: of the middle between the eyes, from the picture's middle to the right and up, as shares of its width and height (-0.5 to 0.5 inside it).
`size`: distance of the eyes as a share of the picture's longer side.
Then :data:`DISTANCES` and :data:`HEIGHTS`; then x and y of each landmark of :data:`POINTS` from the middle between the eyes, by MediaPipe's number.
Depth is not among them: the model's estimate of it is mainly that of a mean face.
"""

_INDICES = [i for points in POINTS.values() for i in points]
_SIDES = [(i, x, y, z, w) for i, _, x, y, z, w in _REFERENCE] + [
    (j, -x, y, z, w) for i, j, x, y, z, w in _REFERENCE if i != j
]
_BASIS = [side[0] for side in _SIDES]
_BASIS_R3 = np.array([side[1:4] for side in _SIDES])
_WEIGHTS_R = np.array([side[4] for side in _SIDES])
_BASIS_R3 -= np.average(_BASIS_R3, axis=0, weights=_WEIGHTS_R)


class Pose(NamedTuple):
    """Radians, as in :data:`FEATURES`, and the rotation [3, 3] from the face's axes to the picture's (x right, y up, z to the viewer)."""

    yaw: float
    pitch: float
    roll: float
    rotation_33: np.ndarray


def head_pose(points_L3: np.ndarray) -> Pose:
    """The pose of the head, from landmarks in pixels (y downwards, depth smaller nearer to the camera).

    The rotation R minimises the weighted sum of squared distances between R times the reference and the landmarks, both centred (Kabsch 1976). It is
    the product of a turn by `roll` about z, by -`pitch` about x and by `yaw` about y, so turning the picture changes `roll` alone.
    """
    from scipy.spatial.transform import Rotation

    seen_R3 = _upright(points_L3[_BASIS])
    seen_R3 = seen_R3 - np.average(seen_R3, axis=0, weights=_WEIGHTS_R)
    rotation, _ = Rotation.align_vectors(seen_R3, _BASIS_R3, weights=_WEIGHTS_R)
    roll, down, yaw = rotation.as_euler("ZXY")
    return Pose(float(yaw), float(-down), float(roll), rotation.as_matrix())


def face_features(points_L3: np.ndarray, width: int, height: int) -> np.ndarray:
    """The :data:`FEATURES` [F], float32, of landmarks in the pixels of a picture of this width and height."""
    pose = head_pose(points_L3)
    eyes_23 = np.stack([points_L3[list(corners)].mean(axis=0) for corners in (RIGHT_EYE, LEFT_EYE)])
    middle_3 = eyes_23.mean(axis=0)
    distance = float(np.linalg.norm(eyes_23[1] - eyes_23[0]))
    face_L3 = _upright(points_L3 - middle_3) @ pose.rotation_33 / distance
    plane_L2 = face_L3[:, :2]
    values = [
        *(pose.yaw, pose.pitch, pose.roll),
        *(middle_3[0] / width - 0.5, 0.5 - middle_3[1] / height, distance / max(width, height)),
        *(np.mean([np.linalg.norm(plane_L2[i] - plane_L2[j]) for i, j in pairs]) for _, pairs in DISTANCES),
        *(plane_L2[i, 1] - plane_L2[list(others), 1].mean() for _, i, others in HEIGHTS),
    ]
    features_F: np.ndarray = np.concatenate([np.array(values), plane_L2[_INDICES].reshape(-1)]).astype(np.float32)
    return features_F


def _upright(points_P3: np.ndarray) -> np.ndarray:
    """From the picture's axes (y downwards, z from the viewer) to those with y up and z to the viewer."""
    upright_P3: np.ndarray = points_P3 * np.array([1.0, -1.0, -1.0])
    return upright_P3
