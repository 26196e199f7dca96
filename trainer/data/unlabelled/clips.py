"""Clips among the samples to be predicted: extracted by the recipe of the run's data, in worker processes, a few hundred at a time.

What is extracted lies in a temporary folder as own data would, and is read as own data is, so predictions are those of extracting first.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.readers.jsonl import feature_faults, plain_sample, with_features
from trainer.data.readers.raw import RawSample, ReaderError
from trainer.features.manifest import ClipLine, clip_of
from trainer.features.recipe_record import RecipeRecord, described, differences_of, recipe_in, record_of
from trainer.features.types import Clip

if TYPE_CHECKING:
    from trainer.data.unlabelled.lines import UncheckedSample
    from trainer.features.extraction_folder import RowRecord
    from trainer.features.extractor import Job
    from trainer.features.recipe import Recipe

CHUNK = 512  # samples among which clips are extracted together


class ClipsError(ValueError):
    """Clips that cannot be extracted for this run: it has no recipe, or another one than this machine gives."""


@dataclass(frozen=True)
class ClipSettings:
    """How clips are extracted: processes, device of the encoders, seconds for one clip; see :func:`trainer.features.extract.extract`."""

    workers: int = 1
    device: str = "auto"
    time_limit: float = 600.0

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise ValueError(f"the time limit must be more than 0 seconds, not {self.time_limit:g}")


@dataclass(frozen=True)
class PendingClip:
    """A clip of a line that was read."""

    line: ClipLine
    clip: Clip


@dataclass
class PreparedRecipe:
    """One recipe, ready to be used here."""

    recipe: Recipe
    device: str


@dataclass
class ClipExtraction:
    """Puts the features of their clips into samples. Use as a context.

    Args:
        recipe_of: the recipe of the data that a sample is like, by the task that it names (None: none).
        keep: whether samples are read twice: what was extracted is then kept until the end.
        ready: the recipes that were found to be usable here, by their hashes; several extractions may share them.
    """

    recipe_of: Callable[[str | None], RecipeRecord | None]
    settings: ClipSettings = field(default_factory=ClipSettings)
    keep: bool = False
    ready: dict[str, PreparedRecipe] = field(default_factory=dict)
    _kept: dict[int, RowRecord] = field(default_factory=dict)
    _temporary: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> ClipExtraction:
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def resolved(
        self, samples: Iterator[UncheckedSample], wanted: Callable[[UncheckedSample], bool]
    ) -> Iterator[UncheckedSample]:
        """The same samples in their order, those of clips with their features. Samples are held back from the first clip on only.

        Clips of samples that are not `wanted` are left alone, unless samples are read twice: then what is said in them may be needed.

        Raises:
            ClipsError: a clip, and no recipe to extract it by.
        """
        for first in samples:
            if first.clip is None:
                yield first
                continue
            chunk = [first, *itertools.islice(samples, CHUNK - 1)]
            self._extract([sample for sample in chunk if self.keep or wanted(sample)])
            for sample in chunk:
                if sample.clip is not None and sample.order in self._kept:
                    self._fill(sample, sample.clip, self._kept[sample.order])
                yield sample
            if not self.keep:
                for sample in chunk:
                    self._forget(sample.order)

    def _extract(self, chunk: Sequence[UncheckedSample]) -> None:
        """Extract the clips of a chunk that are not there yet."""
        by_recipe: dict[str, list[Job]] = {}
        for sample in chunk:
            if sample.clip is not None and sample.order not in self._kept:
                name = self._prepare(sample)
                by_recipe.setdefault(name, []).append(self._job(sample.order, sample.clip))
        for name, jobs in by_recipe.items():
            from trainer.features.extractor import extract_all

            ready, settings = self.ready[name], self.settings
            workers = min(settings.workers, len(jobs))
            for job, record in extract_all(iter(jobs), ready.recipe, ready.device, workers, settings.time_limit):
                self._kept[job.number] = record

    def _prepare(self, sample: UncheckedSample) -> str:
        """The hash of the recipe of a sample's clip, which can be used here."""
        saved = self.recipe_of(sample.task)
        if saved is None:
            raise ClipsError(
                f"{sample.where} names a clip, and the run's data come from no recipe: extract features as the run's data have them, "
                "and give own data with audio and video; or train a run on data of egmf extract"
            )
        if saved["hash"] not in self.ready:
            from trainer.features.extractor import choose_device

            recipe = recipe_in(saved, "the run's recipe")
            if lines := differences_of(saved, record_of(recipe)):
                raise ClipsError(described("this machine does not extract as the run's data were extracted", lines))
            self.ready[saved["hash"]] = PreparedRecipe(recipe, choose_device(self.settings.device, recipe))
        return saved["hash"]

    def _job(self, order: int, pending: PendingClip) -> Job:
        from trainer.features.extractor import Job

        text = pending.line.text if (pending.line.text or "").strip() else None
        return Job(order, pending.clip, text, self._place(order, "audio"), self._place(order, "video"))

    def _place(self, order: int, modality: str) -> Path:
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="egmf-clips-")
        return Path(self._temporary.name) / f"{order}.{modality}.npy"

    def _forget(self, order: int) -> None:
        if self._kept.pop(order, None) is not None:
            for modality in ("audio", "video"):
                self._place(order, modality).unlink(missing_ok=True)

    def _fill(self, sample: UncheckedSample, pending: PendingClip, record: RowRecord) -> None:
        """Give a sample what was extracted, in the way of a line of own data."""
        sample.notes += [f"{note['kind']} ({note['modality']}): {note['text']}" for note in record["notes"]]
        if record["left_out"] is not None:
            sample.faults.append(": ".join(record["left_out"]))
            return
        arrays = record["arrays"]
        changed: dict[str, object] = {name: str(self._place(sample.order, name)) for name in arrays}
        changed |= {f"{name}_length": array["frames"] for name, array in arrays.items()}
        changed["rate"] = {name: array["rate"] for name, array in arrays.items()}
        if record["text"] is not None:
            changed["text"] = record["text"]
        line = pending.line.model_copy(update=changed)
        assert sample.raw is not None
        sample.raw = plain_sample(line, sample.raw.id, sample.raw.split, sample.raw.where)
        sample.rates = {str(name): rate for name, rate in line.rate.items()}
        sample.load = partial(load_line, sample.raw, Path(), line, False)


def pending_clip(line: ClipLine, folder: Path, faults: list[str], *, contained: bool) -> PendingClip | None:
    """The clip of a line; None, and the reasons, where it cannot be used."""
    clip = clip_of(line, folder, faults, contained=contained)
    return None if clip is None else PendingClip(line, clip)


def load_line(raw: RawSample, folder: Path, line: ClipLine, contained: bool, faults: list[str]) -> RawSample | None:
    """The sample with the features of its line; None, and the reasons, where they cannot be had."""
    if unreadable := feature_faults(folder, line, contained=contained):
        faults += unreadable
        return None
    try:
        return with_features(raw, folder, line)
    except ReaderError as error:
        faults.append(str(error))
        return None


def other_recipes(sources: Sequence[Path], recipes: Mapping[str, RecipeRecord | None]) -> tuple[list[str], bool]:
    """Faults of inputs that another recipe extracted than the run's data; and whether there is an input of which no recipe is known.

    Args:
        sources: files or folders of own data.
        recipes: task -> recipe of the run's data, of the tasks that are asked.
    """
    from trainer.features.recipe_record import recipe_beside

    faults: list[str] = []
    unknown = False
    for source in sources:
        found = recipe_beside(source)
        unknown = unknown or found is None
        for task, saved in recipes.items():
            if found is not None and saved is not None and (lines := differences_of(saved, found)):
                faults.append(
                    described(f"{source} was extracted by another recipe than the run's data of {task}", lines)
                )
    return list(dict.fromkeys(faults)), unknown
