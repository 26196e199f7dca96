"""Opening prepared datasets: views of the map, order, history, pickling, and clear refusals."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from torch.utils.data import DataLoader

from trainer.data.dataset import SplitView, open_dataset
from trainer.data.preparation import rows
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.prepare import prepare_source
from trainer.data.readers.raw import RawSample, Source
from trainer.tasks import BUILT_IN

MELD = BUILT_IN["meld"]
SPLITS = ("train", "valid", "test")


def make(split: str) -> list[RawSample]:
    """Conversations whose rows and turns are out of order and have gaps; the same dialogue ids in every split."""
    rng = np.random.default_rng(len(split))
    out = []
    for i in rng.permutation(30):
        audio = None if i % 5 == 0 else rng.standard_normal((8, 4)).astype("f4")
        video = rng.standard_normal((5, 3)).astype("f4")
        if i % 7 == 3:
            video[i % 5] = np.nan
        video[1 + i % 5 :] = 0.0  # padding
        place = (str(i % 4), int(i) * 3) if i != 11 else (None, None)
        out.append(
            RawSample(
                f"{split}/{i}", split, f"{split} 说{i}", MELD.labels[i % 7], audio, video, None, 1 + i % 5,
                speaker=f"S{i % 3}", dialogue=place[0], turn=place[1], kind="local" if i % 2 else None,
            )
        )  # fmt: skip
    return out


RAW = {split: make(split) for split in SPLITS}


def write(out: Path, raw: dict[str, list[RawSample]]) -> Path:
    prepare_source(MELD, Source("test", lambda split: iter(raw[split]), list(SPLITS), []), out)
    return out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows, "FLUSH_ROWS", 7)  # several record batches
    return write(tmp_path / "data", RAW)


def mapped(folder: Path) -> list[tuple[int, int]]:
    """The addresses at which this process has files of `folder` mapped, as the kernel says."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0].split("-") for line in lines if str(folder.resolve()) in line]
    return [(int(start, 16), int(stop, 16)) for start, stop in places]


def test_samples_are_those_of_the_source(folder: Path) -> None:
    opened = open_dataset(folder)
    assert opened.task == MELD
    assert opened.splits == list(SPLITS)
    assert opened.widths == {"audio": 4, "video": 3}
    assert opened.rates == {"audio": None, "video": None}
    for split in SPLITS:
        view = opened[split]
        assert len(view) == len(RAW[split]) == len(list(view))
        for i, raw in enumerate(RAW[split]):
            sample = view[i]
            assert (sample.id, sample.text, sample.speaker, sample.kind) == (raw.id, raw.text, raw.speaker, raw.kind)
            assert (sample.dialogue, sample.turn) == (raw.dialogue, raw.turn)
            assert sample.target == MELD.labels.index(raw.label)
            assert sample.history == []
            if raw.audio is None:
                assert sample.audio_TF is None
            else:
                np.testing.assert_array_equal(sample.audio_TF, raw.audio)
            published = raw.video[: raw.video_length]
            good = np.isfinite(published).all(axis=1)
            if not good.any():
                assert sample.video_TF is None
                continue
            np.testing.assert_array_equal(sample.video_TF, np.where(good[:, None], published, 0))
            if good.all():
                assert sample.video_mask_T is None
            else:
                np.testing.assert_array_equal(sample.video_mask_T, good)
        assert view.ids == [r.id for r in RAW[split]]
        assert list(view.texts()) == [r.text for r in RAW[split]]
        np.testing.assert_array_equal(view.targets(), [MELD.labels.index(r.label) for r in RAW[split]])
        assert view.kinds() == [r.kind for r in RAW[split]]
        frames = [sum(len(x) for x in (s.audio_TF, s.video_TF) if x is not None) for s in view]
        np.testing.assert_array_equal(view.lengths(), np.add([len(r.text) for r in RAW[split]], frames))


def test_features_are_views_of_the_file_and_cost_no_memory(folder: Path) -> None:
    before = pa.total_allocated_bytes()
    opened = open_dataset(folder)
    samples = [sample for split in SPLITS for sample in opened[split]]
    assert pa.total_allocated_bytes() - before < 20_000  # masks of the few repaired frames
    arrays = [array for s in samples for array in (s.audio_TF, s.video_TF) if array is not None]
    assert len(arrays) > 100
    for array in arrays:
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert not array.flags.owndata
        assert not array.flags.writeable
        at = array.ctypes.data
        assert any(start <= at and at + array.nbytes <= stop for start, stop in mapped(folder))


def test_places_count_from_both_ends(folder: Path) -> None:
    view = open_dataset(folder)["test"]
    assert view[-1].id == view[len(view) - 1].id == view[np.int64(29)].id == RAW["test"][-1].id
    for i in (30, -31):
        with pytest.raises(IndexError):
            view[i]


@pytest.mark.parametrize("history", [1, 3, 100])
def test_history_is_what_was_said_before_in_the_same_conversation_and_split(folder: Path, history: int) -> None:
    opened = open_dataset(folder, history=history)
    for split in SPLITS:
        for sample, raw in zip(opened[split], RAW[split], strict=True):
            output = [
                r for r in RAW[split] if r.dialogue is not None and r.dialogue == raw.dialogue and r.turn < raw.turn
            ]
            output = sorted(output, key=lambda r: r.turn)[-history:]
            assert sample.history == [(r.speaker, r.text) for r in output]
    assert max(len(s.history) for s in opened["train"]) == min(history, 7)


def test_history_without_turns_or_with_equal_turns(tmp_path: Path) -> None:
    def line(i: int, dialogue: str, turn: int | None) -> RawSample:
        return RawSample(str(i), "train", f"t{i}", "joy", dialogue=dialogue, turn=turn)

    places = [("a", None), ("b", None), ("a", None), ("c", 2), ("c", 1), ("c", 2), ("c", None), ("c", 3)]
    raw = {"train": [line(i, *place) for i, place in enumerate(places)]}
    raw |= {"valid": [RawSample("v", "valid", "x", "joy")], "test": [RawSample("t", "test", "x", "joy")]}
    opened = open_dataset(write(tmp_path / "data", raw), history=9)
    output = [[text for _, text in sample.history] for sample in opened["train"]]
    assert output == [[], [], ["t0"], ["t4"], [], ["t4"], [], ["t4", "t3", "t5"]]
    assert opened["valid"][0].history == []
    assert opened["train"][2].history == [("", "t0")]
    assert opened["train"].kinds() is None


def first(batch: list) -> tuple[str, float, int]:
    sample = batch[0]
    return sample.id, float(sample.video_TF.sum()) if sample.video_TF is not None else 0.0, len(sample.history)


@pytest.mark.parametrize("workers", [0, 2])
def test_loads_in_other_processes(folder: Path, workers: int) -> None:
    view = open_dataset(folder, history=2)["train"]
    loader = DataLoader(view, batch_size=1, num_workers=workers, collate_fn=first)
    assert list(loader) == [first([sample]) for sample in view]


def test_pickling_keeps_the_path(folder: Path, tmp_path: Path) -> None:
    opened = open_dataset(folder, history=2)
    packed = pickle.dumps((opened, opened["valid"]))
    assert len(packed) < 1000
    again, view = pickle.loads(packed)
    assert isinstance(view, SplitView)
    assert (again.fingerprint, again.history) == (opened.fingerprint, 2)
    assert [s.history for s in view] == [s.history for s in opened["valid"]]
    folder.rename(tmp_path / "moved")
    write(folder, {**RAW, "test": RAW["test"][:5]})
    with pytest.raises(DataError, match="replaced by another"):
        pickle.loads(packed)


def test_unknown_split_names_the_nearest(folder: Path) -> None:
    opened = open_dataset(folder)
    for name, near in {"dev": "valid", "validation": "valid", "tset": "test", "Train": "train"}.items():
        with pytest.raises(DataError, match=f"did you mean {near}"):
            opened[name]
    with pytest.raises(DataError, match="It has train, valid, test"):
        opened["zzz"]


def test_what_is_no_prepared_dataset(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder.*egmf prepare"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds the prepared datasets data"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="not a prepared dataset"):
        open_dataset(folder / "record.json")
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "format": 3}))
    with pytest.raises(DataError, match="format 3, newer than this version's 2: update"):
        open_dataset(folder)
    (folder / "record.json").write_text("{")
    with pytest.raises(DataError, match=r"record\.json is damaged"):
        open_dataset(folder)


def shorten(folder: Path) -> None:
    shard = next((folder / "train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-200])


def remove(folder: Path) -> None:
    next((folder / "test").glob("*.arrow")).unlink()


def scramble(folder: Path) -> None:
    shard = next((folder / "train").glob("*.arrow"))
    shard.write_bytes(bytes(len(shard.read_bytes())))


def unstate(folder: Path) -> None:
    (folder / "valid" / "state.json").write_text("{}")


def recount(folder: Path) -> None:
    record = json.loads((folder / "record.json").read_text())
    record["splits"]["valid"]["n"] -= 1
    (folder / "record.json").write_text(json.dumps(record))


def rewidth(folder: Path) -> None:
    record = json.loads((folder / "record.json").read_text())
    record["widths"]["audio"] = 5
    (folder / "record.json").write_text(json.dumps(record))


def untask(folder: Path) -> None:
    record = json.loads((folder / "record.json").read_text())
    record["task"]["labels"] = []
    (folder / "record.json").write_text(json.dumps(record))


@pytest.mark.parametrize("harm", [shorten, remove, scramble, unstate, recount, rewidth, untask])
def test_damage_is_named(folder: Path, harm) -> None:
    harm(folder)
    with pytest.raises(DataError, match=r"(?s)is damaged .*: prepare it again"):
        open_dataset(folder)


def test_opening_reads_no_features(tmp_path: Path) -> None:
    """A split of 30 MB opens by its descriptions alone."""
    values = np.ones((100, 74), "f4")

    def samples(split: str):
        return (RawSample(f"{split}/{i}", split, "text", "joy", values) for i in range(1000 if split == "train" else 1))

    prepare_source(MELD, Source("large", samples, list(SPLITS), []), tmp_path / "data")
    before = pa.total_allocated_bytes()
    view = open_dataset(tmp_path / "data")["train"]
    assert pa.total_allocated_bytes() - before < 100_000
    assert view[999].audio_TF.shape == (100, 74)


def test_history_must_not_be_negative(folder: Path) -> None:
    with pytest.raises(DataError, match="history"):
        open_dataset(folder, history=-1)
