"""Comparisons of run folders: groups, numbers against direct computation, refusals and notes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, f1_score

from tests.distributed.processes import egmf
from tests.results.seeded import make_seeded, make_two
from trainer.answers.metrics import compute
from trainer.results.compare.comparison import compare
from trainer.results.compare.output import as_csv, as_json, as_tex, tables, tex
from trainer.results.compare.result import EVERY
from trainer.results.compare.sources.compared_run import Answers, ComparedRun
from trainer.results.compare.sources.find import find_runs
from trainer.results.compare.sources.from_folders import run_from_folder
from trainer.tasks import define_task, get_task

FULL, LESS = "experts=[local, semantic, global]", "experts=[semantic, global]"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_two(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def runs(two: Path) -> list[ComparedRun]:
    return find_runs([str(two)], ["test", "valid"]).runs


def truth_and_guess(run: Path) -> tuple[np.ndarray, np.ndarray]:
    table, labels = pd.read_parquet(run / "predictions" / "test.parquet"), get_task("meld").labels
    return tuple(np.array([labels.index(cell) for cell in table[c]], float) for c in ("label", "prediction"))  # type: ignore[return-value]


def test_groups_scores_and_cost_are_those_of_the_files(two: Path, runs: list[ComparedRun]) -> None:
    found = compare(runs)
    assert [g.name for g in found.groups] == [FULL, LESS]
    assert [g.seeds for g in found.groups] == [[1, 2, 3]] * 2
    for group, stem in ((FULL, "full"), (LESS, "less")):
        for metric in ("acc", "wf1", "macro_f1"):
            values = [compute(get_task("meld"), *truth_and_guess(two / f"{stem}-s{s}"))[metric] for s in (1, 2, 3)]
            score = found.score("meld", group, metric)
            assert score.values == pytest.approx(values)
            assert (score.mean, score.sd) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
            assert score.n == 200
    assert found.groups[0].cost() == (4.0, "core-hours")  # 2 hours of 2 processes with a thread each
    assert found.groups[0].speed() == 102.0
    assert found.differing == {
        "model.fusion.experts": {FULL: "['local', 'semantic', 'global']", LESS: "['semantic', 'global']"}
    }


def test_a_difference_is_paired_by_seed_and_sample(two: Path, runs: list[ComparedRun]) -> None:
    found = compare(runs, metrics=["all"], baseline=FULL, correction="none")
    assert [(d.group, d.baseline, d.metric) for d in found.differences] == [
        (LESS, FULL, m) for m in ("acc", "wf1", "macro_f1")
    ]
    acc, wf1, _ = found.differences
    pairs = [[truth_and_guess(two / f"{stem}-s{s}") for stem in ("less", "full")] for s in (1, 2, 3)]
    scores = np.array([[f1_score(t, g, average="weighted") for t, g in pair] for pair in pairs])
    change_S = scores[:, 0] - scores[:, 1]
    assert wf1.value == pytest.approx(change_S.mean())
    assert wf1.se_seeds == pytest.approx(stats.sem(change_S))
    rng = np.random.default_rng(9)
    drawn = []
    for _ in range(300):  # the same samples for all six runs
        ids = rng.integers(200, size=200)
        each = [[f1_score(t[ids], g[ids], average="weighted", zero_division=0) for t, g in pair] for pair in pairs]
        drawn.append(np.mean([a - b for a, b in each]))
    assert wf1.se_samples == pytest.approx(np.std(drawn), rel=0.15)
    assert wf1.p == wf1.p_bootstrap
    assert wf1.p_mcnemar is None
    assert wf1.significant
    assert acc.p == max(acc.p_bootstrap, acc.p_mcnemar)  # type: ignore[type-var]
    right = np.array([[t == g for t, g in pair] for pair in pairs]).astype(int)
    assert acc.value == pytest.approx((right[:, 0] - right[:, 1]).mean())


def test_the_metrics_of_the_correction_are_those_asked_for(two: Path, runs: list[ComparedRun]) -> None:
    """`uar` beside the older metrics adds no test to a comparison of all; an alias is no second test; a score it always is."""
    tested = {
        "acc": ["acc"], "wa": ["acc"], "ua": ["uar"], "all": ["acc", "wf1", "macro_f1"],
    }  # fmt: skip
    for asked, expected in tested.items():
        assert compare(runs, metrics=[asked], resamples=100).tested == {"meld": expected}
    assert compare(runs, metrics=["wa", "acc", "ua"], resamples=100).tested == {"meld": ["acc", "uar"]}
    assert compare(runs, metrics=["all", "uar"], resamples=100).tested == {"meld": ["acc", "wf1", "macro_f1", "uar"]}
    found = compare(runs, metrics=["wa"], sort_by="ua", resamples=100)
    assert found.validation[FULL].metric == "uar"
    truth, guess = truth_and_guess(two / "full-s1")
    assert found.score("meld", FULL, "uar").values[0] == pytest.approx(balanced_accuracy_score(truth, guess))
    with pytest.raises(ValueError, match="no metric uaar"):
        compare(runs, metrics=["uaar"])


def test_the_tested_metric_is_that_which_the_runs_select_by(two: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        make_seeded(tmp_path / f"a-s{seed}", seed, 0.7, ["eval.select=ua"])
        make_seeded(tmp_path / f"b-s{seed}", seed, 0.6, ["eval.select.meld=uar", "train.lr.fusion=0.01"])
    found = compare(find_runs([str(tmp_path)], ["test"]).runs, resamples=100)
    assert found.tested == {"meld": ["uar"]}
    assert (
        compare(find_runs([str(tmp_path)], ["test"]).runs, metrics=["all"], resamples=100).tested["meld"][-1] == "uar"
    )
    mixed = find_runs([str(two), str(tmp_path)], ["test"]).runs
    with pytest.raises(
        ValueError, match=r"(?s)select by different metrics of meld: say which is tested, --metric.*wf1: .*uar: "
    ):
        compare(mixed)
    assert compare(mixed, metrics=["wf1"], resamples=100).tested == {"meld": ["wf1"]}


def test_metrics_without_meaning_are_missing_and_not_tested() -> None:
    raw = {"name": "own", "kind": "regression", "family": "mosei", "grid": {"low": 1, "high": 5, "step": 0.5}}
    task, rng = define_task(raw, saved=True), np.random.default_rng(0)
    truth = rng.choice(np.array(task.grid.values), 50)  # type: ignore[union-attr]
    made = [
        ComparedRun(
            f"{group}-s{seed}", f"{group}{seed}", seed, {"own": task}, {}, {"own": "f"},
            {"test": {"own": Answers(np.arange(50).astype(object), truth, truth + rng.normal(0, 1, 50))}}, group=group,
        )
        for group in "ab" for seed in (1, 2)
    ]  # fmt: skip
    found = compare(made, metrics=["all"], baseline="a", resamples=200)
    for metric in ("has0_acc", "non0_f1", "acc7"):
        assert found.score("own", "b", metric).mean is None
        (row,) = [d for d in found.differences if d.metric == metric]
        assert (row.value, row.p, row.p_corrected, row.significant) == (None, None, None, None)
    (row,) = [d for d in found.differences if d.metric == "mae"]
    assert row.p is not None
    assert found.score("own", "b", "mae").mean is not None


def test_kinds_are_their_samples_alone(two: Path, runs: list[ComparedRun]) -> None:
    found = compare(runs, metrics=["acc"], kinds=True)
    assert found.kinds["meld"] == [EVERY, "local", "long-range"]
    truth, guess = truth_and_guess(two / "full-s2")
    assert found.score("meld", FULL, "acc", "local").values[1] == pytest.approx((truth == guess)[::2].mean())
    assert found.score("meld", FULL, "acc", "local").n == 100
    assert {d.kind for d in found.differences} == {EVERY, "local", "long-range"}
    assert all(p.p_corrected >= p.p for p in found.differences if p.p is not None and p.p_corrected is not None)


def test_groups_by_chosen_settings_or_given_by_the_caller(two: Path, tmp_path: Path) -> None:
    make_seeded(tmp_path / "c", 4, 0.7, ["train.lr.fusion=0.01"])
    runs = find_runs([str(two), str(tmp_path)], ["test"]).runs
    found = compare(runs, group_by=["model.fusion"])
    assert {g.name: g.seeds for g in found.groups} == {FULL: [1, 2, 3, 4], LESS: [1, 2, 3]}
    assert any("differ in more than their seed: train.lr.fusion" in note for note in found.notes)
    with pytest.raises(ValueError, match=r"did you mean model\.fusion\.experts\?"):
        compare(runs, group_by=["model.fusion.expert"])
    for run in runs:
        run.group = "yours" if run.name.startswith("less") else "mine"
    with pytest.raises(ValueError, match=r"matches 0 groups.*there are: mine; yours"):
        compare(runs, baseline="his")


def test_a_setting_that_an_older_run_did_not_know_has_its_default(two: Path, tmp_path: Path) -> None:
    for name, seed, overrides in (("old", 4, []), ("other", 5, ["train.label_smoothing=0.1"])):
        make_seeded(tmp_path / name, seed, 0.7, overrides)
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        del config["train"]["regression_loss"], config["model"]["backbone"]["attention"]
        config["eval"] = {"score": config["eval"]["score"]}
        if name == "old":
            del config["train"]["label_smoothing"]
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    found = compare(find_runs([str(two), str(tmp_path)], ["test"]).runs)
    assert {g.name: g.seeds for g in found.groups} == {
        f"{FULL}, label_smoothing=0.0": [1, 2, 3, 4],
        f"{LESS}, label_smoothing=0.0": [1, 2, 3],
        f"{FULL}, label_smoothing=0.1": [5],
    }


def test_runs_of_a_version_that_knew_full_scores_alone_are_a_group_of_their_own(two: Path, tmp_path: Path) -> None:
    make_seeded(tmp_path / "old", 4, 0.7)
    config = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())
    del config["eval"]
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(config))
    found = compare(find_runs([str(two), str(tmp_path)], ["test"]).runs)
    assert [g.seeds for g in found.groups if "score=full" in g.name] == [[4]]
    assert [g.seeds for g in found.groups if "score=constrained" in g.name] == [[1, 2, 3], [1, 2, 3]]


def test_of_two_runs_with_one_seed_the_newest_counts_and_a_note_says_so(two: Path, tmp_path: Path) -> None:
    make_seeded(tmp_path / "again", 2, 0.99, started="2026-02-01T00:00:00+00:00")
    found = compare(find_runs([str(two), str(tmp_path)], ["test"]).runs)
    assert found.groups[0].seeds == [1, 2, 3]
    assert any("seed 2 twice" in note and "again is left out" in note for note in found.notes)
    assert found.groups[0].runs[1].name == "full-s2"


def test_a_group_with_two_configs_for_one_seed_is_refused(two: Path, tmp_path: Path) -> None:
    make_seeded(tmp_path / "slow", 2, 0.9, ["train.lr.fusion=0.0001"])
    runs = find_runs([str(two), str(tmp_path)], ["test"]).runs
    assert len(compare(runs).groups) == 3
    with pytest.raises(ValueError, match=r"--group-by too\n.*seed 2: .*(slow|full-s2).* differ in train\.lr\.fusion"):
        compare(runs, group_by=["model.fusion.experts"])


def test_unfinished_runs_are_left_out_with_a_note(two: Path, tmp_path: Path) -> None:
    make_seeded(tmp_path / "broke", 9, state="failed", failure="no room")
    found = find_runs([str(two), str(tmp_path)], ["test"])
    assert len(found.runs) == 6
    assert any("broke is left out" in note and "no room" in note for note in found.notes)
    with pytest.raises(ValueError, match="is not finished"):
        run_from_folder(tmp_path / "broke")


def test_runs_that_are_not_comparable_are_refused(two: Path, tmp_path: Path) -> None:
    other = make_seeded(tmp_path / "other", 1, fingerprint="e" * 64)
    runs = find_runs([str(two), str(other)], ["test"]).runs
    with pytest.raises(ValueError, match=r"(?s)not made on the same data.*meld, data f+:.*meld, data e+: .*other"):
        compare(runs)
    assert len(compare(runs, force=True).groups) == 2
    unified = make_seeded(tmp_path / "unified", 1, tasks=("meld", "simsv2"))
    runs = find_runs([str(two), str(unified)], ["test"]).runs
    with pytest.raises(ValueError, match=r"different tasks.*--task meld"):
        compare(runs)
    assert list(compare(runs, task="meld").tasks) == ["meld"]
    fewer = make_seeded(tmp_path / "fewer", 1, samples=150)
    runs = find_runs([str(two), str(fewer)], ["test"]).runs
    with pytest.raises(ValueError, match=r"other samples.*fewer"):
        compare(runs)
    forced = compare(runs, force=True)
    assert not forced.differences
    assert any("no differences are tested" in note for note in forced.notes)


def test_groups_are_sorted_by_validation_only(runs: list[ComparedRun]) -> None:
    for refused in ("test/acc", "train/acc"):
        with pytest.raises(ValueError, match=r"chooses on the .* split.*--sort-by valid/acc"):
            compare(runs, sort_by=refused)
    assert [g.name for g in compare(runs[::-1], sort_by="acc").groups] == [FULL, LESS]
    with pytest.raises(ValueError, match="wf2"):
        compare(runs, metrics=["wf2"])


def test_what_is_undefined_or_unknown_is_missing_everywhere(tmp_path: Path) -> None:
    make_seeded(tmp_path / "a", 1, tasks=("simsv2",), invalid=0.1)
    make_seeded(tmp_path / "b", 2, tasks=("simsv2",), overrides=["model.fusion.width=64"])
    table = pd.read_parquet(tmp_path / "b" / "predictions" / "test.parquet")
    table["prediction"] = 0.5
    table.to_parquet(tmp_path / "b" / "predictions" / "test.parquet")
    found = compare(find_runs([str(tmp_path)], ["test"]).runs, metrics=["corr"])
    constant = found.score("simsv2", "width=64", "corr")
    assert (constant.values, constant.mean, constant.sd) == ([None], None, None)
    assert [d.value for d in found.differences] == [None]
    assert any("no seed is common" in note for note in found.notes)
    table = tables(found)[0]
    assert table.rows[1][table.columns.index("corr")] == "—"
    left = pd.read_parquet(tmp_path / "a" / "predictions" / "test.parquet")["valid"]
    assert table.rows[0][-1] == f"{1 - left.mean():.4f}"
    assert json.loads(json.dumps(as_json(found), allow_nan=False))["differences"][0]["p"] is None
    assert "difference,simsv2,corr,all,width=64,width=256,200,,,,,,,," in as_csv(found)


def test_json_csv_and_tex_hold_the_numbers(runs: list[ComparedRun]) -> None:
    found = compare(runs, metrics=["acc"])
    written = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert written["scores"][0]["values"] == found.scores[0].values
    assert [run["seed"] for run in written["groups"][0]["runs"]] == [1, 2, 3]
    rows = pd.read_csv(io.StringIO(as_csv(found)))
    assert rows["value"].tolist() == [s.mean for s in found.scores] + [d.value for d in found.differences]
    latex = as_tex(found)
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 2
    assert "experts=[local, semantic, global]" in latex
    assert f"{found.scores[0].mean:.4f} $\\pm$ {found.scores[0].sd:.4f}" in latex
    assert (
        tex("a_b & 5% \\x {y}~^ <")
        == "a\\_b \\& 5\\% \\textbackslash{}x \\{y\\}\\textasciitilde{}\\textasciicircum{} $<$"
    )


def test_many_groups_need_a_baseline(tmp_path: Path) -> None:
    for i in range(11):
        make_seeded(tmp_path / f"r{i}", 0, 0.7, [f"train.steps={i + 1}"], splits=["test"], samples=40)
    runs = find_runs([str(tmp_path)], ["test"]).runs
    found = compare(runs)
    assert not found.differences
    assert any("--baseline" in note for note in found.notes)
    assert len(compare(runs, baseline="steps=11").differences) == 10


def test_the_command(two: Path) -> None:
    done = egmf("compare", str(two), "--kinds", "--sort-by", "acc", "--baseline", "full")
    assert done.returncode == 0, done.stderr
    for text in (
        "meld, test: 200 samples",
        "Differences",
        "significant",
        "core-hours",
        "model.fusion.experts",
        "valid acc",
    ):
        assert text in done.stdout
    done = egmf("compare", str(two), "--sort-by", "test/acc", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "chooses on the test split" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_found_or_read_is_one_message(two: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    damaged = make_seeded(tmp_path / "runs" / "damaged", 1)
    (damaged / "predictions" / "test.parquet").write_bytes(b"PAR1 and no more")
    strange = make_seeded(tmp_path / "runs" / "strange", 2)
    table = pd.read_parquet(strange / "predictions" / "test.parquet")
    table.assign(label="bored").to_parquet(strange / "predictions" / "test.parquet")
    with pytest.raises(
        ValueError, match=r"4 faults[\s\S]*contains none[\s\S]*is damaged[\s\S]*labels that the task does not have"
    ) as raised:
        find_runs([str(tmp_path / "empty"), str(tmp_path / "runs"), "gone"], ["test"], f"sqlite:///{tmp_path}/no.db")
    assert "there is no MLflow store" in str(raised.value)
    with pytest.raises(ValueError, match="no predictions of train"):
        find_runs([str(two)], ["train"])
    with pytest.raises(ValueError, match="no finished runs"):
        compare([])
