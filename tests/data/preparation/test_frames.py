"""Padding on either side, lengths that contradict the frames, zero frames inside a clip, vectors for a whole clip.

Reference: every array is made from a clip that is known, so what must come out is known too.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.dataset import open_dataset
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.frames import FeatureSequence, clip_features
from trainer.data.preparation.prepare import prepare
from trainer.data.readers.raw import ReaderError
from trainer.tasks import get_task

MOSEI = get_task("mosei")


def read(array: Any, length: Any = None, **options: Any) -> tuple[FeatureSequence | None, dict[str, str]]:
    """The features, and kind -> repair of every fault."""
    faults: dict[str, str] = {}

    def fault(kind: str, detail: str = "", repair: str = "") -> None:
        faults[kind] = repair

    return clip_features("audio", array, length, fault, **options), faults


def widespread_length(padded_TF: np.ndarray) -> int:
    """As a script that many use counts it: the index of the first frame of zeros, at least 1."""
    zero = np.flatnonzero(padded_TF.sum(-1) == 0)
    return max(int(zero[0]) if len(zero) else len(padded_TF), 1)


@pytest.mark.parametrize("frames", [1, 2, 7, 12])
@pytest.mark.parametrize("side", ["front", "behind"])
@pytest.mark.parametrize("claim", ["none", "true", "widespread", "array"])
def test_every_real_frame_is_kept_and_no_padding(frames: int, side: str, claim: str) -> None:
    clip = np.random.default_rng(frames).standard_normal((frames, 5)).astype("f4")
    padded = np.zeros((12, 5), "f4")
    padded[slice(12 - frames, 12) if side == "front" else slice(0, frames)] = clip
    length = {"none": None, "true": frames, "widespread": widespread_length(padded), "array": 12}[claim]
    found, faults = read(padded, length)
    assert found is not None
    valid_T = np.ones(len(found.values_TF), bool) if found.mask_T is None else found.mask_T
    np.testing.assert_array_equal(found.values_TF[valid_T], clip)
    if claim == "array":  # the source says that all are the clip's: zeros are then frames without content
        assert len(found.values_TF) == 12
    else:
        assert len(found.values_TF) == frames
    assert found.padding == (12 - frames if claim == "none" else 0)
    contradicted = side == "front" and frames < 12 and (claim == "true" or (claim == "widespread" and frames < 12))
    assert ("frames beyond the length in audio" in faults) == contradicted


def test_a_zero_frame_inside_a_clip_does_not_end_it() -> None:
    clip = np.random.default_rng(0).standard_normal((30, 6))
    clip[4] = 0.0
    for length in (4, 30, None):
        found, faults = read(clip, length)
        assert found is not None
        assert len(found.values_TF) == 30
        np.testing.assert_array_equal(found.mask_T, np.arange(30) != 4)
        assert faults["frames of zeros inside the clip in audio"] == "frames masked"
        kept, faults = read(clip, length, zero_frames="keep")
        assert kept is not None
        assert kept.mask_T is None
        assert "frames of zeros inside the clip in audio" not in faults


def test_what_holds_nothing_is_a_missing_modality() -> None:
    assert read(np.zeros((4, 3))) == (None, {"nothing but zeros in audio": "counted as missing"})
    assert read(np.zeros((4, 3)), 2) == (None, {"nothing but zeros in audio": "counted as missing"})
    assert read(np.zeros((4, 3)), 0) == (None, {})  # the source says so itself
    assert read(np.full((4, 3), np.nan)) == (None, {"no finite frame in audio": "counted as missing"})
    assert read(np.full((4, 3), 1e300)) == (None, {"no frame in audio that float32 can hold": "counted as missing"})


def test_padding_with_nan_is_padding() -> None:
    clip = np.ones((6, 2))
    clip[4:] = np.nan
    assert read(clip, 4)[1] == {}
    found, faults = read(clip)
    assert found is not None
    np.testing.assert_array_equal(found.mask_T, [True] * 4 + [False] * 2)
    assert faults == {"nan or inf in audio": "frames masked"}


def test_a_vector_is_one_frame() -> None:
    found, faults = read(np.arange(73.0))
    assert found is not None
    np.testing.assert_array_equal(found.values_TF, np.arange(73.0)[None])
    assert faults == {"one vector for the whole clip in audio": "read as one frame"}


def columns(split: str, n: int, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(len(split))
    out = {
        "raw_text": np.array([f"{split} {i}" for i in range(n)]), "audio": rng.normal(size=(n, 6, 4)).astype("f4"),
        "regression_labels": np.ones(n, "f4"), "id": np.array([f"{split}{i}" for i in range(n)]), **changes,
    }  # fmt: skip
    return {name: value for name, value in out.items() if value is not None}


def pickled(path: Path, splits: dict[str, Any]) -> Path:
    path.write_bytes(pickle.dumps(splits, 4))
    return path


def test_a_file_padded_in_front_is_repaired_with_a_count_for_every_split(tmp_path: Path) -> None:
    def split(name: str, n: int) -> dict[str, Any]:
        content = columns(name, n)
        for i in range(n):
            content["audio"][i, : 1 + i % 4] = 0.0
        return content | {"audio_lengths": [widespread_length(a) for a in content["audio"]]}

    content = {name: split(name, n) for name, n in (("train", 8), ("valid", 3), ("test", 2))}
    record = prepare(MOSEI, [pickled(tmp_path / "x.pkl", content)], tmp_path / "out").record
    assert [(f["kind"], f["splits"]) for f in record["faults"]] == [
        ("frames beyond the length in audio", {"train": 8, "valid": 3, "test": 2})
    ]
    real = sum(int((a != 0).any(1).sum()) for a in content["train"]["audio"])
    assert sum(len(s.audio_TF) for s in open_dataset(tmp_path / "out")["train"] if s.audio_TF is not None) == real
    for split_columns in content.values():
        del split_columns["audio_lengths"]
    record = prepare(MOSEI, [pickled(tmp_path / "y.pkl", content)], tmp_path / "out2", workers=2).record
    assert record["faults"] == []
    assert record["splits"]["train"]["padding"] == {"audio": 8 * 6 - real, "video": 0}
    assert open_dataset(tmp_path / "out2").zero_frames == "mask"


def test_splits_and_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    content = {
        name.capitalize(): columns(name, 3, text_bert=np.zeros((3, 3, 5))) for name in ("train", "validation", "test")
    }
    notes = prepare(MOSEI, [pickled(tmp_path / "x.pkl", content | {"unsup": {}})], tmp_path / "out").record["source"][
        "notes"
    ]
    assert notes == ["x.pkl: left aside: unsup", "x.pkl: columns that are not read: text_bert"]
    with pytest.raises(ReaderError, match="holds Validation and val, which all mean the valid split"):
        prepare(MOSEI, [pickled(tmp_path / "y.pkl", content | {"val": columns("valid", 2)})], tmp_path / "out3")


def test_vectors_are_no_words(tmp_path: Path) -> None:
    content = {name: columns(name, 3, raw_text=None, text=np.ones((3, 50, 300))) for name in ("train", "valid", "test")}
    with pytest.raises(ReaderError, match=r"the text of train holds arrays of numbers \[50, 300\], no words"):
        prepare(MOSEI, [pickled(tmp_path / "x.pkl", content)], tmp_path / "out")


def test_missing_words_are_a_missing_modality(tmp_path: Path) -> None:
    content = {name: columns(name, 3, raw_text=np.array(["a", " ", ""])) for name in ("train", "valid", "test")}
    record = prepare(MOSEI, [pickled(tmp_path / "x.pkl", content)], tmp_path / "out", strict=True).record
    assert record["splits"]["train"]["missing"] == {"audio": 0, "video": 3, "text": 2}
    assert [s.text for s in open_dataset(tmp_path / "out")["train"]] == ["a", "", ""]
    silent = {name: columns(name, 3, raw_text=None) for name in ("train", "valid", "test")}
    record = prepare(MOSEI, [pickled(tmp_path / "y.pkl", silent)], tmp_path / "out2").record
    assert any("no sample has any text" in note for note in record["source"]["notes"])
    nothing = {name: columns(name, 3, raw_text=np.array(["a", "b", ""]), audio=None) for name in content}
    with pytest.raises(DataError, match=r"no text, audio or video: 3 \(train 1, valid 1, test 1\), refused"):
        prepare(MOSEI, [pickled(tmp_path / "z.pkl", nothing)], tmp_path / "out3")
