"""Runs of several questions about the same samples: trained together on one dataset, evaluated, predicted, compared.

The reference of a question that is trained alone on such a dataset is the run on a dataset that has it alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from launch.plan.lengths import run_lengths
from tests.data.test_questions import AROUSAL, EMOTION, VALENCE, corpus, write_lines
from tests.distributed.processes import egmf
from trainer import Predictor
from trainer.config import load_config
from trainer.data.dataset import open_dataset
from trainer.data.preparation.prepare import prepare
from trainer.questions import define
from trainer.results.compare.sources.from_folders import run_from_folder
from trainer.results.run_folder import read_run
from trainer.run.assemble import open_data
from trainer.serving.prediction import Prediction, Prepared
from trainer.tracking.journal import JOURNAL, read_journal

SMALL = (
    "model.backbone.tiny.vocab_size=400", "model.fusion.width=32", "train.global_batch=8", "train.steps=6", "train.eval_every=3",
    "train.log_every=1", "train.probe=false", "train.zero=0", "track.mlflow=false", "track.system_metrics=false",
)  # fmt: skip
QUESTIONS = (VALENCE, AROUSAL, EMOTION)


def train(folder: Path, task: str, data: str, out: str, *overrides: str) -> Path:
    where = (f"task={folder}/{task}.yaml", f"data.path={folder}/{data}", *SMALL, *overrides)
    done = egmf("train", "configs/tiny.yaml", *where, "--out", str(folder / out))
    assert done.returncode == 0, done.stderr
    return folder / out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of three questions, prepared once; the YAML files of all together and of each alone."""
    folder = tmp_path_factory.mktemp("joint")
    raw = {"name": "corpus", "questions": list(QUESTIONS)}
    for name, one in {"corpus": raw, **{str(question["name"]): question for question in QUESTIONS}}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(one))
    prepare(define(raw), [corpus(folder)], folder / "data/corpus")
    return folder


@pytest.fixture(scope="module")
def joint(folder: Path) -> Path:
    """The questions trained together, on the dataset that ``{task}`` names."""
    return train(folder, "corpus", "data/{task}", "joint", "eval.select.emotion=uar")


def losses(run: Path) -> list[tuple[int, float]]:
    return read_journal(run / JOURNAL)["train/loss"]


def test_each_question_is_a_task_of_the_run_with_the_samples_that_answer_it(folder: Path, joint: Path) -> None:
    record = json.loads((joint / "run.json").read_text())
    fingerprint = open_dataset(folder / "data/corpus").fingerprint
    assert record["data"] == dict.fromkeys(("valence", "arousal", "emotion"), fingerprint)
    assert record["select"]["emotion"] == "uar"
    table = pd.read_parquet(joint / "predictions/test.parquet")
    metrics = json.loads((joint / "metrics.json").read_text())
    for name in record["tasks"]:
        view = open_dataset(folder / "data/corpus", question=name)["test"]
        assert sorted(view.ids) == list(table[table["task"] == name]["id"])
        assert metrics["test"][name]["n"] == len(view)
    assert (joint / "report.html").is_file()


def test_the_questions_share_encoders(folder: Path, joint: Path) -> None:
    names = [name for path in (joint / "checkpoints").glob("*/model.safetensors") for name in load_file(path)]
    encoders = {name.split("encoders.")[1].split(".")[0] for name in names if "encoders." in name}
    assert encoders == {"text", "corpus"}
    config = load_config(joint / "config.yaml")
    assert run_lengths(config, 1).shared == dict.fromkeys(("valence", "arousal", "emotion"), "corpus")


def test_all_questions_of_a_sample_are_predicted_as_they_are_evaluated(
    folder: Path, joint: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    lines = [line | {"audio": f"{folder}/{line['audio']}"} for line in lines if line["split"] == "test"]
    found = predicted(joint, write_lines(tmp_path / "new.jsonl", lines), tmp_path / "all.jsonl")
    assert [(row["id"], row["task"]) for row in found] == [
        (line["id"], name) for line in lines for name in ("valence", "arousal", "emotion")
    ]
    evaluated = pd.read_parquet(joint / "predictions/test.parquet").set_index(["task", "id"])["prediction"]
    by_place = {(row["task"], row["id"]): row["prediction"] for row in found}
    for place, prediction in evaluated.items():
        if place[0] == "emotion":
            assert by_place[place] == prediction
        else:
            assert by_place[place] == pytest.approx(float(prediction), abs=1e-5)
    some = [lines[0] | {"task": "emotion"}, lines[0] | {"task": "arousal"}, lines[1] | {"task": "corpus"}]
    chosen = predicted(joint, write_lines(tmp_path / "some.jsonl", some), tmp_path / "some-out.jsonl")
    assert [row["task"] for row in chosen] == ["emotion", "arousal", "valence", "arousal", "emotion"]
    for row in chosen:
        if row["task"] == "emotion":
            assert row["prediction"] == by_place["emotion", row["id"]]
    wrong = egmf("predict", str(joint), "--input", str(tmp_path / "some.jsonl"), "--out", "-", "--task", "mood")
    assert "--task mood is none of the run's tasks: valence, arousal, emotion, corpus" in wrong.stderr


def test_a_predictor_asks_all_questions(folder: Path, joint: Path) -> None:
    lines = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    lines = [line | {"audio": folder / line["audio"]} for line in lines if line["split"] == "test"]
    predictor = Predictor.load(joint)
    found = predictor.predict(lines, pseudo_tokens=True)
    names = ["valence", "arousal", "emotion"]
    assert [(one.id, one.task) for one in found] == [(line["id"], name) for line in lines for name in names]
    evaluated = pd.read_parquet(joint / "predictions/test.parquet").set_index(["task", "id"])
    for one in found:
        if (one.task, one.id) in evaluated.index:
            assert list((one.probabilities or {}).values()) == pytest.approx(
                evaluated.loc[(one.task, one.id), "probabilities"].tolist(), abs=1e-5
            )
    streamed = [one.plain() for one in predictor.stream(lines, pseudo_tokens=True) if isinstance(one, Prediction)]
    assert streamed == [one.plain() for one in found]
    (prepared,) = predictor.prepare(lines[:1])
    alone = [predictor.prepare(lines[:1], task=name)[0] for name in names]
    assert isinstance(prepared, Prepared)
    assert prepared.tasks == ("valence", "arousal", "emotion")
    assert prepared.cost == sum(one.cost for one in alone if isinstance(one, Prepared))
    with pytest.raises(ValueError, match="valence, arousal, emotion are asked of the sample test0: name one of them"):
        predictor.prompt_embeds(lines[0])
    assert list(predictor.prompt_embeds(lines[0], task="emotion").answers) == ["joy", "anger", "sad"]


def predicted(run: Path, source: Path, out: Path) -> list[Any]:
    done = egmf("predict", str(run), "--input", str(source), "--out", str(out))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_one_question_of_the_dataset_is_the_run_on_a_dataset_that_has_it_alone(folder: Path, joint: Path) -> None:
    """Bit for bit, with samples that do not answer in the one dataset; features as they are, since all samples' are measured."""
    own = []
    for line in map(json.loads, (folder / "corpus.jsonl").read_text().splitlines()):
        target = line.pop("target")["arousal"]
        line.pop("emotion", None)
        own += [] if target is None else [line | {"target": target}]
    prepare(define(AROUSAL), [write_lines(folder / "alone.jsonl", own)], folder / "data/plain")
    raw = ("model.fusion.standardise=false", "data.answers=words")
    one = train(folder, "arousal", "data/corpus", "one", *raw)
    plain = train(folder, "arousal", "data/plain", "plain", *raw)
    assert losses(one) == losses(plain)
    assert len(losses(one)) == 6
    pd.testing.assert_frame_equal(*(pd.read_parquet(run / "predictions/test.parquet") for run in (one, plain)))
    done = egmf("compare", str(joint), str(one), "--task", "arousal", "--json")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["tasks"]) == ["arousal"]


def test_a_run_is_read_where_its_yaml_is_gone(folder: Path, joint: Path) -> None:
    (folder / "corpus.yaml").rename(folder / "corpus.gone")
    try:
        run = read_run(joint)
        assert list(run.tasks) == ["valence", "arousal", "emotion"]
        assert run.steps == 6
        assert not [note for note in run.notes if "task" in note]
        assert list(run_from_folder(joint, ["test"]).tasks) == ["valence", "arousal", "emotion"]
    finally:
        (folder / "corpus.gone").rename(folder / "corpus.yaml")


def test_baselines_of_each_question(folder: Path, joint: Path) -> None:
    done = egmf("baseline", f"{folder}/data/corpus", "--runs", str(folder), "--modalities", "constant", "--json")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["valence", "arousal", "emotion"]
    assert json.loads(done.stdout)["arousal"]["constant"]["test"]["n"] == 5
    assert list(read_run(folder / "baseline-arousal-constant").tasks) == ["arousal"]
    beside = run_from_folder(folder / "baseline-emotion-constant", ["test"])
    assert beside.tasks["emotion"].labels == ("joy", "anger", "sad")


def test_data_that_do_not_fit_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    def fault(task: Any, data: str) -> str:
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
        config = load_config("configs/tiny.yaml", [f"task={tmp_path}/task.yaml", f"data.path={folder}/data/{data}"])
        with pytest.raises(ValueError, match=r"was prepared for|one folder") as caught:
            open_data(config)
        return str(caught.value)

    mood = {"name": "mood", "kind": "classification", "labels": ["good", "bad"]}
    found = fault({"name": "corpus", "questions": [VALENCE | {"grid": {"low": 0, "high": 5}}, mood]}, "corpus")
    assert "was prepared for another task: its grid is" in found
    assert "was prepared for the questions valence, arousal, emotion; mood of" in found
    prepare(define(AROUSAL), [single(tmp_path)], folder / "data/single")
    found = fault({"name": "corpus", "questions": [VALENCE, AROUSAL]}, "single")
    assert "is one folder for 2 tasks: write {task} in it" in found


def single(folder: Path) -> Path:
    lines = [{"text": "a", "target": 2, "split": split} for split in ("train", "valid", "test")]
    return write_lines(folder / "single.jsonl", lines)
