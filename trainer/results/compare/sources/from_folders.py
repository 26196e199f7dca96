"""Runs to compare, read from run folders; MLflow is not needed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import yaml

from trainer.files import load_json, load_yaml
from trainer.results.compare.sources.compared_run import (
    REQUIRED_SETTINGS,
    ComparedRun,
    Cost,
    prediction_files,
    read_splits,
    tasks_of,
    with_defaults,
)
from trainer.results.run_folder import PREDICTIONS, RunFolder, is_artifact_store, is_run
from trainer.results.runs import State, parse_time, state_of
from trainer.run.record import RECORD, RecordValues, baseline_of
from trainer.schema import dotted
from trainer.tracking.journal import JOURNAL, SPEED, read_journal

DEPTH = 4  # levels of folders below a given one that are searched for runs


class BaselineSplitError(ValueError):
    """A baseline without predictions of a split: it can be left out of a comparison. `why` says which."""

    def __init__(self, path: Path, missing: Sequence[str]) -> None:
        self.why = f"it is a baseline and has no predictions of {', '.join(missing)}"
        super().__init__(f"{path} cannot be compared: {self.why}")


class UnfinishedError(ValueError):
    """A run whose `state` is not done: it can be left out of a comparison."""

    def __init__(self, path: Path, state: State) -> None:
        super().__init__(f"{path} is not finished ({state}): continue it, or leave it out")
        self.state = state


def run_from_folder(path: Path, splits: Iterable[str] = ("test",), name: str | None = None) -> ComparedRun:
    """The finished run in a run folder, or the baseline in that of a baseline.

    Raises:
        BaselineSplitError: it is a baseline, which predicts no training samples.
        UnfinishedError: its state is not ``done``.
        ValueError: it is not a run folder, is damaged, or has no predictions of a split.
    """
    record = _read_record(path / RECORD)
    state = state_of(RunFolder(path, record=record))
    if state.name != "done":
        raise UnfinishedError(path, state)
    if "baseline" in record:
        return _baseline_from_folder(path, record, tuple(splits), name)
    config = _read_config(path / "config.yaml")
    fingerprints = _fingerprints(record)
    started = parse_time(record.get("started"))
    journal = read_journal(path / JOURNAL) if (path / JOURNAL).is_file() else {}
    tasks = tasks_of(config, fingerprints)
    speeds = [speed for _, speed in journal.get(SPEED, [])]
    tracked = record.get("mlflow")
    run_id = tracked["run_id"] if tracked else None
    return ComparedRun(
        name=name or path.resolve().name,
        where=str(path),
        seed=int(config["train.seed"]),
        tasks=tasks,
        config=config,
        fingerprints=fingerprints,
        answers=read_splits(prediction_files(path, splits, str(path)), tasks),
        started=started.timestamp() if started else 0.0,
        cost=_cost(record, statistics.median(speeds) if speeds else None),
        commit=(record.get("git") or {}).get("commit"),
        mlflow=(tracked["uri"], run_id) if tracked and run_id else None,
        experiment=config.get("track.experiment"),
        fold=record.get("fold"),
    )


def _baseline_from_folder(path: Path, record: RecordValues, splits: tuple[str, ...], name: str | None) -> ComparedRun:
    """The baseline in a folder that `egmf baseline` wrote; errors as of :func:`run_from_folder`."""
    baseline, fingerprints = baseline_of(record), _fingerprints(record)
    if baseline is None or not fingerprints:
        raise ValueError(f"{path / RECORD} is damaged: egmf baseline --force writes the baseline anew")
    if missing := [split for split in splits if not (path / PREDICTIONS / f"{split}.parquet").is_file()]:
        raise BaselineSplitError(path, missing)
    tasks = tasks_of({"task": json.dumps(list(fingerprints)), "data.path": baseline["data"]}, fingerprints)
    started = parse_time(record.get("started"))
    return ComparedRun(
        name=name or path.resolve().name,
        where=str(path),
        seed=0,
        tasks=tasks,
        config={},
        fingerprints=fingerprints,
        answers=read_splits(prediction_files(path, splits, str(path)), tasks),
        started=started.timestamp() if started else 0.0,
        cost=_cost(record, None),
        commit=(record.get("git") or {}).get("commit"),
        baseline=baseline["name"],
        fold=record.get("fold"),
    )


def _fingerprints(record: RecordValues) -> dict[str, str]:
    return {name: str(value) for name, value in (record.get("data") or {}).items()}


def _cost(record: RecordValues, samples_per_second: float | None) -> Cost:
    started, ended = parse_time(record.get("started")), parse_time(record.get("ended"))
    seconds = (ended - started).total_seconds() if started and ended else None
    return Cost(seconds, record.get("world"), record.get("device"), samples_per_second)


def runs_below(folder: Path, splits: Sequence[str]) -> tuple[list[ComparedRun], list[str], list[str]]:
    """The finished runs and the baselines in `folder` (which may be one itself), notes on those left out, and faults of those unreadable.

    Raises:
        ValueError: there is no run in it.
    """
    paths = [folder] if is_run(folder) else _run_folders(folder)
    if not paths:
        raise ValueError(f"{folder} is not a run folder and contains none: egmf train makes them, egmf runs lists them")
    runs, notes, faults = [], [], []
    for path in paths:
        try:
            runs.append(run_from_folder(path, splits, str(path.relative_to(folder)) if path != folder else None))
        except UnfinishedError as error:
            notes.append(f"{path} is left out: it is not finished ({error.state})")
        except BaselineSplitError as error:
            notes.append(f"{path} is left out: {error.why}")
        except (ValueError, OSError) as error:
            faults.append(str(error))
    return runs, notes, faults


def _run_folders(folder: Path, depth: int = DEPTH) -> list[Path]:
    """Run folders below `folder`, by name; folders inside a run (its archived predecessors) are not searched, and neither are the
    copies of runs that an MLflow store keeps as artifacts."""
    paths = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if is_artifact_store(path):
            continue
        if is_run(path):
            paths.append(path)
        elif depth > 1:
            paths += _run_folders(path, depth - 1)
    return paths


def _read_record(path: Path) -> RecordValues:
    try:
        value = load_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not the record of a run")
    return cast(RecordValues, value)


def _read_config(path: Path) -> dict[str, str]:
    """The resolved config as MLflow has it: dotted keys, values as text."""
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    config = {key: str(value) for key, value in dotted(raw).items()} if isinstance(raw, dict) else {}
    missing = REQUIRED_SETTINGS - set(config)
    if missing:
        raise ValueError(f"{path} is not the resolved config of a run: it lacks {', '.join(sorted(missing))}")
    return with_defaults(config)
