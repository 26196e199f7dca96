"""What a comparison finds: scores of groups, differences between them, and all that is shown beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.results.compare.folds import FoldScores
from trainer.results.compare.groups import Group
from trainer.results.compare.power import Limit
from trainer.results.compare.statistics import Correction

EVERY = "all"  # the kind that stands for all samples


@dataclass(frozen=True)
class Score:
    """A metric of a group on the samples of a kind: the value of each seed, their mean, standard deviation and t interval.

    A baseline has one value and no seeds.

    Of a cross-validation the value of a seed is that of the predictions of all folds together, and `folds` has the metric
    fold by fold.
    """

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
    folds: FoldScores | None = None


@dataclass(frozen=True)
class Difference:
    """`group` minus `baseline`, paired by seed and sample; a baseline of scikit-learn by sample with every seed of the other.

    `p` is that of the bootstrap over samples and seeds; for an accuracy the larger of it and McNemar's, which is
    conditional on the trained models; of a cross-validation the largest of these and `p_folds`, that of the spread over folds,
    whose interval counts where it is the wider one. `p_corrected` is `p` corrected for all differences of the comparison that
    have one. `seeds_needed` and `seeds_limit`: see :class:`trainer.results.compare.power.SeedsNeeded`; `p_smallest` is the
    smallest p that a sign-flip test over these seeds, or over the folds where there are several, can give, not corrected.
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
    folds: list[str] = field(default_factory=list)
    fold_values: list[float | None] = field(default_factory=list)
    se_folds: float | None = None
    p_folds: float | None = None
    p_smallest: float | None = None
    seeds_needed: int | None = None
    seeds_limit: Limit | None = None


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

    @property
    def baselines(self) -> set[str]:
        """The names of the groups that are baselines of scikit-learn."""
        return {group.name for group in self.groups if group.baseline is not None}

    def score(self, task: str, group: str, metric: str, kind: str = EVERY) -> Score:
        """The score of these names.

        Raises:
            KeyError: there is none.
        """
        for score in self.scores:
            if (score.task, score.group, score.metric, score.kind) == (task, group, metric, kind):
                return score
        raise KeyError((task, group, metric, kind))
