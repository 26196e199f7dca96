"""Own data as JSONL: what is read, and that all faults come at once."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.readers.raw import RawSample, ReaderError, Source
from trainer.data.readers.source import open_source
from trainer.tasks import get_task

MELD, SIMS = get_task("meld"), get_task("simsv2")
RNG = np.random.default_rng(0)
SPLIT_KEYS = {"Train": "train", "validation": "valid", "test": "test"}  # as written, and what it means


def read(task: Any, *paths: Path) -> tuple[Source, dict[str, list[RawSample]]]:
    source = open_source(task, list(paths))
    return source, {split: list(source.samples(split)) for split in source.splits}


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def test_own_samples(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    audio = RNG.standard_normal((7, 4)).astype("f4")
    np.save(tmp_path / "clips" / "a.npy", audio)
    np.savez_compressed(tmp_path / "clips" / "a.npz", audio=audio, video=audio[:, :2])
    np.savez(tmp_path / "clips" / "b.npz", features=audio[:1])
    full = {
        "id": "a1",
        "text": "Hi 你",
        "label": "joy",
        "audio": "clips/a.npy",
        "video": "clips/a.npz",
        "split": "train",
    }
    full |= {"audio_length": 5, "speaker": "Ann", "dialogue": 7, "turn": 3, "kind": "local", "language": "en"}
    full |= {"rate": {"audio": 100, "video": 25}, "lable": 1}
    bare = {"text": "b", "label": "anger", "video": str(tmp_path / "clips" / "b.npz"), "split": "dev"}
    path = write_lines(tmp_path / "own.jsonl", full, "", bare)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    source, found = read(MELD, path)
    assert source.splits == ["train", "valid"]
    assert source.rates == {"audio": 100.0, "video": 25.0}
    assert source.notes == ["own.jsonl: not used: 'lable' of 1 line(s) (did you mean label?)"]
    one, two = found["train"][0], found["valid"][0]
    assert (one.id, one.text, one.label, one.audio_length, one.video_length) == ("a1", "Hi 你", "joy", 5, None)
    assert (one.speaker, one.dialogue, one.turn, one.kind, one.language) == ("Ann", "7", 3, "local", "en")
    assert np.array_equal(one.audio, audio)  # type: ignore[arg-type]
    assert np.array_equal(one.video, audio[:, :2])  # type: ignore[arg-type]
    assert (two.id, two.audio, two.where) == ("valid-00003", None, "own.jsonl line 3")
    assert np.array_equal(two.video, audio[:1])  # type: ignore[arg-type]


def test_own_samples_in_files_named_after_splits(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", {"text": "a", "target": -0.25}, {"text": "b", "label": 1})
    write_lines(tmp_path / "extra_train.jsonl", {"id": 9, "text": "c", "target": 0.5, "label": "neutral"})
    write_lines(tmp_path / "dev.jsonl", {"text": "d", "target": 0.0, "split": "test"})
    source, found = read(SIMS, tmp_path)
    assert source.splits == ["train", "test"]
    assert [s.label for s in found["train"]] == [0.5, -0.25, 1]
    assert found["train"][0].id == "9"
    assert found["test"][0].label == 0.0


def test_all_faults_of_own_samples_come_at_once(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object))
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "cut.npy", np.zeros((9, 9)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:300])
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    np.savez(tmp_path / "objects.npz", audio=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    header = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f8', 'fortran_order': False, 'shape': (9000000000, 9), }".ljust(117)
        + b"\n"
    )
    with zipfile.ZipFile(tmp_path / "claims.npz", "w") as archive:
        archive.writestr("audio.npy", header + bytes(64))
    base = {"text": "a", "label": "joy", "split": "train"}
    path = write_lines(
        tmp_path / "own.jsonl",
        base | {"audio": "none.npy", "video": "none.npz"},
        "{broken",
        base | {"split": "tset"},
        {"text": "a", "label": "joy"},
        base | {"text": 5, "turn": "x", "audio_length": 1.5},
        *(
            base | {"audio": name}
            for name in ("objects.npy", "text.npy", "cut.npy", "two.npz", "objects.npz", "text.npz")
        ),
        base | {"audio": "claims.npz"},
        base | {"audio": "a.wav"},
        base | {"rate": {"audio": 10}},
        base | {"rate": {"audio": 20}},
        base | {"rate": {"sound": -1}},
        "[" * 100_000,
        base | {"audio": "../up/none.npy"},
    )
    with pytest.raises(ReaderError) as caught:
        open_source(MELD, [path])
    output = "\n".join(caught.value.faults)
    for wanted in (
        "own.jsonl line 1: no audio file ",
        "own.jsonl line 1: no video file ",
        "line 2: Invalid JSON",
        "line 3: split 'tset' is none of train, valid, test",
        "line 4: no split: give every sample one",
        "line 5: text: ",
        "line 5: turn: ",
        "line 5: audio_length: ",
        "objects.npy: is not a readable array: ",
        "text.npy: is not a .npy array",
        "cut.npy: is not a readable array: ",
        "two.npz: holds a, b; one array, or one called 'audio', was expected",
        "objects.npz: holds Python objects",
        "text.npz: is not a readable .npz",
        "claims.npz: claims shape (9000000000, 9)",
        "a.wav: features are .npy or .npz files",
        "audio has several rates (10, 20)",
        "line 16: rate",
        "line 17: Invalid JSON",
        "line 18: no audio file ",
    ):
        assert wanted in output, wanted
    assert "… and " in str(caught.value)


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "utf-16-be", "utf-8-sig"])
def test_own_samples_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    line = json.dumps({"id": "a", "text": "今天我真的很高兴", "label": "高兴", "split": "train"}, ensure_ascii=False)
    path = tmp_path / "own.jsonl"
    path.write_bytes((line + "\n" + line.replace('"a"', '"b"') + "\n").encode(encoding))
    found = read(get_task("cherma"), path)[1]["train"]
    assert [(s.id, s.text, s.label) for s in found] == [
        ("a", "今天我真的很高兴", "高兴"),
        ("b", "今天我真的很高兴", "高兴"),
    ]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_lines_may_end_as_any_system_has_them(tmp_path: Path, end: str) -> None:
    lines = [
        {"id": f"{split}{i}", "text": "a", "label": "joy", "split": split} for split in SPLIT_KEYS for i in range(3)
    ]
    (tmp_path / "own.jsonl").write_bytes(end.join(map(json.dumps, lines)).encode())
    source = open_source(MELD, [tmp_path / "own.jsonl"])
    found = {split: [sample.id for sample in source.samples(split)] for split in source.splits}
    assert found == {SPLIT_KEYS[s]: [f"{s}0", f"{s}1", f"{s}2"] for s in SPLIT_KEYS}


def test_a_list_of_samples_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps([{"text": "a", "label": "joy"}], indent=1))
    with pytest.raises(ReaderError, match="is one JSON list; one sample a line was expected"):
        open_source(MELD, [tmp_path])


def test_pickles_inside_npy_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    np.save(tmp_path / "a.npy", np.array([Evil()], dtype=object))
    np.savez(tmp_path / "a.npz", np.array([Evil()], dtype=object))
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Evil()))
    base = {"text": "a", "label": "joy"}
    path = write_lines(tmp_path / "train.jsonl", *(base | {"audio": name} for name in ("a.npy", "a.npz", "b.npy")))
    with pytest.raises(ReaderError, match="3 faults"):
        open_source(MELD, [path])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["clip.npy", "clip.npz"])
def test_a_pipe_among_the_features_is_refused_and_never_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    path = write_lines(tmp_path / "train.jsonl", {"text": "a", "label": "joy", "audio": name})
    with pytest.raises(ReaderError, match="is not a regular file"):
        read(MELD, path)


def bomb(path: Path, header: bytes, length: int, body: int = 0) -> Path:
    """An array of format 2.0 whose header claims `length` bytes, packed where the suffix says so."""
    content = b"\x93NUMPY\x02\x00" + length.to_bytes(4, "little") + header + bytes(body)
    if path.suffix == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("audio.npy", content)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    ("header", "length", "says"),
    [
        (b" " * (64 << 20), 64 << 20, "has a header of 67108864 bytes"),
        (
            b"{'descr': '<f4', 'fortran_order': False, 'shape': (536870912, 1), }\n",
            67,
            "claims shape|not a readable array",
        ),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 40, 1 << 40), }\n", 73, "not a readable"),
    ],
    ids=["header", "array", "no shape"],
)
def test_arrays_that_would_take_gigabytes_are_refused_from_their_first_bytes(
    tmp_path: Path, suffix: str, header: bytes, length: int, says: str
) -> None:
    name = bomb(tmp_path / f"clip{suffix}", header, length).name
    path = write_lines(tmp_path / "train.jsonl", {"text": "a", "label": "joy", "audio": name})
    tracemalloc.start()
    try:
        with pytest.raises(ReaderError, match=says):
            read(MELD, path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_clip_of_more_than_a_gibibyte_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "clip.npy").open("wb") as file:
        np.lib.format.write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 29, 1)})
        file.truncate(file.tell() + (1 << 31))  # nothing of it is on the disk
    path = write_lines(tmp_path / "train.jsonl", {"text": "a", "label": "joy", "audio": "clip.npy"})
    with pytest.raises(ReaderError, match=r"holds 2.0 GiB .*at most 1 GiB: cut it into clips"):
        read(MELD, path)
