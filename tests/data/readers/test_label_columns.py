"""Which column holds the labels, MMSA's annotations, and the languages of a task and of its samples."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.processes import egmf
from trainer.data.dataset import open_dataset
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.prepare import prepare
from trainer.data.readers.raw import ReaderError
from trainer.tasks import BUILT_IN, TaskError, define_task

SPLITS = ("train", "valid", "test")
SIGNS = {"name": "signs", "kind": "classification", "labels": ["negative", "neutral", "positive"]}


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def meld_files(folder: Path) -> list[Path]:
    """As published: every row with an emotion and a sentiment, "neutral" in both at times."""
    header = ["Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID"]
    signs = {"neutral": "neutral", "joy": "positive", "anger": "negative"}
    folder.mkdir(exist_ok=True)
    return [
        write_csv(
            folder / f"{split}_sent_emo.csv",
            header,
            [
                [i, f"words {i}", "Ross", emotion, sign, i // 3, i % 3]
                for i, (emotion, sign) in enumerate(signs.items())
            ],
        )
        for split in SPLITS
    ]


def labels(folder: Path, split: str = "train") -> list[str]:
    view = open_dataset(folder)
    return [view.task.labels[int(target)] for target in view[split].targets()]


def test_meld_s_sentiment_is_read_by_name(tmp_path: Path) -> None:
    task = define_task(SIGNS | {"label_column": "Sentiment"})
    prepare(task, meld_files(tmp_path / "meld"), tmp_path / "out")
    assert labels(tmp_path / "out") == ["neutral", "positive", "negative"]
    assert open_dataset(tmp_path / "out").task == task
    with pytest.raises(DataError, match="unknown label"):
        prepare(define_task(SIGNS), meld_files(tmp_path / "meld"), tmp_path / "out2")
    wrong = define_task(SIGNS | {"label_column": "Sentimnt"})
    with pytest.raises(
        ReaderError, match=r"its header needs .*Sentimnt; it has Sr No\., Utterance, Speaker, Emotion, Sentiment"
    ):
        prepare(wrong, meld_files(tmp_path / "meld"), tmp_path / "out3")


def test_the_command_names_the_column_too(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(json.dumps(SIGNS))
    files = [str(path) for path in meld_files(tmp_path / "meld")]
    done = egmf(
        "prepare", "signs", "--task", str(tmp_path / "task.yaml"), "--source", *files, "--label-column", "Sentiment",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert labels(tmp_path / "out", "test") == ["neutral", "positive", "negative"]


def test_pickles_and_own_samples_have_a_column_of_labels_too(tmp_path: Path) -> None:
    task = define_task({"name": "t", "kind": "regression", "grid": {"low": -1, "high": 1}, "label_column": "label_T"})
    columns = {
        "raw_text": np.array(["a", "b"]), "label_T": np.array([0.5, -0.5]), "regression_labels": np.array([1.0, 1.0]),
    }  # fmt: skip
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(dict.fromkeys(SPLITS, columns), 4))
    prepare(task, [tmp_path / "x.pkl"], tmp_path / "out")
    np.testing.assert_array_equal(open_dataset(tmp_path / "out")["train"].targets(), [0.5, -0.5])
    lines = [{"text": "a", "label": 1, "label_T": 0.25, "split": split} for split in SPLITS]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert prepare(task, [tmp_path / "own.jsonl"], tmp_path / "out2").record["source"]["notes"] == []
    np.testing.assert_array_equal(open_dataset(tmp_path / "out2")["test"].targets(), [0.25])


def test_a_task_without_a_column_is_written_as_before() -> None:
    assert all("label_column" not in task.model_dump(mode="json") for task in BUILT_IN.values())
    task = define_task(SIGNS | {"label_column": "Sentiment"})
    assert define_task(task.model_dump(mode="json")) == task


def mmsa(folder: Path, **changes: str) -> Path:
    header = ["video_id", "clip_id", "text", "label", "label_T", "label_A", "label_V", "annotation", "mode"]
    rows = [
        ["video_0001", f"{i + 1:04d}", f"话 {i}", 0.2 * i, 0.4, 0, 0, ["Neutral", "Positive"][min(i, 1)], mode]
        for i, mode in enumerate(["train", "train", "valid", "test"])
    ]
    return write_csv(folder / "label.csv", [changes.get(name, name) for name in header], rows)


def test_mmsa_annotations_keep_their_ids(tmp_path: Path) -> None:
    prepare(BUILT_IN["simsv2"], [mmsa(tmp_path)], tmp_path / "out")
    opened = open_dataset(tmp_path / "out")
    assert [opened[split].ids for split in SPLITS] == [
        ["video_0001$_$0001", "video_0001$_$0002"], ["video_0001$_$0003"], ["video_0001$_$0004"],
    ]  # fmt: skip
    np.testing.assert_allclose(opened["train"].targets(), [0.0, 0.2])
    assert [s.text for s in opened["test"]] == ["话 3"]
    text = define_task({**BUILT_IN["simsv2"].model_dump(mode="json"), "label_column": "label_T"})
    prepare(text, [mmsa(tmp_path)], tmp_path / "out2")
    np.testing.assert_allclose(open_dataset(tmp_path / "out2")["train"].targets(), [0.4, 0.4])
    words = define_task({"name": "w", "kind": "classification", "labels": ["Negative", "Neutral", "Positive"]})
    prepare(words, [mmsa(tmp_path)], tmp_path / "out3")
    assert labels(tmp_path / "out3") == ["Neutral", "Positive"]


def test_mmsa_annotations_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ReaderError, match=r"has no column mode; it has video_id, .*, fold"):
        prepare(BUILT_IN["simsv2"], [mmsa(tmp_path, mode="fold")], tmp_path / "out")
    path = mmsa(tmp_path)
    path.write_text(path.read_text() + "v,0001,text,0.1\nv,0002,text,0.1,0,0,0,Neutral,training\n")
    with pytest.raises(ReaderError) as caught:
        prepare(BUILT_IN["simsv2"], [path], tmp_path / "out")
    assert "line 6: has another number of fields than the header (9)" in str(caught.value)
    assert "line 7: mode 'training' is none of train, valid, test" in str(caught.value)


GERMAN = {"instruction": "Nenne das Gefühl: {answers}.", "cue": "Gefühl:"}
DE = {"name": "de", "kind": "classification", "labels": ["Wut", "Freude"], "language": "de"}


def test_a_language_needs_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no prompt in the task's language 'de': write one, prompts: \{de: "):
        define_task(DE)
    task = define_task(DE | {"prompts": {"de": GERMAN}})
    assert task.instruction() == "Nenne das Gefühl: Wut, Freude."
    assert task.answer_texts() == (" Wut", " Freude")
    lines = [
        {"text": "Das ist gut", "label": "Freude", "language": language, "split": split}
        for split in SPLITS
        for language in ("de", "fr" if split == "test" else None)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(
        DataError, match=r"language without a prompt in the task: 1 \(test 1\), refused: 'fr'; the task has de"
    ):
        prepare(task, [tmp_path / "own.jsonl"], tmp_path / "out")
    prepare(task, [tmp_path / "own.jsonl"], tmp_path / "out", drop_bad="all")
    assert open_dataset(tmp_path / "out").task.language == "de"
