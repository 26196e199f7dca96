"""Generated clips: real speech and a real face in media files, whose label is told by voice, by face, or by both together.

A clip shows a portrait (scikit-image's photo of Eileen Collins) that moves, and speaks a neutral sentence (espeak-ng; English, German,
French). It has one of two labels, sure or unsure, and one of three kinds:

- *voice*: the second half of the sentence is spoken lower and softer than the first (falling: sure) or higher and louder (rising: unsure). The
  face is still.
- *face*: the head nods (moves up and down: sure) or shakes (left and right: unsure). The voice stays level.
- *both*: the voice falls or rises, and the head nods or shakes. They agree (falling with nodding, rising with shaking: sure) or differ
  (unsure): either alone says nothing, and no sum of what each says alone is right for all four.

What tells nothing varies. A speaker has a voice, a base pitch, a rate and a look of its own, and speaks in one split only: speakers' base
pitches lie further apart than the two halves of a sentence. The mouth opens and closes while the voice is heard, however loud it is; the head drifts, turns and comes
nearer; pictures are darker or brighter, a bar covers a part of some faces, and a few are hidden for a moment. Containers, codecs, picture
sizes, frame rates (also variable), sampling rates, channels, loudness and noise are drawn for each clip.

Clips come in groups of 12, each kind with each combination of cues the same number of times, and a group has one sentence: in every kind each
sentence is spoken as often with either label (exactly, where the size of a split is a multiple of 12).

What a clip shows and says is a function of version, seed and sizes; the bytes of the files depend on the versions of espeak-ng, scikit-image,
Pillow, PyAV and its FFmpeg as well.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from trainer.data.preparation.prepare import Progress
from trainer.data.preparation.worker_pool import worker_pool
from trainer.files import load_json, new_file, write_json

VERSION = 1
Kind = Literal["voice", "face", "both"]
Voice = Literal["falling", "rising", "level"]
Movement = Literal["nod", "shake", "still"]
KINDS: tuple[Kind, ...] = ("voice", "face", "both")
SIZES = {"train": 960, "valid": 96, "test": 240}
MANIFEST, PLANTED, CORPUS = "manifest.jsonl", "planted.jsonl", "corpus.json"

VOICES = {"en": ("en-us", "en-gb", "en-gb-scotland"), "de": ("de",), "fr": ("fr-fr", "fr-be")}
VARIANTS = ("f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m6", "m7")
SPEAKERS = {"train": 8, "valid": 3, "test": 4}  # of each language
SENTENCES = {
    "en": (
        "the table stands next to the window",
        "they will be here at seven",
        "the train leaves from platform four",
        "he put the book on the shelf",
    ),
    "de": ("das Buch liegt auf dem Tisch", "der Zug kommt um sieben Uhr", "sie hat den Brief gelesen"),
    "fr": ("le livre est sur la table", "le train arrive à sept heures", "elle a lu la lettre ce matin"),
}
HEIGHTS = (160, 192, 240)
RATES = (15, 25, 30, None)  # pictures a second; None: variable


class Format(NamedTuple):
    """A container and the codecs inside, by FFmpeg's names; `variable`: whether it can hold a variable frame rate."""

    suffix: str
    container: str
    video: str
    audio: str
    sampling_rates: tuple[int, ...]
    variable: bool = True


FORMATS = (
    Format("mp4", "mp4", "libx264", "aac", (22050, 44100, 48000)),
    Format("mkv", "matroska", "libx264", "libopus", (48000,)),
    Format("mkv", "matroska", "mpeg4", "flac", (22050, 44100)),
    Format("webm", "webm", "libvpx", "libopus", (48000,)),
    Format("webm", "webm", "libvpx-vp9", "libopus", (48000,)),
    Format("avi", "avi", "mpeg4", "libmp3lame", (22050, 44100), variable=False),
)


@dataclass(frozen=True)
class Speaker:
    """A voice and a look.

    `pitch` and `rate` are espeak-ng's (0 to 99, an octave is 50; words a minute), `range` is how far the pitch moves within a word, on the same scale as
    espeak-ng's default of 50. The portrait is `mirrored` or not, and its red, green and blue multiplied by `tone`.
    """

    name: str
    language: str
    voice: str
    pitch: int
    rate: int
    range: int
    mirrored: bool
    tone: tuple[float, float, float]


@dataclass(frozen=True)
class ClipPlan:
    """What one clip is to hold; the rest is drawn from `seed` by :mod:`trainer.data.generated.spoken_media`."""

    id: str
    split: str
    text: str
    label: str
    kind: Kind
    voice: Voice
    movement: Movement
    speaker: Speaker
    format: Format
    sampling_rate: int
    channels: int
    height: int
    rate: int | None
    seed: tuple[int, ...]

    @property
    def file(self) -> str:
        return f"{self.id}.{self.format.suffix}"


Cell = tuple[Kind, Voice, Movement]
CELLS: tuple[Cell, ...] = (  # any first few are as even as they can be
    ("voice", "falling", "still"), ("face", "level", "nod"), ("both", "falling", "nod"),
    ("voice", "rising", "still"), ("face", "level", "shake"), ("both", "falling", "shake"),
    ("voice", "falling", "still"), ("face", "level", "nod"), ("both", "rising", "shake"),
    ("voice", "rising", "still"), ("face", "level", "shake"), ("both", "rising", "nod"),
)  # fmt: skip


def label_of(kind: Kind, voice: Voice, movement: Movement) -> str:
    """The label that a clip of `kind` has by its cues."""
    said = {"voice": voice == "falling", "face": movement == "nod", "both": (voice == "falling") == (movement == "nod")}
    return "sure" if said[kind] else "unsure"


def plan_clips(seed: int, sizes: Mapping[str, int]) -> list[ClipPlan]:
    """All clips of a corpus, split by split: a function of version, seed and sizes.

    Raises:
        ValueError: a split that is none of train, valid, test, or of less than 12 clips (every kind with every combination of cues).
    """
    if other := set(sizes) - set(SIZES):
        raise ValueError(f"spoken clips have the splits {', '.join(SIZES)}, not {', '.join(sorted(other))}")
    if small := {split: n for split, n in sizes.items() if n < len(CELLS)}:
        raise ValueError(f"too few clips to hold every kind and label: {small}; {len(CELLS)} at least")
    return [plan for split, n in sizes.items() for plan in _plan_split(seed, split, n)]


def _plan_split(seed: int, split: str, n: int) -> Iterator[ClipPlan]:
    number = zlib.crc32(split.encode())
    rng = np.random.default_rng([VERSION, seed, number])
    speakers = {language: _speakers(rng, split, language) for language in VOICES}
    sentences = [(language, text) for language, texts in SENTENCES.items() for text in texts]
    chosen = [sentences[i] for _ in range(-(-n // 12 // len(sentences)) + 1) for i in rng.permutation(len(sentences))]
    turns = {name: rng.permutation(n) for name in ("format", "height", "rate")}  # evenly, and apart from the cells
    for i, place in enumerate(rng.permutation(n)):
        kind, voice, movement = CELLS[place % len(CELLS)]
        language, text = chosen[place // len(CELLS)]
        form = FORMATS[turns["format"][i] % len(FORMATS)]
        rate = RATES[turns["rate"][i] % len(RATES)]
        yield ClipPlan(
            id=f"{split}-{i:05d}",
            split=split,
            text=text,
            label=label_of(kind, voice, movement),
            kind=kind,
            voice=voice,
            movement=movement,
            speaker=speakers[language][int(rng.integers(len(speakers[language])))],
            format=form,
            sampling_rate=int(rng.choice(form.sampling_rates)),
            channels=int(rng.integers(1, 3)),
            height=HEIGHTS[turns["height"][i] % len(HEIGHTS)],
            rate=25 if rate is None and not form.variable else rate,
            seed=(VERSION, seed, number, i),
        )


def _speakers(rng: np.random.Generator, split: str, language: str) -> list[Speaker]:
    out = []
    for k in range(SPEAKERS[split]):
        red, green, blue = rng.uniform(0.85, 1.15, 3)
        out.append(
            Speaker(
                name=f"{split}-{language}-{k}",
                language=language,
                voice=f"{rng.choice(VOICES[language])}+{VARIANTS[int(rng.integers(len(VARIANTS)))]}",
                pitch=int(rng.integers(46, 59)),
                rate=int(rng.integers(155, 191)),
                range=int(rng.integers(15, 41)),
                mirrored=bool(rng.random() < 0.5),
                tone=(float(red), float(green), float(blue)),
            )
        )
    return out


def generate_clips(
    out: Path,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write the media files to the folder `out`, and beside them `manifest.jsonl`, which is returned.

    Rows of the manifest have clip, id, text, label, split, speaker and kind. `planted.jsonl` has all that was chosen for each clip, cues
    included. An interrupted generation goes on where it was; `workers` processes do not change the result.
    `progress(split, done, total)` is called after each clip.

    Raises:
        ValueError: espeak-ng or a package is missing, sizes under 12, or `out` holds something else.
    """
    sizes = SIZES if sizes is None else sizes
    plans = plan_clips(seed, sizes)
    check_requirements()
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, {"version": VERSION, "seed": seed, "sizes": dict(sizes)})
    totals, done = dict(sizes), dict.fromkeys(sizes, 0)

    def tick(plan: ClipPlan) -> None:
        done[plan.split] += 1
        if progress is not None:
            progress(plan.split, done[plan.split], totals[plan.split])

    missing = []
    for plan in plans:
        if (out / plan.file).is_file():
            tick(plan)
        else:
            missing.append(plan)
    if missing:
        from trainer.data.generated.spoken_media import make_clip

        with worker_pool(min(workers, len(missing))) as pool:
            jobs = {pool.submit(make_clip, plan, out / plan.file): plan for plan in missing}
            for job in as_completed(jobs):
                job.result()
                tick(jobs[job])
    with new_file(out / PLANTED) as file:
        file.writelines(json.dumps(asdict(plan), ensure_ascii=False) + "\n" for plan in plans)
    with new_file(out / MANIFEST) as file:
        file.writelines(json.dumps(_row(plan), ensure_ascii=False) + "\n" for plan in plans)
    return out / MANIFEST


def _row(plan: ClipPlan) -> dict[str, str]:
    return {
        "clip": plan.file,
        "id": plan.id,
        "text": plan.text,
        "label": plan.label,
        "split": plan.split,
        "speaker": plan.speaker.name,
        "kind": plan.kind,
    }


def _claim(out: Path, corpus: dict[str, object]) -> None:
    """Have the folder hold this corpus and no other."""
    path = out / CORPUS
    if path.is_file():
        there = load_json(path.read_text(encoding="utf-8"))
        if there != corpus:
            raise ValueError(f"{out} holds other clips ({there}, now {corpus}): remove it, or choose another folder")
    elif any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no generated clips: choose another folder")
    else:
        write_json(path, corpus)


def check_requirements() -> None:
    """Have all that generation needs.

    Raises:
        ValueError: what is missing, all of it, and how it is installed.
    """
    needed = {"av": "pip install 'egmf-trainer[clips]'", "PIL": "pip install 'egmf-trainer[clips]'"}
    needed["skimage"] = "pip install scikit-image (its portrait is the face)"
    faults = [f"the package {name}: {how}" for name, how in needed.items() if importlib.util.find_spec(name) is None]
    if shutil.which("espeak-ng") is None:
        faults.append("the program espeak-ng, which speaks: apt-get install espeak-ng")
    if faults:
        raise ValueError("\n".join(["spoken clips cannot be generated here. Missing:", *(f"  {f}" for f in faults)]))
