"""Baselines beside runs in a comparison: groups of their own, paired with every seed, left out where they do not fit."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from tests.distributed.processes import egmf
from tests.results.compare.test_comparison import FULL, LESS, truth_and_guess
from tests.results.seeded import make_baseline, make_baseline_folds, make_folds, make_seeded, make_two
from trainer.results.compare.comparison import compare
from trainer.results.compare.output import as_csv, as_json, as_tex, costs, differences, group_scores, settings
from trainer.results.compare.page import page
from trainer.results.compare.result import Comparison
from trainer.results.compare.sources.find import find_runs

TEXT, AUDIO = "baseline text", "baseline audio"
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups of runs and two baselines in one folder."""
    runs = make_two(tmp_path_factory.mktemp("runs"), SEEDS)
    make_baseline(runs / "baseline-meld-text", "text", 0.5)
    make_baseline(runs / "baseline-meld-audio", "audio", 0.4)
    return runs


@pytest.fixture(scope="module")
def found(folder: Path) -> Comparison:
    return comparison([folder])


def comparison(paths: list[Path], **more: object) -> Comparison:
    found = find_runs([str(path) for path in paths], ["test"])
    compared = compare(found.runs, resamples=300, **more)  # type: ignore[arg-type]
    compared.notes[:0] = found.notes
    return compared


def f1(path: Path) -> float:
    return float(f1_score(*truth_and_guess(path), average="weighted"))


def test_a_baseline_is_a_group_of_its_own_with_one_value(folder: Path, found: Comparison) -> None:
    assert [g.name for g in found.groups] == [FULL, LESS, AUDIO, TEXT]
    assert [g.seeds for g in found.groups] == [[1, 2, 3], [1, 2, 3], [], []]
    score = found.score("meld", TEXT, "wf1")
    assert score.values == [pytest.approx(f1(folder / "baseline-meld-text"))]
    assert (score.seeds, score.mean, score.sd, score.low) == ([], score.values[0], None, None)
    assert list(found.differing["model.fusion.experts"]) == [FULL, LESS]
    assert found.baseline is None
    assert not [note for note in found.notes if "one seed" in note or "versions of the code" in note]


def test_a_difference_is_paired_with_every_seed(folder: Path, found: Comparison) -> None:
    pairs = [(d.group, d.baseline) for d in found.differences]
    assert pairs == [(LESS, FULL), (FULL, AUDIO), (LESS, AUDIO), (FULL, TEXT), (LESS, TEXT)]
    (row,) = [d for d in found.differences if (d.group, d.baseline) == (FULL, TEXT)]
    change_S = np.array([f1(folder / f"full-s{s}") for s in SEEDS]) - f1(folder / "baseline-meld-text")
    assert row.seeds == [1, 2, 3]
    assert row.value == pytest.approx(change_S.mean())
    assert row.se_seeds == pytest.approx(stats.sem(change_S))
    rng, drawn = np.random.default_rng(5), []
    of_runs, of_text = (
        [truth_and_guess(folder / f"full-s{s}") for s in SEEDS],
        truth_and_guess(folder / "baseline-meld-text"),
    )
    for _ in range(300):  # the same samples for the runs and the baseline
        ids = rng.integers(200, size=200)
        scores = [f1_score(t[ids], g[ids], average="weighted", zero_division=0) for t, g in [*of_runs, of_text]]
        drawn.append(np.mean(scores[:-1]) - scores[-1])
    assert row.se_samples == pytest.approx(np.std(drawn), rel=0.2)
    assert row.p_smallest == 0.25


def test_mcnemar_with_one_seed_is_the_exact_binomial_test(folder: Path) -> None:
    one = comparison([folder / "full-s1", folder / "baseline-meld-text"], metrics=["acc"])
    (row,) = one.differences
    right, other = (t == g for t, g in map(truth_and_guess, (folder / "full-s1", folder / "baseline-meld-text")))
    gained, lost = int((right & ~other).sum()), int((other & ~right).sum())
    assert row.p_mcnemar == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert row.value == pytest.approx((gained - lost) / 200)
    assert [note for note in one.notes if note.startswith("one seed only")] == [
        f"one seed only, which says nothing about other seeds: {one.groups[0].name}"
    ]


def test_the_others_are_compared_with_a_baseline_only_where_it_is_named(folder: Path) -> None:
    for name in (TEXT, "text", "baseline-meld-text"):
        named = comparison([folder], baseline=name)
        assert [(d.group, d.baseline) for d in named.differences] == [(FULL, TEXT), (LESS, TEXT), (AUDIO, TEXT)]
        between = named.differences[-1]
        assert between.value == pytest.approx(f1(folder / "baseline-meld-audio") - f1(folder / "baseline-meld-text"))
        assert (between.seeds, between.se_seeds, between.p_smallest, between.seeds_limit) == ([], None, None, None)
        assert between.p is not None
    assert comparison([folder], baseline="full").baseline == FULL
    with pytest.raises(ValueError, match=r"matches 2 groups.*baseline audio; baseline text"):
        comparison([folder], baseline="baseline")


def test_baselines_add_no_pairs_of_their_own_and_do_not_count_as_too_many_groups(tmp_path: Path) -> None:
    for i in range(2):
        make_seeded(tmp_path / f"r{i}", 0, 0.7, [f"train.steps={i + 1}"], splits=["test"], samples=40)
    for i in range(10):
        make_baseline(tmp_path / f"b{i}", f"text-{i}", splits=["test"], samples=40)
    found = comparison([tmp_path])
    assert len(found.groups) == 12
    assert len(found.differences) == 1 + 2 * 10
    alone = comparison([tmp_path / "b0", tmp_path / "b1"])
    assert [(d.group, d.baseline, d.seeds) for d in alone.differences] == [("baseline text-1", "baseline text-0", [])]
    assert not [note for note in alone.notes if "seed" in note]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"fingerprint": "e" * 64},
            r"is a baseline of other data than the runs' \(fingerprint e{16}\): egmf baseline \S+ makes theirs",
        ),
        ({"task": "cherma"}, "is a baseline of cherma, and the runs are of meld"),
        ({"samples": 150}, "predicted other samples of test"),
        ({"splits": ["valid"]}, "is a baseline and has no predictions of test"),
        ({"state": "failed", "failure": "no room"}, "is not finished"),
    ],
)
def test_a_baseline_that_does_not_fit_is_named_and_left_out(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    make_seeded(tmp_path / "a", 1)
    make_baseline(tmp_path / "odd", **changes)  # type: ignore[arg-type]
    make_baseline(tmp_path / "good", "audio")
    found = comparison([tmp_path])
    assert [g.baseline for g in found.groups] == [None, "audio"]
    (note,) = [note for note in found.notes if "odd" in note]
    assert re.search(rf"odd is left out: it {words}", note)


def test_of_several_tasks_the_baselines_of_one_are_compared_on_it_alone(tmp_path: Path) -> None:
    make_seeded(tmp_path / "a", 1, tasks=("meld", "simsv2"))
    make_baseline(tmp_path / "words")
    found = comparison([tmp_path])
    assert [g.baseline for g in found.groups] == [None]
    assert any("words is left out" in note and "--task meld compares on that alone" in note for note in found.notes)
    assert [g.baseline for g in comparison([tmp_path], task="meld").groups] == [None, "text"]


def test_beside_runs_over_folds_stand_the_baselines_of_their_folds(tmp_path: Path) -> None:
    names = ("x", "y", "z")
    make_folds(tmp_path, "a", 0.7, names=names, seeds=(1, 2))
    make_baseline_folds(tmp_path, "text", 0.5, names=names)
    make_baseline(tmp_path / "words")
    found = comparison([tmp_path])
    assert [(g.name, g.seeds, len(g.runs)) for g in found.groups[1:]] == [(TEXT, [], 3)]
    assert any(
        "words is left out: it is of no fold, and the runs are those of a cross-validation" in n for n in found.notes
    )
    of_text = {name: truth_and_guess(tmp_path / f"b-text-fold={name}") for name in names}
    of_runs = {(name, s): truth_and_guess(tmp_path / f"a-fold={name}-s{s}") for name in names for s in (1, 2)}

    def together(of: list[tuple[np.ndarray, np.ndarray]]) -> float:
        truth, guess = (np.concatenate(part) for part in zip(*of, strict=True))
        return float(f1_score(truth, guess, average="weighted"))

    pooled = together(list(of_text.values()))
    score = found.score("meld", TEXT, "wf1")
    assert (score.mean, score.n) == (pytest.approx(pooled), 200)
    assert score.folds is not None
    assert score.folds.values == [pytest.approx(f1(tmp_path / f"b-text-fold={name}")) for name in names]
    (row,) = found.differences
    runs = [together([of_runs[name, s] for name in names]) for s in (1, 2)]
    assert (row.seeds, row.folds) == ([1, 2], list(names))
    assert row.value == pytest.approx(np.mean(runs) - pooled)
    changes = [
        np.mean([f1_score(*of_runs[name, s], average="weighted") for s in (1, 2)])
        - f1_score(*of_text[name], average="weighted")
        for name in names
    ]
    assert row.fold_values == [pytest.approx(change) for change in changes]
    assert row.p_folds is not None
    assert f"{pooled:.4f}" in as_csv(found) or f"{pooled:.4f}" in page(found)


def test_baselines_of_folds_that_no_run_has_are_left_out_and_lacking_ones_named(tmp_path: Path) -> None:
    names = ("x", "y", "z")
    make_folds(tmp_path / "some", "a", 0.7, names=names)
    shutil.rmtree(tmp_path / "some" / "a-fold=z-s1")
    make_baseline_folds(tmp_path / "text", "text", 0.5, names=names)
    found = comparison([tmp_path / "some", tmp_path / "text"])
    assert any(note.endswith("b-text-fold=z is left out: it is of fold z, and no run is") for note in found.notes)
    assert [g.per_seed[0].where for g in found.groups[1:]] == ["the 2 folds of baseline text"]
    assert found.differences[0].folds == ["x", "y"]
    shutil.rmtree(tmp_path / "text" / "b-text-fold=x")
    found = comparison([tmp_path / "some", tmp_path / "text"])
    assert any(
        "baseline text lacks folds x, z: its scores are those of the samples of fold y only" in n for n in found.notes
    )
    assert found.differences[0].folds == ["y"]


def test_a_baseline_of_a_fold_is_no_match_for_runs_without_and_other_training_samples_are_noted(tmp_path: Path) -> None:
    make_seeded(tmp_path / "plain", 1)
    make_baseline_folds(tmp_path, "text", 0.5, names=("x", "y"))
    found = comparison([tmp_path])
    assert [g.baseline for g in found.groups] == [None]
    assert any("fold=x is left out: it is of fold x, and the runs are of none" in note for note in found.notes)
    fold = {"name": "x", "names": ["x", "y"], "train": 90, "test": 100}
    make_seeded(tmp_path / "of-x", 1, fold=fold)
    make_baseline(tmp_path / "audio", "audio", fold={**fold, "train": 60})
    found = comparison([tmp_path / "of-x", tmp_path / "audio"])
    assert any("audio learnt from 60 samples of fold x" in n and "of-x from 90" in n for n in found.notes)


def test_of_one_baseline_twice_the_newer_counts(folder: Path, tmp_path: Path) -> None:
    again = make_baseline(tmp_path / "again", "text", 0.9, started="2026-02-01T00:00:00+00:00")
    found = comparison([folder, again])
    assert [g.name for g in found.groups].count(TEXT) == 1
    assert found.groups[-1].runs[0].name == "baseline-meld-text"
    assert any(f"there is {TEXT} twice" in note and "again is left out" in note for note in found.notes)


def test_a_damaged_baseline_is_a_fault(tmp_path: Path) -> None:
    make_baseline(tmp_path / "b", baseline={"name": "text"})
    with pytest.raises(ValueError, match=r"run\.json is damaged: egmf baseline --force"):
        comparison([tmp_path])


def test_groups_with_baselines_are_sorted_by_validation(folder: Path) -> None:
    found = find_runs([str(folder)], ["test", "valid"])
    compared = compare(found.runs, sort_by="acc", resamples=100)
    means = [compared.validation[g.name].mean for g in compared.groups]
    assert means == sorted(means, reverse=True)  # type: ignore[type-var]
    assert len(compared.validation[TEXT].values) == 1


def test_every_output_shows_a_baseline_without_seed_or_deviation(folder: Path, found: Comparison) -> None:
    value = f"{found.score('meld', TEXT, 'wf1').mean:.4f}"
    table = group_scores(found, "meld")
    row = dict(zip(table.columns, table.rows[-1], strict=True))
    assert (row["group"], row["seeds"], row["wf1"], row["wf1, 95% interval"]) == (TEXT, "—", value, "—")
    assert "A baseline is fitted once" in table.note
    shown = settings(found)
    assert shown is not None
    assert TEXT not in str((shown.columns, shown.rows))
    assert costs(found).rows[-1] == [TEXT, "—", "1 core-hours", "1 core-hours", "—", "cpu x 1 threads"]
    rows = differences(found)
    assert rows is not None
    assert "with every seed of the other group" in rows.note
    written = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert [group["baseline"] for group in written["groups"]] == [None, None, "audio", "text"]
    assert [run["seed"] for run in written["groups"][3]["runs"]] == [None]
    lines = [
        line for line in csv.DictReader(io.StringIO(as_csv(found))) if line["group"] == TEXT and line["metric"] == "wf1"
    ]
    assert [(line["what"], line["seeds"], line["sd"]) for line in lines] == [("score", "", "")]
    assert f"{value} & --" in as_tex(found)
    assert f"{value} $\\pm$" not in as_tex(found)
    html = page(found)
    assert f"<td>{value}</td>" in html
    assert "<dt>baselines of scikit-learn</dt><dd>2</dd>" in html
    assert "<dt>runs</dt><dd>6</dd>" in html


def test_the_command_compares_a_folder_of_runs_and_baselines(folder: Path, tmp_path: Path) -> None:
    done = egmf("compare", str(folder), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert TEXT in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"compare.{kind}" for kind in ("csv", "json", "tex", "html")
    }
