"""Clips to sound and pictures: any container and codec that FFmpeg reads, by PyAV.

Both are placed by time stamps on one axis, seconds from the clip's beginning. A clip ends at its `end`, or where the file does.

Shapes: n samples, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from trainer.features.media.file import Frames, MediaFile, MediaInfo, TimedFrame, Window, load_av, probe
from trainer.features.types import Clip, ClipError, Note, Picture, Sound

if TYPE_CHECKING:
    import av

__all__ = ["LARGEST_SIDE", "MediaInfo", "Pictures", "probe", "read_pictures", "read_sound"]

LARGEST_SIDE = 1280  # pixels: larger pictures are made smaller, which bounds memory
HOLD = 0.5  # seconds that the first picture is shown early, and the last one longer than it says: tracks rarely begin and end at once
JITTER = 0.04  # seconds between a time stamp of sound and the samples so far that are no gap: stamps are rounded, some to 10 ms or more
ROUNDING = 1e-6  # seconds: a picture that begins at the very time is shown then
MOST_SILENCE = 1000  # samples before a run of sound, to align it
SLOWEST = 1000  # samples a second; less is damage
_ARRAY_FORMATS = ("dbl", "dblp", "flt", "fltp", "s16", "s16p", "s32", "s32p", "u8", "u8p")
UNSPECIFIED_COLORS = 2  # FFmpeg's number of it
_MOST_PLANES = 7  # channels of a planar frame: PyAV reads behind the end of its list of planes where there are more
_MOST_STRETCH = 8  # of a pixel's width to its height; more is damage


def read_sound(clip: Clip, sampling_rate: int, max_seconds: float) -> tuple[Sound | None, list[Note]]:
    """The sound of a clip: the mean of the channels, resampled, `round(seconds · sampling_rate)` samples.

    Sample i is that of the time start + i / sampling_rate, so that a part of a file is that part of the whole. What the track does not cover is silence. None, with a note, where there is no
    track, where it holds nothing between start and end, or where it cannot be decoded and the pictures perhaps can.

    Raises:
        ClipError: `unreadable`, `empty`, or `too long` (longer than `max_seconds`).
    """
    with MediaFile(clip.path) as media:
        if "sound" not in media.tracks:
            return None, [Note("no sound", "audio", "the file has no sound track")]
        if media.tracks["sound"].codec_context is None:
            return None, [media.cannot_decode("sound", "FFmpeg has no decoder for its sound")]
        window = media.window(clip, max_seconds)
        timeline = _Timeline(window, sampling_rate)
        frames = media.frames("sound", window)
        for time, _, frame in frames:
            try:
                timeline.add(time, frame)
            except (load_av().FFmpegError, ValueError):
                frames.damaged += 1
        timeline.close()
        if not timeline.heard:
            if frames.damaged:
                return None, [media.cannot_decode("sound", "nothing of its sound can be decoded")]
            return None, [Note("no sound", "audio", f"the sound track holds nothing {_between(window)}")]
        samples_n = np.nan_to_num(timeline.samples_n, copy=False, nan=0.0, posinf=1.0, neginf=-1.0)
        return Sound(samples_n.clip(-1.0, 1.0, out=samples_n), sampling_rate), _faults("audio", window, frames)


def read_pictures(clip: Clip, rate: float, max_seconds: float) -> Pictures:
    """The pictures of a clip, `rate` of them a second, decoded while they are asked for: see :class:`Pictures`.

    Raises:
        ClipError: `unreadable`, `empty`, or `too long` (longer than `max_seconds`).
    """
    media = MediaFile(clip.path)
    try:
        return Pictures(media, clip, rate, max_seconds)
    except BaseException:
        media.close()
        raise


class Pictures(Iterator[Picture]):
    """Pictures of a clip in the order of time: number k of `count` is the one that is shown at start + (k + 0.5) / rate.

    `count` is the number of these times inside the clip, `max(1, ⌊seconds · rate + 0.5⌋)`, or 0 where there is nothing to see. A picture is shown until the
    next one is. Where none is shown, because the track begins or ends more than :data:`HOLD` seconds away, the picture is black. RGB is upright, with square
    pixels and at most :data:`LARGEST_SIDE` of them on a side; what is transparent is black. Pictures that are shown for long are the same array.

    `notes` are complete when the iteration has ended. :meth:`close` (or `with`) ends it early.
    """

    def __init__(self, media: MediaFile, clip: Clip, rate: float, max_seconds: float) -> None:
        self.rate = rate
        self.count = 0
        self.notes: list[Note] = []
        self._media = media
        self._pictures: Iterator[Picture] = iter(())
        if "picture" not in media.tracks:
            self.notes.append(Note("no picture", "video", "the file has no picture track"))
        elif media.tracks["picture"].codec_context is None:
            self.notes.append(media.cannot_decode("picture", "FFmpeg has no decoder for its pictures"))
        else:
            self._begin(media.window(clip, max_seconds))

    def _begin(self, window: Window) -> None:
        frames = self._media.frames("picture", window)
        count = max(1, int(window.seconds * self.rate + 0.5))
        times = [window.start + (k + 0.5) / self.rate for k in range(count)]
        end = window.ends.get(self._media.tracks["picture"].index, 0.0)
        shown = _shown(frames, times, end)
        first = next(shown, None)
        if first is not None and (first.visible or not frames.ended):
            self.count = count
            self._pictures = self._converted(chain([first], shown), frames, window)
        elif frames.damaged and not frames.decoded:
            self.notes.append(self._media.cannot_decode("picture", "nothing of its pictures can be decoded"))
        else:
            self.notes.append(Note("no picture", "video", f"no picture is shown {_between(window)}"))

    def _converted(self, shown: Iterator[_Shown], frames: Frames, window: Window) -> Iterator[Picture]:
        """RGB of what is shown, each frame converted once."""
        to_rgb = _ToRgb(self._media.tracks["picture"].sample_aspect_ratio)
        frame, rgb, black = None, np.zeros((0, 0, 3), np.uint8), 0
        for k, (timed, visible) in enumerate(shown):
            if timed is not frame:
                frame, rgb = timed, to_rgb(timed.frame)
            black += not visible
            yield Picture((k + 0.5) / self.rate, rgb if visible else np.zeros_like(rgb))
        if black:
            self.notes.append(Note("no picture", "video", f"no picture is shown at {black} of {self.count} times"))
        self.notes += _faults("video", window, frames)

    def __next__(self) -> Picture:
        try:
            return next(self._pictures)
        except StopIteration:
            self._media.close()
            raise
        except load_av().FFmpegError as error:
            self._media.close()
            raise ClipError("unreadable", f"{self._media.path}: a picture cannot be converted ({error})") from error

    def close(self) -> None:
        """End the iteration."""
        self._pictures = iter(())
        self._media.close()

    def __enter__(self) -> Pictures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Shown(NamedTuple):
    """A frame for a time, and whether it is really shown then; else only its size counts."""

    frame: TimedFrame
    visible: bool


def _shown(frames: Iterator[TimedFrame], times: Sequence[float], track_end: float) -> Iterator[_Shown]:
    """For each of the rising `times` the frame that is shown; nothing where there are no frames at all."""
    shown, upcoming = None, next(frames, None)
    for time in times:
        while upcoming is not None and upcoming.time <= time + ROUNDING:
            shown, upcoming = upcoming, next(frames, None)
        if shown is not None:
            yield _Shown(shown, upcoming is not None or time <= max(shown.end, track_end) + HOLD)
        elif upcoming is not None:
            yield _Shown(upcoming, upcoming.time - time <= HOLD)


class _ToRgb:
    """Frames of a track to RGB [H, W, 3]: upright, square pixels, opaque on black; the same bytes on every processor."""

    def __init__(self, aspect: Fraction | None) -> None:
        reformatter = load_av().video.reformatter
        self._aspect = float(aspect) if aspect and 1 / _MOST_STRETCH <= aspect <= _MOST_STRETCH else 1.0
        self._reformatter = reformatter.VideoReformatter()
        kinds = reformatter.Interpolation
        self._interpolation = int(kinds.BILINEAR | kinds.ACCURATE_RND | kinds.FULL_CHR_H_INT | kinds.BITEXACT)

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        if any(part.is_alpha for part in frame.format.components) or frame.format.has_palette:
            rgba = self._convert(frame, "rgba")
            rgb = ((rgba[..., :3] * rgba[..., 3:].astype(np.uint16) + 127) // 255).astype(np.uint8)
        else:
            rgb = self._convert(frame, "rgb24")
        return np.ascontiguousarray(_turned(rgb, _display_matrix(frame)))

    def _convert(self, frame: av.VideoFrame, pixels: str) -> np.ndarray:
        width, height = frame.width * max(1.0, self._aspect), frame.height * max(1.0, 1 / self._aspect)
        shrink = min(1.0, LARGEST_SIDE / max(width, height))
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        try:
            converted = self._reformatter.reformat(frame, *size, pixels, interpolation=self._interpolation, threads=1)
        except (
            load_av().FFmpegError
        ):  # a colour space that FFmpeg does not convert, perhaps damaged: taken for the usual
            frame.colorspace, frame.color_range = UNSPECIFIED_COLORS, 0
            converted = self._reformatter.reformat(frame, *size, pixels, interpolation=self._interpolation, threads=1)
        array: np.ndarray = converted.to_ndarray()
        return array


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """How the frame is meant to be turned: (a, b, c, d), where (x, y) is shown at (a x + c y, b x + d y), y downwards."""
    try:
        kept: Any = frame.side_data
        stored = np.frombuffer(bytes(kept["DISPLAYMATRIX"]), np.int32)
    except (KeyError, ValueError):  # none; or PyAV does not know a kind of side data
        return 1, 0, 0, 1
    a, b, c, d = (float(stored[i]) for i in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (-1 if a < 0 else 1), 0, 0, (-1 if d < 0 else 1)
    return 0, (-1 if b < 0 else 1), (-1 if c < 0 else 1), 0


def _turned(rgb: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A picture as its display matrix says, to the nearest right angle."""
    a, b, c, d = matrix
    if a == 0:  # columns become rows
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


class _Timeline:
    """Samples of a window, into which decoded sound is written where its time stamps say."""

    def __init__(self, window: Window, sampling_rate: int) -> None:
        self.samples_n = np.zeros(max(1, round(window.seconds * sampling_rate)), np.float32)
        self.heard = False  # whether anything was written
        self._start, self._sampling_rate = window.start, sampling_rate
        self._resampler: av.AudioResampler | None = None
        self._rate, self._next, self._place = 0, 0.0, 0

    def add(self, time: float, frame: av.AudioFrame) -> None:
        """Write a frame. What follows without a gap is resampled as one piece."""
        av = load_av()
        if frame.sample_rate < SLOWEST or not frame.samples:
            raise ValueError("not a frame of sound")
        mono = _mono(_mean_of_channels(frame), frame.sample_rate)
        if self._resampler is None or frame.sample_rate != self._rate or abs(time - self._next) > JITTER:
            self.close()
            self._resampler = av.AudioResampler("fltp", "mono", self._sampling_rate)
            self._rate, self._next = frame.sample_rate, time
            if (silence_1n := self._align(time)).size:
                self._write(self._resampler.resample(_mono(silence_1n, self._rate)))
        self._next += frame.samples / frame.sample_rate
        self._write(self._resampler.resample(mono))

    def _align(self, time: float) -> np.ndarray:
        """Silence [1, n] before a run that begins at `time`, so that its samples fall on those of the window: parts equal the whole."""
        cycle = min(self._rate // math.gcd(self._rate, self._sampling_rate), MOST_SILENCE)
        place_n = (time - self._start - np.arange(cycle) / self._rate) * self._sampling_rate
        best = int(np.abs(place_n - place_n.round()).round(6).argmin())
        self._place = round(float(place_n[best]))
        return np.zeros((1, best), np.float32)

    def close(self) -> None:
        """Write what the resampler holds back."""
        if self._resampler is not None:
            self._write(self._resampler.resample(None))
            self._resampler = None

    def _write(self, frames: Sequence[av.AudioFrame | None]) -> None:
        for frame in frames:
            if frame is not None:
                new_n = frame.to_ndarray()[0]
                begin, end = max(self._place, 0), min(self._place + len(new_n), len(self.samples_n))
                if begin < end:
                    self.samples_n[begin:end] = new_n[begin - self._place : end - self._place]
                    self.heard = True
                self._place += len(new_n)


def _mono(samples_1n: np.ndarray, rate: int) -> av.AudioFrame:
    frame: av.AudioFrame = load_av().AudioFrame.from_ndarray(samples_1n, "fltp", "mono")
    frame.sample_rate = rate
    return frame


def _mean_of_channels(frame: av.AudioFrame) -> np.ndarray:
    """float32 [1, n] between -1 and 1 of a frame of any format and layout."""
    channels = frame.layout.nb_channels
    if frame.format.name not in _ARRAY_FORMATS or (frame.format.is_planar and channels > _MOST_PLANES):
        frame = load_av().AudioResampler("flt").resample(frame)[0]
    array: np.ndarray = frame.to_ndarray()
    array = array if frame.format.is_planar else array.reshape(-1, channels).T
    mean_n: np.ndarray = array.mean(axis=0, dtype=np.float64)
    if array.dtype == np.uint8:
        mean_n = (mean_n - 128) / 128
    elif array.dtype.kind == "i":
        mean_n = mean_n / 2.0 ** (8 * array.itemsize - 1)
    mono_1n: np.ndarray = mean_n.astype(np.float32)[None]
    return mono_1n


def _between(window: Window) -> str:
    return f"between {window.start:.2f} and {window.end:.2f} s"


def _faults(modality: Literal["audio", "video"], window: Window, frames: Frames) -> list[Note]:
    """The note on what is missing, where something is."""
    text = "; ".join(part for part in (window.missing, frames.fault) if part)
    return [Note("truncated", modality, text)] if text else []
