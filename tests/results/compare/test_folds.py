"""Comparisons over the folds of a cross-validation, against scikit-learn and scipy on the files, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from tests.distributed.processes import egmf
from tests.results.seeded import FOLDS, make_folds, make_seeded, track
from trainer.config import load_config
from trainer.results.compare.comparison import compare
from trainer.results.compare.output import as_csv, as_json, as_tex, tables
from trainer.results.compare.page import page
from trainer.results.compare.sources.compared_run import ComparedRun
from trainer.results.compare.sources.find import find_runs
from trainer.results.compare.statistics import fold_test, over_folds, resample_counts

LESS = ["model.fusion.experts=[semantic,global]"]
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups of five folds and two seeds."""
    folder = tmp_path_factory.mktemp("folds")
    make_folds(folder, "full", 0.75, seeds=SEEDS)
    return make_folds(folder, "less", 0.6, LESS, seeds=SEEDS)


@pytest.fixture(scope="module")
def runs(two: Path) -> list[ComparedRun]:
    return find_runs([str(two)], ["test", "valid"]).runs


def table(two: Path, stem: str, fold: str, seed: int) -> pd.DataFrame:
    return pd.read_parquet(two / f"{stem}-fold={fold}-s{seed}" / "predictions" / "test.parquet")


def wf1(rows: pd.DataFrame) -> float:
    return float(f1_score(rows["label"], rows["prediction"], average="weighted"))


def test_runs_over_folds_are_one_group_with_the_pooled_score_and_that_over_folds(
    two: Path, runs: list[ComparedRun]
) -> None:
    found = compare(runs)
    full, less = found.groups
    assert (full.name, full.seeds, len(full.runs)) == ("experts=[local, semantic, global]", [1, 2], 10)
    assert "data.fold" not in found.differing
    for group, stem in ((full, "full"), (less, "less")):
        score = found.score("meld", group.name, "wf1")
        pooled = [wf1(pd.concat([table(two, stem, fold, seed) for fold in FOLDS])) for seed in SEEDS]
        assert score.values == pytest.approx(pooled)
        assert (score.n, score.mean) == (200, pytest.approx(np.mean(pooled)))
        each = [np.mean([wf1(table(two, stem, fold, seed)) for seed in SEEDS]) for fold in FOLDS]
        assert score.folds is not None
        assert score.folds.names == list(FOLDS)
        assert score.folds.values == pytest.approx(each)
        assert (score.folds.mean, score.folds.sd) == pytest.approx((np.mean(each), np.std(each, ddof=1)))
        half = stats.t.ppf(0.975, 4) * np.std(each, ddof=1) * np.sqrt(1 / 5 + 40 / 120)
        assert (score.folds.low, score.folds.high) == pytest.approx((np.mean(each) - half, np.mean(each) + half))
    validation = compare(runs, sort_by="acc").validation[full.name]
    valid = [pd.read_parquet(two / f"full-fold={f}-s1" / "predictions" / "valid.parquet") for f in FOLDS]
    assert validation.values[0] == pytest.approx(np.mean([(t["label"] == t["prediction"]).mean() for t in valid]))


def test_differences_are_paired_within_folds(two: Path, runs: list[ComparedRun]) -> None:
    (found,) = compare(runs, baseline="less", correction="none").differences
    pairs = {
        key: (table(two, "full", *key), table(two, "less", *key)) for key in ((f, s) for f in FOLDS for s in SEEDS)
    }
    each_F = [np.mean([wf1(pairs[f, s][0]) - wf1(pairs[f, s][1]) for s in SEEDS]) for f in FOLDS]
    whole_S = [np.subtract(*(wf1(pd.concat([pairs[f, s][i] for f in FOLDS])) for i in (0, 1))) for s in SEEDS]
    assert found.folds == list(FOLDS)
    assert found.fold_values == pytest.approx(each_F)
    assert found.value == pytest.approx(np.mean(whole_S))
    assert found.se_seeds == pytest.approx(stats.sem(whole_S))
    assert found.se_folds == pytest.approx(np.std(each_F, ddof=1) * np.sqrt(1 / 5 + 1 / 3))
    assert found.p_folds == pytest.approx(2 * stats.t.sf(found.value / found.se_folds, 4))  # type: ignore[operator]
    assert found.p == max(found.p_folds, found.p_bootstrap)  # type: ignore[type-var]
    rng = np.random.default_rng(3)
    drawn = []
    for _ in range(100):  # the same samples for all runs, as many of each fold as it has
        places = {f: rng.integers(40, size=40) for f in FOLDS}
        resampled = [[pd.concat([pairs[f, s][i].iloc[places[f]] for f in FOLDS]) for i in (0, 1)] for s in SEEDS]
        drawn.append(np.mean([wf1(a) - wf1(b) for a, b in resampled]))
    assert found.se_samples == pytest.approx(np.std(drawn), rel=0.2)
    assert (found.value - found.low) >= stats.t.ppf(0.975, 4) * found.se_folds - 1e-9  # type: ignore[operator]


def test_samples_are_resampled_within_folds() -> None:
    fold_N = np.array(["a"] * 30 + ["b"] * 10, dtype=object)[np.random.default_rng(0).permutation(40)]
    counts_BN = resample_counts(40, 50, np.random.default_rng(1), fold_N)
    assert (counts_BN[:, fold_N == "a"].sum(1) == 30).all()
    assert (counts_BN[:, fold_N == "b"].sum(1) == 10).all()
    assert 0.6 < (counts_BN > 0).mean() < 0.66


def test_missing_folds_and_seeds_are_named(two: Path, tmp_path: Path) -> None:
    some = Path(shutil.copytree(two, tmp_path / "some"))
    for name in ("full-fold=Ses10-s1", "full-fold=Ses10-s2", "less-fold=Ses2-s2"):
        shutil.rmtree(some / name)
    runs = find_runs([str(some)], ["test"]).runs
    found = compare(runs)
    notes = "\n".join(found.notes)
    assert (
        "lacks fold Ses10: its scores are those of the samples of folds Ses1, Ses2, Ses3, Ses4 only (4 of 5)" in notes
    )
    assert "seed 2 is left out: it lacks fold Ses2" in notes
    assert "on the folds that all groups have: Ses1, Ses2, Ses3, Ses4" in notes
    assert [score.n for score in found.scores if score.metric == "wf1"] == [160, 200]
    (difference,) = found.differences
    assert (difference.n, difference.seeds, difference.folds) == (160, [1], list(FOLDS[:4]))
    text = "\n".join(str(row) for one in tables(found) for row in one.rows)
    assert "160" in text
    assert "200" in text
    mixed = [run for run in runs if run.name in ("full-fold=Ses1-s1", "full-fold=Ses2-s2")]
    with pytest.raises(ValueError, match=r"no seed has all folds \(seed 1 lacks .*seed 2 lacks"):
        compare(mixed)


def test_of_two_runs_of_a_fold_and_seed_the_newest_counts(two: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(two / "full-fold=Ses2-s1", tmp_path / "again"))
    record = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps({**record, "started": "2026-02-01T00:00:00+00:00"}))
    found = compare(find_runs([str(two), str(again)], ["test"]).runs)
    assert any("seed 1 of fold Ses2 twice" in note and "again is left out" in note for note in found.notes)
    assert len(found.groups[0].runs) == 10


def test_what_does_not_fit_together_is_refused(two: Path, tmp_path: Path, runs: list[ComparedRun]) -> None:
    make_folds(tmp_path / "share", "a", 0.7, ["data.fold_valid=0.1"], names=("1", "2", "3"), samples=60)
    share = find_runs([str(tmp_path / "share")], ["test", "valid"]).runs
    for run in share:
        run.answers["valid"] = share[0].answers["valid"]
    assert len(compare(share).groups) == 1
    with pytest.raises(ValueError, match="samples of valid are in several folds"):
        compare(share, split="valid")
    for run in share:
        run.answers["test"] = share[0].answers["test"]
    with pytest.raises(ValueError, match="folds share test samples"):
        compare(share)
    whole = make_seeded(tmp_path / "whole", 1, 0.75)
    with pytest.raises(ValueError, match=r"some runs are of a fold, and some of none: .*whole"):
        compare([*runs, *find_runs([str(whole)], ["test"]).runs])


def test_several_datasets_are_never_dropped_silently(tmp_path: Path) -> None:
    """Five datasets d/f1 to d/f5 that are folds, in a sweep over data.path."""
    for k in range(1, 6):
        make_seeded(
            tmp_path / f"path=d_f{k}-s1",
            1,
            0.7,
            [f"data.path=d/f{k}"],
            fingerprint=str(k) * 64,
            samples=60 + k,
            hours=k,
        )
    runs = find_runs([str(tmp_path)], ["test"]).runs
    with pytest.raises(ValueError, match=r"not made on the same data[\s\S]*egmf sweep CONFIG --folds"):
        compare(runs)
    (warning,) = (note for note in compare(runs, force=True).notes if note.startswith("WARNING"))
    assert "4 LEFT OUT" in warning
    assert all(f"(data d/f{k})" in warning for k in range(1, 6))
    assert "egmf sweep CONFIG --folds" in warning
    done = egmf("compare", str(tmp_path), "--force", "--json", "--no-log")
    assert done.returncode == 0, done.stderr
    assert "4 LEFT OUT" in done.stderr
    assert any("4 LEFT OUT" in note for note in json.loads(done.stdout)["notes"])


def test_every_output_has_the_folds(two: Path, runs: list[ComparedRun], tmp_path: Path) -> None:
    found = compare(runs)
    heads = {one.title: one.columns for one in tables(found)}
    assert "meld, test: 200 samples, 5 folds together" in heads
    assert [f"wf1, fold {fold}" for fold in FOLDS] == heads["meld, test: over folds"][-5:]
    written = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert written["scores"][0]["folds"]["names"] == list(FOLDS)
    assert {run["fold"] for run in written["groups"][0]["runs"]} == set(FOLDS)
    assert written["differences"][0]["folds"] == list(FOLDS)
    assert " ".join(FOLDS) in as_csv(found)
    assert "over folds" in as_tex(found)
    assert "over folds" in page(found)
    alone = make_folds(tmp_path / "one", "full", 0.75)
    for run in sorted(alone.iterdir()):
        track(run, load_config(run / "config.yaml"), f"sqlite:///{tmp_path}/mlflow.db")
    tracked = compare(find_runs(["egmf"], ["test"], f"sqlite:///{tmp_path}/mlflow.db").runs)
    assert tracked.groups[0].seeds == [1]
    assert tracked.score("meld", tracked.groups[0].name, "wf1").values[0] == found.scores[1].values[0]


def test_the_interval_over_folds_by_hand() -> None:
    values = np.array([0.6, 0.7, 0.65, 0.62])
    plain = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    found = over_folds(values, 0.0, 0.9)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))
    tested = fold_test(float(values.mean()), values, 0.0)
    assert tested is not None
    assert tested.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    wider = over_folds(values, 1 / 3, 0.9)
    assert wider.high - wider.low == pytest.approx((plain.high - plain.low) * np.sqrt((1 / 4 + 1 / 3) * 4))  # type: ignore[operator]
    assert fold_test(0.1, np.array([0.1, np.nan]), 0.2) is None
    assert fold_test(0.1, np.array([0.1]), 0.2) is None


def test_the_corrected_test_over_folds_finds_few_false_differences() -> None:
    """Two learners that are equally good: nearest class means on one half of the features or the other, five folds."""
    rng = np.random.default_rng(5)
    folds, size, features, trials = 5, 20, 16, 600
    false = {"corrected": 0, "plain": 0}
    for _ in range(trials):
        y_N = np.tile([0, 1], folds * size // 2)
        x_NF = rng.normal(0, 1, (folds * size, features)) + 0.25 * (2 * y_N - 1)[:, None]
        fold_N = rng.permutation(folds * size) % folds
        change_F = np.empty(folds)
        for f in range(folds):
            train, test = fold_N != f, fold_N == f
            means = [x_NF[train & (y_N == c)].mean(0) for c in (0, 1)]
            right = []
            for half in (slice(0, features // 2), slice(features // 2, None)):
                nearer = ((x_NF[test, half] - means[1][half]) ** 2).sum(1) < (
                    (x_NF[test, half] - means[0][half]) ** 2
                ).sum(1)
                right.append((nearer == (y_N[test] == 1)).mean())
            change_F[f] = right[0] - right[1]
        for name, ratio in (("corrected", 1 / (folds - 1)), ("plain", 0.0)):
            found = fold_test(float(change_F.mean()), change_F, ratio)
            assert found is not None
            false[name] += found.p <= 0.05
    print(f"{false} of {trials}")
    assert false["corrected"] <= 0.07 * trials
    assert false["corrected"] < false["plain"]
