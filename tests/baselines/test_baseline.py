"""Baselines against scikit-learn used directly, brute force, and the faults of data and folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error
from sklearn.preprocessing import StandardScaler

from tests.distributed.processes import egmf, environment
from tests.toy import prepare_toy
from trainer.baselines.baseline import BaselineError, check_data, fit_baseline, specs, write_baseline
from trainer.baselines.features import statistics
from trainer.data.dataset import open_dataset
from trainer.results.compare.sources.from_folders import runs_below


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture(scope="module")
def meld(folder: Path) -> Path:
    return prepare_toy("meld", folder)


@pytest.fixture(scope="module")
def simsv2(folder: Path) -> Path:
    return prepare_toy("simsv2", folder)


def test_text_of_a_classification_is_what_scikit_learn_gives(meld: Path, tmp_path: Path) -> None:
    data = open_dataset(meld)
    (spec,) = specs(data, ["text"])
    found = fit_baseline(data, spec)
    tfidf = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    train = tfidf.fit_transform(list(data["train"].texts()))
    model = LogisticRegression(C=1.0, max_iter=1000).fit(train, data["train"].targets())
    p_NC = model.predict_proba(tfidf.transform(list(data["test"].texts())))
    truth_N = data["test"].targets()
    scores = found.scores["test"]["meld"]
    assert scores["acc"] == pytest.approx(accuracy_score(truth_N, model.classes_[p_NC.argmax(1)]))  # type: ignore[typeddict-item]
    assert scores["nll"] == pytest.approx(log_loss(truth_N, p_NC, labels=model.classes_))
    write_baseline(found, data.fingerprint, tmp_path / "b")
    table = pd.read_parquet(tmp_path / "b" / "predictions" / "test.parquet")
    expected = dict(zip(data["test"].ids, p_NC, strict=True))
    assert sorted(table["id"]) == list(table["id"]) == sorted(expected)
    for row in table.itertuples():
        np.testing.assert_allclose(row.probabilities, expected[row.id], atol=1e-9)
    record = json.loads((tmp_path / "b" / "run.json").read_text())
    assert (record["state"], record["baseline"]["name"], record["data"]) == ("done", "text", {"meld": data.fingerprint})
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["test"]["meld"]["acc"] == scores["acc"]  # type: ignore[typeddict-item]


def test_text_of_a_chinese_regression_is_ridge_on_characters_and_has_no_probabilities(
    simsv2: Path, tmp_path: Path
) -> None:
    data = open_dataset(simsv2)
    (spec,) = specs(data, ["text"])
    found = fit_baseline(data, spec)
    tfidf = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    train = tfidf.fit_transform(list(data["train"].texts()))
    guess_N = Ridge(alpha=1.0).fit(train, data["train"].targets()).predict(tfidf.transform(list(data["test"].texts())))
    mae = mean_absolute_error(data["test"].targets(), np.clip(guess_N, -1, 1))
    scores = found.scores["test"]["simsv2"]
    assert scores["mae"] == pytest.approx(mae, abs=1e-6)  # type: ignore[typeddict-item]
    assert "nll" not in scores
    write_baseline(found, data.fingerprint, tmp_path / "b")
    assert "probabilities" not in pd.read_parquet(tmp_path / "b" / "predictions" / "test.parquet")


def test_statistics_are_those_of_the_frames_and_nan_where_the_stream_is_missing(meld: Path) -> None:
    view = open_dataset(meld)["train"]
    found = statistics(view, "audio")
    for i, sample in enumerate(view):
        if sample.audio_TF is None:
            assert np.isnan(found[i]).all()
            continue
        columns = [[float(x) for x in column] for column in zip(*sample.audio_TF.tolist(), strict=True)]
        means = [sum(c) / len(c) for c in columns]
        deviations = [(sum((x - m) ** 2 for x in c) / len(c)) ** 0.5 for c, m in zip(columns, means, strict=True)]
        np.testing.assert_allclose(found[i], [*means, *deviations, *map(max, columns)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("names", [("audio", "video"), ("text", "audio")])
def test_joined_modalities_are_columns_side_by_side(meld: Path, names: tuple[str, str]) -> None:
    """With text, whose columns are sparse, and without."""
    data = open_dataset(meld)
    columns: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for name in names:
        if name == "text":
            tfidf = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), min_df=2, sublinear_tf=True)
            tfidf.fit(list(data["train"].texts()))
            parts = {split: tfidf.transform(list(data[split].texts())).toarray() for split in columns}
        else:
            of_frames = {split: statistics(data[split], name) for split in columns}
            of_frames = {split: np.column_stack([x, np.isnan(x).all(1)]) for split, x in of_frames.items()}
            scaler = StandardScaler().fit(of_frames["train"])
            width = of_frames["train"].shape[1]
            parts = {s: np.nan_to_num(scaler.transform(x), nan=0.0) / width**0.5 for s, x in of_frames.items()}
        for split, part in parts.items():
            columns[split].append(part)
    train, test = (np.hstack(columns[split]) for split in ("train", "test"))
    model = LogisticRegression(C=1.0, max_iter=1000).fit(train, data["train"].targets())
    found = fit_baseline(data, specs(data, [",".join(names)])[0])
    assert [row.answer.value for row in found.rows["test"]] == model.predict(test).tolist()
    p_NC = np.array([row.answer.probabilities for row in found.rows["test"]])
    np.testing.assert_allclose(p_NC[:, model.classes_.astype(int)], model.predict_proba(test), atol=1e-3)


def test_by_default_there_is_every_modality_alone_and_all_joined(meld: Path, simsv2: Path) -> None:
    data = open_dataset(meld)
    names = [spec.name for spec in specs(data)]
    assert names == ["constant", "text", "audio", "video", "text+audio+video"]
    majority = np.bincount(data["train"].targets().astype(int)).argmax()
    truth_N = data["test"].targets()
    found = {spec.name: fit_baseline(data, spec).scores["test"]["meld"] for spec in specs(data)}
    assert found["constant"]["acc"] == pytest.approx(float((truth_N == majority).mean()))  # type: ignore[typeddict-item]
    assert found["text+audio+video"]["n"] == len(truth_N)
    assert [spec.name for spec in specs(data, ["text"], "characters", tune=True)] == ["text-characters-tuned"]
    tuned = fit_baseline(open_dataset(simsv2), specs(open_dataset(simsv2), ["audio"], tune=True)[0]).record
    scores = {float(value): score for value, score in tuned["tried"].items()}
    assert len(scores) == 7
    assert scores[tuned["value"] or 0.0] == max(score for score in scores.values() if score is not None)
    with pytest.raises(BaselineError, match="'voice' is none of text, audio, video"):
        specs(data, ["text,voice"])


def test_data_that_allow_no_baseline_are_refused(folder: Path) -> None:
    small = open_dataset(prepare_toy("meld", folder / "small", train=1))
    with pytest.raises(BaselineError, match=r"(?s)2 fault.*1 samples.*one class") as error:
        check_data(small, specs(small, ["text"]))
    assert "--modalities constant" in str(error.value)
    check_data(small, specs(small, ["constant"]))


def test_a_run_is_never_overwritten_and_a_baseline_only_by_force(meld: Path, tmp_path: Path) -> None:
    data = open_dataset(meld)
    text, constant = (fit_baseline(data, spec) for spec in specs(data, ["text", "constant"]))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("task: meld\n")
    with pytest.raises(BaselineError, match="holds a run"):
        write_baseline(text, data.fingerprint, tmp_path / "run", force=True)
    write_baseline(text, data.fingerprint, tmp_path / "b")
    write_baseline(text, data.fingerprint, tmp_path / "b")
    with pytest.raises(BaselineError, match="--force"):
        write_baseline(constant, data.fingerprint, tmp_path / "b")
    write_baseline(constant, data.fingerprint, tmp_path / "b", force=True)
    runs, notes, faults = runs_below(tmp_path / "b", ["test"])
    assert ([run.baseline for run in runs], notes, faults) == (["constant"], [], [])


def test_a_baseline_is_shown_as_one(meld: Path, tmp_path: Path) -> None:
    data = open_dataset(meld)
    write_baseline(fit_baseline(data, specs(data, ["text"])[0]), data.fingerprint, tmp_path / "runs" / "b")
    shown = egmf("show", str(tmp_path / "runs" / "b"))
    assert shown.returncode == 0, shown.stderr
    assert "LogisticRegression of text, no EGMF run" in shown.stdout
    assert "note" not in shown.stdout
    assert "0 of" not in shown.stdout
    lines = json.loads(egmf("runs", str(tmp_path / "runs"), "--json").stdout)["runs"]
    assert [(line["name"], line["baseline"], line["step"]) for line in lines] == [("b", True, None)]
    assert "baseline" in egmf("runs", str(tmp_path / "runs")).stdout


def test_the_command_imports_no_torch(meld: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['egmf', 'baseline', *sys.argv[1:]]\n"
        "from trainer.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meld").symlink_to(meld)  # which a task's name stands for
    command = [sys.executable, "-c", code, "meld", "--runs", str(tmp_path), "--json"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"constant", "text", "audio", "video", "text+audio+video"}
    assert (tmp_path / "baseline-meld-text" / "run.json").is_file()
