"""Several labels of a sample, and shares of annotators, as people write them: read, stored, counted, and refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.dataset import open_dataset
from trainer.data.folds import FoldChoice
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.prepare import prepare
from trainer.label_sets import MOST_LABELS, decode_sets, encode_set, encode_sets, parse_set, set_text
from trainer.tasks import Task, TaskError, define_task

LABELS = ["joy", "anger", "sad"]
SETS = define_task({"name": "sets", "kind": "multilabel", "labels": LABELS})
SHARES = define_task({"name": "shares", "kind": "classification", "labels": LABELS})


def prepared(
    task: Task, folder: Path, labels: list[Any], *, splits: tuple[str, ...] = ("train", "valid", "test"), **changes: Any
):
    lines = [
        json.dumps({"id": f"{split}{i}", "text": "so", "split": split, "label": label})
        for split in splits
        for i, label in enumerate(labels)
    ]
    (folder / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare(task, [folder / "own.jsonl"], folder / "data", **changes)
    return open_dataset(folder / "data")


def test_sets_are_read_in_every_form_and_counted(tmp_path: Path) -> None:
    forms = [
        ["sad", "joy"],
        "joy, sad",
        "joy|sad",
        {"joy": 1, "anger": 0, "sad": True},
        [1, 0, 1],
        [],
        "none",
        {"joy": 0},
        "Anger",
        ["joy", "joy"],
    ]
    data = prepared(SETS, tmp_path, forms)
    words = [set_text(LABELS, sample.target) for sample in data["train"]]
    assert words == ["joy, sad"] * 5 + ["none"] * 3 + ["anger", "joy"]
    entry = data.record["splits"]["train"]
    assert entry["labels"] == {"joy": 6, "anger": 1, "sad": 5}
    assert entry["without_label"] == 3
    assert data["test"].shares() == [None] * len(forms)
    assert [fault["kind"] for fault in data.record["faults"]] == ["label in another case"]


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (["joy", "jou"], "unknown label.*'jou' \\(did you mean joy\\?\\)"),
        ("joy, jou", "unknown label"),
        ({"joy": 0.4}, "label that neither applies nor does not.*'?0.4"),
        ({"joy": "1"}, "label that neither applies nor does not"),
        ([1, 0], "wrong number of labels.*2 numbers for 3 labels"),
        (None, "no label.*an empty set of labels is written"),
        ("", "no label"),
        ([["joy"]], "unknown label"),
        (3, "unknown label"),
    ],
)
def test_sets_that_cannot_be_told_are_refused(tmp_path: Path, label: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        prepared(SETS, tmp_path, [["joy"], label])
    assert not (tmp_path / "data").exists()


def test_shares_are_normalised_and_the_label_is_that_of_most(tmp_path: Path) -> None:
    given = [{"joy": 2, "anger": 1}, {"sad": 0.2, "anger": 0.8}, [1, 1, 0], "sad", {"sad": 3}, {"anger": 1, "joy": 1}]
    data = prepared(SHARES, tmp_path, given)
    expected = [[2 / 3, 1 / 3, 0], [0, 0.8, 0.2], [0.5, 0.5, 0], None, None, [0.5, 0.5, 0]]
    for sample, share_C in zip(data["valid"], expected, strict=True):
        assert (sample.share_C is None) == (share_C is None)
        if share_C is not None:
            assert sample.share_C == pytest.approx(np.array(share_C), abs=1e-7)
    assert [LABELS[int(sample.target)] for sample in data["valid"]] == ["joy", "anger", "joy", "sad", "sad", "joy"]
    assert data["valid"].shared
    assert data.record["splits"]["valid"]["shared"] == 4
    assert data.record["splits"]["valid"]["labels"] == {"joy": 3, "anger": 1, "sad": 2}


def test_shares_belong_to_the_fingerprint_and_one_label_alone_does_not_change_it(tmp_path: Path) -> None:
    def fingerprint(name: str, *labels: Any) -> str:
        (tmp_path / name).mkdir()
        return prepared(SHARES, tmp_path / name, list(labels)).fingerprint

    plain = fingerprint("plain", "joy", "sad")
    assert fingerprint("whole", {"joy": 1}, {"sad": 4}) == plain
    assert (
        len({plain, fingerprint("most", {"joy": 2, "sad": 1}, "sad"), fingerprint("more", {"joy": 3, "sad": 1}, "sad")})
        == 3
    )


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (["joy", "joy", "anger"], "several labels.*\\{label: share\\}.*kind: multilabel"),
        ({"joy": -1, "sad": 2}, "share of a label that is no share"),
        ({"joy": "many"}, "share of a label that is no share.*'many'"),
        ({"joy": 0}, "no label.*all shares are 0"),
        ({"glee": 1}, "unknown label.*'glee'"),
        ([0.5, 0.5], "wrong number of labels.*2 shares for 3 labels"),
        ({}, "no label"),
        ([], "no label|several labels|wrong number"),
    ],
)
def test_shares_that_cannot_be_told_are_refused(tmp_path: Path, label: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        prepared(SHARES, tmp_path, ["joy", label])


def test_several_targets_are_told_where_they_belong(tmp_path: Path) -> None:
    task = define_task({"name": "valence", "kind": "regression", "grid": {"low": 1, "high": 5}})
    with pytest.raises(
        DataError, match=r"label that is no number.*several targets of one sample are questions of one task file"
    ):
        prepared(task, tmp_path, [2.0, {"valence": 1.0, "arousal": 2.0}])


def test_arrays_of_a_pickle_are_sets_and_shares(tmp_path: Path) -> None:
    member_NC = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    share_NC = np.array([[0.5, 0.5, 0], [0, 0, 1], [0.2, 0.3, 0.5]], dtype=np.float32)
    for task, labels in ((SETS, member_NC), (SHARES, share_NC)):
        split = {"raw_text": ["a", "b", "c"], "labels": labels, "id": ["1", "2", "3"]}
        content = {name: {**split, "id": [f"{name}{i}" for i in split["id"]]} for name in ("train", "valid", "test")}
        (tmp_path / f"{task.name}.pkl").write_bytes(pickle.dumps(content))
        prepare(task, [tmp_path / f"{task.name}.pkl"], tmp_path / task.name)
    sets = open_dataset(tmp_path / "sets")["train"]
    assert np.array_equal(decode_sets(sets.targets(), 3), member_NC == 1)
    shares = open_dataset(tmp_path / "shares")["train"]
    assert [None if s is None else pytest.approx(s, abs=1e-6) for s in shares.shares()] == [
        [0.5, 0.5, 0],
        None,
        [0.2, 0.3, 0.5],
    ]


def test_folds_keep_shares(tmp_path: Path) -> None:
    lines = [
        {"id": str(i), "text": "so", "fold": f"f{i % 3}", "label": {"joy": 1, "sad": 3} if i % 3 == 2 else "joy"}
        for i in range(9)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare(SHARES, [tmp_path / "own.jsonl"], tmp_path / "data")
    data = open_dataset(tmp_path / "data", choice=FoldChoice("f2", 0.2, 0))
    assert (data["train"].shared, data["test"].shared) == (False, True)
    assert data["test"].shares() == [pytest.approx([0.25, 0.0, 0.75])] * 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": ["joy", "sad, lonely"]}, "may not hold a comma.*'sad, lonely'"),
        ({"labels": ["joy", "none"]}, "'none' stands for samples without any label"),
        ({"labels": [f"l{i}" for i in range(MOST_LABELS + 1)]}, "at most 52 labels, not 53"),
        ({"labels": ["joy"]}, "at least two different labels"),
        ({"grid": {"low": 0, "high": 1}}, "no grid"),
        ({"family": "emotion"}, "family 'multilabel'"),
        ({"select": "acc"}, "none of the metrics"),
    ],
)
def test_definitions_that_cannot_be_used_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(TaskError, match=says):
        define_task({"name": "mine", "kind": "multilabel", "labels": LABELS, **changes})


def test_a_set_is_its_number_and_its_text() -> None:
    rng = np.random.default_rng(0)
    member_NC = rng.random((50, MOST_LABELS)) < 0.3
    labels = [f"label {i}" for i in range(MOST_LABELS)]
    value_N = encode_sets(member_NC)
    assert np.array_equal(decode_sets(value_N, MOST_LABELS), member_NC)
    for value, row in zip(value_N.tolist(), member_NC, strict=True):
        assert value == encode_set(np.flatnonzero(row).tolist())
        assert parse_set(labels, set_text(labels, value)) == value
    assert parse_set(labels, "label 3; label 1") == 10
    assert [parse_set(labels, text) for text in ("", " ", "label 99", "none, label 1")] == [None] * 4


def test_answers_are_yes_and_no_of_every_label_in_the_prompts_language() -> None:
    assert SETS.answers()[:3] == ("joy: yes", "joy: no", "anger: yes")
    assert SETS.answers("indices")[4:] == ("2: yes", "2: no")
    assert SETS.answer_texts("words", "en")[0] == " joy: yes"
    assert SETS.answer_texts("words", "zh")[:2] == ("joy：是", "joy：否")
    assert (
        SETS.instruction()
        == "Say of each emotion whether the speaker shows it in words, voice or face: joy, anger, sad."
    )
    assert SETS.select == "macro_f1"
