"""From raw samples to a checked, fingerprinted, memory-mapped dataset on disk.

One pass over the source checks each sample and writes the good ones to Arrow files in a temporary folder; what needs
several samples (ids, widths, empty splits) is decided on what remains in memory of each; the folder is then put in place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from trainer.data.folds import cut_dialogues, fold_sizes
from trainer.data.preparation.arguments import DropBad, check_arguments
from trainer.data.preparation.columns import STREAMS, features, schema
from trainer.data.preparation.faults import DataError, Fault, describe, group_faults
from trainer.data.preparation.feature_statistics import Standardise, measure
from trainer.data.preparation.folder import RECORD, format_of, new_folder, read_record
from trainer.data.preparation.frames import ZeroFrames
from trainer.data.preparation.record import DatasetRecord, DroppedSample
from trainer.data.preparation.resampling import Resampling, resampled_rate, stated_rates
from trainer.data.preparation.rows import Seen, Shard, convert, convert_shard, keep, wrong_width
from trainer.data.preparation.summary import statistics
from trainer.data.preparation.worker_pool import worker_pool
from trainer.data.readers.raw import ALL, SPLITS, Source
from trainer.data.readers.source import open_source
from trainer.new_folder import NewFolder
from trainer.questions import Definition, Questions

log = logging.getLogger(__name__)

Progress = Callable[[str, int, "int | None"], None]
SHARDS = 4  # of a split for each process: smaller ones even out the work
NUMBERS = re.compile(r"\[(\n[-+.,eE\d\s]+)\]")  # a list of numbers as JSON with indentation has it: it goes on one line
Key = tuple[str, int, int]  # split, shard, place among the shard's seen samples
EMPTY, UNANSWERED = (
    "split without samples",
    "question without answers",
)  # faults of a split, that no sample cures by leaving
KEEPER = ("test", "valid", "train", ALL)  # of samples with one id, that of the earlier split here stays


@dataclass
class Summary:
    """What a preparation made: the folder, its record, and whether the folder held the same dataset already."""

    path: Path
    record: DatasetRecord
    unchanged: bool = False

    @property
    def fingerprint(self) -> str:
        return str(self.record["fingerprint"])


def prepare(
    task: Definition,
    paths: Sequence[Path],
    out: Path,
    *,
    strict: bool = False,
    drop_bad: DropBad = "none",
    zero_frames: ZeroFrames = "mask",
    standardise: Standardise = "mean",
    max_rate: float | None = None,
    workers: int = 1,
    force: bool = False,
    plugins: Sequence[str] = (),
    fold_column: str | None = None,
    contained: bool = False,
    rates: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Open the published files at `paths` and prepare them; see :func:`prepare_source`. `plugins` bring further formats,
    `fold_column` names the column of the folds of a cross-validation. `contained` refuses feature files outside the folder of the
    file that names them. `rates` are the frames a second of streams whose files do not say them.

    Raises:
        ReaderError: files that cannot be read, or do not fit together.
        DataError: faults in the data, an `out` that is taken, or `max_rate` with a stream whose rate is not known.
    """
    check_arguments(task, out, strict, drop_bad, zero_frames, standardise, max_rate, workers, force)
    source = open_source(task, paths, plugins=plugins, fold_column=fold_column, contained=contained)
    source.rates = stated_rates(source.rates, rates or {})
    return prepare_source(
        task, source, out, strict=strict, drop_bad=drop_bad, zero_frames=zero_frames, standardise=standardise, max_rate=max_rate,
        workers=workers, force=force, progress=progress,
    )  # fmt: skip


def prepare_source(
    task: Definition,
    source: Source,
    out: Path,
    *,
    strict: bool = False,
    drop_bad: DropBad = "none",
    zero_frames: ZeroFrames = "mask",
    standardise: Standardise = "mean",
    max_rate: float | None = None,
    workers: int = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Check `source` and write it to `out` as an Arrow dataset with `record.json`.

    A fault with one right repair is repaired (a frame with nan or inf is masked; a clip without any other frame counts as
    missing), all others refuse the source, in one message. `strict` repairs nothing. `drop_bad` leaves out the samples
    that would refuse it, of train or of all splits. Frames of zeros inside a clip are masked, or count with `zero_frames`
    "keep". Of samples with one id those of test stay before those of valid and
    train, and earlier ones before later ones.

    `standardise` measures the features of the training frames, for the encoders of a model: their mean and deviation, or
    median and interquartile range ("robust"); see :mod:`trainer.data.preparation.feature_statistics`.

    Streams of more than `max_rate` frames a second are resampled to that (:func:`trainer.data.preparation.resampling.resample`),
    and the record has their rates afterwards.

    `workers` processes read where the source can be read in parts; the result does not depend on their number. An `out`
    that holds the same dataset is left as it is, another prepared dataset is replaced with `force`. `progress(split,
    done, total)` is called now and then; the total may be None. Nothing remains of a preparation that fails.

    Raises:
        DataError: faults in the data, an `out` that is taken, or `max_rate` with a stream whose rate is not known.
    """
    check_arguments(task, out, strict, drop_bad, zero_frames, standardise, max_rate, workers, force)
    if workers > 1 and source.part is None:
        log.warning("%s is read by one process: it cannot be read in parts", source.name)
        workers = 1
    if source.recipe is not None and zero_frames == "keep":
        raise DataError(
            "zero_frames=keep: the features were extracted by a recipe, which writes zeros where it saw or heard nothing: they are masked"
        )
    try:
        with new_folder(out) as folder:
            progress = progress or (lambda split, done, total: None)
            resampling = None if max_rate is None else Resampling(max_rate, source.rates)
            shards = _convert(task, source, folder.path, workers, zero_frames, resampling, progress)
            record = _validate(task, source, shards, strict, drop_bad, zero_frames, standardise, max_rate)
            _write(task, folder.path, shards, record)
            return _put_in_place(folder, record, _fingerprint(record, shards, standardised=False), force)
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker process was killed, perhaps for want of memory: try fewer --workers than {workers}; nothing was written"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise DataError(f"cannot write {out}: {os.strerror(error.errno)}; nothing was written") from error
        raise


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _splits_of(names: Container[str]) -> tuple[str, ...]:
    """The splits of a dataset: samples with folds have one, from which a run cuts its own."""
    return (ALL,) if ALL in names else SPLITS


def _convert(
    task: Definition,
    source: Source,
    folder: Path,
    workers: int,
    zero_frames: ZeroFrames,
    resampling: Resampling | None,
    progress: Progress,
) -> dict[str, list[Shard]]:
    splits = [split for split in _splits_of(source.splits) if split in source.splits]
    columns = schema(task, splits)
    for split in splits:
        (folder / split).mkdir()
    if workers == 1:
        shards = {}
        for split in splits:
            path = folder / split / "part-0.arrow"

            def tick(done: int, split: str = split) -> None:
                progress(split, done, None)

            shards[split] = [convert(source.samples(split), task, split, path, columns, tick, zero_frames, resampling)]
        return shards
    return _convert_many(task, source, folder, workers, zero_frames, resampling, progress, splits)


def _convert_many(
    task: Definition,
    source: Source,
    folder: Path,
    workers: int,
    zero_frames: ZeroFrames,
    resampling: Resampling | None,
    progress: Progress,
    splits: list[str],
) -> dict[str, list[Shard]]:
    read, columns, count = source.part, schema(task, splits), workers * SHARDS
    assert read is not None
    places = {}
    done: dict[str, int] = Counter()
    with worker_pool(workers) as pool:
        for split in splits:
            for k in range(count):
                path = folder / split / f"part-{k}.arrow"
                job = pool.submit(convert_shard, read, task, split, (k, count), path, columns, zero_frames, resampling)
                places[job] = (split, k)
        found: dict[tuple[str, int], Shard] = {}
        for job in as_completed(places):
            found[places[job]] = shard = job.result()
            done[shard.split] += len(shard.seen)
            progress(shard.split, done[shard.split], None)
    return {split: [found[split, k] for k in range(count)] for split in splits}


# ── validating ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _validate(
    task: Definition,
    source: Source,
    shards: dict[str, list[Shard]],
    strict: bool,
    drop_bad: DropBad,
    zero_frames: ZeroFrames,
    standardise: Standardise,
    max_rate: float | None,
) -> DatasetRecord:
    """Decide what stays; the shards' files and `seen` hold just that afterwards. Returns the record, without the files."""
    widths, wrong = _widths(source, shards)
    alone = [fault for split in shards for shard in shards[split] for fault in shard.faults]
    faults = [*alone, *wrong.values(), *(twice := _duplicates(shards)).values()]
    bad = set(wrong) | set(twice)
    splits = _splits_of(shards)
    left = {"train": ("train",), "all": splits}.get(drop_bad, ())
    dropped: list[DroppedSample] = [
        {"split": key[0], "id": row.id, "where": row.where}
        for key, row in _walk(shards)
        if row.digest is None or key in bad
    ]
    full = {key[0] for key, row in _walk(shards) if row.digest and key not in bad}
    empty = [split for split in splits if split not in full]
    faults += [Fault(EMPTY, split, detail=_why(split, source, dropped)) for split in empty]
    silent = _unasked(task, shards, bad, [split for split in splits if split in full])
    faults += silent
    folds = fold_sizes(row.fold for key, row in _walk(shards) if row.fold and key not in bad)
    if ALL in full and len(folds) < 2:
        faults.append(Fault("one fold only", ALL, detail=f"all samples have the fold {next(iter(folds))}"))
    refused = (strict and faults) or [
        f for f in faults if not f.repair and (f.split not in left or f.split in empty or f in silent)
    ]
    if refused:
        raise DataError(_refusal(task, source, faults, strict, drop_bad, left))
    _take_out(task, shards, bad)
    record: DatasetRecord = {"format": format_of(task), "task": task.model_dump(mode="json"), "fingerprint": ""}
    rates = {name: source.rates.get(name) for name in STREAMS}
    record |= {"widths": widths, "rates": {name: resampled_rate(rate, max_rate) for name, rate in rates.items()}}
    if max_rate is not None:
        record |= {"max_rate": max_rate, "source_rates": rates}
    counts = Counter(entry["split"] for entry in dropped)
    record["zero_frames"] = zero_frames
    record["splits"] = {
        split: statistics(task, [row for shard in shards[split] for row in shard.seen], counts[split])
        for split in splits
    }
    if folds:
        record["folds"] = folds
    record["faults"] = group_faults(faults, otherwise="left out")
    record["dropped"] = {"mode": drop_bad, "n": {s: counts[s] for s in splits}, "samples": dropped}
    record["source"] = {"name": source.name, "files": _hashes(source.files), "notes": [*source.notes, *_silent(shards)]}
    if folds and (note := cut_dialogues((row.dialogue, row.fold) for _, row in _walk(shards))):
        record["source"]["notes"].append(note)
    training = [] if folds else [shard.path for shard in shards["train"]]  # of folds: measured when one is chosen
    if source.recipe is not None:
        record["recipe"] = source.recipe
    record["standardisation"] = measure(training, widths, standardise)
    record["fingerprint"] = _fingerprint(record, shards)
    return record


def _unasked(
    task: Definition, shards: dict[str, list[Shard]], bad: Container[Key], splits: Sequence[str]
) -> list[Fault]:
    """A fault for each of several questions that no sample of a split answers: it could not be trained, or not be scored."""
    if not isinstance(task, Questions):
        return []
    answered = {
        (key[0], name) for key, row in _walk(shards) if row.digest and key not in bad for name in row.answers or ()
    }
    return [
        Fault(f"{question.name}: {UNANSWERED}", split, detail=f"no sample of {split} answers it")
        for question in task.questions
        for split in splits
        if (split, question.name) not in answered
    ]


def _silent(shards: dict[str, list[Shard]]) -> list[str]:
    if any(row.characters for split in shards for shard in shards[split] for row in shard.seen):
        return []
    return ["no sample has any text: models of this dataset learn from audio and video alone"]


def _walk(shards: dict[str, list[Shard]], splits: Sequence[str] = (*SPLITS, ALL)) -> Iterator[tuple[Key, Seen]]:
    for split in splits:
        for k, shard in enumerate(shards.get(split, [])):
            for i, row in enumerate(shard.seen):
                yield (split, k, i), row


def _widths(source: Source, shards: dict[str, list[Shard]]) -> tuple[dict[str, int], dict[Key, Fault]]:
    """Features per frame: as the source states, else what most training samples have; and the rows that differ."""
    widths, wrong = {}, {}
    for m, name in enumerate(STREAMS):
        stated = (source.widths or {}).get(name)
        found = Counter(row.widths[m] for _, row in _walk(shards) if row.widths[m])
        train = Counter(row.widths[m] for _, row in _walk(shards, ["train"]) if row.widths[m])
        width = stated if stated is not None else (train or found or Counter([0])).most_common(1)[0][0]
        widths[name] = int(width)
        for key, row in _walk(shards) if set(found) - {width} else ():
            if row.widths[m] not in (0, width):
                wrong[key] = wrong_width(name, row.widths[m], int(width), key[0], row.id, row.where)
    return widths, wrong


def _duplicates(shards: dict[str, list[Shard]]) -> dict[Key, Fault]:
    first: dict[str, str] = {}
    twice = {}
    for key, row in _walk(shards, KEEPER):
        if not row.id:
            continue
        if row.id in first:
            detail = "" if first[row.id] == key[0] else f"the same id in {first[row.id]}"
            twice[key] = Fault("duplicate id", key[0], row.id, row.where, detail)
        else:
            first[row.id] = key[0]
    return twice


def _take_out(task: Definition, shards: dict[str, list[Shard]], bad: set[Key]) -> None:
    """Leave in the files and in `seen` what stays."""
    for split in shards:
        for k, shard in enumerate(shards[split]):
            wanted = [(split, k, i) not in bad for i, row in enumerate(shard.seen) if row.digest]
            if not all(wanted):
                keep(shard, wanted, schema(task, shards))
            shard.seen = [row for i, row in enumerate(shard.seen) if row.digest and (split, k, i) not in bad]


def _why(split: str, source: Source, dropped: Sequence[DroppedSample]) -> str:
    if split not in source.splits:
        return f"the source has no {split} split (it has {', '.join(source.splits) or 'none'})"
    return f"every sample of {split} is faulty" if any(d["split"] == split for d in dropped) else f"{split} is empty"


def _refusal(
    task: Definition, source: Source, faults: list[Fault], strict: bool, drop_bad: DropBad, left: Sequence[str]
) -> str:
    would = [f for f in faults if f.split in left and not f.repair and not _is_of_split(f)]
    rest = [f for f in faults if f not in set(would)]
    lines = describe([*group_faults(rest, repair=not strict), *group_faults(would, otherwise="left out")])
    kinds = len({f.kind for f in faults})
    head = f"{task.name} from {source.name}: {len(faults)} fault(s) of {kinds} kind(s); nothing was written"
    advice = []
    kept = [f for f in rest if not _is_of_split(f)]
    if strict:
        advice.append("without --strict, faults with one right repair are repaired")
    elif any(f.split == "train" and not f.repair for f in kept):
        advice.append("--drop-bad leaves faulty training samples out")
    if any(f.split != "train" and not f.repair for f in kept) and drop_bad != "all":
        advice.append("--drop-bad=all leaves faulty samples of valid and test out too")
    tail = ["Correct the source" + "".join(f"; {a}" for a in advice) + "."]
    return "\n".join([head, *(f"  {line}" for line in lines), *tail])


def _is_of_split(fault: Fault) -> bool:
    return fault.kind.endswith((EMPTY, UNANSWERED))


# ── recording ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fingerprint(record: DatasetRecord, shards: dict[str, list[Shard]], standardised: bool = True) -> str:
    """sha256 over task, widths, rates, `max_rate` and the recipe's hash if any, what was left out, and every row in order: not over places or processes.

    Statistics by which features are standardised, if any, are a part of it; without `standardised` they are left out, as
    earlier versions had it.
    """
    out = hashlib.sha256()
    dropped = [record["dropped"]["mode"], [[d["split"], d["id"]] for d in record["dropped"]["samples"]]]
    head = [record["format"], record["task"], record["widths"], record["rates"], dropped]
    head += [{"max_rate": record["max_rate"]}] if "max_rate" in record else []
    head += [{"recipe": record["recipe"]["hash"]}] if "recipe" in record else []
    if standardised and record["standardisation"]["mode"] != "none":
        head.append(record["standardisation"])
    out.update(json.dumps(head, sort_keys=True, ensure_ascii=True).encode())
    for split in record["splits"]:
        rows = [row.digest for shard in shards[split] for row in shard.seen if row.digest]
        out.update(f"{split} {len(rows)}".encode())
        for digest in rows:
            out.update(digest)
    return out.hexdigest()


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    """sha256 of each file, by its path below the folder common to all."""
    if not files:
        return {}
    paths = [Path(f).resolve() for f in files]
    common = Path(os.path.commonpath([p.parent for p in paths]))
    out = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        out[path.relative_to(common).as_posix()] = digest.hexdigest()
    return out


def _write(task: Definition, folder: Path, shards: dict[str, list[Shard]], record: DatasetRecord) -> None:
    """Complete the folder to what `DatasetDict.save_to_disk` would have written, and add the record."""
    from datasets import DatasetInfo

    sizes = {}
    for split in record["splits"]:
        full = [shard for shard in shards[split] if shard.seen]
        for shard in shards[split]:
            if not shard.seen:
                shard.path.unlink()
        names = [f"data-{k:05d}-of-{len(full):05d}.arrow" for k in range(len(full))]
        for shard, name in zip(full, names, strict=True):
            shard.path.rename(folder / split / name)
            sizes[f"{split}/{name}"] = (folder / split / name).stat().st_size
        state: dict[str, object] = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": f"{record['fingerprint'][:16]}-{split}",
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        (folder / split / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
        DatasetInfo(features=features(task, shards)).write_to_directory(str(folder / split))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(record["splits"])}))
    record["files"] = sizes
    text = NUMBERS.sub(
        lambda found: f"[{' '.join(found[1].split())}]", json.dumps(record, indent=1, ensure_ascii=False)
    )
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def _put_in_place(folder: NewFolder, record: DatasetRecord, samples: str, force: bool) -> Summary:
    """`samples`: the fingerprint that an earlier version, without statistics of features, gave the same samples."""
    from trainer.data.dataset import open_dataset  # imports torch

    there = read_record(folder.out)
    if there is not None and there["fingerprint"] == record["fingerprint"]:
        with contextlib.suppress(DataError):  # a damaged copy is replaced
            return Summary(folder.out, open_dataset(folder.out).record, unchanged=True)
    elif there is not None and not force:
        if "standardisation" not in there and there["fingerprint"] == samples:
            raise DataError(
                f"{folder.out} holds another dataset: the same samples as an earlier version prepared them, without the statistics "
                "by which features are standardised. Runs on it go on as before; choose another --out, replace it with --force "
                "(its runs then cannot be continued), or keep it as it is with --standardise=none"
            )
        raise DataError(
            f"{folder.out} holds another dataset of task {there['task'].get('name')} (fingerprint "
            f"{there['fingerprint'][:12]}, now {record['fingerprint'][:12]}), so it is not replaced: choose another --out, "
            "or replace it with --force"
        )
    folder.put_in_place()
    return Summary(folder.out, record)
