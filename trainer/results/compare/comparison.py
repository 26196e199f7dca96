"""The comparison of runs: groups of runs that differ only in seed and fold, their means, and paired tests between groups.

From run folders, without MLflow::

    runs = [run_from_folder(path, ["test"]) for path in paths]     # trainer.results.compare.sources.from_folders
    comparison = compare(runs, baseline="full", kinds=True)

A run's group is decided by its config, or by `run.group` where all runs have one. :func:`trainer.results.compare.sources.find_runs`
reads folders, MLflow runs and experiments. :mod:`trainer.results.compare.statistics` and docs/compare.md define the numbers.

Nothing here is selected by a test score: there is no best run, seed or group, and groups are sorted by validation only.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trainer.answers.metrics import metric_of
from trainer.distributed.messages import group_by_value, join_truncated
from trainer.results.compare.baselines import trained_runs, with_fitting_baselines
from trainer.results.compare.differences import add_differences, chosen_samples, correct_p_values
from trainer.results.compare.folds import (
    folds_of,
    only_folds,
    score_folds,
    tested_per_trained,
)
from trainer.results.compare.groups import FOLDS_HINT, Group, group_runs
from trainer.results.compare.result import EVERY, Comparison, Score
from trainer.results.compare.sources.compared_run import Answers, ComparedRun, same_samples
from trainer.results.compare.statistics import (
    Correction,
    over_seeds,
)
from trainer.tasks import Task

ALL_PAIRS = 10  # groups up to which all pairs are compared


def compare(
    runs: Sequence[ComparedRun],
    *,
    split: str = "test",
    metrics: Sequence[str] = (),
    task: str | None = None,
    group_by: Sequence[str] = (),
    baseline: str | None = None,
    kinds: bool = False,
    sort_by: str | None = None,
    correction: Correction = "holm",
    level: float = 0.95,
    resamples: int = 2000,
    force: bool = False,
) -> Comparison:
    """Compare finished runs, and baselines, on the predictions of a split.

    Baselines of the runs' data and task are groups of their own beside the runs'; others are left out, with a note.

    Args:
        metrics: those whose differences are tested; by default each task's selecting metric; "all" for
            every metric but those that are tested on request only (:class:`trainer.metric_table.Metric`).
        task: compare on this task only; by default on all, and then all runs must have the same tasks.
        group_by: settings, or sections of them, by which the runs are grouped; by default all that can affect results.
        baseline: the group with which all others are compared; by default all pairs, up to ten groups of runs, and
            each of these with each baseline.
        kinds: also compare on the samples of each kind of the data.
        sort_by: a metric *on validation* by which the groups are sorted, best first; needs predictions on validation.
        correction: method that corrects the p-values of all tests of this comparison.
        level: confidence level of intervals; a difference is significant where its corrected p is at most ``1 - level``.
        resamples: number of bootstrap resamples of the samples.
        force: compare even if data or tasks differ.

    Raises:
        ValueError: nothing to compare, or runs that are not comparable; every reason in one message.
    """
    if not runs:
        raise ValueError("there are no finished runs to compare")
    if not 0 < level < 1 or resamples < 100:
        raise ValueError(f"level={level} must lie between 0 and 1, and resamples={resamples} be at least 100")
    trained = trained_runs(runs)
    tasks = _common_tasks(trained, task, force=force)
    _check_data(trained, tasks, force=force)
    tested = {name: _tested_metrics(one, metrics, trained) for name, one in tasks.items()}
    _check_metrics(tasks, metrics)
    runs, left_out = with_fitting_baselines(runs, tasks, split)
    groups, notes = group_runs(runs, group_by)
    out = Comparison(
        split,
        level,
        correction,
        resamples,
        {name: list(one.metrics) for name, one in tasks.items()},
        tested,
        {},
        groups,
    )
    out.notes += left_out + notes
    out.less_is_better = sorted(
        {m for one in tasks.values() for m in one.metrics if not one.metric(m).greater_is_better}
    )
    with_settings = [group for group in groups if group.baseline is None]
    settings = with_settings[0].settings if with_settings else {}
    out.differing = {key: {g.name: g.settings[key] for g in with_settings} for key in settings}
    if sort_by is not None:
        _sort(out, tasks, sort_by)
    pairs = _pairs(out, baseline)
    out.notes += _caveats(out)
    for one in tasks.values():
        _compare_task(out, one, pairs, kinds=kinds, force=force)
    correct_p_values(out)
    return out


def _common_tasks(runs: Sequence[ComparedRun], only: str | None, *, force: bool) -> dict[str, Task]:
    by_tasks = group_by_value((run.where, tuple(sorted(run.tasks))) for run in runs)
    if only is not None:
        without = [run.where for run in runs if only not in run.tasks]
        if without:
            raise ValueError(f"these runs have no task {only}: {', '.join(without)}")
        return {only: runs[0].tasks[only]}
    common = [name for name in runs[0].tasks if all(name in run.tasks for run in runs)]
    if len(by_tasks) > 1 and not (force and common):
        lines = [f"{', '.join(names)}: {join_truncated(where)}" for names, where in by_tasks.items()]
        cure = (
            f"--task {common[0]} compares on one, --force on all common ones" if common else "they have none in common"
        )
        raise ValueError("\n  ".join([f"the runs have different tasks ({cure})", *lines]))
    return {name: runs[0].tasks[name] for name in common}


def _check_data(runs: Sequence[ComparedRun], tasks: dict[str, Task], *, force: bool) -> None:
    faults = []
    for name, task in tasks.items():
        if any(run.tasks[name].model_copy(update={"select": task.select}) != task for run in runs):
            faults.append(f"the runs define {name} differently: its labels, numbers or prompts differ")
        by_data = group_by_value((run.where, run.fingerprints.get(name, "unknown")) for run in runs)
        if len(by_data) > 1 or "unknown" in by_data:
            faults += [f"{name}, data {data[:16]}: {join_truncated(where)}" for data, where in by_data.items()]
    if faults and not force:
        several = any(len({run.fingerprints.get(name) for run in runs}) > 1 for name in tasks)
        cure = [f"{FOLDS_HINT}."] if several else []
        raise ValueError(
            "\n  ".join(["the runs were not made on the same data (--force compares them anyway)", *faults, *cure])
        )


def _tested_metrics(task: Task, metrics: Sequence[str], runs: Sequence[ComparedRun]) -> list[str]:
    if not metrics:
        by_metric = group_by_value((run.where, run.tasks[task.name].select) for run in runs)
        if len(by_metric) > 1:
            lines = [f"{metric}: {join_truncated(where)}" for metric, where in by_metric.items()]
            raise ValueError(
                "\n  ".join(
                    [f"the runs select by different metrics of {task.name}: say which is tested, --metric", *lines]
                )
            )
        return [task.select]
    asked = {task.metric_names.get(name) for name in metrics}
    if "all" in metrics:
        asked |= {task.select, *(name for name in task.metrics if not task.metric(name).on_request)}
    return [name for name in task.metrics if name in asked]


def _check_metrics(tasks: dict[str, Task], metrics: Sequence[str]) -> None:
    known = list(dict.fromkeys(name for task in tasks.values() for name in task.metrics))
    unknown = [name for name in metrics if name != "all" and not any(name in t.metric_names for t in tasks.values())]
    if unknown:
        raise ValueError(f"no metric {', '.join(unknown)} of {', '.join(tasks)}: there are {', '.join(known)}")


def _sort(out: Comparison, tasks: dict[str, Task], sort_by: str) -> None:
    """Sort the groups by their mean of a metric on validation, best first, undefined ones last."""
    split, _, metric = sort_by.rpartition("/")
    if split not in ("", "valid"):
        raise ValueError(
            f"groups are not sorted by {sort_by}: whoever picks the first row then chooses on the {split} split, and that "
            f"score no longer estimates performance on new data. Sort by validation: --sort-by valid/{metric}"
        )
    task = next(iter(tasks.values()))
    metric = task.metric_names.get(metric, metric)
    if len(tasks) > 1 or metric not in task.metrics:
        raise ValueError(f"--sort-by takes a metric of one task (--task): {', '.join(task.metrics)}; not {metric}")
    for group in out.groups:
        by_seed = [[run.answers["valid"][task.name] for run in folds] for folds in group.runs_by_seed()]
        values_S = np.array(
            [np.mean([metric_of(task, metric, one.truth_N, one.guess_N).value() for one in folds]) for folds in by_seed]
        )
        n = sum(len(one.ids_N) for one in by_seed[0])
        out.validation[group.name] = _score(out, task, group, metric, EVERY, n, values_S)
    sign = -1 if task.metric(metric).greater_is_better else 1

    def order(group: Group) -> tuple[bool, float]:
        mean = out.validation[group.name].mean
        return mean is None, 0.0 if mean is None else sign * mean

    out.groups.sort(key=order)


def _pairs(out: Comparison, baseline: str | None) -> list[tuple[Group, Group]]:
    """(group, the group it is compared with)."""
    if baseline is not None:
        reference = _named(out.groups, baseline)
        out.baseline = reference.name
        return [(group, reference) for group in out.groups if group is not reference]
    trained = [group for group in out.groups if group.baseline is None]
    baselines = [group for group in out.groups if group.baseline is not None]
    if (count := len(trained or baselines)) > ALL_PAIRS:
        out.notes.append(f"no differences are tested: {count} groups make too many pairs; choose one with --baseline")
        return []
    pairs = [(b, a) for a, b in itertools.combinations(trained or baselines, 2)]
    return pairs + [(group, one) for one in baselines for group in trained]


def _named(groups: Sequence[Group], name: str) -> Group:
    """The group of a name; else the one with a setting of this value; else the one that `name` is a part of, or the beginning of
    its runs' names, baselines last.

    Raises:
        ValueError: none or several.
    """
    matching = [g for g in groups if g.name == name]
    matching = matching or [g for g in groups if g.baseline is not None and name in (g.baseline, g.runs[0].name)]
    matching = matching or [g for g in groups if name in map(_plain_value, g.settings.values())]
    for baselines in (False, True):
        some = [g for g in groups if (g.baseline is not None) == baselines]
        matching = matching or [g for g in some if name in g.name]
        matching = matching or [g for g in some if any(run.name.startswith(name) for run in g.runs)]
    if len(matching) != 1:
        raise ValueError(
            f"--baseline {name!r} matches {len(matching)} groups: give a group's name, a part of it, or how its runs' "
            f"names begin; there are: {'; '.join(g.name for g in groups)}"
        )
    return matching[0]


def _plain_value(value: str | None) -> str | None:
    """A setting's value without its brackets or quotes: ``text`` for ``["text"]``."""
    return None if value is None else re.sub(r"[\[\]\"' ]", "", value)


def _caveats(out: Comparison) -> list[str]:
    notes = []
    trained = [group for group in out.groups if group.baseline is None]
    runs = [run for group in trained for run in group.runs]
    commits = {run.commit for run in runs}
    if len(commits) > 1:
        notes.append(
            f"the runs were made by different versions of the code: {join_truncated(sorted(str(c)[:12] for c in commits))}"
        )
    single = [group.name for group in trained if len(group.seeds) == 1]
    if single:
        notes.append(f"one seed only, which says nothing about other seeds: {join_truncated(single)}")
    return notes


def _compare_task(
    out: Comparison, task: Task, pairs: Sequence[tuple[Group, Group]], *, kinds: bool, force: bool
) -> None:
    """Add the task's scores and differences."""
    runs = [run for group in out.groups for run in group.per_seed]
    if unpooled := [run.where for run in runs if out.split not in run.answers]:
        raise ValueError(
            f"samples of {out.split} are in several folds, so folds are not compared on it, but on test: {join_truncated(unpooled)}"
        )
    answers = {id(run): run.answers[out.split][task.name] for run in runs}
    shared = _on_common_folds(out, answers)
    first = shared[id(runs[0])]
    different = [r.where for r in runs if not same_samples(first, shared[id(r)])]
    if different and not force:
        raise ValueError(
            f"{task.name}, {out.split}: these runs predicted other samples, or samples with other labels, than "
            f"{runs[0].where}: {join_truncated(different)}"
        )
    if different:
        out.notes.append(f"{task.name}: no differences are tested, since the runs predicted different samples")
    out.kinds[task.name] = [EVERY]
    if kinds and first.kind_N is not None and not different:
        out.kinds[task.name] += sorted({str(kind) for kind in first.kind_N if kind is not None})
    _add_scores(out, task, answers)
    if not different and pairs and len(first.ids_N):
        add_differences(out, task, pairs, shared)


def _on_common_folds(out: Comparison, answers: dict[int, Answers]) -> dict[int, Answers]:
    """The answers to the samples of the folds that all groups have; all answers, where a group has none."""
    folds = [folds_of(answers[id(group.per_seed[0])]) for group in out.groups]
    common = [fold for fold in folds[0] if all(fold in others for others in folds)]
    if not all(folds) or all(of_group == common for of_group in folds):
        return answers
    note = "differences are those on the folds that all groups have: " + (", ".join(common) or "none")
    if note not in out.notes:
        out.notes.append(note)
    return {key: only_folds(one, common) for key, one in answers.items()}


def _add_scores(out: Comparison, task: Task, answers: dict[int, Answers]) -> None:
    """Scores of every group, metric and kind."""
    for group in out.groups:
        of_group = [answers[id(run)] for run in group.per_seed]
        ratio = tested_per_trained(group.runs)
        invalid = [float(np.isnan(one.guess_N).mean()) for one in of_group]
        out.invalid_rate[task.name, group.name] = sum(invalid) / len(invalid)
        for metric in task.metrics:
            of = [metric_of(task, metric, one.truth_N, one.guess_N) for one in of_group]
            for kind in out.kinds[task.name]:
                chosen = [chosen_samples(one, kind) for one in of_group]
                values_S = np.array([one.value(of_kind) for one, of_kind in zip(of, chosen, strict=True)])
                folds = score_folds(of_group, chosen, lambda s, part, of=of: of[s].value(part), ratio, out.level)  # type: ignore[misc]
                n = int(chosen[0].sum())
                out.scores.append(replace(_score(out, task, group, metric, kind, n, values_S), folds=folds))


def _score(out: Comparison, task: Task, group: Group, metric: str, kind: str, n: int, values_S: np.ndarray) -> Score:
    mean = over_seeds(values_S, out.level)
    values = [None if np.isnan(v) else float(v) for v in values_S]
    return Score(task.name, group.name, metric, kind, n, group.seeds, values, mean.mean, mean.sd, mean.low, mean.high)
