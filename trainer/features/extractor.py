"""One clip to all its features, by one recipe; and many clips in processes that may die. Everything that decodes or encodes is called from here."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainer.features.extraction_folder import ArrayRecord, NoteRecord, RowRecord, empty_row, write_array
from trainer.features.recipe import Recipe, Transcribed
from trainer.features.types import Clip, ClipError, ClipFeatures, ModalityFeatures, Note, Sound, Told, Word

if TYPE_CHECKING:
    from trainer.features.audio.features import AudioFeatures
    from trainer.features.audio.transcribe import Transcriber
    from trainer.features.video.features import VideoFeatures

MODALITIES = ("audio", "video")
_OF_THE_CLIP: tuple[Told, ...] = (
    "too long",
    "empty",
)  # what is wrong with a clip as a whole, whichever stream showed it


class Extractor:
    """The encoders of one recipe, loaded once; :meth:`extract` is called for every clip."""

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        """Load what the recipe needs.

        Raises:
            ValueError: a package or weights that are missing; the message says what to do.
        """
        from trainer.features.audio.features import audio_features
        from trainer.features.audio.transcribe import Transcriber
        from trainer.features.video.features import video_features

        self.recipe = recipe
        self._audio: AudioFeatures | None = None if recipe.audio is None else audio_features(recipe.audio, device)
        self._video: VideoFeatures | None = None if recipe.video is None else video_features(recipe.video, device)
        self._transcriber: Transcriber | None = None
        if isinstance(recipe.text, Transcribed):
            self._transcriber = Transcriber(recipe.text, device)

    @property
    def rates(self) -> dict[str, float]:
        """Modality -> frames a second."""
        parts = {"audio": self._audio, "video": self._video}
        return {name: float(part.rate) for name, part in parts.items() if part is not None}

    def extract(self, clip: Clip, text: str | None) -> ClipFeatures:
        """All that the recipe takes from a clip; `text` is given by the user, or None.

        A modality of which no frame is valid is missing. One stream that cannot be decoded is told, and the others go on.

        Raises:
            ClipError: the clip as a whole cannot be used, or none of the streams that the recipe reads can be decoded.
        """
        notes: list[Note] = []
        troubles: list[ClipError] = []
        sounds: dict[int, Sound | None] = {}
        audio = video = None
        words: Sequence[Word] = ()
        heard: str | None = None
        tried = 0
        if self._audio is not None:
            tried += 1
            with _told("audio", notes, troubles):
                sound = self._sound(clip, self._audio.sampling_rate, sounds, notes)
                audio = None if sound is None else _kept(self._audio(sound), notes)
        if self._video is not None:
            tried += 1
            with _told("video", notes, troubles):
                video = self._pictures(clip, self._video, notes)
        if self._transcriber is not None and not (text or "").strip():
            tried += 1
            with _told("text", notes, troubles):
                sound = self._sound(clip, self._transcriber.sampling_rate, sounds, notes)
                if sound is not None:
                    heard, words = self._transcriber(sound)
        if troubles and len(troubles) == tried:
            raise troubles[0]
        undecoded = next((note for note in notes if note.kind == "unreadable"), None)
        if undecoded is not None and audio is None and video is None and not heard:
            raise ClipError("unreadable", f"{clip.path}: {undecoded.text}")
        found = [(audio, self._audio), (video, self._video)]
        spans = [len(one.values_TF) / part.rate for one, part in found if one is not None and part is not None]
        spans += [len(one.samples_n) / one.sampling_rate for one in sounds.values() if one is not None]
        return ClipFeatures(
            audio, video, heard or None, tuple(words), max(spans, default=0.0), tuple(dict.fromkeys(notes))
        )

    def _sound(
        self, clip: Clip, sampling_rate: int, sounds: dict[int, Sound | None], notes: list[Note]
    ) -> Sound | None:
        from trainer.features.media.clip import read_sound

        if sampling_rate not in sounds:
            sounds[sampling_rate], told = read_sound(clip, sampling_rate, self.recipe.max_seconds)
            notes += told
        return sounds[sampling_rate]

    def _pictures(self, clip: Clip, part: VideoFeatures, notes: list[Note]) -> ModalityFeatures | None:
        from trainer.features.media.clip import read_pictures

        with read_pictures(clip, part.picture_rate, self.recipe.max_seconds) as pictures:
            found = part(pictures, pictures.count) if pictures.count else None
        notes += pictures.notes
        return None if found is None else _kept(found, notes)


@contextlib.contextmanager
def _told(modality: Literal["audio", "video", "text"], notes: list[Note], troubles: list[ClipError]) -> Iterator[None]:
    """A stream that cannot be decoded is a note and a trouble; what is wrong with the whole clip is raised."""
    try:
        yield
    except ClipError as error:
        if error.kind in _OF_THE_CLIP:
            raise
        notes.append(Note(error.kind, modality, str(error)))
        troubles.append(error)


def _kept(found: ModalityFeatures, notes: list[Note]) -> ModalityFeatures | None:
    """The features, if any frame is valid; frames that are not are zeros."""
    notes += found.notes
    if not found.valid_T.any():
        return None
    values_TF = found.values_TF
    if not found.valid_T.all():
        values_TF = values_TF * found.valid_T[:, None]
    return ModalityFeatures(values_TF, found.valid_T)


# ── in other processes ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Job:
    """One clip to be extracted: its number, the text that is given, and where each modality's array goes."""

    number: int
    clip: Clip
    text: str | None
    audio: Path
    video: Path


_extractor: Extractor | None = None  # of this worker process


def begin(recipe: Recipe, device: str) -> None:
    """Load the encoders in a worker process, once. It computes on one thread, so that the bits do not depend on the machine.

    Raises:
        ValueError: a package or weights that are missing.
    """
    global _extractor
    from threadpoolctl import threadpool_limits

    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    try:
        _extractor = Extractor(recipe, device)
    except (OSError, ImportError) as error:
        raise ValueError(f"what the recipe needs cannot be loaded: {error}") from error
    threadpool_limits(1)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


def extract_to_files(job: Job) -> RowRecord:
    """Extract one clip in a worker process, write its arrays, and tell what was made."""
    assert _extractor is not None
    try:
        found = _extractor.extract(job.clip, job.text)
    except ClipError as error:
        return empty_row(error.kind, str(error))
    arrays: dict[str, ArrayRecord] = {}
    for modality, path in (("audio", job.audio), ("video", job.video)):
        features: ModalityFeatures | None = getattr(found, modality)
        if features is None:
            path.unlink(missing_ok=True)
            continue
        frames, width = features.values_TF.shape
        arrays[modality] = {
            "frames": frames,
            "width": width,
            "rate": _extractor.rates[modality],
            "valid": int(features.valid_T.sum()),
            "bytes": write_array(path, features.values_TF),
        }
    notes: list[NoteRecord] = [{"kind": n.kind, "modality": n.modality, "text": n.text} for n in found.notes]
    record: RowRecord = {
        "id": "",
        "key": "",
        "left_out": None,
        "arrays": arrays,
        "text": found.text,
        "words": [{"text": w.text, "start": round(w.start, 3), "end": round(w.end, 3)} for w in found.words],
        "seconds": round(found.seconds, 3),
        "notes": notes,
    }
    if not arrays and not (job.text or found.text):
        told = ", ".join(dict.fromkeys(note["kind"] for note in notes)) or "nothing that the recipe reads"
        record["left_out"] = ["empty", f"no features and no text ({told})"]
    return record


def extract_all(
    jobs: Iterable[Job], recipe: Recipe, device: str, workers: int, time_limit: float
) -> Iterator[tuple[Job, RowRecord]]:
    """Extract many clips in `workers` processes; results come in the order in which they are ready.

    A clip that takes longer than `time_limit` seconds, or kills its process, costs itself alone.

    Raises:
        ValueError: the encoders cannot be loaded.
    """
    from trainer.features.worker_pool import run_in_processes

    for job, found in run_in_processes(
        extract_to_files, jobs, workers=workers, time_limit=time_limit, initializer=begin, arguments=(recipe, device)
    ):
        yield job, empty_row(found.kind, str(found)) if isinstance(found, ClipError) else found


def choose_device(device: str, recipe: Recipe, shard: int = 0) -> str:
    """The device of a recipe's encoders: `auto` is a GPU where there is one and the recipe has encoders, and of several GPUs the one of the shard.

    Raises:
        ValueError: another word than auto, cpu, cuda, cuda:N, or a GPU that is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device is auto, cpu, cuda or cuda:N, not {device!r}")
    if device == "cpu" or (device == "auto" and not recipe.encoders):
        return "cpu"
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return f"cuda:{shard % there}" if there else "cpu"
    number = int(device.partition(":")[2] or 0)
    if number >= there:
        raise ValueError(f"--device {device}: this machine has {there} GPU(s)")
    return f"cuda:{number}"
