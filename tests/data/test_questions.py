"""Datasets with several questions: answers of every reader, checks, columns, views of one question, folds and histories."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk

from trainer.data.dataset import PreparedDataset, open_dataset
from trainer.data.folds import FoldChoice
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.prepare import prepare
from trainer.data.preparation.summary import summary_json
from trainer.data.readers.raw import RawSample, ReaderError
from trainer.data.readers.source import open_source
from trainer.questions import Questions, define

GRID = {"low": 1, "high": 5}
VALENCE = {"name": "valence", "kind": "regression", "grid": GRID}
AROUSAL = {"name": "arousal", "kind": "regression", "grid": GRID}
EMOTION = {"name": "emotion", "kind": "classification", "labels": ["joy", "anger", "sad"]}
TOPICS = {"name": "topics", "kind": "multilabel", "labels": ["work", "home"]}
SPLITS = ("train", "valid", "test")


def asked(*questions: Any) -> Questions:
    found = define({"name": "corpus", "questions": list(questions)})
    assert isinstance(found, Questions)
    return found


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def answers(source: Path, *questions: Any, split: str = "train") -> list[Any]:
    return [sample.answers for sample in open_source(asked(*questions), [source]).samples(split)]


def corpus(folder: Path, **more: Any) -> Path:
    """Samples of three questions: every third has no arousal, every fourth no emotion; those of a dialogue of four in turn."""
    rng, lines = np.random.default_rng(0), []
    for split, n in (("train", 24), ("valid", 9), ("test", 8)):
        for i in range(n):
            np.save(folder / f"{split}{i}.npy", rng.normal(i, 1, (2 + i % 3, 4)).astype("f4"))
            target = {"valence": 1.0 + i % 5, "arousal": 2.5 if i % 3 else None}
            line = {
                "id": f"{split}{i}",
                "text": f"words {i}",
                "split": split,
                "audio": f"{split}{i}.npy",
                "target": target,
            }
            line |= {"dialogue": f"d{i // 4}", "turn": i % 4, "session": f"s{i % 4}"}
            lines.append(line | ({"emotion": ("joy", "anger", "sad")[i % 3]} if i % 4 else {}))
    return write_lines(folder / "corpus.jsonl", lines)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    prepare(asked(VALENCE, AROUSAL, EMOTION), [corpus(folder)], folder / "data")
    return folder / "data"


# ── readers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_own_samples_answer_in_an_object_or_under_the_names(tmp_path: Path) -> None:
    lines = [
        {"target": {"valence": 1.5}, "arousal": 2},
        {"label": {"emotion": "joy", "valence": 2}, "labels": {"topics": ["work"]}, "emo": "sad"},
        {"labels": {"emotion": {"joy": 1, "sad": 1}, "arousl": 3}, "valence": None, "label": "joy"},
    ]
    path = write_lines(tmp_path / "train.jsonl", lines)
    source = open_source(asked(VALENCE, AROUSAL, EMOTION, TOPICS), [path])
    assert [sample.answers for sample in source.samples("train")] == [
        {"valence": 1.5, "arousal": 2, "emotion": None, "topics": None},
        {"valence": 2, "arousal": None, "emotion": "joy", "topics": ["work"]},
        {"valence": None, "arousal": None, "emotion": {"joy": 1, "sad": 1}, "topics": None},
    ]
    assert [sample.label for sample in source.samples("train")] == [None] * 3
    (note,) = source.notes
    for unused in ("'emo' of 1", "'labels.arousl' of 1 line(s) (did you mean labels.arousal?)", "'label' of 1"):
        assert unused in note
    assert [one["emotion"] for one in answers(path, VALENCE, EMOTION | {"label_column": "emo"})] == [None, "sad", None]


def test_the_label_of_a_built_in_question_is_the_formats_own(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", [{"label": "joy", "valence": 3}])
    assert answers(path, "meld", VALENCE) == [{"meld": "joy", "valence": 3}]


def test_columns_of_annotations(tmp_path: Path) -> None:
    head = "Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID"
    (tmp_path / "train_sent_emo.csv").write_text(f"{head}\nHi,Ann,joy,positive,0,0\nNo,Bob,,negative,0,1\n")
    sentiment = {"name": "sentiment", "kind": "classification", "labels": ["negative", "positive"]}
    path = tmp_path / "train_sent_emo.csv"
    found = answers(path, "meld", sentiment)
    assert found == [{"meld": "joy", "sentiment": "positive"}, {"meld": "", "sentiment": "negative"}]
    wrong = [EMOTION | {"label_column": "Emotions"}, VALENCE]
    with pytest.raises(
        ReaderError, match=r"no column Emotions \(the question emotion\), valence \(the question valence\)"
    ):
        open_source(asked(*wrong), [path])
    rows = "video_id,clip_id,text,label,label_T,mode\nv,1,Hi,0.4,-0.2,train\n"
    (tmp_path / "label.csv").write_text(rows)
    tone = {"name": "tone", "kind": "regression", "grid": {"low": -1, "high": 1}, "label_column": "label_T"}
    assert answers(tmp_path / "label.csv", "simsv2", tone) == [{"simsv2": "0.4", "tone": "-0.2"}]


def test_columns_and_rows_of_pickles(tmp_path: Path) -> None:
    features = {"text": ["a", "b"], "regression_labels": np.array([0.4, -1]), "tone": np.array([np.nan, 1.0])}
    path = tmp_path / "all.pkl"
    path.write_bytes(pickle.dumps(dict.fromkeys(SPLITS, features)))
    tone = {"name": "tone", "kind": "regression", "grid": {"low": -1, "high": 1}}
    found = answers(path, "simsv2", tone)
    assert [one["simsv2"] for one in found] == [0.4, -1]
    assert [one["tone"] for one in found][1] == 1.0
    rows = [{"features": {"text": "a"}, "emotion": "joy", "val": 3}, {"features": {"text": "b"}, "val": 4}]
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(rows))
    by_row = answers(tmp_path / "train.pkl", EMOTION, VALENCE | {"label_column": "val"})
    assert by_row == [{"emotion": "joy", "valence": 3}, {"emotion": None, "valence": 4}]
    with pytest.raises(ReaderError, match=r"train.pkl: no row has valence \(the question valence\); they have"):
        open_source(asked(EMOTION, VALENCE), [tmp_path / "train.pkl"])
    with pytest.raises(ReaderError, match=r"all.pkl: valid has no arousal \(the question arousal\); it has"):
        open_source(asked("simsv2", AROUSAL), [path])


def test_annotations_that_are_joined_answer_what_features_do_not(tmp_path: Path) -> None:
    words = [f"this is what was said as number {i}" for i in range(60)]
    head = "Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID"
    rows = [f"{text},Ann,joy,{'positive' if i % 2 else ''},0,{i}" for i, text in enumerate(words)]
    (tmp_path / "train_sent_emo.csv").write_text("\n".join([head, *rows]) + "\n")
    features = [{"features": {"text": text, "audio": np.ones((2, 3))}, "label": "joy"} for text in words]
    (tmp_path / "corpus_train.pkl").write_bytes(pickle.dumps(features))
    sentiment = {"name": "sentiment", "kind": "classification", "labels": ["negative", "positive"]}
    found = list(open_source(asked("meld", sentiment), [tmp_path]).samples("train"))
    assert len(found) == 60
    assert [sample.answers for sample in found[:2]] == [
        {"meld": "joy", "sentiment": ""},
        {"meld": "joy", "sentiment": "positive"},
    ]
    assert all(sample.audio is not None for sample in found)


def test_a_reader_that_gives_one_label_is_refused(tmp_path: Path) -> None:
    plugin = tmp_path / "one_label.py"
    plugin.write_text(
        "from trainer.data.readers.registry import Reader\n"
        "class One(Reader):\n    name, title, suffixes = 'one', 'one', ('.one',)\n    def read(self, path, context): return []\n"
    )
    (tmp_path / "train.one").write_text("x")
    with pytest.raises(ReaderError, match="the reader one gives one label a sample, and cannot read several questions"):
        open_source(asked(VALENCE, EMOTION), [tmp_path / "train.one"], plugins=[str(plugin)])


# ── preparation ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_faults_name_their_question(tmp_path: Path) -> None:
    lines = [{"id": f"{split}0", "split": split, "text": "a", "valence": 2, "emotion": "joy"} for split in SPLITS]
    lines += [
        {"id": "t1", "split": "train", "text": "b", "valence": 7, "emotion": "joyy"},
        {"id": "t2", "split": "train", "text": "c", "valence": None, "emotion": ""},
        {"id": "t3", "split": "train", "text": "c", "valence": "x", "emotion": "Joy"},
    ]
    path = write_lines(tmp_path / "c.jsonl", lines)
    with pytest.raises(DataError) as caught:
        prepare(asked(VALENCE, EMOTION), [path], tmp_path / "out")
    for part in (
        "valence: out-of-range value: 1 (train 1), refused: 7 is outside 1 to 5",
        "emotion: unknown label: 1 (train 1), refused: 'joyy' (did you mean joy?)",
        "no label: 1 (train 1), refused: no answer to any of valence, emotion",
        "valence: label that is no number: 1 (train 1)",
        "emotion: label in another case: 1 (train 1), read as 'joy'",
    ):
        assert part in str(caught.value), part
    assert not (tmp_path / "out").exists()
    kept = prepare(asked(VALENCE, EMOTION), [path], tmp_path / "out", drop_bad="train")
    assert kept.record["splits"]["train"]["n"] == 1


def test_a_question_that_no_sample_of_a_split_answers_is_refused_always(tmp_path: Path) -> None:
    lines = [
        {"split": split, "text": "a", "valence": 2, "arousal": None if split == "valid" else 3} for split in SPLITS
    ]
    path = write_lines(tmp_path / "c.jsonl", lines)
    with pytest.raises(
        DataError, match=r"arousal: question without answers: 1 \(valid 1\), refused: no sample of valid"
    ) as caught:
        prepare(asked(VALENCE, AROUSAL), [path], tmp_path / "out", drop_bad="all")
    assert "--drop-bad" not in str(caught.value)


def test_counts_columns_and_record(prepared: Path) -> None:
    record = open_dataset(prepared).record
    assert record["format"] == 2
    assert [one["name"] for one in record["task"]["questions"]] == ["valence", "arousal", "emotion"]  # type: ignore[attr-defined, index]
    train = summary_json(record)["train"]
    assert {name: (one["n"], one["unanswered"]) for name, one in train["questions"].items()} == {
        "valence": (24, 0), "arousal": (16, 8), "emotion": (18, 6),
    }  # fmt: skip
    assert train["questions"]["emotion"]["labels"] == {"joy": 6, "anger": 6, "sad": 6}
    assert train["labels"] == train["questions"]["valence"]["labels"]
    arrow = load_from_disk(str(prepared))["train"]
    assert {"label_emotion", "target_emotion", "shares_emotion", "label_valence", "target_valence"} <= set(
        arrow.column_names
    )
    assert "label" not in arrow.column_names
    assert "shares_valence" not in arrow.column_names
    assert arrow["target_arousal"][:4] == [None, 2.5, 2.5, None]
    assert arrow["label_emotion"][:4] == [None, "anger", "sad", "joy"]


def test_the_result_does_not_depend_on_processes(tmp_path: Path, prepared: Path) -> None:
    several = prepare(asked(VALENCE, AROUSAL, EMOTION), [corpus(tmp_path)], tmp_path / "data", workers=2)
    assert several.fingerprint == open_dataset(prepared).fingerprint
    again = prepare(asked(VALENCE, AROUSAL, EMOTION), [tmp_path / "corpus.jsonl"], tmp_path / "data")
    assert again.unchanged
    with pytest.raises(DataError, match="another definition of task corpus"):
        prepare(asked(VALENCE, EMOTION), [tmp_path / "corpus.jsonl"], tmp_path / "data")


# ── views ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def same(a: Any, b: Any) -> bool:
    return all(
        np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


@pytest.mark.parametrize("question", [VALENCE, AROUSAL, EMOTION])
def test_one_question_is_the_dataset_of_the_samples_that_answer_it(
    tmp_path: Path, prepared: Path, question: Any
) -> None:
    """Against the dataset that is prepared from these samples alone."""
    lines = [json.loads(line) for line in (prepared.parent / "corpus.jsonl").read_text().splitlines()]
    own = []
    for line in lines:
        answer = line["target"].get(question["name"], line.get(question["name"]))
        if answer is not None:
            name = f"{prepared.parent}/{line['audio']}"
            own.append(
                {k: v for k, v in line.items() if k not in ("target", "emotion")} | {"label": answer, "audio": name}
            )
    task = define(question)
    prepare(task, [write_lines(tmp_path / "own.jsonl", own)], tmp_path / "data")
    expected, found = open_dataset(tmp_path / "data"), open_dataset(prepared, question=question["name"])
    assert found.task == task
    for split in SPLITS:
        a, b = found[split], expected[split]
        assert len(a) == len(b)
        assert all(map(same, a, b))
        assert (a.ids, a.dialogues(), list(a.texts())) == (b.ids, b.dialogues(), list(b.texts()))
        for x, y in ((a.targets(), b.targets()), (a.lengths(), b.lengths()), (a.frames("audio"), b.frames("audio"))):
            np.testing.assert_array_equal(x, y)
        assert a.longest(3) == b.longest(3)


def test_histories_are_those_of_all_samples(prepared: Path) -> None:
    view = open_dataset(prepared, history=2, question="arousal")["train"]
    sample = next(sample for sample in view if sample.id == "train5")
    assert [text for _, text in sample.history] == ["words 4"]
    assert [text for _, text in next(s for s in view if s.id == "train2").history] == [
        "words 0",
        "words 1",
    ]  # 0: no arousal


def test_questions_must_be_chosen_and_known(prepared: Path) -> None:
    whole = open_dataset(prepared)
    assert np.isnan(whole["train"][0].target)
    with pytest.raises(DataError, match="has the questions valence, arousal, emotion: name the one that is meant"):
        _ = whole.task
    with pytest.raises(DataError, match=r"no question 'emotio' \(did you mean emotion\?\)"):
        whole.asking("emotio")


def test_pickling_opens_the_question_again(prepared: Path) -> None:
    asking = open_dataset(prepared, question="emotion")
    view, again = pickle.loads(pickle.dumps((asking["train"], asking)))
    assert view.ids == asking["train"].ids
    assert isinstance(again, PreparedDataset)
    assert again.task.name == "emotion"


def test_shares_of_annotators_and_sets_of_labels(tmp_path: Path) -> None:
    lines = [
        {"split": split, "text": f"{i}", "emotion": [{"joy": 2, "sad": 2}, "anger", None][i], "topics": [[], ["work", "home"], "home"][i]}
        for split in SPLITS for i in range(3)
    ]  # fmt: skip
    prepare(asked(EMOTION, TOPICS), [write_lines(tmp_path / "c.jsonl", lines)], tmp_path / "data")
    emotion, topics = (open_dataset(tmp_path / "data", question=name)["train"] for name in ("emotion", "topics"))
    assert emotion.shared
    assert not topics.shared
    assert emotion[0].share_C.tolist() == [0.5, 0, 0.5]
    assert emotion[1].share_C is None
    assert len(emotion) == 2
    assert topics.targets().tolist() == [0, 3, 2]


def test_folds_and_questions_together(tmp_path: Path) -> None:
    prepare(asked(VALENCE, AROUSAL, EMOTION), [corpus(tmp_path)], tmp_path / "data", fold_column="session")
    whole = open_dataset(tmp_path / "data", choice=FoldChoice("s1"), history=1)
    one = whole.asking("emotion")
    for split in SPLITS:
        answered = [i for i, sample in enumerate(whole[split]) if int(re.sub(r"\D", "", sample.id)) % 4]
        assert one[split].ids == [whole[split].ids[i] for i in answered]
        assert [sample.history for sample in one[split]] == [whole[split][i].history for i in answered]
    assert one.standardisation["audio"].mean_F.tolist() == whole.standardisation["audio"].mean_F.tolist()
    assert len(one["train"]) + len(one["valid"]) + len(one["test"]) == sum(
        "emotion" in json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()
    )


def test_raw_samples_without_answers_have_none() -> None:
    assert RawSample("a", "train", "t", "joy").answers is None
