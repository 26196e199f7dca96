"""The differences between groups: paired by seed and sample, tested, corrected, and with the seeds that would tell them.

Legend: N samples, M of them chosen, B resamples, S seeds, F folds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from trainer.answers.metrics import metric_of
from trainer.distributed.messages import LISTED, group_by_value, join_truncated
from trainer.metric_formulas import accuracy
from trainer.metric_table import WeightedMetric
from trainer.results.compare.folds import fold_values, folds_of, tested_per_trained
from trainer.results.compare.groups import Group
from trainer.results.compare.power import POWER, SeedsNeeded, seeds_needed, seeds_to_reach, smallest_p
from trainer.results.compare.result import EVERY, Comparison, Difference
from trainer.results.compare.sources.compared_run import Answers
from trainer.results.compare.statistics import (
    Estimate,
    FoldTest,
    corrected,
    estimate,
    fold_test,
    mcnemar,
    resample_counts,
)
from trainer.tasks import Task

_RNG = 0
CORRECTION_NAMES = {"holm": "Holm's", "bh": "Benjamini and Hochberg's"}


def chosen_samples(answers: Answers, kind: str) -> np.ndarray:
    """[N]: whether a sample is of the kind."""
    if kind == EVERY or answers.kind_N is None:
        return np.ones(len(answers.ids_N), dtype=bool)
    return np.asarray(answers.kind_N == kind)


@dataclass(frozen=True)
class _Resampled:
    """A metric of every run on the samples of one kind: on all of them, and on each resample. Runs go by ``id(run)``."""

    metric: str
    kind: str
    chosen_N: np.ndarray
    answers: dict[int, Answers]
    of: dict[int, WeightedMetric]
    value: dict[int, float]
    resampled_B: dict[int, np.ndarray]

    def difference(self, a: int, b: int, chosen_N: np.ndarray) -> float:
        """The metric of run `a` minus that of run `b` on some samples."""
        return self.of[a].value(chosen_N) - self.of[b].value(chosen_N)


def add_differences(
    out: Comparison,
    task: Task,
    pairs: Sequence[tuple[Group, Group]],
    answers: dict[int, Answers],
) -> None:
    """Add the task's differences to the comparison: each metric that is tested, on each kind of samples, for each pair of groups."""
    first = answers[id(out.groups[0].per_seed[0])]
    counts_BN = resample_counts(len(first.ids_N), out.resamples, np.random.default_rng(_RNG), first.fold_N)
    for metric, kind in itertools.product(out.tested[task.name], out.kinds[task.name]):
        chosen_N = chosen_samples(first, kind)
        of = {key: metric_of(task, metric, of_run.truth_N, of_run.guess_N) for key, of_run in answers.items()}
        value = {key: one.value(chosen_N) for key, one in of.items()}
        resampled = _Resampled(metric, kind, chosen_N, answers, of, value, _on_resamples(of, chosen_N, counts_BN))
        out.differences += [_difference(out, task, group, base, resampled) for group, base in pairs]
    disjoint = [f"{g.name} and {b.name}" for g, b in pairs if not _paired(g, b)[1]]
    if disjoint:
        out.notes.append(f"{task.name}: no differences, since no seed is common to {join_truncated(disjoint)}")


def _on_resamples(
    of: Mapping[int, WeightedMetric], chosen_N: np.ndarray, counts_BN: np.ndarray
) -> dict[int, np.ndarray]:
    """[B] of each run: the metric of the chosen samples on each resample."""
    counts_BM = counts_BN if chosen_N.all() else counts_BN[:, chosen_N]
    counts_BM = counts_BM.astype(np.result_type(*(one.columns_NK for one in of.values())), copy=False)
    return {key: one.weighted(counts_BM, chosen_N) for key, one in of.items()}


def _paired(group: Group, base: Group) -> tuple[list[int], list[tuple[int, int]]]:
    """The seeds that both groups have, and the ids of their runs.

    A baseline, which has no seed, is paired with every seed of the other group; two of them make one pair without a seed.
    """
    ids, base_ids = ([id(run) for run in one.per_seed] for one in (group, base))
    if group.baseline is not None or base.baseline is not None:
        count = max(len(ids), len(base_ids))
        ids = ids * count if group.baseline is not None and base.baseline is None else ids
        base_ids = base_ids * count if base.baseline is not None and group.baseline is None else base_ids
        return group.seeds or base.seeds, list(zip(ids, base_ids, strict=True))
    seeds = sorted(set(group.seeds) & set(base.seeds))
    by_seed, base_by_seed = (dict(zip(one.seeds, keys, strict=True)) for one, keys in ((group, ids), (base, base_ids)))
    return seeds, [(by_seed[seed], base_by_seed[seed]) for seed in seeds]


def _difference(out: Comparison, task: Task, group: Group, base: Group, resampled: _Resampled) -> Difference:
    """`group` minus `base`, paired by the seeds that both have."""
    seeds, pairs = _paired(group, base)
    n = int(resampled.chosen_N.sum())
    estimated, p_bootstrap, p_mcnemar, values_F, over = Estimate(None), None, None, np.empty(0), None
    folds = folds_of(resampled.answers[pairs[0][0]]) if pairs else []
    if pairs:
        differences_S = np.array([resampled.value[a] - resampled.value[b] for a, b in pairs])
        resampled_B = sum(resampled.resampled_B[a] - resampled.resampled_B[b] for a, b in pairs) / len(pairs)
        estimated = estimate(differences_S, np.asarray(resampled_B), n, out.level)
        p_bootstrap = estimated.p
        if task.metric(resampled.metric).formula is accuracy:
            p_mcnemar = mcnemar(*(_correct_SN(resampled, keys) for keys in zip(*pairs, strict=True)))
        if len(folds) > 1:
            of_group = [resampled.answers[a] for a, _ in pairs]
            chosen = [resampled.chosen_N] * len(pairs)
            values_F = fold_values(of_group, chosen, lambda s, part: resampled.difference(*pairs[s], part))
            ratio = max(tested_per_trained(group.runs), tested_per_trained(base.runs))
            over = None if estimated.value is None else fold_test(estimated.value, values_F, ratio)
            estimated = _widened(estimated, over, out.level)
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
        p_bootstrap=p_bootstrap,
        p_mcnemar=p_mcnemar,
        se_samples=estimated.se_samples,
        se_seeds=estimated.se_seeds,
        folds=folds,
        fold_values=[None if np.isnan(v) else float(v) for v in values_F],
        se_folds=None if over is None else over.se,
        p_folds=None if over is None else over.p,
    )


def _widened(estimated: Estimate, over: FoldTest | None, level: float) -> Estimate:
    """The estimate with the wider of its interval and that over folds, and the larger p; without p where folds give none."""
    if over is None or estimated.p is None or estimated.value is None or estimated.low is None:
        return replace(estimated, p=None, low=None, high=None)
    half = max(over.half_width(level), estimated.value - estimated.low)
    return replace(estimated, p=max(over.p, estimated.p), low=estimated.value - half, high=estimated.value + half)


def _correct_SN(resampled: _Resampled, keys: Sequence[int]) -> np.ndarray:
    """[S, N]: which answers of the runs are correct, of the samples that an accuracy counts."""
    return np.stack([of.columns_NK[of.counted_N & resampled.chosen_N, 1] for of in (resampled.of[key] for key in keys)])


def correct_p_values(out: Comparison) -> None:
    """Correct the p-values of all differences together, and add what more seeds could tell."""
    corrected_p = corrected([d.p for d in out.differences], out.correction)
    out.differences = [
        replace(d, p_corrected=p, significant=None if p is None else p <= 1 - out.level)
        for d, p in zip(out.differences, corrected_p, strict=True)
    ]
    out.differences = [_with_power(d, out.level, number_of_tests(out)) for d in out.differences]
    out.notes += power_notes(out)


def number_of_tests(out: Comparison) -> int:
    """The factor by which the correction can multiply a p: the number of tests."""
    return 1 if out.correction == "none" else max(1, sum(d.p is not None for d in out.differences))


def _with_power(d: Difference, level: float, tests: int) -> Difference:
    """The difference with the smallest p that its seeds can give by sign flips, and the seeds that would tell it."""
    if (
        d.p is None or d.value is None or d.se_samples is None or not d.seeds
    ):  # between two baselines there are no seeds
        return d
    alpha, count = (1 - level) / tests, len(d.seeds)
    needed = seeds_needed(
        d.value,
        None if d.se_seeds is None else d.se_seeds * math.sqrt(count),
        se_samples=d.se_samples,
        samples=d.n,
        level=alpha,
        width=0.0 if d.se_folds is None else float(stats.t.isf(alpha / 2, len(d.folds) - 1)) * d.se_folds,
    )
    if needed.seeds is not None and needed.seeds <= count and d.p_mcnemar is not None and d.p_mcnemar > alpha:
        needed = SeedsNeeded(None, "samples")  # McNemar's test is of these samples, whatever the seeds
    return replace(d, p_smallest=smallest_p(_repetitions(d)[1]), seeds_needed=needed.seeds, seeds_limit=needed.limit)


def _repetitions(d: Difference) -> tuple[str, int]:
    """What the difference was repeated over, and how often: folds where there are several, which vary more than seeds do."""
    return ("fold", len(d.folds)) if len(d.folds) > 1 else ("seed", len(d.seeds))


def power_notes(out: Comparison) -> list[str]:
    """What the seeds, or folds, of differences that are not significant can tell, in plain words."""
    weak = [d for d in out.differences if d.significant is False and d.p_smallest is not None and d.value]
    tests, alpha = number_of_tests(out), 1 - out.level
    factor = f" for {tests} tests" if tests > 1 else ""
    notes = []
    for (unit, count), several in group_by_value((d, _repetitions(d)) for d in weak).items():
        smallest = smallest_p(count)
        after = (
            f", and {min(1.0, smallest * tests):.3g} after {CORRECTION_NAMES[out.correction]} correction{factor}"
            if factor
            else ""
        )
        notes.append(
            f"with {count} {unit}{'s' if count > 1 else ''} the smallest possible p is {smallest:.3g}{after}, by a sign-flip test, which assumes "
            f"nothing of how {unit}s vary: {alpha:.2g} takes {seeds_to_reach(alpha / tests)} {unit}s. The p shown take differences over {unit}s as normal"
        )
        notes += [_telling(d, alpha, tests, several=len(out.tasks) > 1) for d in several[:LISTED]]
        if len(several) > LISTED:
            notes.append(f"the same of {len(several) - LISTED} more differences: see their column of seeds")
    return notes


def _telling(d: Difference, alpha: float, tests: int, *, several: bool) -> str:
    """How many seeds would tell a difference of the observed size, or why none would."""
    assert d.value is not None
    what = f"{f'{d.task}, ' if several else ''}{d.metric}{'' if d.kind == EVERY else f' of {d.kind}'}, {d.group} − {d.baseline}"
    level = f"level {alpha:.2g}" + (f" / {tests}" if tests > 1 else "")
    value = f"{d.value:+.4f}".replace("-", "−")
    head = f"{what}: {value} is not significant; "
    if d.seeds_needed is not None:
        return f"{head}{d.seeds_needed} seeds can tell a difference of this size (power {POWER:.0%}, {level})"
    reasons = {
        "one seed": "one seed says nothing of how seeds vary, so train at least two more to know how many it takes",
        "samples": f"more seeds alone cannot tell it: {d.n} samples are too few for a difference of this size",
        "folds": f"more seeds alone cannot tell it while it varies so much over the {len(d.folds)} folds",
        "many seeds": "it would take more than 1000 seeds",
        "no difference": "there is no difference",
    }
    return f"{head}{reasons[d.seeds_limit or 'no difference']} ({level})"
