"""From the plan of a spoken clip (:mod:`trainer.data.generated.spoken`) to its media file: speech, moving face, encoding.

Shapes: n samples of sound, N pictures, G x H corners of a mesh.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.generated.spoken import ClipPlan

if TYPE_CHECKING:
    from PIL.Image import Image

SPEECH_RATE = 22050  # Hz, of espeak-ng
WAYS = {"rising": 1.0, "falling": -1.0, "level": 0.0}
DEPTH = 22.0  # of a cue: by how much either half is lower or higher, on espeak-ng's scale of pitch, on which 50 are an octave
SWELL = (
    8.0  # dB of a cue: by how much the sentence begins softer (rising) or louder (falling), and ends louder or softer
)
UNEVEN = 2.5  # standard deviation from word to word, on the same scale
LEVEL = 2.5  # against the fall of every statement, which espeak-ng speaks by itself: by how much the halves of a level one are apart from its middle
SWING = (0.07, 0.1)  # of a nod or shake: farthest way from the middle, as a share of the picture's height
BEATS = (1.0, 1.5)  # nods or shakes a second
SYLLABLES = 4.0  # a second: how often the mouth opens while the voice is heard; its opening follows no loudness, which the voice's cue is told by too
DRIFT = 0.015  # of a head that is still, as a share of the picture's height
TURN = 0.9  # the way of the features within the face, as a share of the way of the head

# of the photo, in pixels: the middle of the face, the line between the lips, the chin, half the mouth's width
FACE = (224.0, 122.0)
LIPS, CHIN, MOUTH_WIDTH = 143.0, 188.0, 24.0
CROP = 230.0  # height of what is shown, where the face is neither nearer nor farther
EDGE = 96  # pixels by which the photo is continued on all sides
CELL = 12  # pixels of the picture, of a cell of the mesh


def make_clip(plan: ClipPlan, path: Path) -> None:
    """Write the clip under a temporary name, then rename.

    Raises:
        ValueError: espeak-ng cannot speak it.
    """
    sound_n = make_sound(plan)
    times_N = picture_times(plan, len(sound_n) / SPEECH_RATE)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        encode(temporary, plan, sound_n, times_N, pictures(plan, sound_n, times_N))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ── speech ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _generator(plan: ClipPlan, part: int) -> np.random.Generator:
    """Its own random numbers for each part of a clip, so that none depends on how many another draws."""
    return np.random.default_rng([*plan.seed, part])


def pitch_of_words(plan: ClipPlan) -> list[int]:
    """The pitch of each word, on espeak-ng's scale: the speaker's own, lower and higher by the cue, and not quite even."""
    words = plan.text.split()
    lengths = np.array([len(word) + 1.0 for word in words])
    middle = (np.cumsum(lengths) - lengths / 2) / lengths.sum()  # of each word, as a share of the sentence
    shift = (WAYS[plan.voice] * DEPTH + LEVEL) * np.clip((middle - 0.5) * 4, -1, 1)
    uneven = _generator(plan, 0).normal(0, UNEVEN, len(words)).clip(-2 * UNEVEN, 2 * UNEVEN)
    return [round(plan.speaker.pitch + a + b) for a, b in zip(shift, uneven, strict=True)]


def speak(plan: ClipPlan) -> np.ndarray:
    """The sentence as float32 [n] at 22050 Hz, without the silence at its ends, its largest sample 1.

    Raises:
        ValueError: espeak-ng fails or says nothing.
    """
    speaker = plan.speaker
    words = zip(pitch_of_words(plan), plan.text.split(), strict=True)
    said = " ".join(f'<prosody pitch="{pitch}" range="{speaker.range}">{word}</prosody>' for pitch, word in words)
    command = ["espeak-ng", "-m", "-v", speaker.voice, "-p", str(speaker.pitch), "-s", str(speaker.rate), "--stdin"]
    done = subprocess.run([*command, "--stdout"], input=f"<speak>{said}</speak>".encode(), capture_output=True)
    start = done.stdout.find(b"data") + 8  # the header does not know the length of what follows
    samples_n = np.frombuffer(done.stdout[start : len(done.stdout) - (len(done.stdout) - start) % 2], "<i2")
    loud: np.ndarray = np.flatnonzero(np.abs(samples_n.astype(np.int32)) > 300)
    if done.returncode or len(loud) < SPEECH_RATE // 2:
        reason = done.stderr.decode(errors="replace").strip() or "no sound"
        raise ValueError(f"espeak-ng cannot speak {plan.text!r} with voice {speaker.voice}: {reason}")
    samples_n = samples_n[loud[0] : loud[-1] + 1].astype(np.float32)
    samples_n /= np.abs(samples_n).max()
    return samples_n


def make_sound(plan: ClipPlan) -> np.ndarray:
    """What is heard, float32 [n] at 22050 Hz: a moment of silence, the sentence, silence; more or less loud, with noise."""
    rng = _generator(plan, 1)
    before, after = (int(s * SPEECH_RATE) for s in rng.uniform(0.1, 0.35, 2))
    level, noise = 10 ** (rng.uniform(-14, -2) / 20), 10 ** (rng.uniform(-62, -46) / 20)
    spoken_n = speak(plan)
    spoken_n *= 10 ** (WAYS[plan.voice] * SWELL * np.linspace(-1, 1, len(spoken_n)) / 20)
    sound_n = np.pad(spoken_n / np.abs(spoken_n).max(), (before, after)) * level
    return (sound_n + noise * rng.standard_normal(len(sound_n))).clip(-1, 1).astype(np.float32)


# ── face ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Poses:
    """Of each picture: where the face's middle is, right and below of the picture's, as a share of the picture's height; the turn of the features within
    the face, right and down, and the mouth's opening, in pixels of the photo; the roll, clockwise, in radians; the size."""

    x_N: np.ndarray
    y_N: np.ndarray
    turn_x_N: np.ndarray
    turn_y_N: np.ndarray
    mouth_N: np.ndarray
    roll_N: np.ndarray
    zoom_N: np.ndarray


def picture_times(plan: ClipPlan, seconds: float) -> np.ndarray:
    """When pictures are shown, in seconds, from 0; at a variable rate in whole milliseconds, 33 to 100 apart."""
    if plan.rate is not None:
        return np.arange(math.ceil(seconds * plan.rate)) / plan.rate
    steps = _generator(plan, 2).integers(33, 101, math.ceil(seconds / 0.033))
    times = np.concatenate([[0], np.cumsum(steps)])
    return times[times < seconds * 1000] / 1000


def make_poses(plan: ClipPlan, sound_n: np.ndarray, times_N: np.ndarray) -> Poses:
    """How the head is held at each time: the cue, and what every head does."""
    rng = _generator(plan, 3)
    seconds = len(sound_n) / SPEECH_RATE

    def drift(size: float) -> np.ndarray:
        return size * np.sin(2 * np.pi * (rng.uniform(0.15, 0.35) * times_N + rng.random()))

    x_N, y_N = rng.uniform(-0.05, 0.05) + drift(DRIFT), rng.uniform(-0.03, 0.05) + drift(DRIFT)
    roll_N, zoom_N = rng.normal(0, 0.04) + drift(0.02), rng.uniform(0.88, 1.12) + drift(0.02)
    swing, beats, start, fade = rng.uniform(*SWING), rng.uniform(*BEATS), rng.uniform(0.0, 0.3), 0.25
    inside_N = np.clip((times_N - start) / fade, 0, 1) * np.clip((seconds - times_N) / fade, 0, 1)
    cue_N = swing * inside_N * np.sin(2 * np.pi * beats * (times_N - start)) * rng.choice([-1.0, 1.0])
    aside_N, down_N = cue_N * (plan.movement == "shake"), cue_N * (plan.movement == "nod")
    before, after = _generator(plan, 1).uniform(0.1, 0.35, 2)  # as in make_sound
    speaks_N = (times_N >= before) & (times_N < seconds - after)
    syllables_N = np.abs(np.sin(np.pi * SYLLABLES * (times_N + rng.random())))
    return Poses(
        x_N=x_N + aside_N,
        y_N=y_N + down_N,
        turn_x_N=TURN * CROP * 0.5 * aside_N,
        turn_y_N=TURN * CROP * 0.5 * down_N,
        mouth_N=rng.uniform(5.0, 9.0) * syllables_N * speaks_N,
        roll_N=roll_N,
        zoom_N=zoom_N,
    )


@functools.cache
def _photo() -> np.ndarray:
    """The portrait, RGB bytes, continued by :data:`EDGE` pixels on all sides."""
    from skimage.data import astronaut

    photo_HW3: np.ndarray = astronaut()  # type: ignore[no-untyped-call]
    return np.pad(photo_HW3, ((EDGE, EDGE), (EDGE, EDGE), (0, 0)), mode="edge")


def _look(plan: ClipPlan, brightness: float) -> tuple[Image, float]:
    """The photo as the speaker looks, and where in it the face's middle is, from the left."""
    from PIL import Image, ImageOps

    image = Image.fromarray(_photo())
    middle = FACE[0] + EDGE
    if plan.speaker.mirrored:
        image, middle = ImageOps.mirror(image), image.width - middle
    levels = np.arange(256)[None] * np.array(plan.speaker.tone)[:, None] * brightness
    return image.point(levels.clip(0, 255).round().astype(int).ravel().tolist()), middle


def pictures(plan: ClipPlan, sound_n: np.ndarray, times_N: np.ndarray) -> Iterator[Image]:
    """The pictures of a clip, one for each time."""
    from PIL import Image, ImageDraw

    rng = _generator(plan, 4)
    photo, middle = _look(plan, float(rng.uniform(0.65, 1.25)))
    poses = make_poses(plan, sound_n, times_N)
    size = (round(plan.height * 4 / 3 / 16) * 16, plan.height)
    columns, rows = (np.linspace(0, n, round(n / CELL) + 1).round().astype(int) for n in size)
    bar = _bar(rng, size) if rng.random() < 0.25 else None
    hidden = rng.uniform(0.2, 0.7) * times_N[-1] if rng.random() < 0.1 else math.inf
    grey = tuple(int(value) for value in rng.integers(30, 200, 3))
    for k, time in enumerate(times_N):
        corners_GH2 = _corners(poses, k, size, columns, rows, middle)
        quads = np.concatenate(
            [corners_GH2[:-1, :-1], corners_GH2[1:, :-1], corners_GH2[1:, 1:], corners_GH2[:-1, 1:]], -1
        ).reshape(-1, 8)
        boxes = [(x0, y0, x1, y1) for y0, y1 in itertools.pairwise(rows)
                 for x0, x1 in itertools.pairwise(columns)]  # fmt: skip
        mesh = [(tuple(map(int, box)), tuple(quad)) for box, quad in zip(boxes, quads.tolist(), strict=True)]
        picture = photo.transform(size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
        if bar is not None:
            ImageDraw.Draw(picture).rectangle(bar, fill=grey)
        if hidden <= time < hidden + 0.3:
            ImageDraw.Draw(picture).rectangle((0.15 * size[0], 0, 0.85 * size[0], size[1]), fill=grey)
        yield picture


def _bar(rng: np.random.Generator, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A bar in front of one side of the face or below the mouth: left, top, right, bottom in pixels."""
    width, height = size
    near, wide = rng.uniform(0.15, 0.2) * height, rng.uniform(0.06, 0.12) * height
    side = rng.integers(3)
    if side == 2:
        return 0, 0.5 * height + 1.2 * near, width, 0.5 * height + 1.2 * near + wide
    left = width / 2 + near if side else width / 2 - near - wide
    return left, 0.2 * height, left + wide, height


def _corners(
    poses: Poses, k: int, size: tuple[int, int], columns: np.ndarray, rows: np.ndarray, middle: float
) -> np.ndarray:
    """Where in the photo the corners of picture k's mesh lie, [G, H, 2].

    A corner (x, y) of the picture is, before the features turn and the mouth opens, at  m + s R (x - x_face, y - y_face),  with m the face's middle in the photo, s
    the pixels of the photo in a pixel of the picture, and R the rotation back by the roll.
    """
    width, height = size
    x_GH, y_GH = np.meshgrid(columns.astype(float), rows.astype(float))
    scale = CROP / height / poses.zoom_N[k]
    u_GH = (x_GH - width / 2 - poses.x_N[k] * height) * scale
    v_GH = (y_GH - height / 2 - poses.y_N[k] * height) * scale
    cos, sin = math.cos(poses.roll_N[k]), math.sin(poses.roll_N[k])
    u_GH, v_GH = cos * u_GH + sin * v_GH, cos * v_GH - sin * u_GH
    near_GH = np.exp(-(u_GH**2 + v_GH**2) / (2 * 32.0**2))
    u_GH, v_GH = u_GH - near_GH * poses.turn_x_N[k], v_GH - near_GH * poses.turn_y_N[k]
    below_GH = v_GH - (LIPS - FACE[1])  # of the line between the lips
    opening = poses.mouth_N[k]
    moved_GH = np.clip(below_GH / (6 + opening), 0, 1) * np.clip((CHIN + 12 - LIPS - below_GH) / 20, 0, 1)
    v_GH = v_GH - opening * moved_GH * np.exp(-((u_GH / MOUTH_WIDTH) ** 2) / 2)
    return np.stack([u_GH + middle, v_GH + FACE[1] + EDGE], -1)


# ── encoding ────────────────────────────────────────────────────────────────────────────────────────────────────────

VIDEO_OPTIONS = {
    "libx264": {"preset": "ultrafast", "crf": "23"},
    "libvpx": {
        "deadline": "realtime",
        "cpu-used": "-8",
    },  # by a positive speed, its quality depends on how busy the machine is
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "mpeg4": {},
}


def encode(path: Path, plan: ClipPlan, sound_n: np.ndarray, times_N: np.ndarray, shown: Iterator[Any]) -> None:
    """Write sound and pictures to one file, by one thread and without what differs from run to run (dates, identifiers)."""
    import av

    form = plan.format
    base = Fraction(1, 1000) if plan.rate is None else Fraction(1, plan.rate)
    with av.open(str(path), "w", format=form.container, container_options={"fflags": "+bitexact"}) as out:
        video: Any = out.add_stream(
            form.video, rate=plan.rate or 30, options=dict(VIDEO_OPTIONS[form.video]), time_base=base
        )
        video.height, video.width = plan.height, round(plan.height * 4 / 3 / 16) * 16
        video.pix_fmt, video.bit_rate = "yuv420p", 900_000
        video.codec_context.thread_count = 1
        audio: Any = out.add_stream(
            form.audio, rate=plan.sampling_rate, layout="mono" if plan.channels == 1 else "stereo"
        )
        for time, picture in zip(times_N, shown, strict=True):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            out.mux(video.encode(frame))
        out.mux(video.encode())
        samples = av.AudioFrame.from_ndarray((sound_n * 32767).astype(np.int16)[None], format="s16", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = SPEECH_RATE, 0, Fraction(1, SPEECH_RATE)
        out.mux(audio.encode(samples))
        out.mux(audio.encode())
