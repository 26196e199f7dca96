"""A manifest of clips to own data, by one recipe: resumable, in parts that several machines make, the same bytes however it was interrupted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from trainer.features.extraction_folder import (
    REPORT,
    REPORT_TEXT,
    SAMPLES,
    ExtractionFolder,
    RowRecord,
    digest,
    empty_row,
    json_line,
)
from trainer.features.extractor import MODALITIES, Job, choose_device, extract_all
from trainer.features.manifest import Manifest, ManifestRow, read_manifest
from trainer.features.recipe import Recipe
from trainer.features.recipe_record import record_of
from trainer.files import new_file, write_text

TIME_LIMIT = 600.0  # seconds for one clip
AGAIN = ("timed out", "crashed")  # rows left out for these are tried again by the next extraction
Progress = Callable[[int, int], None]  # rows done, of how many


class LeftOut(TypedDict):
    """A row that is not in the own data, and why."""

    id: str
    line: int
    clip: str
    kind: str
    why: str


class Report(TypedDict):
    """What an extraction made: rows of the manifest, samples written, those with each modality, seconds of the clips; kind of note -> modality -> clips."""

    recipe: str
    rows: int
    samples: int
    modalities: dict[str, int]
    seconds: float
    notes: dict[str, dict[str, int]]
    left_out: list[LeftOut]


@dataclass
class Extraction:
    """What one call did. `report` covers the whole manifest, or, where other shards are not finished (`complete` false), the rows of this one."""

    out: Path
    report: Report
    complete: bool
    extracted: int
    notes: Sequence[str] = field(default_factory=tuple)


def extract(
    manifest: Path | Manifest,
    recipe: Recipe,
    out: Path,
    *,
    workers: int = 1,
    shard: tuple[int, int] = (1, 1),
    device: str = "auto",
    time_limit: float = TIME_LIMIT,
    force: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Extract the clips of a manifest into the folder `out`; see :mod:`trainer.features.extraction_folder` for what it holds.

    A row is extracted anew where its clip, seconds or text, or the clip's size or time of change, are others than when it was made; other keys of the
    manifest only pass through. So the same call goes on after a kill, and after a change of the manifest. Rows that are no longer in the
    manifest are removed. A row is left out where its clip cannot be read, takes too long or kills its process, or where there
    are neither features nor text; a missing modality is told.

    Args:
        workers: processes; the bytes do not depend on their number.
        shard: (I, N): only the rows I - 1, I - 1 + N, … are extracted. Whichever of the N calls ends last writes `samples.jsonl`.
        device: auto, cpu, cuda or cuda:N, of the recipe's encoders.
        time_limit: seconds for one clip.
        force: replace what another recipe extracted into `out`.
        progress: called with the number of rows done and of all rows of the shard.

    Raises:
        ManifestError: every fault of the manifest.
        ValueError: `out` is taken or cannot be written, the recipe cannot be used on this machine, or another recipe extracted what is in `out`.
    """
    index, count = shard
    if not 1 <= index <= count:
        raise ValueError(f"shard {index}/{count}: I/N is a part I, from 1 to N, of N")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if not time_limit > 0:
        raise ValueError(f"the time limit must be more than 0 seconds, not {time_limit:g}")
    given = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    chosen = choose_device(device, recipe, index - 1)
    identity = record_of(recipe)
    folder = ExtractionFolder(out)
    mine = given.rows[index - 1 :: count]
    try:
        folder.begin(identity, force=force)
        extracted = _extract_rows(folder, mine, identity["hash"], recipe, chosen, workers, time_limit, progress)
        with folder.held():
            complete = all(row_is_done(folder, row, identity["hash"]) for row in given.rows)
            tally = _Tally(identity["hash"])
            if complete:
                _write_samples(folder, given, tally)
            else:
                for row in mine:
                    tally.add(row, folder.read_row(row.id))
    except OSError as error:  # a full disk, a folder of someone else's
        raise ValueError(f"{out} cannot be written: {error}; the same command goes on from here") from error
    return Extraction(out, tally.report, complete, extracted, given.notes)


def key_of(row: ManifestRow, recipe: str) -> str:
    """What decides the arrays of a row: its clip, seconds and text, the clip's size and time of change, and the recipe's hash."""
    try:
        about = row.clip.path.stat()
    except OSError:
        return ""
    return digest([row.name, row.clip.start, row.clip.end, row.text, about.st_size, about.st_mtime_ns, recipe])


def row_is_done(folder: ExtractionFolder, row: ManifestRow, recipe: str) -> bool:
    """Whether a row has been extracted, also where it was left out."""
    return folder.finished(row.id, key_of(row, recipe)) is not None


def _extract_rows(
    folder: ExtractionFolder,
    rows: Sequence[ManifestRow],
    recipe_hash: str,
    recipe: Recipe,
    device: str,
    workers: int,
    time_limit: float,
    progress: Progress | None,
) -> int:
    """Extract those of the rows that are not finished; how many they were."""
    keys = [key_of(row, recipe_hash) for row in rows]
    there = [folder.finished(row.id, key) for row, key in zip(rows, keys, strict=True)]
    todo = [i for i, record in enumerate(there) if record is None or (record["left_out"] or [""])[0] in AGAIN]
    done = len(rows) - len(todo)
    told = progress or (lambda done, total: None)
    told(done, len(rows))
    if not todo:
        return 0

    def jobs() -> Iterator[Job]:
        for i in todo:
            row = rows[i]
            folder.forget_row(row.id)
            audio, video = (folder.path / folder.array_name(row.id, modality) for modality in MODALITIES)
            yield Job(i, row.clip, row.text, audio, video)

    folder.forget_result()
    for job, record in extract_all(jobs(), recipe, device, workers, time_limit):
        row = rows[job.number]
        if record["left_out"]:
            for path in (job.audio, job.video):
                path.unlink(missing_ok=True)
        folder.write_row({**record, "id": row.id, "key": keys[job.number]})
        done += 1
        told(done, len(rows))
    return len(todo)


class _Tally:
    """Counts the rows into a report."""

    def __init__(self, recipe: str) -> None:
        self.report: Report = {
            "recipe": recipe, "rows": 0, "samples": 0, "modalities": {}, "seconds": 0.0, "notes": {}, "left_out": [],
        }  # fmt: skip
        self._notes: dict[str, Counter[str]] = {}

    def add(self, row: ManifestRow, record: RowRecord | None) -> bool:
        """Count a row; whether it is a sample."""
        report, record = self.report, record or empty_row("unreadable", "its record is gone: extract again")
        report["rows"] += 1
        for kind, modality in {(note["kind"], note["modality"]): None for note in record["notes"]}:
            of_kind = report["notes"].setdefault(kind, {})
            of_kind[modality] = of_kind.get(modality, 0) + 1
        if record["left_out"] is not None:
            trouble, why = record["left_out"]
            report["left_out"].append({"id": row.id, "line": row.line, "clip": row.name, "kind": trouble, "why": why})
            return False
        report["samples"] += 1
        report["seconds"] = round(report["seconds"] + record["seconds"], 3)
        has = [*record["arrays"], *(["text"] if row.text or record["text"] else [])]
        for modality in has:
            report["modalities"][modality] = report["modalities"].get(modality, 0) + 1
        return True


def _write_samples(folder: ExtractionFolder, manifest: Manifest, tally: _Tally) -> None:
    """Own data and the report, of a manifest whose rows are all finished; and nothing else stays."""
    arrays: list[str] = []
    with new_file(folder.path / SAMPLES) as file:
        for row in manifest.rows:
            record = folder.read_row(row.id)
            if tally.add(row, record) and record is not None:
                sample = sample_of(row.values, record, partial(folder.array_name, row.id))
                arrays += [sample[modality] for modality in record["arrays"]]
                file.write(json_line(sample))
    write_text(folder.path / REPORT, json_line(tally.report, indent=2))
    words = "\n".join(report_lines(tally.report)) + "\n"
    write_text(folder.path / REPORT_TEXT, words.encode("utf-8", "backslashreplace").decode())
    folder.clean({row.id for row in manifest.rows}, set(arrays))


def sample_of(values: Mapping[str, Any], record: RowRecord, place: Callable[[str], str]) -> dict[str, Any]:
    """One line of own data: the row's own keys, and where `place` says that its arrays are, with their true lengths and rates."""
    sample = dict(values)
    if record["text"] is not None:
        sample["text"] = record["text"]
    arrays = record["arrays"]
    sample |= {modality: place(modality) for modality in arrays}
    sample |= {f"{modality}_length": array["frames"] for modality, array in arrays.items()}
    if arrays:
        sample["rate"] = {modality: array["rate"] for modality, array in arrays.items()}
    return sample


def report_lines(report: Report) -> list[str]:
    """The report in words."""
    of = ", ".join(f"{modality} {n}" for modality, n in report["modalities"].items())
    lines = [
        f"recipe {report['recipe'][:16]}",
        f"{report['samples']} samples of {report['rows']} rows, {report['seconds'] / 60:.1f} minutes; with {of or 'nothing'}",
    ]
    for kind, modalities in sorted(report["notes"].items()):
        lines.append(
            f"{kind}: " + ", ".join(f"{modality} of {n} clip(s)" for modality, n in sorted(modalities.items()))
        )
    lines.append(f"left out: {len(report['left_out'])}")
    lines += [
        f"  line {one['line']} {one['id']} ({one['clip']}): {one['kind']}: {one['why']}" for one in report["left_out"]
    ]
    return lines
