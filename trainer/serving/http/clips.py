"""Clips that requests bring: extracted by the model's recipe in processes that stay, so that encoders are loaded once."""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.preparation.columns import STREAMS
from trainer.features.extractor import Job, begin, choose_device, extract_to_files
from trainer.features.recipe_record import RecipeRecord, described, differences_of, recipe_in, record_of
from trainer.features.types import Clip, ClipError
from trainer.features.worker_pool import StandingProcess, WorkerError
from trainer.serving.http.asking import ClipFile
from trainer.serving.http.faults import Fault, RefusedError, busy, unavailable

log = logging.getLogger(__name__)

MEMORY = 4 << 30  # bytes that a process may take for one clip


@dataclass(frozen=True)
class ExtractedClip:
    """What a clip adds to its sample, in the keys of a sample, and what was noted."""

    values: Mapping[str, Any]
    notes: tuple[str, ...]


class ClipWorkers:
    """Processes that extract clips by one recipe, each one clip at a time; further clips wait. Thread-safe.

    Args:
        record: the recipe that made the model's data.
        workers: processes; each loads the recipe's encoders at its first clip.
        device: of the encoders, see :func:`trainer.features.extractor.choose_device`.
        seconds: that one clip may take.

    Raises:
        ValueError: the recipe cannot be used on this machine.
    """

    def __init__(self, record: RecipeRecord, workers: int, device: str, seconds: float) -> None:
        recipe = recipe_in(record, "the model's recipe")
        if lines := differences_of(record, record_of(recipe)):
            raise ValueError(described("this machine does not extract as the model's data were extracted", lines))
        arguments = (recipe, choose_device(device, recipe))
        self._seconds, self._closed = seconds, False
        self._all = [StandingProcess(seconds, MEMORY, begin, arguments) for _ in range(workers)]
        self._free: queue.SimpleQueue[StandingProcess] = queue.SimpleQueue()
        for one in self._all:
            threading.Thread(target=self._start, args=(one,), daemon=True).start()
        self._folder = tempfile.TemporaryDirectory(prefix="egmf-serve-")

    def extract(self, file: ClipFile, text: str | None) -> ExtractedClip:
        """The features of a clip.

        Raises:
            RefusedError: it cannot be read (422), or all processes are busy for too long (429).
        """
        with self._process() as process, self._places() as (clip, audio, video):
            clip.write_bytes(file.content)
            given = text if (text or "").strip() else None
            try:
                found = process.run(extract_to_files, Job(0, Clip(clip, file.start, file.end), given, audio, video))
            except (ValueError, WorkerError) as error:
                log.error("clips cannot be extracted: %s", error)
                raise unavailable("clips_unavailable", "clips cannot be extracted at the moment") from error
            left_out = (found.kind, str(found)) if isinstance(found, ClipError) else found["left_out"]
            if left_out is not None:
                kind, why = left_out
                reason = f"{kind}: {why}".replace(str(clip), "the clip")
                raise RefusedError(422, "bad_clip", "the clip cannot be used", [Fault("clip", reason)])
            assert not isinstance(found, ClipError)
            values: dict[str, Any] = {}
            for name, path in zip(STREAMS, (audio, video), strict=True):
                if name in found["arrays"]:
                    values[name] = np.load(path, allow_pickle=False)
                    values[f"{name}_length"] = found["arrays"][name]["frames"]
            if found["arrays"]:
                values["rate"] = {name: array["rate"] for name, array in found["arrays"].items()}
            if found["text"] is not None:
                values["text"] = found["text"]
            notes = [f"{one['kind']} ({one['modality']}): {one['text']}" for one in found["notes"]]
            return ExtractedClip(values, tuple(note.replace(str(clip), "the clip") for note in notes))

    def close(self) -> None:
        """End the processes and remove what they wrote."""
        self._closed = True
        for one in self._all:
            one.close()
        self._folder.cleanup()

    def remove_files(self) -> None:
        """Remove what lies in the temporary folder, whoever still reads it."""
        shutil.rmtree(self._folder.name, ignore_errors=True)

    def _start(self, process: StandingProcess) -> None:
        """Load the encoders, so that the first clip need not wait for them."""
        try:
            process.start()
        except (ValueError, WorkerError) as error:
            log.error("clips cannot be extracted: %s", error)
        except Exception:
            if not self._closed:
                raise
        finally:
            self._free.put(process)

    @contextlib.contextmanager
    def _process(self) -> Iterator[StandingProcess]:
        try:
            process = self._free.get(timeout=self._seconds)
        except queue.Empty as error:
            raise busy("clips_busy", "all processes that read clips are busy: ask again", int(self._seconds)) from error
        try:
            yield process
        finally:
            self._free.put(process)

    @contextlib.contextmanager
    def _places(self) -> Iterator[tuple[Path, Path, Path]]:
        """Where a clip and its arrays lie while it is read; names of clients play no part."""
        name = uuid.uuid4().hex
        places = [Path(self._folder.name) / f"{name}{suffix}" for suffix in (".clip", ".audio.npy", ".video.npy")]
        try:
            yield places[0], places[1], places[2]
        finally:
            for place in places:
                place.unlink(missing_ok=True)
