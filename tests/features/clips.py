"""Small real clips for tests of the extraction: a tone, and a real face or a picture without one, encoded by PyAV."""

from __future__ import annotations

import functools
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np

SOUND_RATE = 16000
SMALL = (
    "audio: {kind: log_mel, rate: 10, bands: 8, pitch: false}\nvideo: {kind: landmarks, rate: 2}\n"  # a quick recipe
)


@functools.cache
def face(size: int = 160) -> np.ndarray:
    """RGB bytes [size, size, 3] of a face."""
    from PIL import Image
    from skimage.data import astronaut

    return np.asarray(Image.fromarray(astronaut()[:300, 80:380]).resize((size, size)))


def tone(seconds: float, pitch: float) -> np.ndarray:
    """A tone with three harmonics, float64 [n], between -0.7 and 0.7."""
    time = np.arange(round(seconds * SOUND_RATE)) / SOUND_RATE
    return sum(0.4 / k * np.sin(2 * np.pi * pitch * k * time) for k in (1, 2, 3)) * 0.95  # type: ignore[no-any-return]


def make_clip(path: Path, seconds: float = 1.0, pitch: float = 200.0, seen: str = "face", rate: int = 10) -> Path:
    """A video file with a tone; `seen` is a face, nothing but grey, or "" for no picture track. With pitch 0 there is no sound track."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=rate) if seen else None
        audio = container.add_stream("aac", rate=SOUND_RATE) if pitch else None
        if video is not None:
            video.width = video.height = 160
            video.pix_fmt = "yuv420p"
            video.codec_context.thread_count = 1
        if audio is not None:
            audio.layout = "mono"
            samples = tone(seconds, pitch).astype(np.float32)
            for start in range(0, len(samples), 1024):
                frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = SOUND_RATE, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
        for k in range(round(seconds * rate)) if video is not None else ():
            picture = np.roll(face(), k % 5, axis=1) if seen == "face" else np.full((160, 160, 3), 90, np.uint8)
            shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            shown.pts = k
            container.mux(video.encode(shown))
        if video is not None:
            container.mux(video.encode(None))
    return path


def make_wav(path: Path, seconds: float = 1.0, pitch: float = 200.0) -> Path:
    """A sound file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SOUND_RATE)
        file.writeframes((tone(seconds, pitch) * 32767).astype("<i2").tobytes())
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative path; locks are left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
