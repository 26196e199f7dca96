"""Preparation: what is kept, repaired, refused, left out, recorded, and that nothing half-written stays."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from rich.console import Console

from tests.data.shards import broken_part, killed_part, read_part
from tests.distributed.processes import restore_interrupts
from trainer.data.dataset import open_dataset
from trainer.data.preparation import rows
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.prepare import prepare, prepare_source
from trainer.data.preparation.summary import summary_json, summary_table
from trainer.data.readers.raw import RawSample, Source
from trainer.tasks import BUILT_IN

MELD, MOSEI = BUILT_IN["meld"], BUILT_IN["mosei"]
PUBLISHED = Path(__file__).parents[3].parent / "shared" / "data" / "meld"


def make(split: str, count: int, regression: bool = False) -> list[RawSample]:
    """Clean samples, padded at the end, of several lengths."""
    rng = np.random.default_rng(len(split))
    out = []
    for i in range(count):
        label = round(float(rng.uniform(-3, 3)), 2) if regression else MELD.labels[i % 7]
        audio, video = rng.standard_normal((9, 4)).astype("f4"), rng.standard_normal((6, 3))
        audio[1 + i % 9 :], video[6 - i % 6 :] = 0.0, 0.0
        out.append(
            RawSample(f"{split}/{i}", split, f"text {i}", label, audio, video, 1 + i % 9, 6 - i % 6, where=f"row {i}")
        )
    return out


def source(samples: dict[str, list[RawSample]] | None = None, **changes: object) -> Source:
    samples = {s: make(s, 8) for s in ("train", "valid", "test")} if samples is None else samples
    plain = Source("test", lambda split: iter(samples[split]), list(samples), [])
    return replace(plain, **changes)


def with_train(*samples: RawSample, base: int = 8) -> Source:
    return source({"train": make("train", base) + list(samples), "valid": make("valid", 3), "test": make("test", 3)})


def odd(name: str = "odd", **changes: object) -> RawSample:
    audio, video = np.ones((5, 4), "f4"), np.ones((4, 3), "f4")
    return replace(RawSample(name, "train", "words", "joy", audio, video, 5, 4, where=f"of {name}"), **changes)


def refusal(src: Source, out: Path, task=MELD, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        prepare_source(task, src, out, **options)
    assert not out.exists()
    assert not list(out.parent.glob(".*"))
    return str(caught.value)


def test_content_is_that_of_the_source_without_its_padding(tmp_path: Path) -> None:
    src = source()
    summary = prepare_source(MELD, src, tmp_path / "out")
    loaded = datasets.load_from_disk(str(tmp_path / "out"))  # the library's own reader as reference
    assert list(loaded) == ["train", "valid", "test"]
    for split in loaded:
        for raw, row in zip(src.samples(split), loaded[split], strict=True):
            assert (row["id"], row["text"], row["label"]) == (raw.id, raw.text, raw.label)
            assert row["target"] == MELD.labels.index(raw.label)
            assert row["audio_frames"] == raw.audio_length
            assert row["video_frames"] == raw.video_length
            np.testing.assert_array_equal(
                np.float32(row["audio"]).reshape(-1, 4), np.float32(raw.audio[: raw.audio_length])
            )
            np.testing.assert_array_equal(
                np.float32(row["video"]).reshape(-1, 3), np.float32(raw.video[: raw.video_length])
            )
            assert row["audio_mask"] is None
    assert summary.record["widths"] == {"audio": 4, "video": 3}
    assert summary.record == json.loads((tmp_path / "out/record.json").read_text())
    assert os.listdir(tmp_path) == ["out"]


def test_missing_modalities_and_masks(tmp_path: Path) -> None:
    ones = np.ones((5, 4))
    holes, gone = ones.copy(), ones.copy()
    holes[1, 2], holes[3, 0], gone[:] = np.nan, -np.inf, np.nan
    padding = ones.copy()
    padding[3:] = np.nan  # behind the claimed length: no fault
    src = with_train(
        odd("none", audio=None, audio_length=None),
        odd("zero", audio=ones * 0, audio_length=0),
        odd("empty", audio=np.empty((0, 4)), audio_length=None),
        odd("whole", audio_length=None),
        odd("holes", audio=holes),
        odd("gone", audio=gone),
        odd("padding", audio=padding, audio_length=3),
        odd("ints", audio=ones.astype(int)),
        odd("overflow", audio=np.where(np.arange(5)[:, None] == 2, 1e300, ones)),
        base=1,
    )
    record = prepare_source(MELD, src, tmp_path / "out").record
    view = open_dataset(tmp_path / "out")["train"]
    by_id = {sample.id: sample for sample in view}
    assert [by_id[i].audio_TF for i in ("none", "zero", "empty", "gone")] == [None] * 4
    assert by_id["whole"].audio_TF.shape == (5, 4)
    assert by_id["padding"].audio_TF.shape == (3, 4)
    assert by_id["padding"].audio_mask_T is None
    np.testing.assert_array_equal(by_id["holes"].audio_mask_T, [True, False, True, False, True])
    np.testing.assert_array_equal(by_id["holes"].audio_TF, np.float32(ones) * [[1], [0], [1], [0], [1]])
    np.testing.assert_array_equal(by_id["overflow"].audio_mask_T, [True, True, False, True, True])
    assert by_id["ints"].audio_TF.dtype == np.float32
    assert by_id["holes"].video_TF.shape == (4, 3)
    entry = record["splits"]["train"]
    assert entry["missing"] == {"audio": 4, "video": 0}
    assert entry["masked_frames"] == {"audio": 3, "video": 0}
    kinds = {fault["kind"]: (fault["n"], fault["ids"], fault["action"]) for fault in record["faults"]}
    assert kinds == {
        "nan or inf in audio": (1, ["holes"], "frames masked"),
        "more than float32 can hold in audio": (1, ["overflow"], "frames masked"),
        "no finite frame in audio": (1, ["gone"], "counted as missing"),
    }


FAULTY = {
    "no id": {"id": "  "},
    "no text, audio or video": {
        "text": " \n",
        "audio": None,
        "audio_length": None,
        "video": None,
        "video_length": None,
    },
    "text that is no Unicode": {"text": "half \ud83d"},
    "no label": {"label": None},
    "unknown label": {"label": "angre"},
    "wrong dimension of audio": {"audio": np.ones((5, 7), "f4")},
    "wrong dimension of video": {"video": np.ones((4, 3, 1))},
    "audio that is no array of numbers": {"audio": np.array([["a"]])},
    "length beyond the array in audio": {"audio_length": 6},
    "length beyond the array in video": {"video": None, "video_length": 2},
    "negative length of video": {"video_length": -1},
    "length of audio that is no whole number": {"audio_length": 2.5},
    "turn that is no whole number": {"turn": 1.5},
    "turn beyond 64 bits": {"turn": 1 << 63},
    "duplicate id": {"id": "train/0"},
}


def test_all_faults_are_shown_together_and_nothing_stays(tmp_path: Path) -> None:
    samples = [odd(f"bad{i}", **changes) for i, changes in enumerate(FAULTY.values())]
    broken = with_train(*samples, odd("soft", audio=np.full((5, 4), np.nan)))
    message = refusal(replace(broken, splits=["train", "test"]), tmp_path / "new/folder/out")
    assert os.listdir(tmp_path) == []
    for i, kind in enumerate(FAULTY):
        (line,) = [line for line in message.splitlines() if line.strip().startswith(kind)]
        assert "(train 1), refused" in line
        assert f"of bad{i}" in line
    assert "'angre' (did you mean anger?)" in message
    assert "7 features per frame instead of 4" in message
    assert "split without samples: 1 (valid 1), refused: the source has no valid split" in message
    assert "no finite frame in audio: 1 (train 1), counted as missing" in message
    assert "--drop-bad" in message


@pytest.mark.parametrize("kind", FAULTY)
def test_drop_bad_leaves_just_the_faulty_out(tmp_path: Path, kind: str) -> None:
    clean = prepare_source(MELD, with_train(), tmp_path / "clean").record
    record = prepare_source(MELD, with_train(odd(**FAULTY[kind])), tmp_path / "out", drop_bad="train").record
    assert record["splits"]["train"]["n"] == 8
    assert [d["where"] for d in record["dropped"]["samples"]] == ["of odd"]
    assert record["dropped"]["n"] == {"train": 1, "valid": 0, "test": 0}
    assert record["splits"]["train"]["dropped"] == 1
    assert [f["action"] for f in record["faults"]] == ["left out"]
    assert open_dataset(tmp_path / "out")["train"].ids == open_dataset(tmp_path / "clean")["train"].ids
    assert record["fingerprint"] != clean["fingerprint"]


def test_valid_and_test_need_drop_bad_all(tmp_path: Path) -> None:
    test = [*make("test", 3), odd("bad", split="test", label=None)]
    src = source({"train": make("train", 3), "valid": make("valid", 3), "test": test})
    for mode in ("none", "train"):
        message = refusal(src, tmp_path / "out", drop_bad=mode)
        assert "--drop-bad=all" in message
        assert "--drop-bad leaves" not in message
    record = prepare_source(MELD, src, tmp_path / "out", drop_bad="all").record
    assert record["dropped"]["n"]["test"] == 1
    assert record["splits"]["test"]["n"] == 3


def test_strict_refuses_what_would_be_repaired(tmp_path: Path) -> None:
    message = refusal(with_train(odd(audio=np.full((5, 4), np.inf))), tmp_path / "out", strict=True)
    assert "no finite frame in audio: 1 (train 1), refused" in message
    assert "without --strict" in message
    prepare_source(MELD, with_train(), tmp_path / "out", strict=True)
    with pytest.raises(DataError, match="give one of them"):
        prepare_source(MELD, with_train(), tmp_path / "other", strict=True, drop_bad="all")


def test_of_equal_ids_the_one_in_the_test_split_stays(tmp_path: Path) -> None:
    train = [odd("a"), odd("a", where="again"), odd("b"), odd("c"), odd("d")]
    src = source({"train": train, "valid": [odd("b"), odd("c")], "test": [odd("c"), odd("e")]})
    message = refusal(src, tmp_path / "out")
    assert "duplicate id: 4 (valid 1, train 3), refused: the same id in test (2 times), the same id in valid" in message
    prepare_source(MELD, src, tmp_path / "out", drop_bad="all")
    opened = open_dataset(tmp_path / "out")
    assert [opened[split].ids for split in opened.splits] == [["a", "d"], ["b"], ["c", "e"]]


def test_widths_are_the_stated_or_the_commonest(tmp_path: Path) -> None:
    odd_one = with_train(odd(audio=np.ones((5, 7))))
    with pytest.raises(DataError, match=r"wrong dimension of audio: 14 .* instead of 7"):
        prepare_source(MELD, replace(odd_one, widths={"audio": 7}), tmp_path / "out")
    record = prepare_source(MELD, replace(odd_one, widths={"audio": 4}), tmp_path / "out", drop_bad="train").record
    assert record["widths"] == {"audio": 4, "video": 3}
    text = {s: [replace(r, audio=None, video=None, audio_length=None, video_length=None) for r in make(s, 2)] for s in
            ("train", "valid", "test")}  # fmt: skip
    prepare_source(MELD, source(text), tmp_path / "text")
    assert open_dataset(tmp_path / "text").widths == {"audio": 0, "video": 0}


def test_labels_are_read_with_care(tmp_path: Path) -> None:
    record = prepare_source(MELD, with_train(odd(label=" Joy\n")), tmp_path / "out").record
    assert record["faults"][0]["details"] == {"'Joy'": 1}
    assert record["faults"][0]["action"] == "read as 'joy'"
    assert open_dataset(tmp_path / "out")["train"][8].target == MELD.labels.index("joy")
    task = MELD.model_copy(update={"labels": ("Up", "UP", "down")})
    lines = [odd(str(i), label=label) for i, label in enumerate(["Up", "UP", "down", "up", 3])]
    clean = [odd("v", label="UP")], [odd("t", label="UP")]
    message = refusal(source({"train": lines, "valid": clean[0], "test": clean[1]}), tmp_path / "out2", task=task)
    assert "unknown label: 2 (train 2), refused: 'up' (did you mean Up?), '3'" in message


def test_numbers_are_kept_as_published_and_must_be_in_range(tmp_path: Path) -> None:
    splits = {s: make(s, 5, regression=True) for s in ("train", "valid", "test")}
    good = [np.float32(1 / 3), "-2.5", 3, -3.0000001, 0.0]
    splits["train"] += [odd(f"good{i}", label=value) for i, value in enumerate(good)]
    record = prepare_source(MOSEI, source(splits), tmp_path / "out").record
    targets = open_dataset(tmp_path / "out")["train"].targets()
    np.testing.assert_array_equal(targets[5:], [float(v) for v in good])
    expected = Counter(np.sign(targets).tolist())
    assert record["splits"]["train"]["labels"] == {
        "negative": expected[-1.0],
        "zero": expected[0.0],
        "positive": expected[1.0],
    }
    assert record["splits"]["train"]["target"]["std"] == pytest.approx(targets.std(), abs=1e-6)
    splits["train"] += [odd(f"bad{i}", label=v) for i, v in enumerate([3.1, "high", np.nan, None, True])]
    message = refusal(source(splits), tmp_path / "out2", task=MOSEI)
    for part in ("out-of-range value: 1", "3.1 is outside -3 to 3", "'high'", "label that is nan", "no label: 1"):
        assert part in message


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    def whole(split: str) -> Iterator[RawSample]:
        return read_part(split, 0, 1)

    seen: list[tuple[str, int]] = []
    src = Source("parts", whole, ["train", "valid", "test"], [], part=read_part)
    one = prepare_source(MELD, src, tmp_path / "one", drop_bad="train").record
    two = prepare_source(
        MELD,
        src,
        tmp_path / "two",
        drop_bad="train",
        workers=2,
        progress=lambda split, done, total: seen.append((split, done)),
    ).record
    assert one.pop("files") != two.pop("files")
    assert one == two
    assert [s.id for s in open_dataset(tmp_path / "one")["train"]] == open_dataset(tmp_path / "two")["train"].ids
    assert {("train", 34), ("valid", 30), ("test", 30)} <= set(seen)
    with pytest.raises(ValueError, match="cannot read row 7"):
        prepare_source(MELD, replace(src, part=broken_part), tmp_path / "three", workers=2)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_a_source_without_parts_says_that_one_process_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare_source(MELD, source(), tmp_path / "out", workers=2)
    assert "read by one process" in caplog.text


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    def of(src: Source, task=MELD, **options: object) -> str:
        return prepare_source(task, src, tmp_path / f"{len(os.listdir(tmp_path))}", **options).fingerprint

    first = of(source())
    assert of(source(name="elsewhere", notes=["note"])) == first
    splits = {s: make(s, 8) for s in ("train", "valid", "test")}
    turned = {**splits, "train": splits["train"][::-1]}
    touched = {**splits, "test": [replace(splits["test"][0], video=splits["test"][0].video + 1), *splits["test"][1:]]}
    spoken = {**splits, "valid": [replace(r, speaker="Ross") for r in splits["valid"]]}
    prompts = MELD.model_copy(update={"select": "acc"})
    others = [
        of(source(turned)),
        of(source(touched)),
        of(source(spoken)),
        of(source(), task=prompts),
        of(source(rates={"audio": 50.0, "video": None})),
        of(source(), drop_bad="train"),
    ]
    assert len({first, *others}) == 7


def test_what_is_there_is_replaced_only_knowingly(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    prepare_source(MELD, source(), out)  # an empty folder is free
    before = (out / "record.json").stat()
    again = prepare_source(MELD, source(), out)
    assert again.unchanged
    assert (out / "record.json").stat().st_ino == before.st_ino
    with pytest.raises(DataError, match=r"holds another dataset .* --force"):
        prepare_source(MELD, with_train(), out)
    with pytest.raises(DataError, match="task meld"):
        prepare(MOSEI, [], out)  # refused before anything is read
    with pytest.raises(DataError, match="drop_bad=none, not all"):
        prepare(MELD, [], out, drop_bad="all")
    assert (out / "record.json").stat().st_ino == before.st_ino
    changed = prepare_source(MELD, with_train(), out, force=True)
    assert not changed.unchanged
    assert open_dataset(out).fingerprint == changed.fingerprint
    shard = next((out / "train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:100])
    assert not prepare_source(MELD, with_train(), out).unchanged  # a damaged copy of the same is renewed
    assert len(open_dataset(out)["train"]) == 8
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(DataError, match="choose another --out"):
            prepare_source(MELD, source(), tmp_path / name, force=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "years"


def test_a_full_disk_and_a_broken_source_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(split: str) -> Iterator[RawSample]:
        yield from make(split, 3)
        raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        prepare_source(MELD, Source("torn", breaks, ["train"], []), tmp_path / "a/b")
    assert os.listdir(tmp_path) == []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rows.RowWriter, "write", full)
    assert "No space left on device; nothing was written" in refusal(source(), tmp_path / "out")


SLOW = """
import sys, time
from pathlib import Path
import numpy as np
from trainer.data.preparation.prepare import prepare_source
from trainer.data.readers.raw import RawSample, Source
from trainer.tasks import BUILT_IN

def samples(split):
    for i in range(3):
        yield RawSample(f"{split}/{i}", split, "text", "joy", np.ones((4, 2)))
    Path(sys.argv[1]).touch()
    time.sleep(60)

prepare_source(BUILT_IN["meld"], Source("slow", samples, ["train"], []), Path(sys.argv[2]))
"""


def test_signals_leave_nothing_and_the_next_cleans_up_after_a_kill(tmp_path: Path) -> None:
    stops = {signal.SIGINT: tmp_path / "int", signal.SIGTERM: tmp_path / "term", signal.SIGKILL: tmp_path / "kill"}
    running = {}
    for number, folder in stops.items():
        folder.mkdir()
        command = [sys.executable, "-c", textwrap.dedent(SLOW), str(tmp_path / f"begun{number}"), str(folder / "out")]
        running[number] = subprocess.Popen(
            command,
            stderr=subprocess.DEVNULL,
            preexec_fn=restore_interrupts,
        )
    for number, process in running.items():
        deadline = time.time() + 60
        while not (tmp_path / f"begun{number}").exists() and time.time() < deadline and process.poll() is None:
            time.sleep(0.02)
        if number == signal.SIGKILL:
            with pytest.raises(DataError, match="another process is preparing"):
                prepare_source(MELD, source(), stops[number] / "out")
        process.send_signal(number)
        assert process.wait(30) != 0
    assert os.listdir(stops[signal.SIGINT]) == []
    assert os.listdir(stops[signal.SIGTERM]) == []
    killed = stops[signal.SIGKILL]
    assert len(os.listdir(killed)) == 1
    bystander = killed / ".out.preparing-mine"
    bystander.mkdir()
    prepare_source(MELD, source(), killed / "out")
    assert sorted(os.listdir(killed)) == [bystander.name, "out"]


def test_a_killed_helper_is_a_fault_in_words(tmp_path: Path) -> None:
    src = Source("parts", lambda split: iter(()), ["train", "valid", "test"], [], part=killed_part)
    with pytest.raises(DataError, match=r"a worker process was killed.*fewer --workers than 2; nothing was written"):
        prepare_source(MELD, src, tmp_path / "out", workers=2)
    assert os.listdir(tmp_path) == []


def test_a_dataset_moved_aside_by_a_killed_replacement_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_source(MELD, source(), out)
    out.rename(tmp_path / ".out.replaced-1234")
    assert prepare_source(MELD, source(), out).unchanged
    assert os.listdir(tmp_path) == ["out"]


def test_memory_holds_one_batch_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FLUSH_BYTES", 1 << 20)

    def samples(split: str) -> Iterator[RawSample]:
        for i in range(40 if split == "train" else 1):
            yield RawSample(f"{split}/{i}", split, "text", "joy", np.ones((1000, 256), "f4"))

    tracemalloc.start()
    prepare_source(MELD, Source("large", samples, ["train", "valid", "test"], []), tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.arrow"))
    assert size > 40e6
    assert peak < 15e6


def test_summary_has_every_number_at_any_width(tmp_path: Path) -> None:
    src = with_train(odd(audio=np.full((5, 4), np.nan), text="12345"))
    record = prepare_source(MELD, src, tmp_path / "out").record
    entry = summary_json(record)["train"]
    raw = list(src.samples("train"))
    assert entry["n"] == 9
    assert entry["labels"] == {label: sum(r.label == label for r in raw) for label in MELD.labels}
    assert list(entry["labels"]) == list(MELD.labels)
    lengths = [r.audio_length for r in raw[:-1]]
    assert entry["audio_frames"] == {"mean": np.mean(lengths), "p50": 4, "p95": 8, "max": 8}
    assert entry["text_characters"]["max"] == 6
    for width in (60, 80, 200):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(summary_table(record))
        text = console.export_text()
        assert "…" not in text
        for label in MELD.labels:
            assert label in text
        assert "no finite frame in audio: 1 (train 1)" in " ".join(text.split())


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published MELD annotations are not at ../shared/data/meld")
def test_published_meld_annotations_give_the_published_counts(tmp_path: Path) -> None:
    record = prepare(MELD, [PUBLISHED], tmp_path / "out").record
    order = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")
    counts = {
        "train": (4710, 1743, 1205, 1109, 683, 271, 268),
        "valid": (470, 163, 150, 153, 111, 22, 40),
        "test": (1256, 402, 281, 345, 208, 68, 50),
    }
    for split, expected in counts.items():
        entry = summary_json(record)[split]
        assert entry["n"] == sum(expected)
        assert entry["labels"] == dict(zip(order, expected, strict=True))
    opened = open_dataset(tmp_path / "out", history=3)["test"]
    with (PUBLISHED / "test_sent_emo.csv").open(encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    by_place = {(int(r["Dialogue_ID"]), int(r["Utterance_ID"])): r for r in published}
    assert len(by_place) == len(opened) == 2610
    for sample, row in zip(opened, published, strict=True):
        dialogue, turn = int(row["Dialogue_ID"]), int(row["Utterance_ID"])
        before = [by_place[dialogue, t] for t in range(turn) if (dialogue, t) in by_place][-3:]
        assert [who for who, _ in sample.history] == [r["Speaker"] for r in before]
        assert sample.target == MELD.labels.index(row["Emotion"])
