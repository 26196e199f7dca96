"""How many seeds a comparison says it takes: against the noncentral t distribution, enumeration, and simulated comparisons."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.results.seeded import make_folds, make_seeded, make_two
from trainer.results.compare.comparison import compare
from trainer.results.compare.output import as_json, tables
from trainer.results.compare.power import SeedsNeeded, power, seeds_needed, seeds_to_reach, smallest_p
from trainer.results.compare.sources.find import find_runs
from trainer.results.compare.statistics import estimate


def test_the_smallest_p_is_that_of_all_sign_flips() -> None:
    for seeds in (1, 2, 3, 6):
        change_S = np.linspace(1, 2, seeds)
        sums = [abs(np.dot(signs, change_S)) for signs in itertools.product((-1, 1), repeat=seeds)]
        assert smallest_p(seeds) == np.mean(np.array(sums) >= change_S.sum() - 1e-12)
    assert smallest_p(3) == 0.25
    for level in (0.05, 0.05 / 6, 0.25, 1e-4):
        needed = seeds_to_reach(level)
        assert smallest_p(needed) <= level < smallest_p(needed - 1)


@pytest.mark.parametrize(
    ("effect", "seeds", "level"), [(1.0, 3, 0.05), (1.5, 6, 0.05), (2.0, 5, 0.05 / 6), (0.5, 30, 0.01)]
)
def test_without_variance_of_samples_it_is_the_power_of_the_t_test(effect: float, seeds: int, level: float) -> None:
    found = power(0.1, 0.1 / effect, seeds, se_samples=0.0, samples=500, level=level)
    critical = stats.t.isf(level / 2, seeds - 1)
    exact = stats.nct(seeds - 1, effect * np.sqrt(seeds))
    assert found == pytest.approx(exact.sf(critical) + exact.cdf(-critical), abs=0.003)


def significant(trials: int, difference: float, sd: float, seeds: int, se: float, samples: int, level: float) -> float:
    """The share of simulated comparisons whose interval does not hold 0."""
    rng = np.random.default_rng([seeds, samples])
    resampled_B = se * stats.norm.ppf((np.arange(200) + 0.5) / 200)
    resampled_B *= se / resampled_B.std(ddof=1)
    found = 0
    for _ in range(trials):
        one = estimate(rng.normal(difference, sd, seeds), resampled_B, samples, 1 - level)
        assert one.low is not None
        assert one.high is not None
        found += not one.low <= 0 <= one.high
    return found / trials


@pytest.mark.parametrize(
    ("difference", "sd", "se", "level"),
    [
        (0.18, 0.05, 0.02, 0.05 / 6),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((-0.05, 0.03, 0.01, 0.05), (0.04, 0.02, 0.012, 0.05 / 3))),
    ],  # the others are further draws of the same simulation
)  # fmt: skip
def test_the_stated_seeds_reach_the_stated_power(difference: float, sd: float, se: float, level: float) -> None:
    needed = seeds_needed(difference, sd, se_samples=se, samples=300, level=level).seeds
    assert needed is not None
    assert needed > 3
    reached = significant(500, difference, sd, needed, se, 300, level)
    fewer = significant(500, difference, sd, needed - 1, se, 300, level)
    stated = [power(difference, sd, s, se_samples=se, samples=300, level=level) for s in (needed, needed - 1)]
    print(f"{needed} seeds: stated {stated[0]:.3f}, simulated {reached:.3f}; one fewer: {stated[1]:.3f}, {fewer:.3f}")
    assert stated[1] < 0.8 <= stated[0]
    assert (reached, fewer) == (pytest.approx(stated[0], abs=0.05), pytest.approx(stated[1], abs=0.06))


def test_no_number_where_seeds_cannot_help() -> None:
    about = {"se_samples": 0.02, "samples": 200, "level": 0.05}
    assert seeds_needed(0.03, 0.01, **about) == SeedsNeeded(None, "samples")  # type: ignore[arg-type]
    assert seeds_needed(0.10, None, **about) == SeedsNeeded(None, "one seed")  # type: ignore[arg-type]
    assert seeds_needed(0.0, 0.01, **about) == SeedsNeeded(None, "no difference")  # type: ignore[arg-type]
    assert seeds_needed(0.10, 0.01, width=0.2, **about) == SeedsNeeded(None, "folds")  # type: ignore[arg-type]
    assert seeds_needed(0.04, 5.0, **about) == SeedsNeeded(None, "many seeds")  # type: ignore[arg-type]
    assert seeds_needed(0.10, 0.0, **about).seeds == 2  # type: ignore[arg-type]
    free, wide = (seeds_needed(0.1, 0.05, width=width, **about).seeds for width in (0.0, 0.09))  # type: ignore[arg-type]
    assert free is not None
    assert wide is not None
    assert wide > free


def test_a_comparison_says_what_its_seeds_can_tell(tmp_path: Path) -> None:
    make_two(tmp_path, samples=1000)
    make_seeded(tmp_path / "third-s1", 1, 0.68, ["train.steps=9"], samples=1000)
    for seed in (2, 3):
        make_seeded(tmp_path / f"third-s{seed}", seed, 0.68 + 0.05 * seed, ["train.steps=9"], samples=1000)
    found = compare(find_runs([str(tmp_path)], ["test"]).runs)
    assert {d.p_smallest for d in found.differences} == {0.25}
    weak = [d for d in found.differences if d.significant is False]
    assert weak
    assert any(
        "with 3 seeds the smallest possible p is 0.25, and 0.75 after Holm's correction for 3 tests" in n
        for n in found.notes
    )
    (note,) = (n for n in found.notes if n.startswith(f"wf1, {weak[0].group} − {weak[0].baseline}: "))
    assert f"{weak[0].value:+.4f} is not significant; ".replace("-", "−") in note
    assert "level 0.05 / 3" in note
    for d in found.differences:
        assert (d.seeds_needed is None) == (d.seeds_limit is not None)
        if d.se_seeds is not None and d.value is not None and d.seeds_needed is not None:
            expected = seeds_needed(
                d.value, d.se_seeds * np.sqrt(3), se_samples=d.se_samples or 0.0, samples=1000, level=0.05 / 3
            )
            assert expected.seeds == d.seeds_needed
    assert as_json(found)["power"] == {"target": 0.8, "tests": 3}
    (differences,) = (t for t in tables(found) if t.title.startswith("Differences"))
    assert differences.columns[-1] == "seeds for 80%"
    alone = compare([run for run in find_runs([str(tmp_path)], ["test"]).runs if run.seed == 1], correction="none")
    assert {d.seeds_limit for d in alone.differences} <= {"one seed", "samples"}
    assert as_json(alone)["power"] == {"target": 0.8, "tests": 1}


def test_folds_limit_what_more_seeds_can_tell(tmp_path: Path) -> None:
    for name, quality in zip(("a", "b", "c"), (0.9, 0.5, 0.6), strict=True):
        names = ("a", "b", "c")
        for stem, better, overrides in (("x", quality, []), ("y", 0.55, ["train.steps=9"])):
            make_folds(tmp_path / name, stem, better, overrides, seeds=(1, 2), names=names, samples=600)
    runs = [
        run
        for run in find_runs([str(tmp_path)], ["test"]).runs
        if run.fold and run.fold["name"] == Path(run.where).parent.name
    ]
    found = compare(runs)
    (difference,) = found.differences
    assert difference.seeds_limit == "folds"
    assert any("while it varies so much over the 3 folds" in note for note in found.notes)
    assert difference.p_smallest == 0.25
    assert any(
        note.startswith("with 3 folds the smallest possible p is 0.25, by a sign-flip test") for note in found.notes
    )
