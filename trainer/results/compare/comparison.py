"""The comparison of runs: groups of runs that differ only in their seed, their means, and paired tests between groups.

From run folders, without MLflow::

    runs = [run_from_folder(path, ["test"]) for path in paths]     # trainer.results.compare.from_folders
    comparison = compare(runs, baseline="full", kinds=True)

A run's group is decided by its config, or by `run.group` where all runs have one. :func:`trainer.results.compare.sources.find_runs`
reads folders, MLflow runs and experiments. :mod:`trainer.results.compare.statistics` and docs/compare.md define the numbers.

Nothing here is selected by a test score: there is no best run, seed or group, and groups are sorted by validation only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trainer.answers.metrics import metric_of
from trainer.distributed.messages import group_by_value, join_truncated
from trainer.metric_table import WeightedMetric, accuracy
from trainer.results.compare.compared_run import Answers, ComparedRun
from trainer.results.compare.groups import Group, group_runs
from trainer.results.compare.statistics import (
    Correction,
    Estimate,
    corrected,
    estimate,
    mcnemar,
    over_seeds,
    resample_counts,
)
from trainer.tasks import Task

ALL_PAIRS = 10  # groups up to which all pairs are compared
EVERY = "all"  # the kind that stands for all samples
_RNG = 0


@dataclass(frozen=True)
class Score:
    """A metric of a group on the samples of a kind: the value of each seed, their mean, standard deviation and t interval."""

    task: str
    group: str
    metric: str
    kind: str
    n: int
    seeds: list[int]
    values: list[float | None]
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """`group` minus `baseline`, paired by seed and sample.

    `p` is that of the bootstrap over samples and seeds; for an accuracy the larger of it and McNemar's, which is
    conditional on the trained models. `p_corrected` is `p` corrected for all differences of the comparison that have one.
    """

    task: str
    group: str
    baseline: str
    metric: str
    kind: str
    n: int
    seeds: list[int]
    value: float | None
    low: float | None
    high: float | None
    p: float | None
    p_bootstrap: float | None
    p_mcnemar: float | None
    se_samples: float | None
    se_seeds: float | None
    p_corrected: float | None = None
    significant: bool | None = None


@dataclass
class Comparison:
    """The result of :func:`compare`. `notes` are caveats for readers; `differing` is setting -> group -> value."""

    split: str
    level: float
    correction: Correction
    resamples: int
    tasks: dict[str, list[str]]  # task -> metrics that are shown
    tested: dict[str, list[str]]  # task -> metrics whose differences are tested
    kinds: dict[str, list[str]]
    groups: list[Group]
    scores: list[Score] = field(default_factory=list)
    invalid_rate: dict[tuple[str, str], float] = field(default_factory=dict)  # (task, group) -> mean over seeds
    validation: dict[str, Score] = field(default_factory=dict)  # group -> the score it is sorted by
    differences: list[Difference] = field(default_factory=list)
    differing: dict[str, dict[str, str | None]] = field(default_factory=dict)
    baseline: str | None = None
    less_is_better: list[str] = field(default_factory=list)  # metrics
    notes: list[str] = field(default_factory=list)

    def score(self, task: str, group: str, metric: str, kind: str = EVERY) -> Score:
        """The score of these names.

        Raises:
            KeyError: there is none.
        """
        for score in self.scores:
            if (score.task, score.group, score.metric, score.kind) == (task, group, metric, kind):
                return score
        raise KeyError((task, group, metric, kind))


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
    """Compare finished runs on the predictions of a split.

    Args:
        metrics: those whose differences are tested; by default each task's selecting metric; "all" for
            every metric but those that are tested on request only (:class:`trainer.metric_table.Metric`).
        task: compare on this task only; by default on all, and then all runs must have the same tasks.
        group_by: settings, or sections of them, by which the runs are grouped; by default all that can affect results.
        baseline: the group with which all others are compared; by default all pairs, up to ten groups.
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
    tasks = _common_tasks(runs, task, force=force)
    _check_data(runs, tasks, force=force)
    tested = {name: _tested_metrics(one, metrics, runs) for name, one in tasks.items()}
    _check_metrics(tasks, metrics)
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
    out.notes += notes
    out.less_is_better = sorted(
        {m for one in tasks.values() for m in one.metrics if not one.metric(m).greater_is_better}
    )
    out.differing = {key: {g.name: g.settings[key] for g in groups} for key in (groups[0].settings if groups else {})}
    if sort_by is not None:
        _sort(out, tasks, sort_by)
    pairs = _pairs(out, baseline)
    out.notes += _caveats(out)
    for one in tasks.values():
        _compare_task(out, one, pairs, kinds=kinds, force=force)
    _correct_p_values(out)
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
        raise ValueError(
            "\n  ".join(["the runs were not made on the same data (--force compares them anyway)", *faults])
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
        answers = [run.answers["valid"][task.name] for run in group.runs]
        values_S = np.array([metric_of(task, metric, one.truth_N, one.guess_N).value() for one in answers])
        out.validation[group.name] = _score(out, task, group, metric, EVERY, len(answers[0].ids_N), values_S)
    sign = -1 if task.metric(metric).greater_is_better else 1

    def order(group: Group) -> tuple[bool, float]:
        mean = out.validation[group.name].mean
        return mean is None, 0.0 if mean is None else sign * mean

    out.groups.sort(key=order)


def _pairs(out: Comparison, baseline: str | None) -> list[tuple[Group, Group]]:
    """(group, the group it is compared with)."""
    names = [group.name for group in out.groups]
    if baseline is not None:
        matching = [g for g in out.groups if g.name == baseline]
        matching = matching or [g for g in out.groups if baseline in g.name]
        matching = matching or [g for g in out.groups if any(run.name.startswith(baseline) for run in g.runs)]
        if len(matching) != 1:
            raise ValueError(
                f"--baseline {baseline!r} matches {len(matching)} groups: give a group's name, a part of it, or how its runs' "
                f"names begin; there are: {'; '.join(names)}"
            )
        out.baseline = matching[0].name
        return [(group, matching[0]) for group in out.groups if group is not matching[0]]
    if len(names) > ALL_PAIRS:
        out.notes.append(
            f"no differences are tested: {len(names)} groups make too many pairs; choose one with --baseline"
        )
        return []
    return [(b, a) for a, b in itertools.combinations(out.groups, 2)]


def _caveats(out: Comparison) -> list[str]:
    notes = []
    runs = [run for group in out.groups for run in group.runs]
    commits = {run.commit for run in runs}
    if len(commits) > 1:
        notes.append(
            f"the runs were made by different versions of the code: {join_truncated(sorted(str(c)[:12] for c in commits))}"
        )
    single = [group.name for group in out.groups if len(group.runs) == 1]
    if single:
        notes.append(f"one seed only, which says nothing about other seeds: {join_truncated(single)}")
    return notes


def _compare_task(
    out: Comparison, task: Task, pairs: Sequence[tuple[Group, Group]], *, kinds: bool, force: bool
) -> None:
    """Add the task's scores and differences."""
    runs = [run for group in out.groups for run in group.runs]
    answers = {id(run): run.answers[out.split][task.name] for run in runs}
    first = answers[id(runs[0])]
    different = [r.where for r in runs if not _same_samples(first, answers[id(r)])]
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
    values = _add_scores(out, task, answers)
    if not different and pairs:
        _add_differences(out, task, pairs, answers, values)


def _same_samples(a: Answers, b: Answers) -> bool:
    return np.array_equal(a.ids_N, b.ids_N) and np.array_equal(a.truth_N, b.truth_N)


def _chosen(answers: Answers, kind: str) -> np.ndarray:
    if kind == EVERY or answers.kind_N is None:
        return np.ones(len(answers.ids_N), dtype=bool)
    return np.asarray(answers.kind_N == kind)


def _add_scores(out: Comparison, task: Task, answers: dict[int, Answers]) -> dict[tuple[int, str, str], float]:
    """Scores of every group, metric and kind; returns (run, metric, kind) -> value, nan where undefined."""
    values: dict[tuple[int, str, str], float] = {}
    for group in out.groups:
        for run in group.runs:
            of_run = answers[id(run)]
            for metric in task.metrics:
                of = metric_of(task, metric, of_run.truth_N, of_run.guess_N)
                for kind in out.kinds[task.name]:
                    values[id(run), metric, kind] = of.value(_chosen(of_run, kind))
        invalid = [float(np.isnan(answers[id(run)].guess_N).mean()) for run in group.runs]
        out.invalid_rate[task.name, group.name] = sum(invalid) / len(invalid)
        for metric, kind in itertools.product(task.metrics, out.kinds[task.name]):
            n = int(_chosen(answers[id(group.runs[0])], kind).sum())
            values_S = np.array([values[id(run), metric, kind] for run in group.runs])
            out.scores.append(_score(out, task, group, metric, kind, n, values_S))
    return values


def _score(out: Comparison, task: Task, group: Group, metric: str, kind: str, n: int, values_S: np.ndarray) -> Score:
    mean = over_seeds(values_S, out.level)
    values = [None if np.isnan(v) else float(v) for v in values_S]
    return Score(task.name, group.name, metric, kind, n, group.seeds, values, mean.mean, mean.sd, mean.low, mean.high)


@dataclass(frozen=True)
class _Resampled:
    """A metric of every run on the samples of one kind: on all of them, and on each resample. Runs go by ``id(run)``."""

    metric: str
    kind: str
    chosen_N: np.ndarray
    of: dict[int, WeightedMetric]
    value: dict[int, float]
    resampled_B: dict[int, np.ndarray]


def _add_differences(
    out: Comparison,
    task: Task,
    pairs: Sequence[tuple[Group, Group]],
    answers: dict[int, Answers],
    values: dict[tuple[int, str, str], float],
) -> None:
    first = answers[id(out.groups[0].runs[0])]
    counts_BN = resample_counts(len(first.ids_N), out.resamples, np.random.default_rng(_RNG))
    for metric, kind in itertools.product(out.tested[task.name], out.kinds[task.name]):
        chosen_N = _chosen(first, kind)
        of = {key: metric_of(task, metric, of_run.truth_N, of_run.guess_N) for key, of_run in answers.items()}
        value = {key: values[key, metric, kind] for key in answers}
        resampled = _Resampled(metric, kind, chosen_N, of, value, _on_resamples(of, chosen_N, counts_BN))
        out.differences += [_difference(out, task, group, base, resampled) for group, base in pairs]
    disjoint = [f"{g.name} and {b.name}" for g, b in pairs if not set(g.seeds) & set(b.seeds)]
    if disjoint:
        out.notes.append(f"{task.name}: no differences, since no seed is common to {join_truncated(disjoint)}")


def _on_resamples(
    of: Mapping[int, WeightedMetric], chosen_N: np.ndarray, counts_BN: np.ndarray
) -> dict[int, np.ndarray]:
    """[B] of each run: the metric of the chosen samples on each resample."""
    counts_BM = counts_BN if chosen_N.all() else counts_BN[:, chosen_N]
    counts_BM = counts_BM.astype(np.result_type(*(one.columns_NK for one in of.values())), copy=False)
    return {key: one.weighted(counts_BM, chosen_N) for key, one in of.items()}


def _difference(out: Comparison, task: Task, group: Group, base: Group, resampled: _Resampled) -> Difference:
    """`group` minus `base`, paired by the seeds that both have."""
    seeds = sorted(set(group.seeds) & set(base.seeds))
    by_seed, base_by_seed = ({run.seed: id(run) for run in one.runs} for one in (group, base))
    pairs = [(by_seed[seed], base_by_seed[seed]) for seed in seeds]
    n = int(resampled.chosen_N.sum())
    estimated, p_mcnemar = Estimate(None), None
    if seeds:
        differences_S = np.array([resampled.value[a] - resampled.value[b] for a, b in pairs])
        resampled_B = sum(resampled.resampled_B[a] - resampled.resampled_B[b] for a, b in pairs) / len(seeds)
        estimated = estimate(differences_S, np.asarray(resampled_B), n, out.level)
        if task.metric(resampled.metric).formula is accuracy:
            p_mcnemar = mcnemar(*(_correct_SN(resampled, keys) for keys in zip(*pairs, strict=True)))
    p_values = [p for p in (estimated.p, p_mcnemar) if p is not None]
    return Difference(
        task=task.name,
        group=group.name,
        baseline=base.name,
        metric=resampled.metric,
        kind=resampled.kind,
        n=n,
        seeds=seeds,
        value=estimated.value,
        low=estimated.low,
        high=estimated.high,
        p=max(p_values) if estimated.p is not None else None,
        p_bootstrap=estimated.p,
        p_mcnemar=p_mcnemar,
        se_samples=estimated.se_samples,
        se_seeds=estimated.se_seeds,
    )


def _correct_SN(resampled: _Resampled, keys: Sequence[int]) -> np.ndarray:
    """[S, N]: which answers of the runs are correct, of the samples that an accuracy counts."""
    return np.stack([of.columns_NK[of.counted_N & resampled.chosen_N, 1] for of in (resampled.of[key] for key in keys)])


def _correct_p_values(out: Comparison) -> None:
    corrected_p = corrected([d.p for d in out.differences], out.correction)
    out.differences = [
        replace(d, p_corrected=p, significant=None if p is None else p <= 1 - out.level)
        for d, p in zip(out.differences, corrected_p, strict=True)
    ]
