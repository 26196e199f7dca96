"""Pictures of a clip to the features of its video: landmarks of a face, or a vision encoder's output of faces or whole pictures.

Memory does not grow with the size of the pictures times their number: of each picture only landmark features or the crops of its faces are kept, the
crops in a temporary file.

Shapes: T frames of features, F features, H height and W width of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from trainer.features.recipe import Face, Landmarks, VideoEncoder
from trainer.features.types import ModalityFeatures, Note, Picture
from trainer.features.video.crops import CropFile, aligned
from trainer.features.video.faces import FaceFinder, FoundFace
from trainer.features.video.landmarks import FEATURES, face_features
from trainer.features.video.tracks import Tracks

if TYPE_CHECKING:
    import torch

    from trainer.features.video.encoder import VisionEncoder

WINDOW_RATE = 8.0  # pictures a second inside a video encoder's windows, where the recipe has none
Kept = TypeVar("Kept")


class VideoFeatures(Protocol):
    """Turns the pictures of a clip into features.

    Attributes:
        width: features of a frame.
        rate: frames of features a second.
        picture_rate: pictures a second that it wants; `rate`, but for encoders of windows.
    """

    width: int
    rate: float
    picture_rate: float

    def __call__(self, pictures: Iterable[Picture], count: int) -> ModalityFeatures:
        """Features of a clip of `count` pictures, picture k being that of the time (k + 0.5) / picture_rate.

        Frame t is that of the time (t + 0.5) / rate; of a clip with a picture there is at least one. Frames are 0 and not valid where there is no face, and where the pictures end before `count`.
        One note of kind `no face` says in how many pictures none was found.
        """
        ...


def video_features(section: Landmarks | VideoEncoder, device: str = "cpu") -> VideoFeatures:
    """The way from pictures to features that a recipe's section describes; models are loaded here.

    Raises:
        ValueError: a package is missing, or the encoder cannot be used.
    """
    return LandmarkFeatures(section) if isinstance(section, Landmarks) else EncoderFeatures(section, device)


class LandmarkFeatures:
    """The features of :mod:`trainer.features.video.landmarks`, one frame a picture."""

    def __init__(self, section: Landmarks) -> None:
        self.width, self.rate, self.picture_rate = len(FEATURES), section.rate, section.rate
        self._finder = FaceFinder(section.face)

    def __call__(self, pictures: Iterable[Picture], count: int) -> ModalityFeatures:
        def keep(rgb_HW3: np.ndarray, face: FoundFace) -> np.ndarray:
            return face_features(face.points_L3, rgb_HW3.shape[1], rgb_HW3.shape[0])

        chosen, seen = _chosen_faces(self._finder, pictures, count, keep)
        values_TF, valid_T = np.zeros((count, self.width), np.float32), np.zeros(count, bool)
        for k, features_F in chosen.items():
            values_TF[k], valid_T[k] = features_F, True
        return ModalityFeatures(values_TF, valid_T, _notes(len(chosen), seen))


class EncoderFeatures:
    """A vision encoder's output for each picture, or for the window of pictures around each frame's time; of faces, or of whole pictures."""

    def __init__(self, section: VideoEncoder, device: str) -> None:
        from trainer.features.video.encoder import VisionEncoder

        self._face = section.face
        self._finder = None if section.face is None else FaceFinder(section.face)
        self._encoder = VisionEncoder(section, device)
        self.width, self.rate, self.picture_rate = self._encoder.width, section.rate, section.rate
        if self._encoder.window is not None:
            self.picture_rate = section.window_rate or WINDOW_RATE
        elif section.window_rate is not None:
            raise ValueError(f"video.window_rate: {section.name} reads single pictures: leave it out")

    def __call__(self, pictures: Iterable[Picture], count: int) -> ModalityFeatures:
        pictures = iter(pictures)
        with ExitStack() as stack:
            notes: tuple[Note, ...] = ()
            shown: Iterator[np.ndarray | None] = (picture.rgb for _, picture in _first(pictures, count))
            if self._finder is not None and self._face is not None:
                shown, notes = self._faces(self._finder, self._face, pictures, count, stack)
            prepared = (None if rgb_HW3 is None else self._encoder.prepare(rgb_HW3) for rgb_HW3 in shown)
            if self._encoder.window is None:
                frames: Iterable[tuple[int, torch.Tensor]] = (
                    (k, pixels) for k, pixels in enumerate(prepared) if pixels is not None
                )
                length = count
            else:
                step = self.picture_rate / self.rate
                length = frames_in(count, step)
                frames = _stacked(windows(prepared, count, step, self._encoder.window))
            values_TF, valid_T = _encode(self._encoder, frames, length)
        for _ in pictures:  # the source may have something to tell at its end
            pass
        return ModalityFeatures(values_TF, valid_T, notes)

    def _faces(
        self, finder: FaceFinder, face: Face, pictures: Iterable[Picture], count: int, stack: ExitStack
    ) -> tuple[Iterator[np.ndarray | None], tuple[Note, ...]]:
        """The aligned crop of the chosen face of each picture that was seen, None where there is none; and the note."""
        crops = stack.enter_context(CropFile(face.size))

        def keep(rgb_HW3: np.ndarray, found: FoundFace) -> int:
            return crops.add(aligned(rgb_HW3, found.points_L3, face.size, face.margin))

        chosen, seen = _chosen_faces(finder, pictures, count, keep)
        return (crops[chosen[k]] if k in chosen else None for k in range(seen)), _notes(len(chosen), seen)


def frames_in(count: int, step: float) -> int:
    """How many frames `count` pictures make where one comes every `step` pictures: at least one, and those whose middle is inside."""
    return max(1, math.floor(count / step + 0.5)) if count else 0


def windows(pictures: Iterable[Kept | None], count: int, step: float, size: int) -> Iterator[tuple[int, list[Kept]]]:
    """For each frame of a clip of `count` pictures its number and its window of `size` pictures; only the pictures of a window are held.

    The window of frame t is centred at (t + 0.5) * step pictures from the beginning; the first and the last picture are repeated outside of the clip.
    A picture without a face (None) is replaced by the nearest one of the window that has one, the earlier of two. A window is left out where more
    than half of its pictures are None, or where the pictures ended before its middle.
    """
    stream = iter(pictures)
    held: dict[int, Kept | None] = {}
    read, ended = 0, False
    for t in range(frames_in(count, step)):
        middle = (t + 0.5) * step
        first = math.floor(middle - size / 2 + 0.5)
        while not ended and read < first + size:
            try:
                held[read] = next(stream)
            except StopIteration:
                ended = True
            else:
                read += 1
                if read - 2 < first:
                    held.pop(read - 2, None)
        if min(math.floor(middle), count - 1) >= read:
            return
        places = [min(max(k, 0), read - 1) for k in range(first, first + size)]
        for k in [k for k in held if k < places[0]]:
            del held[k]
        there = [i for i, k in enumerate(places) if held[k] is not None]
        if 2 * len(there) >= size:
            nearest = (min(there, key=lambda j: (abs(j - i), j)) for i in range(size))
            window = [held[places[j]] for j in nearest]
            yield t, [one for one in window if one is not None]


def _stacked(windows_of_pixels: Iterable[tuple[int, list[torch.Tensor]]]) -> Iterator[tuple[int, torch.Tensor]]:
    import torch

    return ((t, torch.stack(pixels)) for t, pixels in windows_of_pixels)


def _encode(
    encoder: VisionEncoder, frames: Iterable[tuple[int, torch.Tensor]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Values [T, F] and validity [T]; as many frames as the encoder's batch are held at a time."""
    values_TF, valid_T = np.zeros((length, encoder.width), np.float32), np.zeros(length, bool)
    waiting: list[tuple[int, torch.Tensor]] = []

    def flush() -> None:
        if waiting:
            at = [t for t, _ in waiting]
            values_TF[at], valid_T[at] = encoder([pixels for _, pixels in waiting]), True
            waiting.clear()

    for frame in frames:
        waiting.append(frame)
        if len(waiting) == encoder.batch:
            flush()
    flush()
    return values_TF, valid_T


def _chosen_faces(
    finder: FaceFinder, pictures: Iterable[Picture], count: int, keep: Callable[[np.ndarray, FoundFace], Kept]
) -> tuple[dict[int, Kept], int]:
    """What `keep` makes of the chosen face by the picture's number, and how many pictures there were."""
    tracks: Tracks[Kept] = Tracks(finder.face.choose)
    for _, picture in _first(pictures, count):
        faces = finder.find(picture.rgb)
        tracks.add(picture.time, [face.detection.box_4 for face in faces], [keep(picture.rgb, face) for face in faces])
    return tracks.chosen(), tracks.pictures


def _first(pictures: Iterable[Picture], count: int) -> Iterator[tuple[int, Picture]]:
    """The first `count` pictures, numbered; the source is read to its end, where it may have something to tell."""
    return ((k, picture) for k, picture in enumerate(pictures) if k < count)


def _notes(found: int, seen: int) -> tuple[Note, ...]:
    if found == seen:
        return ()
    return (Note("no face", "video", f"in {seen - found} of {seen} pictures"),)
