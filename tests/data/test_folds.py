"""Datasets with folds: which samples are training, validation and test; and that datasets without folds are what they were."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from tests.toy import prepare_toy
from trainer.config import ConfigError, check_config
from trainer.data.dataset import open_dataset
from trainer.data.folds import FoldChoice, assign_folds, find_fold, fold_sizes
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.folder import read_record
from trainer.data.preparation.prepare import prepare
from trainer.data.preparation.rows import Metadata, Row
from trainer.data.preparation.summary import summary_json
from trainer.data.readers.raw import ReaderError
from trainer.run.assemble import open_data
from trainer.tasks import get_task

MELD = get_task("meld")
SESSIONS = ("Ses1", "Ses2", "Ses10")  # in this order, which is not that of their letters


def lines(key: str = "fold", count: int = 60) -> list[dict[str, Any]]:
    """Samples in dialogues of four, each dialogue in one session, two speakers by turns."""
    return [
        {
            "id": f"u{i:03d}", "text": f"text {i}", "label": MELD.labels[i % 7], key: SESSIONS[i // 4 % 3],
            "dialogue": f"d{i // 4}", "turn": i % 4, "speaker": f"{SESSIONS[i // 4 % 3]}-{i % 2}",
        }
        for i in range(count)
    ]  # fmt: skip


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folds")
    prepare(MELD, [write(folder / "own.jsonl", lines())], folder / "meld")
    return folder / "meld"


def test_every_sample_is_tested_once_and_the_next_fold_validates(prepared: Path) -> None:
    record = read_record(prepared)
    assert record is not None
    assert (list(record["splits"]), record["folds"]) == (["all"], dict.fromkeys(SESSIONS, 20))
    assert summary_json(record)["all"]["folds"] == record["folds"]
    ids = {name: {row["id"] for row in lines() if row["fold"] == name} for name in SESSIONS}
    for i, name in enumerate(SESSIONS):
        for wanted in (name, str(i + 1)):
            opened = open_dataset(prepared, choice=FoldChoice(wanted))
            assert (opened.fold, opened.folds, opened.splits) == (name, list(SESSIONS), ["train", "valid", "test"])
            after, rest = SESSIONS[(i + 1) % 3], SESSIONS[(i + 2) % 3]
            found = {split: set(opened[split].ids) for split in opened.splits}
            assert found == {"test": ids[name], "valid": ids[after], "train": ids[rest]}


def test_a_view_gives_what_the_whole_dataset_gives(prepared: Path) -> None:
    whole = {sample.id: sample for sample in open_dataset(prepared)["all"]}
    opened = open_dataset(prepared, history=2, choice=FoldChoice("Ses2", 0.3, seed=4))
    for split in opened.splits:
        view = pickle.loads(pickle.dumps(opened[split]))
        assert view.ids == [sample.id for sample in view]
        assert list(view.texts()) == [whole[name].text for name in view.ids]
        assert view.targets().tolist() == [whole[name].target for name in view.ids]
        assert view.lengths().tolist() == [len(whole[name].text) for name in view.ids]
        for sample in view:
            n = int(sample.id[1:])
            assert [text for _, text in sample.history] == [f"text {k}" for k in range(max(n - 2, n - n % 4), n)]
        assert view[-1].id == view.ids[-1]
        with pytest.raises(IndexError):
            view[len(view)]


def test_a_share_cuts_no_dialogue_and_follows_the_seed(prepared: Path) -> None:
    def valid(seed: int) -> list[str]:
        opened = open_dataset(prepared, choice=FoldChoice("Ses1", 0.2, seed))
        parts = {split: {sample.dialogue for sample in opened[split]} for split in opened.splits}
        assert not parts["train"] & parts["valid"]
        assert len(parts["valid"]) == 2  # of the ten dialogues of two sessions
        assert sum(len(opened[split]) for split in opened.splits) == 60
        assert all(sample.id in opened["test"].ids for sample in opened["test"])
        return opened["valid"].ids

    assert valid(1) == valid(1)
    assert len({tuple(valid(seed)) for seed in range(8)}) > 1


def test_groups_are_speakers_where_there_are_no_dialogues() -> None:
    fold_N = np.array(["a"] * 4 + ["b"] * 12, dtype=object)
    speakers = [None] * 4 + [f"p{i % 3}" for i in range(12)]
    found = assign_folds(FoldChoice("a", 0.1), fold_N, [None] * 16, speakers)
    assert len({speakers[i] for i in found["valid"]}) == 1
    assert not {speakers[i] for i in found["valid"]} & {speakers[i] for i in found["train"]}
    alone = assign_folds(FoldChoice("a", 0.25), fold_N, [None] * 16, [None] * 16)
    assert [len(alone[split]) for split in ("train", "valid", "test")] == [9, 3, 4]
    with pytest.raises(DataError, match="of one dialogue or speaker"):
        assign_folds(FoldChoice("a", 0.25), fold_N, ["d"] * 16, [None] * 16)
    with pytest.raises(DataError, match=r"nothing is left to train on.*data\.fold_valid=0\.1"):
        assign_folds(FoldChoice("a"), fold_N, [None] * 16, speakers)


def test_names_of_folds() -> None:
    assert list(fold_sizes(["10", "9", "s2", "s10", "9"])) == ["9", "10", "s2", "s10"]
    assert find_fold("2", ["a", "b"]) == "b"
    assert find_fold("1", ["0", "1"]) == "1"
    with pytest.raises(DataError, match=r"the folds are 0, 1$"):
        find_fold("2", ["0", "1"])
    with pytest.raises(DataError, match="or a number from 1 to 2"):
        find_fold("c", ["a", "b"])


def test_the_column_of_folds_is_named_or_is_fold(tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", [{**row, "split": "train"} for row in lines("session")])
    with pytest.raises(DataError, match="split without samples"):
        prepare(MELD, [own], tmp_path / "out")
    with pytest.raises(ReaderError, match=r"no line has a fold.*did you mean session\?"):
        prepare(MELD, [own], tmp_path / "out", fold_column="sesion")
    for column, names in (("session", list(SESSIONS)), ("speaker", [f"{s}-{i}" for s in SESSIONS for i in range(2)])):
        made = prepare(MELD, [own], tmp_path / column, fold_column=column, workers=2)
        assert list(made.record["folds"]) == names
    numbers = write(tmp_path / "numbers.jsonl", [{**row, "fold": i % 3} for i, row in enumerate(lines())])
    made = prepare(MELD, [numbers], tmp_path / "numbers")
    assert made.record["folds"] == {"0": 20, "1": 20, "2": 20}
    assert any("15 of 15 dialogues are cut across folds" in note for note in made.record["source"]["notes"])
    assert made.fingerprint != prepare(MELD, [own], tmp_path / "session", fold_column="session").fingerprint
    table = datasets.load_from_disk(str(tmp_path / "session"))
    assert table["all"]["fold"][:5] == ["Ses1"] * 4 + ["Ses2"]


def test_annotation_csv_with_a_column_of_folds(tmp_path: Path) -> None:
    rows = [f'"t {i}",p{i % 2},joy,{i // 4},{i % 4},Ses{i // 4 % 3}' for i in range(24)]
    path = tmp_path / "iemocap.csv"
    path.write_text("\n".join(["Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID,Session", *rows]) + "\n")
    made = prepare(MELD, [path], tmp_path / "out", fold_column="Session")
    assert made.record["folds"] == {"Ses0": 8, "Ses1": 8, "Ses2": 8}
    with pytest.raises(ReaderError, match=r"its header needs .*Speaker_ID"):
        prepare(MELD, [path], tmp_path / "other", fold_column="Speaker_ID")


def test_what_is_refused(prepared: Path, tmp_path: Path) -> None:
    some = [{k: v for k, v in row.items() if k != "fold" or i != 3} for i, row in enumerate(lines(count=9))]
    with pytest.raises(ReaderError, match=r"line 4: no split: .*for cross-validation give every sample a fold"):
        prepare(MELD, [write(tmp_path / "some.jsonl", some)], tmp_path / "out")
    with pytest.raises(DataError, match=r"no fold: 1 \(all 1\)"):
        prepare(MELD, [tmp_path / "some.jsonl"], tmp_path / "out", fold_column="fold")
    mixed = [*lines(count=4), {"text": "t", "label": "joy", "split": "test"}]
    with pytest.raises(ReaderError, match="give all samples folds, or all a split"):
        prepare(MELD, [write(tmp_path / "mixed.jsonl", mixed)], tmp_path / "out")
    with pytest.raises(DataError, match="one fold only"):
        prepare(MELD, [write(tmp_path / "one.jsonl", lines(count=4))], tmp_path / "out")
    with pytest.raises(DataError, match=r"no split 'train': choose the fold.*data\.fold=Ses1"):
        open_dataset(prepared)["train"]
    with pytest.raises(ConfigError, match=r"data\.fold_valid"):
        check_config({"task": "meld", "data": {"fold_valid": 1.0}})
    config = check_config({"task": "meld", "data": {"path": str(prepared), "fold": 2}})
    assert config.data.fold == "2"
    assert open_data(config)[1]["meld"].fold == "Ses2"
    for fold, words in ((None, "data.fold=Ses1; egmf sweep CONFIG --folds"), ("Ses3", "no fold 'Ses3'")):
        config.data.fold = fold
        with pytest.raises(ValueError, match=words):
            open_data(config)
    config = check_config({"task": "meld", "data": {"path": str(prepare_toy("meld", tmp_path)), "fold": "a"}})
    with pytest.raises(ValueError, match="has no folds"):
        open_data(config)


@pytest.mark.parametrize("valid", ["next", 0.25])
def test_features_are_standardised_by_the_training_samples_of_the_fold(tmp_path: Path, valid: Any) -> None:
    rng, rows = np.random.default_rng(0), lines()
    for i, row in enumerate(rows):
        np.save(tmp_path / f"{i}.npy", rng.normal(SESSIONS.index(row["fold"]), 1 + i % 3, (3 + i % 4, 5)).astype("f4"))
        row["audio"] = f"{i}.npy"
    prepare(MELD, [write(tmp_path / "own.jsonl", rows)], tmp_path / "meld")
    for fold in SESSIONS:
        dataset = open_dataset(tmp_path / "meld", choice=FoldChoice(fold, valid, 3))
        frames_TF = np.concatenate([s.audio_TF for s in dataset["train"] if s.audio_TF is not None]).astype("f8")
        found = dataset.standardisation["audio"]
        np.testing.assert_allclose(found.mean_F, frames_TF.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.scale_F, 1 / frames_TF.std(0), rtol=1e-6)
    assert open_dataset(tmp_path / "meld").standardisation == {}


def test_a_dataset_without_folds_is_what_it_was(tmp_path: Path) -> None:
    """A `fold` beside a split is not used, as before folds were known; the row's digest is that of the former definition."""
    own = [{**row, "split": ("train", "valid", "test")[i % 3]} for i, row in enumerate(lines())]
    made = prepare(MELD, [write(tmp_path / "own.jsonl", own)], tmp_path / "out")
    assert made.record["source"]["notes"] == ["own.jsonl: not used: 'fold' of 60 line(s)"]
    assert "folds" not in made.record
    assert "fold" not in datasets.load_from_disk(str(tmp_path / "out"))["train"].column_names
    bare = [{k: v for k, v in row.items() if k != "fold"} for row in own]
    assert made.fingerprint == prepare(MELD, [write(tmp_path / "bare.jsonl", bare)], tmp_path / "bare").fingerprint
    row = Row("a", "t", 1.0, "joy", {"audio": None, "video": None}, Metadata("s", "d", 3, None, "en"))
    head = json.dumps(["a", "t", (1.0).hex(), "joy", "s", "d", 3, None, "en"])
    assert row.digest() == hashlib.sha256(head.encode() + b"--").digest()
