"""Does a damaged media file bring extraction down? Thousands of them through the worker pool that decodes clips.

    python -m benchmarks.fuzz_media [--n 1000] [--seed 0] [--workers 2] [--time-limit 20] [--out JSON]

Good files of many containers and codecs are made, damaged in every way of `tests/features/media_files.py`, and decoded: sound at 16 kHz, pictures at 5 a
second. What a file comes to: fine (nothing to tell), partly (a track missing, cut off, or damaged), unreadable, empty, too long, timed out, crashed.
The last two are told as well, and cost their file alone; exit code 1 where a file is not told, or the whole takes longer than its files' time limits.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.features.types import Clip, ClipError
from trainer.features.worker_pool import run_in_processes

HERE = Path(__file__).parent
MAX_SECONDS = 120.0
OUTCOMES = ("fine", "partly", "truncated", "unreadable", "empty", "too long", "timed out", "crashed")


class Case(NamedTuple):
    """A damaged file."""

    path: Path
    damage: str
    source: str


class Read(NamedTuple):
    """What came out of it."""

    kinds: tuple[str, ...]
    seconds: float


def main() -> int:
    arguments = _arguments()
    from benchmarks.machine import describe, today

    started = time.monotonic()
    table: dict[str, Counter[str]] = {}
    crashes, slowest, untold = Counter[str](), 0.0, 0
    with tempfile.TemporaryDirectory(prefix="fuzz-media") as folder:
        good = _good_files(Path(folder))
        cases = _cases(good, Path(folder), arguments.n, arguments.seed)
        outcomes = run_in_processes(
            decode, cases, workers=arguments.workers, time_limit=arguments.time_limit, memory_limit=2 << 30
        )
        for done, (case, outcome) in enumerate(outcomes, 1):
            table.setdefault(case.damage, Counter())[_word(outcome)] += 1
            if isinstance(outcome, ClipError):
                untold += not str(outcome)
                if outcome.kind in ("crashed", "timed out"):
                    crashes[f"{outcome} ({case.source})"] += 1
            else:
                slowest = max(slowest, outcome.seconds)
            case.path.unlink()
            if done % 100 == 0:
                print(f"{done} files, {time.monotonic() - started:.0f} s", flush=True)
    total: Counter[str] = sum(table.values(), Counter())
    result = {
        "date": today(),
        "command": f"python -m benchmarks.fuzz_media --n {arguments.n} --seed {arguments.seed} "
        f"--workers {arguments.workers} --time-limit {arguments.time_limit:g}",
        "machine": describe("av", "numpy", "Pebble"),
        "good_files": sorted(good),
        "files": sum(total.values()),
        "seconds": round(time.monotonic() - started, 1),
        "slowest_s": round(slowest, 2),
        "not_told": untold,
        "outcomes": {word: total[word] for word in OUTCOMES},
        "by_damage": {
            damage: {word: counts[word] for word in OUTCOMES if counts[word]} for damage, counts in table.items()
        },
        "crashed_or_timed_out": dict(crashes),
    }
    path = arguments.out or HERE / "results" / "fuzz-media.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _show(table, total)
    print(f"{result['files']} files in {result['seconds']} s, the slowest {slowest:.2f} s: {path}")
    return 1 if untold or result["files"] != arguments.n else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def decode(case: Case) -> Read:
    """Sound and pictures of a file, as extraction reads them; in a worker process."""
    from trainer.features.media.clip import read_pictures, read_sound

    started = time.monotonic()
    sound, notes = read_sound(Clip(case.path), 16000, MAX_SECONDS)
    with read_pictures(Clip(case.path), 5.0, MAX_SECONDS) as pictures:
        count = sum(1 for _ in pictures)
    if count != pictures.count:
        raise AssertionError(f"{count} pictures where {pictures.count} were said to come")
    never = {"sound.": {"no picture"}, "pictures.": {"no sound"}}.get(case.source.partition(".")[0] + ".", set())
    kinds = {note.kind for note in (*notes, *pictures.notes)} - never
    if sound is None and not count:
        kinds = {"unreadable"}
    return Read(tuple(sorted(kinds)), time.monotonic() - started)


def _word(outcome: Read | ClipError) -> str:
    if isinstance(outcome, ClipError):
        return outcome.kind
    if not outcome.kinds:
        return "fine"
    return outcome.kinds[0] if outcome.kinds in (("truncated",), ("unreadable",)) else "partly"


def _good_files(folder: Path) -> dict[str, bytes]:
    """Three seconds each of many containers and codecs."""
    from tests.features.media_files import PictureTrack, SoundTrack, steady, tones, write

    times, small = steady(45, 15), {"rate": 15, "options": {"g": "15"}}
    h264 = PictureTrack(times, **small)
    mpeg4, mjpeg = PictureTrack(times, "mpeg4", **small), PictureTrack(times, "mjpeg", pixels="yuvj420p", rate=15)
    vp8 = PictureTrack(times, "libvpx", rate=15, options={"cpu-used": "8", "deadline": "realtime"})
    vp9 = PictureTrack(times, "libvpx-vp9", rate=15, options={"cpu-used": "8", "deadline": "realtime"})
    opus = SoundTrack(tones(3, 48000), "libopus", 48000)
    aac, mp3, pcm, flac = (SoundTrack(tones(3), codec) for codec in ("aac", "libmp3lame", "pcm_s16le", "flac"))
    made = {
        "h264-aac.mp4": (h264, aac, {}),
        "h264-aac-faststart.mp4": (h264, aac, {"movflags": "faststart"}),
        "h264-aac-fragments.mp4": (h264, aac, {"movflags": "frag_keyframe+empty_moov"}),
        "mpeg4-pcm.mov": (mpeg4, pcm, {}),
        "h264-flac.mkv": (h264, flac, {}),
        "vp8-opus.webm": (vp8, opus, {}),
        "vp9-opus.webm": (vp9, opus, {}),
        "mpeg4-mp3.avi": (mpeg4, mp3, {}),
        "mjpeg-pcm.avi": (mjpeg, pcm, {}),
        "mpeg2-mp2.ts": (PictureTrack(steady(75, 25), "mpeg2video"), SoundTrack(tones(3), "mp2"), {}),
        "h264-aac.flv": (h264, aac, {}),
        "sound.mp3": (None, mp3, {}),
        "sound.wav": (None, pcm, {}),
        "sound.flac": (None, flac, {}),
        "sound.ogg": (None, opus, {}),
        "sound.m4a": (None, aac, {}),
        "pictures.mp4": (h264, None, {}),
    }
    files = {}
    for name, (pictures, sound, options) in made.items():
        path = write(folder / name, pictures, sound, options=options)
        files[name] = path.read_bytes()
        path.unlink()
    return files


def _cases(good: dict[str, bytes], folder: Path, count: int, seed: int) -> Iterator[Case]:
    """`count` damaged files, every kind of damage as often."""
    from tests.features import media_files as made

    alone: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "cut off": made.cut,
        "bytes flipped": made.flipped,
        "bytes of headers flipped": made.flipped_header,
        "zeros in the middle": made.hollow,
        "a part removed": made.removed,
        "random bytes": made.random_bytes,
    }
    paired: dict[str, Callable[[bytes, bytes, random.Random], bytes]] = {
        "header of another format": made.other_header,
        "body of another format": made.other_body,
    }
    kinds = [*alone, *paired, "named as another format"]
    names = sorted(good)
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        kind, name, other = kinds[number % len(kinds)], draw.choice(names), draw.choice(names)
        suffix = Path(name).suffix
        if kind in alone:
            data = alone[kind](good[name], draw)
        elif kind in paired:
            data = paired[kind](good[name], good[other], draw)
        else:
            data, suffix = good[name], Path(other).suffix
        path = folder / f"{number}{suffix}"
        path.write_bytes(data)
        yield Case(path, kind, name)


def _show(table: dict[str, Counter[str]], total: Counter[str]) -> None:
    """The table by damage and outcome."""
    words = [word for word in OUTCOMES if total[word]]
    print(f"{'':26}" + "".join(f"{word:>12}" for word in words))
    for damage, counts in [*table.items(), ("all", total)]:
        print(f"{damage:26}" + "".join(f"{counts[word]:12}" for word in words))


if __name__ == "__main__":
    sys.exit(main())
