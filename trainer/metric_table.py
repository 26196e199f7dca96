"""The metrics: one entry each, from which scores, the choice of a checkpoint, comparisons and docs/metrics.md come.

A metric is a function of sums over samples: its formula gives each sample a few numbers, the `columns`, and says how the
metric follows from their sums. So one formula serves one evaluation, where every sample counts once, and a comparison, where
each of thousands of resamples counts every sample as often as it was drawn.

To add one, write its formula if no other has it, its :class:`Metric`, and name that in a family; see docs/extending.md.

Legend: N samples, M of them counted, K columns, B resamples. Undefined is nan in arrays and None elsewhere, never 0.

Sources: MOSEI and MOSI: thuiar/MMSA, `src/MMSA/utils/metricsTop.py`. SIMS v2: thuiar/ch-sims-v2, `utils/metricsTop.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from trainer.metric_formulas import (
    INVALID,
    Formula,
    Terms,
    accuracy,
    concordance,
    jaccard,
    macro_f1,
    macro_f1_of_sets,
    macro_recall,
    mean_absolute_error,
    micro_f1_of_sets,
    pearson,
    r2,
    root_mean_squared_error,
    set_accuracy,
    weighted_f1,
    weighted_f1_of_sets,
)

LARGEST = float(np.finfo(np.float32).max)  # what is beyond it is inf to published code

Rule = Callable[[np.ndarray], np.ndarray]  # float32 numbers to classes, or to whether a sample counts


@dataclass(frozen=True)
class WeightedMetric:
    """A metric of N predictions for any weights of the samples.

    `counted_N`: the samples in the metric's subset, with a valid prediction where the metric leaves invalid ones out.
    """

    terms: Terms
    counted_N: np.ndarray

    @cached_property
    def columns_NK(self) -> np.ndarray:
        """0 where a sample does not count. float32 if all columns are counts, which it holds exactly; else float64."""
        counts = all(column.dtype == bool for column in self.terms.columns)
        shape = (len(self.counted_N), len(self.terms.columns))
        columns_NK = np.zeros(shape, dtype=np.float32 if counts else np.float64)
        columns_NK[self.counted_N] = np.stack(self.terms.columns, axis=1)
        return columns_NK

    def value(self, chosen_N: np.ndarray | None = None) -> float:
        """The metric over all samples, or those that `chosen_N` marks; nan where undefined."""
        if chosen_N is not None and not chosen_N.all():
            return float(self._from_sums(self.columns_NK[chosen_N].sum(0, dtype=np.float64)))
        if self.terms.whole is not None:
            return self.terms.whole()
        return float(self._from_sums(np.array([column.sum() for column in self.terms.columns], dtype=np.float64)))

    def weighted(self, weight_BM: np.ndarray, chosen_N: np.ndarray | None = None) -> np.ndarray:
        """[B]: the metric where the m-th of all samples, or of those that `chosen_N` marks, counts `weight_BM[b, m]` times."""
        columns_MK = self.columns_NK if chosen_N is None or chosen_N.all() else self.columns_NK[chosen_N]
        sums_BK = weight_BM.astype(columns_MK.dtype, copy=False) @ columns_MK
        return self._from_sums(sums_BK.astype(np.float64, copy=False))

    def _from_sums(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.terms.value(*np.moveaxis(sums, -1, 0)))


@dataclass(frozen=True)
class Metric:
    """One metric of a task.

    Args:
        key: its name in metrics.json and everywhere else.
        name: what the literature calls it.
        definition: what the formula is applied to, in Markdown; docs/metrics.md shows it.
        formula: of the samples that count.
        source: whose definition it is.
        greater_is_better: the direction in which checkpoints and groups are ordered by it.
        classes: how numbers (float32) become the classes that the formula compares; an invalid prediction is then a class of
            its own. None: the formula takes the numbers, and samples with an invalid prediction do not count.
        subset: by which truths (float32) a sample counts; None: all.
        aliases: further names by which it can be asked for; results have the key alone.
        signed: it cuts numbers at 0, and means nothing where all answers lie on one side of it.
        on_request: a comparison of all metrics leaves it out unless it is named or selects. The correction counts every test, so
            a metric that joins a family would otherwise change the p-values of the others.
        spans: it is defined on the scales −s … s of these s; empty: on any.
        sets: its numbers are sets of labels (:mod:`trainer.label_sets`); an invalid prediction is a set of its own.
    """

    key: str
    name: str
    definition: str
    formula: Formula
    source: str
    greater_is_better: bool = True
    classes: Rule | None = None
    subset: Rule | None = None
    aliases: tuple[str, ...] = ()
    signed: bool = False
    on_request: bool = False
    spans: tuple[float, ...] = ()
    sets: bool = False

    def of(self, truth_N: np.ndarray, guess_N: np.ndarray) -> WeightedMetric:
        """The metric of predictions.

        Numbers are put into classes in float32, as published code does: the 0.1 of a float32 label is no more than 0.1
        there, but is more than it in float64. Sums run in float64.

        Args:
            truth_N: float64; label indices, or the unrounded truth.
            guess_N: float64; label indices or numbers; nan, and what float32 cannot hold, is invalid.
        """
        valid_N: np.ndarray = np.abs(guess_N) <= LARGEST  # False for nan
        counted_N = np.ones(len(truth_N), dtype=bool)
        if self.subset is not None:
            counted_N = self.subset(truth_N.astype(np.float32))
        if self.sets:
            guess_N = np.where(valid_N, guess_N, INVALID)
            return WeightedMetric(self.formula(truth_N[counted_N], guess_N[counted_N]), counted_N)
        if self.classes is None:
            counted_N = counted_N & valid_N
            return WeightedMetric(self.formula(truth_N[counted_N], guess_N[counted_N]), counted_N)
        truth_class_N = self.classes(truth_N.astype(np.float32)).astype(int)
        guess_class_N = np.full(len(guess_N), INVALID)
        guess_class_N[valid_N] = self.classes(guess_N[valid_N].astype(np.float32)).astype(int)
        return WeightedMetric(self.formula(truth_class_N[counted_N], guess_class_N[counted_N]), counted_N)


def undefined_metric(samples: int) -> WeightedMetric:
    """A metric that is undefined for any weights of the samples, of which it counts none."""
    none = np.zeros(0, dtype=bool)
    terms = Terms([none, none], lambda count, hits: np.full(np.shape(count), np.nan))
    return WeightedMetric(terms, np.zeros(samples, dtype=bool))


# ---- rules: float32 numbers to classes, or to whether a sample counts


def label(x: np.ndarray) -> np.ndarray:
    """Label indices are classes already."""
    return x


def cut(*edges: float) -> Rule:
    """Classes between `edges`, which belong to the class below them."""
    cuts = np.array(edges, dtype=np.float32)
    return lambda x: np.digitize(x, cuts, right=True)


def rounded(limit: int) -> Rule:
    """Clipped to ± `limit`, then rounded half to even."""
    return lambda x: np.round(np.clip(x, -limit, limit))


def positive(x: np.ndarray) -> np.ndarray:
    return x > 0


def not_negative(x: np.ndarray) -> np.ndarray:
    return x >= 0


def nonzero(x: np.ndarray) -> np.ndarray:
    return np.asarray(x != 0)


def weak(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(x) <= np.float32(0.4))


# ---- metrics

SKLEARN = "MELD (Poria et al. 2019) and CHERMA (Sun et al. 2023) report weighted F1 as scikit-learn computes it"
BALANCED = "scikit-learn's `balanced_accuracy_score`; UAR is the measure of the INTERSPEECH emotion challenges (Schuller et al. 2009)"
MMSA = "`src/MMSA/utils/metricsTop.py` of thuiar/MMSA (regression of MOSI and MOSEI), which prints four decimals"
SIMS_V2 = "`utils/metricsTop.py` of thuiar/ch-sims-v2"
SCIKIT = "scikit-learn and scipy"
SETS = "scikit-learn, of indicator matrices; GoEmotions (Demszky et al. 2020) reports macro F1"
SEMEVAL = 'SemEval-2018 Task 1 E-c (Mohammad et al. 2018); scikit-learn\'s `jaccard_score(average="samples", zero_division=1)`'
LIN = "Lin 1989, Biometrics 45(1), 255–268, moments divided by n"


@dataclass(frozen=True)
class Family:
    """The metrics that are reported of the tasks of one kind of benchmark.

    `select` chooses the checkpoint where a task does not say otherwise. Truth and prediction are clipped to ± `clip` first.
    """

    kind: Literal["classification", "regression", "multilabel"]
    select: str
    metrics: tuple[Metric, ...]
    clip: float | None = None

    def metric(self, key: str) -> Metric:
        """KeyError where there is none."""
        return {metric.key: metric for metric in self.metrics}[key]

    @cached_property
    def names(self) -> dict[str, str]:
        """Every name by which a metric can be asked for, its aliases too -> its key."""
        return {name: metric.key for metric in self.metrics for name in (metric.key, *metric.aliases)}

    def misfit(self, low: float, high: float) -> str | None:
        """Why the family as a whole does not fit answers from `low` to `high`; None where it does."""
        if any(metric.signed for metric in self.metrics) and not low < 0 < high:
            return "its accuracies and F1 cut numbers at 0, and the grid does not have numbers on both sides of 0"
        if self.clip is not None and max(-low, high) > self.clip:
            return f"it clips all numbers to ±{self.clip:g}, and the grid has numbers beyond"
        return None

    def undefined(self, low: float, high: float) -> dict[str, str]:
        """The metrics that mean nothing where answers lie from `low` to `high`: key -> why."""
        reasons: dict[str, str] = {}
        for metric in self.metrics:
            if metric.signed and not low < 0 < high:
                reasons[metric.key] = "it cuts numbers at 0, and all numbers of the grid lie on one side"
            elif metric.spans and (low, high) not in [(-span, span) for span in metric.spans]:
                reasons[metric.key] = f"its classes are those of {' or '.join(f'−{s:g} … {s:g}' for s in metric.spans)}"
            elif metric.classes is None and self.clip is not None and max(-low, high) > self.clip:
                reasons[metric.key] = f"it is of numbers clipped to ±{self.clip:g}"
        return reasons

    def of(self, key: str, truth_N: np.ndarray, guess_N: np.ndarray) -> WeightedMetric:
        """See :meth:`Metric.of`."""
        if self.clip is not None:
            guess_N = np.where(np.abs(guess_N) <= LARGEST, guess_N, np.nan)  # clipping must not make inf valid
            truth_N, guess_N = (np.clip(values_N, -self.clip, self.clip) for values_N in (truth_N, guess_N))
        return self.metric(key).of(truth_N, guess_N)


def _pair(
    accuracy_key: str, f1_key: str, definition: str, source: str, classes: Rule, subset: Rule | None = None
) -> tuple[Metric, Metric]:
    """Accuracy and weighted F1 of the same two classes, cut at 0."""
    return (
        Metric(accuracy_key, "accuracy", definition, accuracy, source, classes=classes, subset=subset, signed=True),
        Metric(f1_key, "weighted F1", definition, weighted_f1, source, classes=classes, subset=subset, signed=True),
    )


EMOTION = Family(
    kind="classification",
    select="wf1",
    metrics=(
        Metric(
            "acc", "accuracy, weighted accuracy (WA)",
            "share of predictions equal to the label; papers on speech emotion call it weighted accuracy",
            accuracy, SKLEARN, classes=label, aliases=("wa",),
        ),
        Metric(
            "wf1", "weighted F1", "Σ_c (n_c / n) · F1_c, n_c the true count of class c (scikit-learn `average=\"weighted\"`)",
            weighted_f1, SKLEARN, classes=label,
        ),
        Metric(
            "macro_f1", "macro F1", "mean of F1_c over the classes that occur in truth or prediction (scikit-learn's default)",
            macro_f1, SKLEARN, classes=label,
        ),
        Metric(
            "uar", "unweighted average recall (UAR), unweighted accuracy (UA)",
            "mean over the classes that occur in the truth of the share of their samples predicted right",
            macro_recall, BALANCED, classes=label, aliases=("ua",), on_request=True,
        ),
    ),
)  # fmt: skip

MOSEI = Family(
    kind="regression",
    select="non0_f1",
    metrics=(
        *_pair("has0_acc", "has0_f1", "two classes, `≥ 0` against `< 0`, all samples", MMSA, not_negative),
        *_pair(
            "non0_acc", "non0_f1",
            "samples whose truth is not 0; two classes, `> 0` against `≤ 0`, so a prediction of 0 counts as negative",
            MMSA, positive, nonzero,
        ),
        Metric(
            "acc7", "seven-class accuracy",
            "truth and prediction clipped to ±3, then rounded half to even: 0.5 → 0, 1.5 → 2, 2.5 → 2",
            accuracy, MMSA, classes=rounded(3), spans=(3.0,),
        ),
        Metric("acc5", "five-class accuracy", "the same with ±2", accuracy, MMSA, classes=rounded(2), spans=(3.0, 2.0)),
        Metric("mae", "mean absolute error", "unclipped", mean_absolute_error, MMSA, greater_is_better=False),
        Metric("corr", "Pearson's r", "unclipped", pearson, MMSA),
    ),
)  # fmt: skip

SIMS = Family(
    kind="regression",
    select="acc2",
    clip=1.0,
    metrics=(
        Metric(
            "acc2", "accuracy", "two classes cut at 0, zero is negative: [−1, 0], (0, 1]", accuracy, SIMS_V2,
            classes=cut(0.0), signed=True,
        ),
        Metric(
            "acc3", "three-class accuracy", "[−1, −0.1], (−0.1, 0.1], (0.1, 1]", accuracy, SIMS_V2,
            classes=cut(-0.1, 0.1), spans=(1.0,),
        ),
        Metric(
            "acc5", "five-class accuracy", "[−1, −0.7], (−0.7, −0.1], (−0.1, 0.1], (0.1, 0.7], (0.7, 1]",
            accuracy, SIMS_V2, classes=cut(-0.7, -0.1, 0.1, 0.7), spans=(1.0,),
        ),
        Metric(
            "f1", "weighted F1", "two classes cut at 0, zero is negative: [−1, 0], (0, 1]", weighted_f1, SIMS_V2,
            classes=cut(0.0), signed=True,
        ),
        Metric(
            "weak_acc2", "accuracy", "`acc2` over the samples with −0.4 ≤ truth ≤ 0.4; `null` where there are none",
            accuracy, SIMS_V2, classes=cut(0.0), subset=weak, signed=True,
        ),
        Metric("mae", "mean absolute error", "of the clipped values", mean_absolute_error, SIMS_V2, greater_is_better=False),
        Metric("corr", "Pearson's r", "of the clipped values", pearson, SIMS_V2),
        Metric("r2", "coefficient of determination", "1 − Σ(t − p)² / Σ(t − mean t)², of the clipped values", r2, SIMS_V2),
    ),
)  # fmt: skip

REGRESSION = Family(
    kind="regression",
    select="ccc",
    metrics=(
        Metric(
            "ccc", "concordance correlation coefficient (CCC)",
            "2 cov(t, p) / (var t + var p + (mean t − mean p)²); 0 where predictions are constant",
            concordance, LIN,
        ),
        Metric("corr", "Pearson's r", "unclipped", pearson, SCIKIT),
        Metric("mae", "mean absolute error", "unclipped", mean_absolute_error, SCIKIT, greater_is_better=False),
        Metric(
            "rmse", "root mean squared error", "√(Σ(t − p)² / n)", root_mean_squared_error, SCIKIT, greater_is_better=False
        ),
        Metric("r2", "coefficient of determination", "1 − Σ(t − p)² / Σ(t − mean t)²", r2, SCIKIT),
    ),
)  # fmt: skip

MULTILABEL = Family(
    kind="multilabel",
    select="macro_f1",
    metrics=(
        Metric(
            "micro_f1", "micro-averaged F1", "2 · hits / (labels in the truth + labels predicted), over all samples and labels",
            micro_f1_of_sets, SETS, sets=True,
        ),
        Metric(
            "macro_f1", "macro F1", "mean of F1_c over the labels that occur in truth or prediction", macro_f1_of_sets, SETS,
            sets=True,
        ),
        Metric(
            "wf1", "weighted F1", "Σ_c n_c · F1_c / Σ_c n_c, n_c the samples that have label c", weighted_f1_of_sets, SETS,
            sets=True,
        ),
        Metric(
            "jaccard", "Jaccard index, multi-label accuracy",
            "mean over samples of the share of labels in both truth and prediction among those in either; 1 where both are empty",
            jaccard, SEMEVAL, sets=True,
        ),
        Metric(
            "exact", "exact match, subset accuracy", "share of samples whose set of labels is predicted as it is", set_accuracy,
            SETS, sets=True, aliases=("subset_acc",),
        ),
    ),
)  # fmt: skip

FAMILIES = {
    "emotion": EMOTION,
    "mosei": MOSEI,
    "sims": SIMS,
    "regression": REGRESSION,
    "multilabel": MULTILABEL,
}
