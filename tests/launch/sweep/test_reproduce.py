"""Suites: every one is sound, what is missing is said, and small ones give their tables, whole and in part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.sweep.pool import Budget
from launch.sweep.reproduce import Machine, costs, hours, make_sweep, missing
from launch.sweep.suites import load_suite
from tests.distributed.processes import egmf
from trainer.data.generated.synthetic_benchmark import generate
from trainer.shipped import list_suites, shipped_folder
from trainer.tasks import get_task

SMALL = (
    "train.steps=2", "train.global_batch=8", "train.micro_batch=4", "train.epochs=1", "train.probe=false",
    "model.backbone.tiny.vocab_size=400", "model.fusion.width=16", "model.fusion.heads=1",
    "track.system_metrics=false", "track.report=false",
)  # fmt: skip
TINY = (
    "model.backbone.name=tiny", "model.backbone.quantization=none", "model.backbone.gradient_checkpointing=false",
    "train.precision=fp32",
)  # fmt: skip


@pytest.mark.parametrize("name", [suite.name for suite in list_suites()])
def test_every_suite_is_sound(name: str, tmp_path: Path) -> None:
    suite = load_suite(name)
    sweep = make_sweep(suite, tmp_path, None, suite.seeds, [])
    assert len(sweep.children()) == len(suite.variants) * len(suite.seeds)
    for one in suite.evidence.values():
        without = sweep.variants[one.without].model.fusion.experts
        assert set(sweep.variants[str(suite.baseline)].model.fusion.experts) - set(without) == {one.expert}
    if suite.together is not None:
        assert set(sweep.variants[suite.together.variant].tasks) == set(suite.together.alone)
    for task, one in (suite.together.alone if suite.together else {}).items():
        assert sweep.variants[one.variant].tasks == [task]
        assert one.metric in get_task(task).metrics
    for variant, published in suite.published.items():
        assert published.metric in get_task(sweep.variants[variant].tasks[0]).metrics


def test_the_words_on_the_command_line_come_under_what_makes_a_variant(tmp_path: Path) -> None:
    suite = load_suite("diagnostic")
    sweep = make_sweep(suite, tmp_path, None, (1,), ["model.fusion.experts=[local]", "train.steps=3"])
    assert sweep.variants["no-local"].model.fusion.experts == ["semantic", "global"]
    assert sweep.variants["full"].train.steps == 3
    assert sweep.variants["full"].data.path == str(tmp_path / "data" / "{task}")


def test_faults_of_a_suite_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        f"title: x\nconfig: {shipped_folder()}/demo.yaml\nseeds: [1]\nbaseline: ful\nvariants: {{a: {{}}}}\nminutes: 0\n"
    )
    with pytest.raises(ValueError, match="is not a valid suite") as result:
        load_suite(str(path))
    assert "minutes" in str(result.value)
    path.write_text(path.read_text().replace("minutes: 0\n", ""))
    with pytest.raises(ValueError, match="baseline: no variant ful"):
        load_suite(str(path))
    path.write_text(
        f"title: x\nconfig: {shipped_folder()}/demo.yaml\nseeds: [1]\nvariants: {{a: {{train.zer: 2}}, b: {{train.zero: 9}}}}\n"
    )
    with pytest.raises(ValueError, match=r"a: [\s\S]*train.zer: unknown key[\s\S]*b: [\s\S]*train.zero"):
        make_sweep(load_suite(str(path)), tmp_path, None, (1,), [])
    with pytest.raises(ValueError, match="no suite diagnostics; there are: diagnostic, "):
        load_suite("diagnostics")
    with pytest.raises(ValueError, match="leave --data out"):
        make_sweep(load_suite("diagnostic"), tmp_path, tmp_path, (1,), [])


def test_what_the_paper_needs_and_is_not_here_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    suite = load_suite("paper")
    sweep = make_sweep(suite, tmp_path, tmp_path / "data", suite.seeds, ["model.backbone.name=/models/none"])
    output = "\n".join(missing(sweep, generated=False))
    for words in ("data/meld", "data/cherma", "data/mosei", "data/simsv2", "no model folder /models/none"):
        assert words in output
    table, notes = costs(sweep, Machine())
    assert table is not None
    assert [row[0] for row in table.rows] == ["meld", "cherma", "mosei", "simsv2"]
    assert "no plan" in notes[0]
    assert hours(suite, sweep, Budget()).startswith("20 runs (4 variants, 5 seeds), 20 left; how long")


@pytest.mark.distributed
@pytest.mark.slow
def test_a_small_diagnostic_suite_gives_its_tables(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        f"extends: {shipped_folder()}/suites/diagnostic.yaml\ngenerate: [{{task: diagnostic, sizes: {{train: 48, valid: 24, test: 36}}}}]\nseeds: [1, 2]\n"
    )
    out = tmp_path / "out"
    words = ("reproduce", "--suite", str(path), "--out", str(out), *SMALL)
    done = egmf(*words, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "10 runs (5 variants, 2 seeds), 10 left" in done.stderr
    page = (out / "reproduce.md").read_text()
    for head in ("acc by kind of evidence", "Difference of acc to full", "Mean weight of each expert", "## Expected"):
        assert head in page
    held = json.loads((out / "reproduce.json").read_text())
    assert {(s["group"], s["kind"]) for s in held["scores"]} >= {("full", "all"), ("text-only", "long-range")}
    assert all(len(s["values"]) == 2 for s in held["scores"])
    assert set(held["gates"]["no-local"]["local"]) == {"semantic", "global"}
    assert sum(sum(per_seed) for per_seed in held["gates"]["full"]["local"].values()) == pytest.approx(2.0, abs=1e-4)
    assert len(held["claims"]) == 9
    (out / "no-global-s2" / "run.json").unlink()
    (out / "full-s1" / "predictions" / "test.parquet").rename(tmp_path / "kept")
    refused = egmf(*words, timeout=900)
    assert refused.returncode == 1
    assert "full-s1" in refused.stderr
    assert (out / "reproduce.md").read_text() == page
    (tmp_path / "kept").rename(out / "full-s1" / "predictions" / "test.parquet")
    again = egmf(*words, "--json", timeout=900)
    assert again.returncode == 0, again.stderr
    assert "10 of 10 runs are done already" in again.stderr
    assert json.loads(again.stdout)["scores"] == held["scores"]


@pytest.mark.distributed
@pytest.mark.slow
def test_the_paper_suite_runs_on_small_stand_ins(tmp_path: Path) -> None:
    for name in ("meld", "cherma", "mosei", "simsv2"):
        generate(name, tmp_path / "data" / name, sizes={"train": 48, "valid": 24, "test": 24})
    out = tmp_path / "out"
    words = ("reproduce", "--suite", "paper", "--data", str(tmp_path / "data"), "--seeds", "1,2", "--out", str(out))
    planned = egmf(*words, "--dry-run", *SMALL, *TINY)
    assert planned.returncode == 0, planned.stderr
    assert "nothing is missing" in planned.stderr
    done = egmf(*words, *SMALL, *TINY, timeout=900)
    assert done.returncode == 0, done.stderr
    scores = json.loads((out / "reproduce.json").read_text())["scores"]
    assert [(s["group"], s["metric"], s["published"]) for s in scores] == [
        ("meld", "wf1", 0.6557), ("cherma", "wf1", 0.739), ("mosei", "non0_f1", 0.8709), ("simsv2", "acc2", 0.8257),
    ]  # fmt: skip
    for score in scores:
        runs = [json.loads((out / f"{score['group']}-s{seed}" / "metrics.json").read_text()) for seed in (1, 2)]
        own = [run["test"][score["group"]][score["metric"]] for run in runs]
        assert score["values"] == pytest.approx(own, abs=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
def test_one_model_of_two_tasks_stands_beside_a_model_of_each(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    sizes = "sizes: {train: 48, valid: 24, test: 24}"
    path.write_text(
        f"title: both\nconfig: {shipped_folder()}/demo.yaml\nseeds: [1, 2]\n"
        f"generate: [{{task: meld, {sizes}}}, {{task: simsv2, {sizes}}}]\n"
        "variants: {meld: {task: meld}, numbers: {task: simsv2}, both: {task: [meld, simsv2]}}\n"
        "together:\n  variant: both\n  loses: 0.5\n"
        "  alone: {meld: {variant: meld, metric: wf1}, simsv2: {variant: numbers, metric: acc2}}\n"
    )
    out = tmp_path / "out"
    done = egmf("reproduce", "--suite", str(path), "--out", str(out), "--parallel", "2", *SMALL, timeout=900)
    assert done.returncode == 0, done.stderr

    def measured(variant: str, task: str, metric: str) -> float:
        runs = [json.loads((out / f"{variant}-s{seed}" / "metrics.json").read_text()) for seed in (1, 2)]
        return sum(run["test"][task][metric] for run in runs) / 2

    held = json.loads((out / "reproduce.json").read_text())
    for found, (task, alone, metric) in zip(
        held["tasks"], [("meld", "meld", "wf1"), ("simsv2", "numbers", "acc2")], strict=True
    ):
        expected = measured("both", task, metric) - measured(alone, task, metric)
        assert found["difference"]["value"] == pytest.approx(expected, abs=1e-6)
    for claim, found in zip(held["claims"], held["tasks"], strict=True):
        assert claim["met"] == (found["difference"]["value"] >= -0.5)
