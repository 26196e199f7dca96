"""Baselines among run folders: shown as what they are, and their scores beside those of the runs of the same data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tests.results.seeded import make_baseline, make_seeded
from trainer.baselines.baseline import fit_baseline, specs, write_baseline
from trainer.data.dataset import open_dataset
from trainer.results.analysis import analyse
from trainer.results.baselines_beside import add_baselines
from trainer.results.compare.comparison import compare
from trainer.results.compare.sources.find import find_runs
from trainer.results.report.report import write_report
from trainer.results.run_folder import RunFolder, read_run
from trainer.results.runs import list_runs
from trainer.results.show import run_json, show_run
from trainer.results.tables import scores
from trainer.results.task_results import TaskResults


def beside(path: Path) -> tuple[RunFolder, list[TaskResults]]:
    run = read_run(path)
    results = analyse(run)
    run.notes.clear()
    add_baselines(run, results)
    return run, results


def metric_rows(results: TaskResults) -> dict[str, dict[str, str]]:
    table = scores(results)
    assert table is not None
    return {row[0].partition(" ")[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_the_table_of_scores_has_a_column_for_each_baseline_of_the_data(tmp_path: Path) -> None:
    make_seeded(tmp_path / "run", 1)
    made = {
        name: make_baseline(tmp_path / f"b-{name}", name, quality) for name, quality in (("text", 0.5), ("audio", 0.4))
    }
    make_baseline(tmp_path / "other-data", "video", fingerprint="e" * 64)
    make_baseline(tmp_path / "other-task", "video", task="cherma")
    make_baseline(tmp_path / "broken-off", "video", state="running")
    make_baseline(tmp_path / "elsewhere" / "b-video", "video")
    run, (results,) = beside(tmp_path / "run")
    assert [(one.name, one.folder) for one in results.baselines] == [("audio", "b-audio"), ("text", "b-text")]
    table = metric_rows(results)
    for name, folder in made.items():
        expected = json.loads((folder / "metrics.json").read_text())["test"]["meld"]
        for metric in ("acc", "wf1", "n"):
            value = expected[metric]
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            assert table[metric][f"baseline {name}, test"] == shown
    assert run.notes == []
    listed = run_json(tmp_path / "run")["tasks"]["meld"]["baselines"]  # type: ignore[index]
    assert [one["name"] for one in listed] == ["audio", "text"]


def test_without_baselines_the_table_is_what_it_was(tmp_path: Path) -> None:
    make_seeded(tmp_path / "run", 1)
    _, (results,) = beside(tmp_path / "run")
    table = scores(results)
    assert table is not None
    assert table.columns == ["metric", "test", "valid", "constant answer, test"]
    assert "aseline" not in table.note


def test_a_run_of_a_fold_or_a_damaged_baseline_is_noted(tmp_path: Path) -> None:
    fold = {"name": "x", "names": ["x", "y"], "train": 100, "test": 100}
    make_seeded(tmp_path / "folds", 1, fold=fold)
    make_seeded(tmp_path / "run", 1)
    damaged = make_baseline(tmp_path / "b")
    (damaged / "metrics.json").write_text("{")
    run, (results,) = beside(tmp_path / "run")
    assert results.baselines == []
    assert [note for note in run.notes if "/b cannot be shown: metrics.json is damaged" in note] == run.notes != []
    run, (results,) = beside(tmp_path / "folds")
    assert results.baselines == []
    assert run.notes == ["the baselines beside the run are not shown: none is of its fold, and the run is of fold x"]


@pytest.fixture
def among(unified: Path, data: Path, tmp_path: Path) -> Path:
    """A folder with a run of three tasks and real baselines of two of them."""
    shutil.copytree(unified, tmp_path / unified.name)
    for task in ("meld", "simsv2"):
        opened = open_dataset(data / task)
        for spec in specs(opened, ["text", "constant"]):
            write_baseline(fit_baseline(opened, spec), opened.fingerprint, tmp_path / f"baseline-{task}-{spec.name}")
    return tmp_path


def test_the_report_and_the_terminal_show_real_baselines(among: Path, unified: Path) -> None:
    write_report(among / unified.name)
    html = (among / unified.name / "report.html").read_text()
    terminal = Console(width=400)
    with terminal.capture() as captured:
        terminal.print(show_run(among / unified.name))
    for task, metric in (("meld", "wf1"), ("simsv2", "mae")):
        value = json.loads((among / f"baseline-{task}-text" / "metrics.json").read_text())["test"][task][metric]
        assert f"<td>{value:.4f}</td>" in html
        assert f"{value:.4f}" in captured.get()
    assert html.count('<th scope="col">baseline text, test</th>') == 2
    results = {result.task.name: result for result in beside(among / unified.name)[1]}
    assert [len(results[task].baselines) for task in ("meld", "cherma", "simsv2")] == [2, 0, 2]
    row = metric_rows(results["meld"])["acc"]
    assert row["baseline constant, test"] == row["constant answer, test"]


@pytest.mark.parametrize("task", ["meld", "simsv2"])
def test_real_baselines_are_compared_with_a_run_on_the_same_samples(among: Path, data: Path, task: str) -> None:
    found = compare(find_runs([str(among)], ["test"]).runs, task=task, resamples=100)
    assert [group.baseline for group in found.groups] == [None, "constant", "text"]
    (selecting,) = found.tested[task]
    for name in ("constant", "text"):
        scored = json.loads((among / f"baseline-{task}-{name}" / "metrics.json").read_text())["test"][task][selecting]
        assert found.score(task, f"baseline {name}", selecting).mean == pytest.approx(scored)
        (row,) = [d for d in found.differences if d.baseline == f"baseline {name}"]
        assert row.n == len(open_dataset(data / task)["test"])


def test_a_baseline_has_a_page_of_its_own_without_notes(among: Path) -> None:
    folder = among / "baseline-meld-text"
    write_report(folder)
    html = (folder / "report.html").read_text()
    assert "LogisticRegression of text, no EGMF run" in html
    assert "Not on this page" not in html
    assert "text unavailable" not in html
    assert "baseline constant" not in html
    summary = run_json(folder)
    assert summary["notes"] == []
    assert (summary["config"], summary["step"], summary["training"]) == (None, None, {})
    assert summary["baseline"]["name"] == "text"  # type: ignore[index]


def test_lists_and_pages_survive_a_damaged_record_of_a_baseline(tmp_path: Path) -> None:
    folder = make_baseline(tmp_path / "b", baseline={"name": "text"})
    (line,) = list_runs(tmp_path)
    assert not line.baseline
    write_report(folder)
    make_seeded(tmp_path / "run", 1, data=[])
    assert beside(tmp_path / "run")[1][0].baselines == []
