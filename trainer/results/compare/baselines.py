"""Baselines of scikit-learn beside runs in a comparison: which can stand there, and why the others are left out.

A baseline has no config and no seed. It is a group of its own with one score, and is paired with every seed of another group by
sample. One on a dataset with folds is fitted once for each, and its folds stand beside those of the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.results.compare.folds import fold_name
from trainer.results.compare.sources.compared_run import ComparedRun, data_path_of, same_samples
from trainer.tasks import Task


def trained_runs(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The runs that a training made; all of them, where there are baselines only."""
    return [run for run in runs if run.baseline is None] or list(runs)


def with_fitting_baselines(
    runs: Sequence[ComparedRun], tasks: Mapping[str, Task], split: str
) -> tuple[list[ComparedRun], list[str]]:
    """The runs, and those baselines that have their tasks, data, folds and samples; a note for each baseline that is left out,
    and for each that learnt from other samples of its fold than the runs did."""
    trained = trained_runs(runs)
    kept, notes = list(trained), []
    for run in runs if trained[0].baseline is None else []:
        if run.baseline is None:
            continue
        reason = _reason_against(run, trained, tasks, split)
        if reason is None:
            kept.append(run)
            notes += _other_training(run, trained)
        else:
            notes.append(f"{run.where} is left out: {reason}")
    return kept, notes


def _reason_against(
    baseline: ComparedRun, trained: Sequence[ComparedRun], tasks: Mapping[str, Task], split: str
) -> str | None:
    """Why a baseline cannot stand beside the runs, None where it can."""
    if any(name not in baseline.tasks for name in tasks):
        common = next((name for name in baseline.tasks if name in tasks), None)
        cure = "" if common is None else f" (--task {common} compares on that alone)"
        return f"it is a baseline of {', '.join(baseline.tasks)}, and the runs are of {', '.join(tasks)}{cure}"
    for name, task in tasks.items():
        fingerprint = baseline.fingerprints.get(name)
        if fingerprint is None or all(run.fingerprints.get(name) != fingerprint for run in trained):
            path = data_path_of(trained[0], name)
            return f"it is a baseline of other data than the runs' (fingerprint {str(fingerprint)[:16]}): egmf baseline {path} makes theirs"
        if (reason := _reason_against_fold(baseline, trained)) is not None:
            return reason
        own = baseline.tasks[name]
        if (own.kind, own.labels, own.grid) != (task.kind, task.labels, task.grid):
            return f"it defines {name} differently: its labels or numbers are others than the runs'"
        like = _of_its_fold(baseline, trained)[0]
        if not same_samples(baseline.answers[split][name], like.answers[split][name]):
            return f"it predicted other samples of {split}, or samples with other labels, than {like.where}"
    return None


def _reason_against_fold(baseline: ComparedRun, trained: Sequence[ComparedRun]) -> str | None:
    """Why a baseline's fold, or that it has none, keeps it from standing beside the runs."""
    if baseline.fold is None and any(run.fold is not None for run in trained):
        return "it is of no fold, and the runs are those of a cross-validation"
    if baseline.fold is not None and all(run.fold is None for run in trained):
        return f"it is of fold {fold_name(baseline)}, and the runs are of none"
    if not _of_its_fold(baseline, trained):
        return f"it is of fold {fold_name(baseline)}, and no run is"
    return None


def _of_its_fold(baseline: ComparedRun, trained: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The runs of the baseline's fold; of a baseline without one, those without one."""
    return [run for run in trained if fold_name(run) == fold_name(baseline)]


def _other_training(baseline: ComparedRun, trained: Sequence[ComparedRun]) -> list[str]:
    """A note where the baseline was fitted on another number of samples than every run of its fold was trained on."""
    if baseline.fold is None:
        return []
    own = baseline.fold["train"]
    counts = {run.fold["train"]: run.where for run in _of_its_fold(baseline, trained) if run.fold is not None}
    if own in counts:
        return []
    count, where = next(iter(counts.items()))
    return [
        f"{baseline.where} learnt from {own} samples of fold {fold_name(baseline)}, {where} from {count}: give egmf baseline the runs' "
        "data.fold_valid with --fold-valid"
    ]
