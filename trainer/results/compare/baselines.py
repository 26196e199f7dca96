"""Baselines of scikit-learn beside runs in a comparison: which can stand there, and why the others are left out.

A baseline has no config, no folds and no seed. It is a group of its own with one score, and is paired with every seed of
another group by sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.results.compare.compared_run import ComparedRun, data_path_of, same_samples
from trainer.tasks import Task


def trained_runs(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The runs that a training made; all of them, where there are baselines only."""
    return [run for run in runs if run.baseline is None] or list(runs)


def with_fitting_baselines(
    runs: Sequence[ComparedRun], tasks: Mapping[str, Task], split: str
) -> tuple[list[ComparedRun], list[str]]:
    """The runs, and those baselines that have their tasks, data and samples; a note for each baseline that is left out."""
    trained = trained_runs(runs)
    kept, notes = list(trained), []
    for run in runs if trained[0].baseline is None else []:
        if run.baseline is None:
            continue
        reason = _reason_against(run, trained, tasks, split)
        if reason is None:
            kept.append(run)
        else:
            notes.append(f"{run.where} is left out: {reason}")
    return kept, notes


def _reason_against(
    baseline: ComparedRun, trained: Sequence[ComparedRun], tasks: Mapping[str, Task], split: str
) -> str | None:
    """Why a baseline cannot stand beside the runs, None where it can."""
    if any(run.fold is not None for run in trained):
        return "a baseline has no folds, and the runs are those of a cross-validation"
    if any(name not in baseline.tasks for name in tasks):
        common = next((name for name in baseline.tasks if name in tasks), None)
        cure = "" if common is None else f" (--task {common} compares on that alone)"
        return f"it is a baseline of {', '.join(baseline.tasks)}, and the runs are of {', '.join(tasks)}{cure}"
    for name, task in tasks.items():
        fingerprint = baseline.fingerprints.get(name)
        if fingerprint is None or all(run.fingerprints.get(name) != fingerprint for run in trained):
            path = data_path_of(trained[0], name)
            return f"it is a baseline of other data than the runs' (fingerprint {str(fingerprint)[:16]}): egmf baseline {path} makes theirs"
        own = baseline.tasks[name]
        if (own.kind, own.labels, own.grid) != (task.kind, task.labels, task.grid):
            return f"it defines {name} differently: its labels or numbers are others than the runs'"
        if not same_samples(baseline.answers[split][name], trained[0].answers[split][name]):
            return f"it predicted other samples of {split}, or samples with other labels, than {trained[0].where}"
    return None
