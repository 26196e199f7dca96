"""What predictions say, against scikit-learn and plain loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.metrics import classification_report

from trainer.data.dataset import open_dataset
from trainer.results.analysis import EXAMPLES, TaskResults, analyse, coverage
from trainer.results.report.report import write_report
from trainer.results.run_folder import read_run
from trainer.tasks import get_task


def results_of(run: Path) -> dict[str, TaskResults]:
    return {results.task.name: results for results in analyse(read_run(run))}


def test_scores_and_the_constant_answer_equal_scikit_learn(meld: Path, data: Path) -> None:
    results = results_of(meld)["meld"]
    table = pd.read_parquet(meld / "predictions" / "test.parquet")
    expected = classification_report(table["label"], table["prediction"], output_dict=True, zero_division=np.nan)
    assert results.split == "test"
    assert results.scores["test"]["acc"] == pytest.approx(expected["accuracy"])
    for label, values in results.scores["test"]["per_class"].items():
        if label in expected:
            assert values["support"] == expected[label]["support"]
            recall = expected[label]["recall"]
            assert values["recall"] == (None if np.isnan(recall) else pytest.approx(recall))
    train = open_dataset(data / "meld")["train"].targets().astype(int)
    dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((len(train), 1)), train)
    guess = get_task("meld").labels[int(dummy.predict([[0]])[0])]
    assert results.constant == f"majority class of train: {guess}"
    assert results.constant_scores is not None
    assert results.constant_scores["acc"] == pytest.approx((table["label"] == guess).mean())


def test_without_its_data_the_constant_answer_is_that_of_the_split_and_texts_are_missing(
    meld: Path, copy: Callable[[Path], Path]
) -> None:
    run = copy(meld)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("/{task}", "/gone/{task}"))
    folder = read_run(run)
    results = analyse(folder)[0]
    table = pd.read_parquet(run / "predictions" / "test.parquet")
    assert str(results.constant).startswith("majority class of this split")
    assert results.constant_scores is not None
    assert results.constant_scores["acc"] == pytest.approx(table["label"].value_counts().max() / len(table))
    assert {e.text for e in (*results.best, *results.worst)} == {None}
    assert any("no longer exists" in note for note in folder.notes)


def test_another_dataset_at_the_same_path_is_not_used(meld: Path, copy: Callable[[Path], Path]) -> None:
    run = copy(meld)
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"data": {"meld": "', '"data": {"meld": "0'))
    folder = read_run(run)
    results = analyse(folder)[0]
    assert {e.text for e in (*results.best, *results.worst)} == {None}
    assert any("has changed since the run" in note for note in folder.notes)


def test_gate_means_equal_loops(unified: Path) -> None:
    table = pd.read_parquet(unified / "predictions" / "test.parquet")
    rows = table[table["task"] == "cherma"].to_dict("records")
    gates = results_of(unified)["cherma"].gates
    assert gates is not None
    names, streams = ["local", "semantic", "global"], ["text", "audio", "video"]
    assert list(gates.all.expert) == names
    assert list(gates.all.modality) == streams
    for group in (gates.all, *gates.groups["class"]):
        group_rows = [row for row in rows if group.name in ("all", row["label"])]
        assert group.n == len(group_rows) > 0
        for e, name in enumerate(names):
            assert group.expert[name] == pytest.approx(
                sum(row["gate_expert"][e] for row in group_rows) / len(group_rows)
            )
        for m, name in enumerate(streams):
            total = sum(row["gate_expert"][e] * row["gate_modality"][e][m] for row in group_rows for e in range(3))
            assert group.modality[name] == pytest.approx(total / len(group_rows))
    assert gates.inside["semantic"]["audio"] == pytest.approx(np.mean([row["gate_modality"][1][1] for row in rows]))
    assert "kind" not in gates.groups
    meld = results_of(unified)["meld"].gates
    assert meld is not None
    assert [group.name for group in meld.groups["kind"]] == ["long", "short"]


def test_examples_are_the_most_and_the_least_probable_truths(meld: Path, data: Path) -> None:
    results = results_of(meld)["meld"]
    table = pd.read_parquet(meld / "predictions" / "test.parquet")
    labels = get_task("meld").labels
    probable = {r["id"]: r["probabilities"][labels.index(r["label"])] for r in table.to_dict("records")}
    by_truth = sorted(probable, key=lambda i: probable[i])
    half = (len(table) + 1) // 2  # fewer samples than two full lists: every sample stands in one of them
    assert len(table) < 2 * EXAMPLES
    assert [e.id for e in results.best] == by_truth[::-1][:half]
    assert [e.id for e in results.worst] == by_truth[: len(table) - half]
    view = open_dataset(data / "meld")["test"]
    for example in (*results.best, *results.worst):
        assert example.text == view[view.ids.index(example.id)].text
        assert example.probabilities[0][1] == max(p for _, p in example.probabilities)


def test_coverage_of_a_calibrated_and_of_an_overconfident_model() -> None:
    task = get_task("simsv2")
    assert task.grid is not None
    grid = np.array(task.grid.values)
    rng = np.random.default_rng(3)
    center = rng.uniform(-0.5, 0.5, 4000)
    p_NC = np.exp(-((grid - center[:, None]) ** 2) / (2 * 0.3**2))
    p_NC /= p_NC.sum(axis=1, keepdims=True)
    truth = np.array([rng.choice(grid, p=p) for p in p_NC])
    for q, share in coverage(task, truth, p_NC):
        assert share == pytest.approx(q, abs=0.06)
    sharp = p_NC**9 / (p_NC**9).sum(axis=1, keepdims=True)
    tails = dict(coverage(task, truth, sharp))
    assert tails[0.05] > 0.15
    assert tails[0.95] < 0.85


def test_invalid_answers_are_the_worst_and_have_no_probabilities(meld: Path, copy: Callable[[Path], Path]) -> None:
    run = copy(meld)
    path = run / "predictions" / "test.parquet"
    table = pd.read_parquet(path)
    table.loc[3, ["prediction", "valid", "answer", "probabilities"]] = [None, False, "no idea", None]
    table.to_parquet(path)
    (run / "metrics.json").unlink()
    results = results_of(run)["meld"]
    assert results.scores["test"]["invalid_rate"] == pytest.approx(1 / len(table))
    assert results.worst[0].id == table.loc[3, "id"]
    assert not results.worst[0].probabilities
    assert sum(results.scores["test"]["confusion"]["invalid"]) == 1


def test_the_load_of_experts_and_a_dead_one(meld: Path, copy: Callable[[Path], Path]) -> None:
    results = results_of(meld)["meld"]
    assert results.warnings == []
    for split in ("valid", "test"):
        table = pd.read_parquet(meld / "predictions" / f"{split}.parquet")
        weights = np.stack(table["gate_expert"])
        load = results.balance[split]
        assert list(load.mean.values()) == pytest.approx([sum(w[e] for w in weights) / len(table) for e in range(3)])
        assert list(load.largest.values()) == pytest.approx([max(w[e] for w in weights) for e in range(3)])
        mean = np.array(list(load.mean.values()))
        assert load.variation == pytest.approx(np.sqrt(((mean - 1 / 3) ** 2).mean()) * 3)
        assert load.n == len(table)
    run = copy(meld)
    path = run / "predictions" / "test.parquet"
    table = pd.read_parquet(path)
    table["gate_expert"] = [np.array([0.6, 0.08, 0.32])] * len(table)  # small on every sample, though above 0.02
    table.to_parquet(path)
    assert results_of(run)["meld"].balance["test"].dead == ["semantic"]
    weights = [np.array([0.0, 0.1, 0.9])] * (len(table) - 1) + [np.array([0.15, 0.1, 0.75])]
    table["gate_expert"] = weights  # large on one sample, but next to nothing on the mean
    table.to_parquet(path)
    results = results_of(run)["meld"]
    assert results.balance["test"].dead == ["local"]
    assert results.warnings
    assert "local (mean weight 0.0" in results.warnings[0]
    write_report(run)
    assert "dead expert of meld on test: local" in (run / "report.html").read_text()


def test_the_temperature_is_that_of_the_validation_predictions(meld: Path, copy: Callable[[Path], Path]) -> None:
    both_splits = results_of(meld)["meld"].calibration
    assert both_splits is not None
    assert set(both_splits.splits) == {"valid", "test"}
    run = copy(meld)
    (run / "predictions" / "test.parquet").unlink()
    valid_only = results_of(run)["meld"].calibration
    assert valid_only is not None
    assert valid_only.temperature == both_splits.temperature
    (run / "predictions" / "test.parquet").write_bytes((meld / "predictions" / "test.parquet").read_bytes())
    (run / "predictions" / "valid.parquet").unlink()
    assert results_of(run)["meld"].calibration is None
