"""The runs that are to be compared, found by what a user names: run folders, folders of them, MLflow runs and experiments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.results.compare.sources.compared_run import ComparedRun
from trainer.results.compare.sources.from_folders import runs_below
from trainer.results.compare.sources.from_mlflow import default_uri, runs_from_mlflow


@dataclass
class FoundRuns:
    """Runs, and notes: what was left out and why."""

    runs: list[ComparedRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_runs(what: Sequence[str], splits: Iterable[str], uri: str | None = None) -> FoundRuns:
    """The finished runs of `what`: run folders, folders that contain some, MLflow run ids and experiment names.

    The run id of a sweep stands for its children. Unfinished runs are left out, and each run counts once.

    Args:
        splits: those whose predictions are read.
        uri: the MLflow store; by default MLFLOW_TRACKING_URI, else ``mlflow.db`` beside the folders or in ``runs``.

    Raises:
        ValueError: something is not found, cannot be read, or has no predictions of a split; all of them in one message.
    """
    splits = tuple(splits)
    folders = [Path(word) for word in what if Path(word).is_dir()]
    words = [word for word in what if not Path(word).is_dir()]
    found = FoundRuns()
    faults: list[str] = []
    for source in [*folders, *([None] if words else [])]:
        try:
            if source is not None:
                runs, notes, unreadable = runs_below(source, splits)
            else:
                runs, notes, unreadable = runs_from_mlflow(words, splits, uri or default_uri(words, folders))
        except ValueError as error:
            faults.append(str(error))
            continue
        found.runs += runs
        found.notes += notes
        faults += unreadable
    if faults:
        raise ValueError("\n  ".join([f"{len(faults)} fault{'s' if len(faults) > 1 else ''}", *faults]))
    return _each_once(found)


def _each_once(found: FoundRuns) -> FoundRuns:
    """Without runs that were found twice: a folder and its MLflow run are the same run."""
    seen: dict[str, ComparedRun] = {}
    notes = list(found.notes)
    for run in found.runs:
        key = run.mlflow[1] if run.mlflow else str(Path(run.where).resolve())
        if key in seen:
            notes.append(f"{run.where} and {seen[key].where} are the same run: it counts once")
        else:
            seen[key] = run
    return FoundRuns(list(seen.values()), notes)
