"""Published formats as raw samples: what is read, what is refused, and that all faults come at once."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.readers.raw import RawSample, ReaderError, Source
from trainer.data.readers.source import open_source
from trainer.tasks import BUILT_IN, define_task, get_task

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
MELD, MOSEI, CHERMA, SIMS = (get_task(name) for name in ("meld", "mosei", "cherma", "simsv2"))
RNG = np.random.default_rng(0)


def row(text: str = "Hi there.", label: Any = "joy", **more: Any) -> dict[str, Any]:
    features = {
        "text": text,
        "audio": RNG.standard_normal((5, 4)).astype("f4"),
        "video": RNG.standard_normal((3, 2)).astype("f4"),
        "audio_len": 4,
        "video_len": 2,
    }
    return {"features": features | more, "label": label}


def dump(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def read(task: Any, *paths: Path) -> tuple[Source, dict[str, list[RawSample]]]:
    source = open_source(task, list(paths))
    return source, {split: list(source.samples(split)) for split in source.splits}


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def faults_of(task: Any, *paths: Path) -> str:
    with pytest.raises(ReaderError) as caught:
        open_source(task, list(paths))
    return str(caught.value)


# ── pickles, one list a split ────────────────────────────────────────────────────────────────────────────────────────


def test_pickles_per_split(tmp_path: Path) -> None:
    rows = {"train": [row("one", "joy"), row("two", "anger")], "valid": [row("three")], "test": [row("four")]}
    for split, content in rows.items():
        dump(tmp_path / f"meld_{split}.pkl", content)
    source, found = read(MELD, tmp_path)
    assert source.splits == ["train", "valid", "test"]
    assert [path.name for path in source.files] == ["meld_test.pkl", "meld_train.pkl", "meld_valid.pkl"]
    assert (source.widths, source.rates, source.notes) == (None, {"audio": None, "video": None}, [])
    first = found["train"][0]
    assert (first.id, first.split, first.text, first.label) == ("train-00000", "train", "one", "joy")
    assert (first.audio_length, first.video_length, first.speaker) == (4, 2, None)
    assert first.audio is not None
    assert np.array_equal(first.audio, rows["train"][0]["features"]["audio"])
    assert first.where == "meld_train.pkl row 0"
    assert [s.id for s in found["train"]] == ["train-00000", "train-00001"]
    assert [s.text for s in source.samples("train")] == ["one", "two"]  # a second time
    assert list(open_source(MELD, [tmp_path / "meld_test.pkl"]).samples("train")) == []


def test_pickles_of_an_own_task_with_more_fields(tmp_path: Path) -> None:
    task = define_task({"name": "mine", "kind": "classification", "labels": ["yes", "no"]})
    rows = [row("a", "yes") | {"id": "s1", "speaker": "Ann", "dialogue": 7, "turn": 3, "language": "zh"}]
    dump(tmp_path / "mine_dev.pkl", rows)
    dump(tmp_path / "other_dev.pkl", [row()])
    source, found = read(task, tmp_path)
    assert source.splits == ["valid"]
    sample = found["valid"][0]
    assert (sample.id, sample.speaker, sample.dialogue, sample.turn) == ("s1", "Ann", "7", 3)
    assert sample.language == "zh"
    assert source.notes == [f"{tmp_path.name}: left aside: other_dev.pkl"]


def test_published_oddities(tmp_path: Path) -> None:
    """Features missing, flat rows, lists for arrays, numpy scalars, padded -inf and nan: all as published."""
    audio = np.full((5, 4), -np.inf, dtype="f4")
    content = [
        row(audio=None, audio_len=0),
        {"text": "flat", "label": np.str_("joy"), "video": [[1, 2], [3, 4]], "video_len": np.int64(1)},
        row(audio=audio, audio_len=np.array([3]), video=np.zeros((0, 2)), video_len=2.0),
        row(text=np.str_("numpy"), label=None, audio="no array", video=[[1], [2, 3]]),
    ]
    dump(tmp_path / "meld_train.pkl", content)
    one, two, three, four = read(MELD, tmp_path)[1]["train"]
    assert (one.audio, one.audio_length) == (None, 0)
    assert (two.text, two.label, two.audio, two.video_length) == ("flat", "joy", None, 1)
    assert type(two.label) is str
    assert two.video is not None
    assert two.video.tolist() == [[1, 2], [3, 4]]
    assert np.array_equal(three.audio, audio)  # type: ignore[arg-type]
    assert (three.audio_length, three.video_length) == (3, 2)
    assert (four.text, four.label) == ("numpy", None)
    assert four.audio is not None
    assert four.video is not None
    assert (four.audio.dtype.kind, four.video.dtype.kind) == ("U", "O")  # for the checks to name


def test_chinese_pickles_of_python_2(tmp_path: Path) -> None:
    """Protocol 2 with byte strings, as Python 2 wrote UTF-8 text."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return b"U" + bytes([len(raw)]) + raw

    body = b"}" + text("features") + b"}" + text("text") + text("你好") + b"s" + text("audio_len") + b"K\x00ss"
    (tmp_path / "cherma_train.pkl").write_bytes(b"\x80\x02]" + body + text("label") + text("高兴") + b"sa.")
    sample = read(CHERMA, tmp_path)[1]["train"][0]
    assert (sample.text, sample.label, sample.audio) == ("你好", "高兴", None)


# ── one pickle of arrays ─────────────────────────────────────────────────────────────────────────────────────────────


def columns(n: int, audio: int = 74, video: int = 35, **more: Any) -> dict[str, Any]:
    out = {
        "raw_text": np.array([f"text {i}" for i in range(n)]),
        "audio": RNG.standard_normal((n, 6, audio)).astype("f4"),
        "vision": RNG.standard_normal((n, 4, video)).astype("f4"),
        "id": [f"video$_${i}" for i in range(n)],
        "regression_labels": np.linspace(-1, 1, n).astype("f4"),
        "audio_lengths": [3] * n,
        "vision_lengths": np.full(n, 2),
        "text_bert": np.zeros((n, 3, 5)),
        "annotations": ["Positive"] * n,
    }
    return out | more


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_in_one_pickle(tmp_path: Path, protocol: int) -> None:
    content = {"train": columns(4), "valid": columns(2), "test": columns(3)}
    content["train"]["audio"][1, 0, 0] = -np.inf
    content["train"]["vision"][2, 1] = np.nan
    source, found = read(MOSEI, dump(tmp_path / "unaligned_50.pkl", content, protocol))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 4, "valid": 2, "test": 3}
    assert source.widths == {"audio": 74, "video": 35}
    sample = found["train"][1]
    assert (sample.id, sample.text, sample.where) == ("video$_$1", "text 1", "unaligned_50.pkl train row 1")
    assert sample.label == float(np.float32(-1 / 3))
    assert (sample.audio_length, sample.video_length) == (3, 2)
    for i, s in enumerate(found["train"]):
        assert np.array_equal(s.audio, content["train"]["audio"][i])  # type: ignore[arg-type]
        assert np.array_equal(s.video, content["train"]["vision"][i], equal_nan=True)  # type: ignore[arg-type]


def test_arrays_with_dev_and_without_lengths_or_ids(tmp_path: Path) -> None:
    content = columns(2, 25, 177)
    for name in ("audio_lengths", "vision_lengths", "id"):
        del content[name]
    content["regression_labels"] = content["regression_labels"].reshape(2, 1)
    source, found = read(SIMS, dump(tmp_path / "ch-simsv2s.pkl", {"dev": content}))
    assert source.splits == ["valid"]
    assert [s.id for s in found["valid"]] == ["valid-00000", "valid-00001"]
    assert [s.audio_length for s in found["valid"]] == [None, None]
    assert [s.label for s in found["valid"]] == [-1.0, 1.0]


def test_a_folder_with_two_pickles_for_a_split_asks_which(tmp_path: Path) -> None:
    dump(tmp_path / "aligned_50.pkl", {"train": columns(2)})
    dump(tmp_path / "unaligned_50.pkl", {"train": columns(2)})
    output = faults_of(MOSEI, tmp_path)
    assert "train stands in several files, name the one you mean" in output
    assert "unaligned_50.pkl" in output
    assert "aligned_50.pkl" in output
    assert len(read(MOSEI, tmp_path / "aligned_50.pkl")[1]["train"]) == 2


def test_all_faults_of_pickles_come_at_once(tmp_path: Path) -> None:
    dump(
        tmp_path / "meld_train.pkl",
        [row(), "text only", {"features": {"speech": 1}, "label": "joy"}, {"text": "no label"}],
    )
    dump(tmp_path / "meld_valid.pkl", {"a": 1})
    (tmp_path / "meld_test.pkl").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    output = faults_of(MELD, tmp_path, tmp_path / "none.pkl")
    for wanted in (
        "6 faults",
        "meld_train.pkl row 1: is a str;",
        "meld_train.pkl row 2: is a mapping of features, label;",
        "meld_train.pkl row 3: is a mapping of text;",
        "meld_valid.pkl: holds a mapping of a;",
        "meld_test.pkl: refused: asks for posix.system",
        "none.pkl: does not exist",
    ):
        assert wanted in output
    assert "row 0" not in output


def test_all_faults_of_arrays_come_at_once(tmp_path: Path) -> None:
    short = columns(3, raw_text=["only one"])
    bare = {"faces": np.zeros((2, 3, 4))}
    output = faults_of(MOSEI, dump(tmp_path / "x.pkl", {"train": short, "valid": bare, "test": [1]}))
    for wanted in (
        "4 faults",
        "the columns of train differ in length: text 1, id 3,",
        "valid has no raw_text, text, audio, vision or video; it has faces",
        "valid has no regression_labels or labels",
        "its test is a list",
    ):
        assert wanted in output


def test_widths_that_differ_between_splits_are_refused(tmp_path: Path) -> None:
    output = faults_of(MOSEI, dump(tmp_path / "x.pkl", {"train": columns(2), "test": columns(2, audio=73)}))
    assert "audio has several features per frame: 73, 74" in output


def test_a_pickle_whose_name_lacks_the_split(tmp_path: Path) -> None:
    assert "its name does not say which" in faults_of(MELD, dump(tmp_path / "features.pkl", [row()]))


# ── MELD's annotations ───────────────────────────────────────────────────────────────────────────────────────────────

HEADER = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime\n"


def csv_row(i: int, text: str, label: str = "joy", dialogue: str = "0", utterance: str = "0") -> str:
    return f'{i},"{text}",Ann,{label},positive,{dialogue},{utterance},1,2,"00:00:01,000","00:00:02,000"\n'


def test_annotations(tmp_path: Path) -> None:
    lines = csv_row(1, 'Say ""yes"", now', utterance="3") + csv_row(2, "two\nlines", "anger", "4", "5")
    (tmp_path / "train_sent_emo.csv").write_bytes(b"\xef\xbb\xbf" + (HEADER + lines).encode())
    (tmp_path / "dev_sent_emo.csv").write_text(
        (HEADER + csv_row(1, "It\x92s")).replace("\n", "\r\n"), encoding="utf-8", newline=""
    )
    (tmp_path / "train_sent_emo_dya.csv").write_text(HEADER + csv_row(1, "a"), encoding="utf-8")
    (tmp_path / "notes.csv").write_text("a,b\n", encoding="utf-8")
    source, found = read(MELD, tmp_path)
    assert source.splits == ["train", "valid"]
    assert source.notes == [f"{tmp_path.name}: left aside: notes.csv, train_sent_emo_dya.csv"]
    one, two = found["train"]
    assert (one.id, one.text, one.label) == ("train_dia0_utt3", 'Say "yes", now', "joy")
    assert (one.speaker, one.dialogue, one.turn, one.audio) == ("Ann", "0", 3, None)
    assert (two.text, two.turn, two.where) == ("two\nlines", 5, "train_sent_emo.csv line 4")
    assert found["valid"][0].text == "It\x92s"  # as published


def test_annotations_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "train_sent_emo.csv"
    path.write_bytes((HEADER + csv_row(1, "It’s") + csv_row(2, "café", utterance="1")).encode("cp1252"))
    source, found = read(MELD, path)
    assert [s.text for s in found["train"]] == ["It’s", "café"]
    assert source.notes == ["train_sent_emo.csv: some lines are not UTF-8 and were read as Windows-1252"]


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-16", "utf-16-le", "utf-8-sig"])
def test_chinese_annotations(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "train_sent_emo.csv"
    path.write_bytes(
        (HEADER + csv_row(1, "今天我真的很高兴！", "高兴") + csv_row(2, "别走", "悲伤", utterance="1")).encode(encoding)
    )
    source, found = read(get_task("cherma"), path)
    assert [(s.text, s.label) for s in found["train"]] == [("今天我真的很高兴！", "高兴"), ("别走", "悲伤")]
    assert (source.notes == []) == (encoding == "utf-8-sig")
    if encoding.startswith("gb"):
        assert "line 2 is not UTF-8, UTF-16 or punctuation of Windows-1252 (bytes " in faults_of(MELD, path)


def test_byte_strings_in_pickles(tmp_path: Path) -> None:
    rows = [{"features": {"text": "今天我真的很高兴".encode("gbk")}, "label": "高兴".encode("gbk")}]
    path = dump(tmp_path / "cherma_train.pkl", rows)
    assert [(s.text, s.label) for s in read(get_task("cherma"), path)[1]["train"]] == [("今天我真的很高兴", "高兴")]
    assert "row 0: its text is not UTF-8 or punctuation of Windows-1252 (bytes bd f1" in faults_of(MELD, path)


def test_all_faults_of_annotations_come_at_once(tmp_path: Path) -> None:
    good = csv_row(1, "a")
    (tmp_path / "train_x.csv").write_text(
        HEADER + good + "2,too,few\n" + csv_row(3, "b", utterance="x"), encoding="utf-8"
    )
    (tmp_path / "dev_x.csv").write_text("Text,Label\na,b\n", encoding="utf-8")
    (tmp_path / "test_x.csv").write_text(HEADER + '1,"open,\n', encoding="utf-8")
    (tmp_path / "all.csv").write_text(HEADER + good, encoding="utf-8")
    (tmp_path / "corpus.csv").write_text("id,split,text\n1,train,a\n", encoding="utf-8")
    output = faults_of(MELD, *sorted(tmp_path.iterdir()))
    for wanted in (
        "6 faults",
        "train_x.csv line 3: has 3 fields, the header 11",
        "train_x.csv line 4: Dialogue_ID '0', Utterance_ID 'x' do not name a place in a dialogue",
        "dev_x.csv: is not an annotation file like MELD's: its header needs Utterance, Speaker",
        "test_x.csv line 2: is not valid CSV",
        "all.csv: its name does not say which split",
        "corpus.csv: is not an annotation file like MELD's: its header needs Utterance, Speaker, Dialogue_ID, Utterance_ID, Emotion; "
        "it has id, split, text. Write a table of another layout as JSON lines",
    ):
        assert wanted in output


@pytest.mark.skipif(not (SHARED / "meld").is_dir(), reason="MELD's annotations are not in ../shared/data/meld")
def test_the_real_annotations() -> None:
    source, found = read(MELD, SHARED / "meld")
    order = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")
    counts = {split: Counter(s.label for s in rows) for split, rows in found.items()}
    assert [counts["train"][name] for name in order] == [4710, 1743, 1205, 1109, 683, 271, 268]
    assert [counts["valid"][name] for name in order] == [470, 163, 150, 153, 111, 22, 40]
    assert [counts["test"][name] for name in order] == [1256, 402, 281, 345, 208, 68, 50]
    assert {split: len({s.id for s in rows}) for split, rows in found.items()} == {
        "train": 9989,
        "valid": 1109,
        "test": 2610,
    }
    assert source.notes == []


@pytest.mark.skipif(not (SHARED / "cped").is_dir(), reason="CPED's annotations are not in ../shared/data/cped")
def test_a_corpus_of_the_same_layout() -> None:
    first, second = read(MELD, SHARED / "cped" / "valid_split.csv")[1]["valid"][:2]
    assert (first.text, first.speaker, first.label) == ("怎么了", "于春晓", "astonished")
    assert (second.id, second.dialogue, second.turn) == ("valid_dia32_000_utt32_000_001", "32_000", 1)


# ── features with annotations ────────────────────────────────────────────────────────────────────────────────────────


def test_features_with_annotations(tmp_path: Path) -> None:
    """Of 120 annotated rows one has no features, and one of the features has no annotation."""
    lines = [csv_row(i, f"Utterance number {i}!", utterance=str(i)) for i in range(120)]
    (tmp_path / "train_sent_emo.csv").write_text(HEADER + "".join(lines), encoding="utf-8")
    (tmp_path / "test_sent_emo.csv").write_text(HEADER + lines[0], encoding="utf-8")
    content = [row(f"utterance number {i} !", audio=np.full((2, 3), i)) for i in range(120) if i != 50]
    content.insert(80, row("something else", "anger"))
    dump(tmp_path / "meld_train.pkl", content)
    source, found = read(MELD, tmp_path)
    rows = found["train"]
    assert len(rows) == 121
    assert [s.id for s in rows if s.audio is None] == ["train_dia0_utt50"]
    assert [(i, s.id, s.text, s.speaker) for i, s in enumerate(rows) if s.speaker is None] == [
        (81, "train-00080", "something else", None)
    ]
    for sample in rows:
        if sample.speaker and sample.audio is not None:
            assert sample.audio[0, 0] == sample.turn
            assert sample.text == f"Utterance number {sample.turn}!"
    assert rows[0].where == "train_sent_emo.csv line 2, meld_train.pkl row 0"
    assert source.notes == [
        "train: 1 row(s) without features: kept without audio and video: "
        "train_sent_emo.csv line 52 'Utterance number 50!' [joy]",
        "train: 1 row(s) without annotation: kept without speaker and dialogue: "
        "meld_train.pkl row 80 'something else' [anger]",
        "test: has annotations only",
    ]


def test_features_that_do_not_align_are_refused_for_all_splits_at_once(tmp_path: Path) -> None:
    for split, published in (("train", "train"), ("valid", "dev")):
        lines = [csv_row(i, f"Utterance {i}", utterance=str(i)) for i in range(60)]
        (tmp_path / f"{published}_sent_emo.csv").write_text(HEADER + "".join(lines), encoding="utf-8")
        dump(tmp_path / f"meld_{split}.pkl", [row(f"Utterance {59 - i}") for i in range(60)])
    output = faults_of(MELD, tmp_path)
    assert "2 faults" in output
    assert output.count("first mismatch: row 0, 'Utterance 0' [joy] against 'Utterance 59' [joy]") == 2
    assert "(train)" in output
    assert "(valid)" in output


# ── sources ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_does_not_go_together(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", {"text": "a", "label": "joy"})
    dump(tmp_path / "meld_train.pkl", [row()])
    assert "JSON lines and pickle do not go together" in faults_of(MELD, tmp_path)
    assert "is none of .jsonl, .csv, .pkl, .pickle" in faults_of(MELD, Path(__file__))
    (tmp_path / "empty").mkdir()
    known = "JSON lines (.jsonl), MELD CSV (.csv), MMSA CSV (.csv) or pickle (.pkl, .pickle)"
    assert f"holds no file of a known format: {known}" in faults_of(MELD, tmp_path / "empty")
    assert f"nothing to read: give {known}" in faults_of(MELD)
    (tmp_path / "empty" / "train.jsonl").touch()
    assert "train.jsonl: is empty" in faults_of(MELD, tmp_path / "empty")


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    path = dump(tmp_path / "meld_train.pkl", [row()])
    source, found = read(MELD, path, tmp_path, path)
    assert source.files == [path]
    assert len(found["train"]) == 1


@pytest.mark.parametrize("task", list(BUILT_IN))
def test_every_task_reads_own_samples(task: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", {"text": "a", "label": "x", "target": 1})
    sample = read(get_task(task), path)[1]["train"][0]
    assert sample.label == ("x" if get_task(task).kind == "classification" else 1)


def test_parts_in_other_processes_are_the_whole(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    write_lines(tmp_path / "train.jsonl", *({"id": i, "text": "a", "label": "joy", "audio": "a.npy"} for i in range(7)))
    write_lines(tmp_path / "train2_train.jsonl", *({"id": i, "text": "a", "label": "joy"} for i in range(7, 10)))
    source = open_source(MELD, [tmp_path])
    assert source.part is not None
    whole = [sample.id for sample in source.samples("train")]
    assert whole == [str(i) for i in range(10)]
    for n in (1, 3, 4, 10, 16):
        assert [sample.id for k in range(n) for sample in source.part("train", k, n)] == whole
    assert list(source.part("test", 0, 2)) == []
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(_ids, source.part).result()
    assert there == whole


def _ids(part: Any) -> list[str]:
    return [sample.id for k in range(3) for sample in part("train", k, 3)]
