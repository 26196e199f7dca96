"""Small media files whose content is known: pictures that carry their number, sound whose pitch tells the second, and damage to both.

    write(path, PictureTrack(times=steady(50, 25)), SoundTrack(tones(2.0)))

The container is that of the path's suffix. What is encoded depends on the versions of the encoders, what it shows does not.

Shapes: n samples, C channels, H height, W width.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

COLUMNS, ROWS = 4, 3  # fields of a numbered picture, one bit each
LOWEST_TONE, TONE_STEP = 400.0, 50.0  # Hz


def number_picture(number: int, width: int, height: int) -> np.ndarray:
    """RGB [H, W, 3] that shows a number below 4096: field i, row by row, is white where bit i is set."""
    field_of_row_H = np.arange(height) * ROWS // height
    field_of_column_W = np.arange(width) * COLUMNS // width
    bit_HW = (number >> (field_of_row_H[:, None] * COLUMNS + field_of_column_W)) & 1
    return np.repeat((bit_HW * 210 + 20).astype(np.uint8)[..., None], 3, axis=2)


def number_of(rgb: np.ndarray) -> int:
    """The number that a picture shows."""
    height, width = rgb.shape[:2]
    middles = [
        (int((r + 0.5) * height / ROWS), int((c + 0.5) * width / COLUMNS)) for r in range(ROWS) for c in range(COLUMNS)
    ]
    return sum(int(rgb[y - 1 : y + 2, x - 1 : x + 2].mean() > 125) << i for i, (y, x) in enumerate(middles))


def corner_picture(number: int, width: int, height: int) -> np.ndarray:
    """RGB [H, W, 3]: red top left, green top right, blue bottom left, white bottom right."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[: height // 2, : width // 2] = 230, 20, 20
    rgb[: height // 2, width // 2 :] = 20, 230, 20
    rgb[height // 2 :, : width // 2] = 20, 20, 230
    rgb[height // 2 :, width // 2 :] = 230, 230, 230
    return rgb


def steady(count: int, rate: float, start: float = 0.0) -> list[float]:
    """Times of `count` pictures at a constant rate."""
    return [start + k / rate for k in range(count)]


def tone_of(second: int) -> float:
    """The frequency of :func:`tones` in a second, in Hz."""
    return LOWEST_TONE + TONE_STEP * (second % 20)


def tones(seconds: float, rate: int = 44100, start: int = 0) -> np.ndarray:
    """[n] samples from second `start` on: in second s a sine of :func:`tone_of` (s), with whole periods."""
    time_n = start + np.arange(round(seconds * rate)) / rate
    frequency_n = LOWEST_TONE + TONE_STEP * (np.floor(time_n) % 20)
    return (0.5 * np.sin(2 * np.pi * frequency_n * time_n)).astype(np.float32)


def frequency_of(samples_n: np.ndarray, rate: int) -> float:
    """The strongest frequency of some sound, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples_n * np.hanning(len(samples_n)), 1 << 17))
    return float(spectrum.argmax() * rate / (1 << 17))


@dataclass(frozen=True)
class PictureTrack:
    """Pictures with their numbers, at `times` in seconds, which are multiples of `time_base`."""

    times: Sequence[float]
    codec: str = "libx264"
    size: tuple[int, int] = (64, 48)  # width, height
    pixels: str = "yuv420p"
    rate: int = 25
    time_base: Fraction | None = None  # None: 1 / rate
    options: dict[str, str] = field(default_factory=dict)
    rotation: float | None = None  # degrees counter-clockwise, by which a player is to turn the picture
    mirrored: bool = False
    aspect: Fraction | None = None  # of a pixel: width to height
    draw: Callable[[int, int, int], np.ndarray] = number_picture


@dataclass(frozen=True)
class SoundTrack:
    """Samples [n] or [C, n] between -1 and 1, from `start` seconds on."""

    samples: np.ndarray
    codec: str = "aac"
    rate: int = 44100
    layout: str = "mono"
    start: float = 0.0
    gap_at: float | None = None  # seconds of sound after which there is a gap
    gap: float = 0.0  # its seconds
    options: dict[str, str] = field(default_factory=dict)


def write(
    path: Path,
    pictures: PictureTrack | None = None,
    sound: SoundTrack | None = None,
    format: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode and write a file; returns its path."""
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        packets = []
        if pictures is not None:
            packets.append(_pictures(container, pictures))
        if sound is not None:
            packets.append(_sound(container, sound))
        encoded = [list(track) for track in packets]
        for packet in sorted((p for track in encoded for p in track), key=lambda p: p.dts * p.time_base):
            container.mux(packet)
    return path


def _pictures(container: av.container.OutputContainer, track: PictureTrack):
    time_base = track.time_base or Fraction(1, track.rate)
    stream = container.add_stream(track.codec, rate=track.rate, options={"threads": "1", **track.options})
    stream.width, stream.height = track.size
    stream.pix_fmt = track.pixels
    stream.codec_context.time_base = time_base
    stream.time_base = time_base
    if track.aspect is not None:
        stream.codec_context.sample_aspect_ratio = track.aspect
    if track.rotation is not None:
        stream.set_display_rotation(track.rotation, hflip=track.mirrored)

    def encode():
        for number, time in enumerate(track.times):
            frame = av.VideoFrame.from_ndarray(track.draw(number, *track.size), "rgb24")
            frame = frame.reformat(format=track.pixels)
            frame.pts, frame.time_base = round(time / time_base), time_base
            yield from stream.encode(frame)
        yield from stream.encode(None)

    return encode()


def _sound(container: av.container.OutputContainer, track: SoundTrack):
    stream = container.add_stream(track.codec, rate=track.rate, layout=track.layout, options=track.options)
    samples = np.atleast_2d(track.samples)

    def encode():
        length = max(track.rate // 10, 4000)
        for first in range(0, samples.shape[1], length):
            piece = np.ascontiguousarray(samples[:, first : first + length].T, np.float32).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(piece, "flt", track.layout)
            late = track.gap if track.gap_at is not None and first / track.rate >= track.gap_at else 0.0
            frame.sample_rate = track.rate
            frame.pts, frame.time_base = first + round((track.start + late) * track.rate), Fraction(1, track.rate)
            yield from stream.encode(frame)
        yield from stream.encode(None)

    return encode()


def hour_long(path: Path, seconds: int = 3600) -> Path:
    """A picture a second and silence, but for the tones of the last 100 seconds."""
    samples = np.zeros(seconds * 8000, np.float32)
    samples[-100 * 8000 :] = tones(100, 8000, start=seconds - 100)
    pictures = PictureTrack(steady(seconds, 1), codec="mpeg4", size=(32, 24), rate=1, options={"g": "12"})
    return write(path, pictures, SoundTrack(samples, codec="flac", rate=8000))


def with_cover(path: Path, mp3: bytes) -> Path:
    """An MP3 with a picture of its cover (ID3 version 2.3)."""
    png = io.BytesIO()
    Image.fromarray(corner_picture(0, 32, 32)).save(png, "png")
    body = b"\0image/png\0\x03\0" + png.getvalue()
    tag = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = bytes((len(tag) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\x03\0\0" + size + tag + mp3)
    return path


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def cut(data: bytes, draw: random.Random) -> bytes:
    """The beginning of a file."""
    return data[: draw.randrange(1, len(data))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Some bytes are others, anywhere."""
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 5, 50, 500))):
        damaged[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(damaged)


def flipped_header(data: bytes, draw: random.Random) -> bytes:
    """Some of the first and last thousand bytes are others: most containers have their tables there."""
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 3, 10))):
        place = draw.randrange(min(1000, len(data)))
        damaged[place if draw.random() < 0.5 else -1 - place] = draw.randrange(256)
    return bytes(damaged)


def hollow(data: bytes, draw: random.Random) -> bytes:
    """A stretch of zeros in the middle."""
    first = draw.randrange(len(data))
    length = min(draw.randrange(1, len(data)), len(data) - first)
    return data[:first] + bytes(length) + data[first + length :]


def removed(data: bytes, draw: random.Random) -> bytes:
    """A stretch is missing from the middle."""
    first = draw.randrange(len(data))
    return data[:first] + data[first + draw.randrange(1, len(data)) :] or data[:1]


def random_bytes(data: bytes, draw: random.Random) -> bytes:
    """Nothing but noise."""
    return draw.randbytes(draw.randrange(1, 50_000))


def other_header(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """The first bytes are those of another file."""
    length = draw.choice((16, 64, 1024))
    return other[:length] + data[length:]


def other_body(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """The header is its own, what follows is another file."""
    length = draw.randrange(1, min(4096, len(data)))
    return data[:length] + other
