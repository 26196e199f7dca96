"""Fewer frames a second: against loops over the time axis in fractions, and through prepare, training's config and predict."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.data.preparation.test_prepare import MELD, make, source
from tests.data.readers.test_readers import columns, dump
from trainer.config import RunConfig
from trainer.data.dataset import open_dataset
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.frames import FeatureSequence
from trainer.data.preparation.prepare import prepare, prepare_source
from trainer.data.preparation.resampling import resample, stated_rates
from trainer.data.task_input import TaskInput
from trainer.data.unlabelled.inputs import open_input
from trainer.data.unlabelled.reader import UnlabelledReader
from trainer.run.assemble import open_data
from trainer.tasks import get_task

RATES = {"audio": 100.0, "video": 25.0}


def by_fractions(values, mask, rate, max_rate):
    """Each window by exact overlaps of its interval with those of the frames; None where no frame in it counts."""
    rate, max_rate = Fraction(rate), Fraction(max_rate)
    end, out = len(values) / rate, []
    for n in range(math.ceil(end * max_rate)):
        start, stop = n / max_rate, min((n + 1) / max_rate, end)
        total, weight = np.zeros(values.shape[1]), Fraction(0)
        for t, frame in enumerate(values):
            shared = min(stop, (t + 1) / rate) - max(start, t / rate)
            if shared > 0 and mask[t]:
                total, weight = total + float(shared) * frame.astype(float), weight + shared
        out.append(total / float(weight) if weight else None)
    return out


@pytest.mark.parametrize(("rate", "max_rate"), [(100, 10), (25, 10), (30, 20), (16, 15), (10, 3), (100, 30), (4, 1)])
@pytest.mark.parametrize("frames", [1, 2, 3, 9, 10, 57])
def test_windows_are_means_over_equal_durations(rate, max_rate, frames):
    rng = np.random.default_rng([rate, max_rate, frames])
    values, mask = rng.standard_normal((frames, 3)).astype("f4"), rng.random(frames) > 0.4
    mask[frames // 2] = True
    values[~mask] = 1e9  # is not read
    got = resample(FeatureSequence(values, mask, 7), rate, max_rate)
    expected = by_fractions(values, mask, rate, max_rate)
    valid = np.ones(len(expected), dtype=bool) if got.mask_T is None else got.mask_T
    assert [bool(v) for v in valid] == [e is not None for e in expected]
    assert got.padding == 7
    assert got.values_TF.dtype == np.float32
    for row, e in zip(got.values_TF, expected, strict=True):
        np.testing.assert_allclose(row, 0.0 if e is None else e, rtol=2e-6, atol=2e-6)


def test_streams_that_are_slow_enough_stay_as_they_are():
    stream = FeatureSequence(np.ones((5, 2), "f4"), None)
    assert resample(stream, 10.0, 10.0) is stream
    assert resample(stream, 9.0, 10.0) is stream


def test_a_wild_value_spoils_its_own_window_only():
    values = np.ones((8, 1), "f4")
    values[1] = 3e38
    means = resample(FeatureSequence(values, None), 4.0, 2.0).values_TF[:, 0]
    np.testing.assert_array_equal(means[1:], 1.0)
    assert means[0] == np.float32(1.5e38)


def test_prepare_writes_means_and_their_rates(tmp_path: Path):
    src = source(rates=dict(RATES))
    plain = prepare_source(MELD, src, tmp_path / "plain").record
    record = prepare_source(MELD, src, tmp_path / "slow", max_rate=50).record
    assert (record["rates"], record["source_rates"], record["max_rate"]) == ({"audio": 50, "video": 25}, RATES, 50)
    assert "max_rate" not in plain
    data = open_dataset(tmp_path / "slow")
    assert (data.rates, data.max_rate) == ({"audio": 50, "video": 25}, 50)
    for raw, sample in zip(make("train", 8), data["train"], strict=True):
        audio = raw.audio[: raw.audio_length]
        expected = [audio[i : i + 2].mean(0) for i in range(0, len(audio), 2)]
        np.testing.assert_allclose(sample.audio_TF, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(sample.video_TF, np.float32(raw.video[: raw.video_length]))


def test_max_rate_is_part_of_the_identity(tmp_path: Path):
    src = source(rates=dict(RATES))
    marks = {
        prepare_source(MELD, src, tmp_path / str(max_rate), max_rate=max_rate).fingerprint
        for max_rate in (None, 10, 50, 200)  # at 200 nothing is resampled
    }
    assert len(marks) == 4
    assert prepare_source(MELD, src, tmp_path / "10", max_rate=10).unchanged
    with pytest.raises(DataError, match=r"was prepared with max_rate=10, not no max_rate: choose another --out"):
        prepare_source(MELD, src, tmp_path / "10")


@pytest.mark.parametrize("max_rate", [0, -1, math.nan, math.inf])
def test_other_max_rates_are_refused(tmp_path: Path, max_rate):
    with pytest.raises(DataError, match="max_rate is a number of frames a second above 0"):
        prepare_source(MELD, source(rates=dict(RATES)), tmp_path / "out", max_rate=max_rate)


def test_an_unknown_rate_is_refused_by_the_name_of_its_modality(tmp_path: Path):
    with pytest.raises(ValueError, match=r"max_rate=10 needs the rate of video, which the source does not say"):
        prepare_source(MELD, source(rates={"audio": 100.0, "video": None}), tmp_path / "out", max_rate=10)
    assert not (tmp_path / "out").exists()
    without = {
        s: [replace(raw, video=None, video_length=None) for raw in make(s, 8)] for s in ("train", "valid", "test")
    }
    prepare_source(MELD, source(without, rates={"audio": 100.0, "video": None}), tmp_path / "out", max_rate=10)


def test_a_run_that_asks_for_a_rate_refuses_data_of_another(tmp_path: Path):
    for name, max_rate in (("slow", 10.0), ("plain", None)):
        prepare_source(MELD, source(rates=dict(RATES)), tmp_path / name, max_rate=max_rate)
    config = RunConfig(task="meld")
    for name, wanted, fault in (
        ("slow", 10.0, None),
        ("slow", None, None),
        ("plain", 10.0, "data.max_rate=10, but .* was prepared with no max_rate: prepare it with --max-rate 10"),
        ("slow", 5.0, "data.max_rate=5, but .* was prepared with 10: prepare it with --max-rate 5"),
    ):
        config.data.path, config.data.max_rate = str(tmp_path / name), wanted
        if fault is None:
            open_data(config)
        else:
            with pytest.raises(ValueError, match=fault):
                open_data(config)


def _write(path: Path, samples: list[dict]) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def test_samples_to_predict_are_resampled_as_the_run_was_trained(tmp_path: Path):
    audio = np.random.default_rng(0).standard_normal((40, 4)).astype("f4")
    np.save(tmp_path / "a.npy", audio)
    expected = TaskInput(
        MELD, {"audio": 4, "video": 0}, {"audio": 10.0, "video": None}, max_rate=10.0,
        source_rates={"audio": 100.0, "video": None},
    )  # fmt: skip
    lines = [{"id": "said", "rate": {"audio": 20}}, {"id": "unsaid"}, {"id": "slow", "rate": {"audio": 8}}]
    path = _write(tmp_path / "in.jsonl", [{**line, "text": "words", "audio": "a.npy"} for line in lines])
    tasks = {"meld": expected}
    with UnlabelledReader(open_input([path], tasks), tasks) as reader:
        said, unsaid, slow = reader
    np.testing.assert_allclose(said.sample.audio_TF, audio.reshape(20, 2, 4).mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(unsaid.sample.audio_TF, audio.reshape(4, 10, 4).mean(1), rtol=1e-5, atol=1e-6)
    assert slow.sample is None
    assert slow.faults == ["another rate of audio (8 frames a second, the run's data have 10: resample)"]


def test_own_samples_with_rates_by_several_processes(tmp_path: Path):
    rng = np.random.default_rng(0)
    lines = []
    for i, split in enumerate(["train"] * 6 + ["valid"] * 3 + ["test"] * 3):
        np.save(tmp_path / f"{i}.npy", rng.standard_normal((30, 4)).astype("f4"))
        line = {"id": str(i), "text": "words", "label": "joy", "split": split, "audio": f"{i}.npy"}
        lines.append({**line, "rate": {"audio": 30}})
    path = _write(tmp_path / "samples.jsonl", lines)
    one, two = (prepare(MELD, [path], tmp_path / f"out{n}", max_rate=10, workers=n) for n in (1, 2))
    assert one.fingerprint == two.fingerprint
    assert one.record["splits"]["train"]["audio_frames"]["max"] == 10


def test_rates_that_published_files_do_not_say_can_be_given(tmp_path: Path):
    splits = {
        split: columns(n, audio_lengths=[4] * n, vision_lengths=[4] * n, id=[f"{split} {i}" for i in range(n)])
        for split, n in (("train", 4), ("valid", 2), ("test", 3))
    }
    source_file, mosei = dump(tmp_path / "unaligned_50.pkl", splits), get_task("mosei")
    with pytest.raises(ValueError, match=r"of published files --rate audio=N"):
        prepare(mosei, [source_file], tmp_path / "none", max_rate=5)
    record = prepare(mosei, [source_file], tmp_path / "out", max_rate=5, rates={"audio": 20.0, "video": 15.0}).record
    assert record["source_rates"] == {"audio": 20.0, "video": 15.0}
    assert record["rates"] == {"audio": 5.0, "video": 5.0}


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"audio": 50.0}, "the source says that its audio has 100 frames a second, not 50"),
        ({"sound": 50.0}, "no stream sound, only audio and video"),
        ({"video": 0.0}, "the rate of video is a number of frames a second above 0, not 0"),
    ],
)
def test_rates_that_contradict_are_refused(given, fault):
    with pytest.raises(ValueError, match=fault):
        stated_rates({"audio": 100.0, "video": None}, given)
    assert stated_rates({"audio": 100.0, "video": None}, {"audio": 100.0}) == {"audio": 100.0, "video": None}
