"""Baselines over folds against scikit-learn used directly on the samples of each fold, and the faults of what is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score, log_loss, mean_absolute_error
from sklearn.preprocessing import StandardScaler

from tests.distributed.processes import egmf
from tests.results.seeded import make_seeded
from trainer.baselines.baseline import (
    C_GRID,
    BaselineError,
    fit_baseline,
    specs,
    write_baseline,
)
from trainer.baselines.folds import check_folds, open_folds, over_folds
from trainer.data.dataset import open_dataset
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.prepare import prepare
from trainer.results.analysis import analyse
from trainer.results.baselines_beside import add_baselines
from trainer.results.compare.comparison import compare
from trainer.results.compare.sources.find import find_runs
from trainer.results.run_folder import read_run
from trainer.tasks import get_task

SESSIONS = ("Ses1", "Ses2", "Ses3", "Ses10")
LABELS = ("joy", "anger", "neutral")
COUNT = 120
WORD = r"\w+|[^\w\s]"


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """Samples by turns in four sessions; words and audio know a little of the label, and each session's audio has its own scale."""
    rng = np.random.default_rng(3)
    made = []
    for i in range(COUNT):
        kind, session = int(rng.integers(3)), i % 4
        words = [f"{LABELS[kind]}{rng.integers(3)}" if rng.random() < 0.6 else f"w{rng.integers(9)}" for _ in range(4)]
        audio_TF = rng.normal(size=(5, 3)) * (1 + 10 * session) + [kind, 0, 0]
        np.save(folder / f"{i}.npy", audio_TF.astype(np.float32))
        line = {"id": f"u{i:03d}", "text": " ".join(words), "fold": SESSIONS[session], "audio": f"{i}.npy"}
        answer = {"label": LABELS[kind]} if task == "meld" else {"target": kind - 1 + float(rng.integers(10)) / 10}
        made.append(line | answer)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("folds")
    for task in ("meld", "mosi"):
        source = made / f"{task}-source"
        source.mkdir()
        lines = "".join(json.dumps(line) + "\n" for line in samples(source, task))
        (source / "own.jsonl").write_text(lines)
        prepare(get_task(task), [source / "own.jsonl"], made / task)
    return made


def parts(view: Any) -> dict[str, dict[str, np.ndarray]]:
    """Fold tested -> split -> indices, written down without the package: the next session validates."""
    fold_N, out = view.folds(), {}
    for k, name in enumerate(SESSIONS):
        after = SESSIONS[(k + 1) % 4]
        out[name] = {
            "train": np.flatnonzero((fold_N != name) & (fold_N != after)),
            "valid": np.flatnonzero(fold_N == after),
            "test": np.flatnonzero(fold_N == name),
        }
    return out


def audio(view: Any) -> np.ndarray:
    rows = []
    for sample in view:
        values_TF = sample.audio_TF.astype(np.float64)
        rows.append(np.concatenate([values_TF.mean(0), values_TF.std(0), values_TF.max(0), [0.0]]))
    return np.array(rows)


def test_every_fold_is_what_scikit_learn_gives_on_its_training_samples_and_all_together_are_one_score(
    folder: Path,
) -> None:
    opened = open_dataset(folder / "meld")
    (spec,) = specs(opened, ["text"])
    found = over_folds({name: fit_baseline(data, spec) for name, data in open_folds(opened).items()})
    whole = opened["all"]
    texts, target_N = np.array(list(whole.texts())), whole.targets()
    truth, guess, p, scores = [], [], [], []
    for name, rows in parts(whole).items():
        tfidf = TfidfVectorizer(token_pattern=WORD, ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        model = LogisticRegression(C=1.0, max_iter=1000).fit(
            tfidf.fit_transform(texts[rows["train"]]), target_N[rows["train"]]
        )
        test_X = tfidf.transform(texts[rows["test"]])
        truth.append(target_N[rows["test"]])
        guess.append(model.predict(test_X))
        p.append(model.predict_proba(test_X))
        scores.append(f1_score(truth[-1], guess[-1], average="weighted"))
        assert found.folds[name]["test"]["wf1"] == pytest.approx(scores[-1])  # type: ignore[typeddict-item]
        valid = model.predict(tfidf.transform(texts[rows["valid"]]))
        assert found.folds[name]["valid"]["acc"] == pytest.approx(accuracy_score(target_N[rows["valid"]], valid))  # type: ignore[typeddict-item]
    assert list(found.folds) == list(SESSIONS)
    assert found.mean["test"]["wf1"] == pytest.approx(np.mean(scores))
    assert found.sd["test"]["wf1"] == pytest.approx(np.std(scores, ddof=1))
    together = f1_score(np.concatenate(truth), np.concatenate(guess), average="weighted")
    assert found.pooled["test"]["wf1"] == pytest.approx(together)  # type: ignore[typeddict-item]
    assert found.pooled["test"]["nll"] == pytest.approx(log_loss(np.concatenate(truth), np.concatenate(p)))
    assert (found.pooled["test"]["n"], found.pooled["valid"]["n"]) == (COUNT, COUNT)
    assert "n" not in found.mean["test"]


def test_numbers_are_pooled_and_have_no_probabilities(folder: Path) -> None:
    opened = open_dataset(folder / "mosi")
    (spec,) = specs(opened, ["audio"])
    found = over_folds({name: fit_baseline(data, spec) for name, data in open_folds(opened).items()})
    whole = opened["all"]
    target_N, audio_NF, guess_N = whole.targets(), audio(whole), np.empty(COUNT)
    for rows in parts(whole).values():
        scaler = StandardScaler().fit(audio_NF[rows["train"]])  # of this fold's training samples alone
        ridge = Ridge(alpha=1.0).fit(scaler.transform(audio_NF[rows["train"]]), target_N[rows["train"]])
        guess_N[rows["test"]] = ridge.predict(scaler.transform(audio_NF[rows["test"]]))
    guess_N = np.clip(guess_N, -3, 3)
    scores = found.pooled["test"]
    assert scores["mae"] == pytest.approx(mean_absolute_error(target_N, guess_N), rel=1e-5)  # type: ignore[typeddict-item]
    assert scores["corr"] == pytest.approx(np.corrcoef(target_N, guess_N)[0, 1], rel=1e-4)  # type: ignore[typeddict-item]
    assert "nll" not in scores


def test_c_is_chosen_by_the_validation_samples_of_the_fold(folder: Path) -> None:
    opened = open_dataset(folder / "meld")
    (spec,) = specs(opened, ["audio"], tune=True)
    whole = opened["all"]
    audio_NF, target_N = audio(whole), whole.targets()
    for name, data in open_folds(opened).items():
        rows, scores = parts(whole)[name], {}
        scaler = StandardScaler().fit(audio_NF[rows["train"]])
        train, valid = (scaler.transform(audio_NF[rows[split]]) for split in ("train", "valid"))
        for c in C_GRID:
            guess = LogisticRegression(C=c, max_iter=1000).fit(train, target_N[rows["train"]]).predict(valid)
            scores[c] = f1_score(target_N[rows["valid"]], guess, average="weighted")
        record = fit_baseline(data, spec).record
        assert record["tried"] == {f"{c:g}": pytest.approx(score) for c, score in scores.items()}
        assert record["value"] == max(scores, key=lambda c: scores[c])
        assert record["fold_valid"] == "next"


def test_validation_by_a_share_is_not_pooled(folder: Path) -> None:
    opened = open_dataset(folder / "meld")
    (spec,) = specs(opened, ["constant"])
    datasets = open_folds(opened, valid=0.3, seed=5)
    fitted = {name: fit_baseline(data, spec) for name, data in datasets.items()}
    assert {one.record["fold_valid"] for one in fitted.values()} == {0.3}
    assert {one.record["fold_seed"] for one in fitted.values()} == {5}
    assert list(over_folds(fitted).pooled) == ["test"]
    assert {one.fold["train"] for one in fitted.values() if one.fold} == {63}  # 90 - 27


def test_folds_that_allow_no_baseline_are_refused_together(tmp_path: Path) -> None:
    lines = [
        {"id": f"u{i}", "text": "a b", "label": "joy" if i % 3 else "anger", "fold": "xyz"[i % 3]} for i in range(12)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(get_task("meld"), [tmp_path / "own.jsonl"], tmp_path / "data")
    opened = open_dataset(tmp_path / "data")
    with pytest.raises(BaselineError, match=r"(?s)6 fault.*fold x: train has 4 .*fold y: train has 4 .*fold z: train"):
        check_folds(open_folds(opened), specs(opened, ["text"]))
    with pytest.raises(BaselineError, match=r"no fold 'w': the folds are x, y, z"):
        open_folds(opened, "w")
    kept = [line for line in lines if line["fold"] != "z"]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    prepare(get_task("meld"), [tmp_path / "two.jsonl"], tmp_path / "two")
    with pytest.raises(DataError, match=r"--fold-valid 0\.1"):
        open_folds(open_dataset(tmp_path / "two"))


def test_the_command_fits_all_folds_or_one(folder: Path, tmp_path: Path) -> None:
    base = ["baseline", str(folder / "meld"), "--runs", str(tmp_path), "--modalities", "text"]
    done = egmf(*base, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["text"]
    assert set(found) == {"folds", "mean", "sd", "pooled"}
    assert {path.name for path in tmp_path.iterdir()} == {f"baseline-meld-text-fold={name}" for name in SESSIONS}
    one = egmf(*base, "--fold", "Ses10", "--json")
    assert json.loads(one.stdout)["text"] == found["folds"]["Ses10"]
    record = json.loads((tmp_path / "baseline-meld-text-fold=Ses10" / "run.json").read_text())
    assert record["fold"] == {"name": "Ses10", "names": list(SESSIONS), "train": 60, "test": 30}
    shown = egmf(*base)
    assert "folds together" in shown.stdout
    assert "fold Ses10" in shown.stdout
    other = egmf(*base, "--fold", "Ses2", "--out", str(tmp_path / "baseline-meld-text-fold=Ses10"))
    assert other.returncode == 1
    assert "holds the baseline text of fold Ses10: --force replaces it" in other.stderr


def test_what_is_asked_wrongly_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    done = egmf(
        "baseline", str(folder / "meld"), "--fold", "9", "--fold-valid", "2", "--modalities", "text", "--modalities", "voice",
        "--out", str(tmp_path / "b"),
    )  # fmt: skip
    assert done.returncode == 1
    for words in ("there is no fold '9'", "--fold-valid is next, or a share", "'voice' is none of"):
        assert words in done.stderr
    done = egmf("baseline", str(folder / "meld"), "--modalities", "text", "--out", str(tmp_path / "b"))
    assert "and there are 4: name one with --modalities and --fold" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_a_fold_has_the_baselines_of_its_fold_beside_it(folder: Path, tmp_path: Path) -> None:
    opened = open_dataset(folder / "meld")
    fitted = {name: fit_baseline(data, specs(opened, ["text"])[0]) for name, data in open_folds(opened).items()}
    for name, one in fitted.items():
        write_baseline(one, opened.fingerprint, tmp_path / f"b-{name}")
    record = {"name": "Ses2", "names": list(SESSIONS), "train": 60, "test": 30}
    make_seeded(tmp_path / "run", 1, fingerprint=opened.fingerprint, fold=record)
    run = read_run(tmp_path / "run")
    results = analyse(run)
    add_baselines(run, results)
    assert [one.folder for one in results[0].baselines] == ["b-Ses2"]


def test_the_comparison_of_baselines_alone_pools_folds_as_the_command_does(folder: Path, tmp_path: Path) -> None:
    opened = open_dataset(folder / "meld")
    found = {}
    for spec in specs(opened, ["text", "constant"]):
        fitted = {name: fit_baseline(data, spec) for name, data in open_folds(opened).items()}
        for name, one in fitted.items():
            write_baseline(one, opened.fingerprint, tmp_path / f"{spec.name}-{name}")
        found[spec.name] = over_folds(fitted)
    compared = compare(find_runs([str(tmp_path)], ["test"]).runs, resamples=100)
    assert [group.name for group in compared.groups] == ["baseline constant", "baseline text"]
    for name, scores in found.items():
        score = compared.score("meld", f"baseline {name}", "wf1")
        assert score.mean == pytest.approx(scores.pooled["test"]["wf1"])  # type: ignore[typeddict-item]
        assert score.folds is not None
        assert score.folds.values == [pytest.approx(one["test"]["wf1"]) for one in scores.folds.values()]  # type: ignore[typeddict-item]
        assert (score.folds.mean, score.folds.sd) == (
            pytest.approx(scores.mean["test"]["wf1"]),
            pytest.approx(scores.sd["test"]["wf1"]),
        )
