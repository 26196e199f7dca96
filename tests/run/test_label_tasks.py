"""A run of two tasks, one with several labels a sample and one with shares of annotators: trained, scored, shown, compared, asked."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

from tests.distributed.fork_server import run
from tests.distributed.processes import ROOT, environment
from trainer.data.preparation.prepare import prepare
from trainer.results.report.report import write_report
from trainer.tasks import get_task

CUES = {"joy": "glad", "anger": "mad", "sad": "cry"}
TASKS = {
    "sets": "{name: sets, kind: multilabel, labels: [joy, anger, sad]}",
    "shares": "{name: shares, kind: classification, labels: [joy, anger, sad]}",
}


def egmf(folder: Path, *arguments: str) -> Any:
    done = run([sys.executable, "-m", "trainer", *arguments], env=environment(), cwd=folder, timeout=500)
    assert done.returncode == 0, done.stderr
    return done


def sample(rng: random.Random, task: str, split: str, i: int) -> dict[str, Any]:
    labels = [label for label in CUES if rng.random() < 0.45]
    if task == "shares":
        labels = labels or ["sad"]
        given: Any = {label: rng.randint(1, 3) for label in labels}
    else:
        given = labels
    return {
        "id": f"{split}-{i:03d}",
        "text": " ".join(["so", *(CUES[label] for label in labels)]),
        "split": split,
        "label": given,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both datasets, and a run of both tasks."""
    folder = tmp_path_factory.mktemp("labels")
    for task, definition in TASKS.items():
        rng = random.Random(task)
        lines = [
            sample(rng, task, split, i) for split, n in (("train", 96), ("valid", 24), ("test", 30)) for i in range(n)
        ]
        (folder / f"{task}.yaml").write_text(definition)
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        prepare(get_task(str(folder / f"{task}.yaml")), [folder / f"{task}.jsonl"], folder / task)
    egmf(
        folder, "train", str(ROOT / "configs/tiny.yaml"), "task=[sets.yaml,shares.yaml]", "data.path=./{task}", "--out", "run",
        "model.backbone.tiny.vocab_size=400", "train.global_batch=16", "train.steps=20", "train.eval_every=20",
        "train.lr.backbone=0.005", "train.probe=false", "track.mlflow=false", "track.system_metrics=false",
    )  # fmt: skip
    return folder


def rows_of(folder: Path, task: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    table = pd.read_parquet(folder / "run/predictions/test.parquet")
    return table[table["task"] == task], json.loads((folder / "run/metrics.json").read_text())["test"][task]


def members(cells: pd.Series) -> np.ndarray:
    return np.array([[label in str(cell).split(", ") for label in CUES] for cell in cells])


def test_sets_are_scored_as_scikit_learn_scores_what_the_file_says(folder: Path) -> None:
    rows, scores = rows_of(folder, "sets")
    truth_NC, guess_NC = members(rows["label"]), members(rows["prediction"])
    p_NC = np.array(rows["probabilities"].tolist())
    assert np.array_equal(guess_NC, p_NC >= 0.5)
    for average in ("micro", "macro", "weighted"):
        key = "wf1" if average == "weighted" else f"{average}_f1"
        assert scores[key] == pytest.approx(f1_score(truth_NC, guess_NC, average=average, zero_division=0), abs=1e-12)
    assert scores["exact"] == accuracy_score(truth_NC, guess_NC)
    assert scores["jaccard"] == pytest.approx(
        jaccard_score(truth_NC, guess_NC, average="samples", zero_division=1), abs=1e-12
    )
    for c, label in enumerate(CUES):
        expected = f1_score(truth_NC[:, c], guess_NC[:, c])
        assert scores["per_class"][label]["f1"] == pytest.approx(expected, abs=1e-12)
        assert scores["per_class"][label]["support"] == truth_NC[:, c].sum()
    p_true_NC = np.where(truth_NC, p_NC, 1 - p_NC)
    assert scores["nll"] == pytest.approx(-np.log(p_true_NC).mean(), rel=1e-6)
    assert scores["brier"] == pytest.approx(((1 - p_true_NC) ** 2).mean(), rel=1e-6)
    again = json.loads(egmf(folder, "score", "--task", "sets.yaml", "run/predictions/test.parquet", "--json").stdout)
    assert {key: again[key] for key in ("n", "micro_f1", "macro_f1", "exact")} == {
        k: scores[k] for k in ("n", "micro_f1", "macro_f1", "exact")
    }


def test_shares_are_scored_against_the_distribution(folder: Path) -> None:
    rows, scores = rows_of(folder, "shares")
    written = {}
    for line in (folder / "shares.jsonl").read_text().splitlines():
        given = json.loads(line)
        written[given["id"]] = [given["label"].get(label, 0) / sum(given["label"].values()) for label in CUES]
    share_NC = np.array([written[name] for name in rows["id"]])
    p_NC = np.array(rows["probabilities"].tolist())
    guess_N = [list(CUES).index(word) for word in rows["prediction"]]
    assert scores["expected_acc"] == pytest.approx(share_NC[np.arange(len(rows)), guess_N].mean(), abs=1e-7)
    kl = [
        sum(q * math.log(q / p) for q, p in zip(qs, ps, strict=True) if q)
        for qs, ps in zip(share_NC, p_NC, strict=True)
    ]
    assert scores["kl"] == pytest.approx(np.mean(kl), rel=1e-5)
    assert list(rows["label"]) == [list(CUES)[int(np.argmax(qs))] for qs in share_NC]


def test_the_report_shows_both_without_a_picture_of_numbers(folder: Path) -> None:
    write_report(folder / "run")
    page = (folder / "run/report.html").read_text()
    assert "labels of at least half of the samples" in page
    assert "expected_acc" in page
    assert "Residuals" not in page
    assert not list((folder / "run/report").glob("*residuals*"))


def test_comparison_pairs_the_sets(folder: Path) -> None:
    found = json.loads(egmf(folder, "compare", "run", "--task", "sets", "--metric", "all", "--json").stdout)
    rows, scores = rows_of(folder, "sets")
    (group,) = found["groups"]
    assert found["tested"]["sets"] == ["micro_f1", "macro_f1", "wf1", "jaccard", "exact"]
    means = {score["metric"]: score["mean"] for score in found["scores"] if score["group"] == group["name"]}
    assert means == pytest.approx({key: scores[key] for key in found["tested"]["sets"]}, abs=1e-12)
    assert len(rows) == scores["n"]


def test_answers_to_new_samples(folder: Path) -> None:
    (folder / "new.jsonl").write_text(
        '{"id": "a", "text": "so glad cry", "task": "sets"}\n{"id": "b", "text": "so mad", "task": "shares"}\n'
    )
    egmf(folder, "predict", "run", "--input", "new.jsonl", "--out", "answers.jsonl", "--probabilities")
    one, two = map(json.loads, (folder / "answers.jsonl").read_text().splitlines())
    assert one["probabilities"].keys() == CUES.keys()
    assert one["prediction"] == (", ".join(label for label, p in one["probabilities"].items() if p >= 0.5) or "none")
    assert sum(two["probabilities"].values()) == pytest.approx(1)


def test_settings_for_one_answer_a_sample_are_refused_together(folder: Path) -> None:
    done = run(
        [sys.executable, "-m", "trainer", "train", str(ROOT / "configs/tiny.yaml"), "task=sets.yaml", "data.path=./{task}", "--out", "bad",
         "train.class_weights=inverse", "data.sampling=sqrt", "eval.mode=generate"],
        env=environment(), cwd=folder, timeout=500,
    )  # fmt: skip
    assert done.returncode == 1
    for setting in ("train.class_weights=inverse", "data.sampling=sqrt", "eval.mode=generate"):
        assert setting in done.stderr
