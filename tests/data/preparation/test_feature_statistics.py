"""Statistics of features against numpy and scikit-learn over all valid frames at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.preprocessing import RobustScaler, StandardScaler

from tests.data.shards import read_part
from trainer.data.dataset import open_dataset
from trainer.data.preparation import feature_statistics, rows
from trainer.data.preparation.faults import DataError
from trainer.data.preparation.feature_statistics import CLIP, NORMAL_IQR, standardisations
from trainer.data.preparation.feature_summary import standardisation_json, standardisation_lines
from trainer.data.preparation.prepare import Summary, prepare_source
from trainer.data.readers.raw import RawSample, Source
from trainer.tasks import BUILT_IN

MELD = BUILT_IN["meld"]
WIDTH = 5


def samples(split: str) -> Iterator[RawSample]:
    """Ragged clips; frames with nan, missing audio; features of wild scales, one constant, one nearly always 0."""
    rng = np.random.default_rng(len(split))
    for i in range(60):
        n = int(rng.integers(1, 30))
        audio = rng.standard_normal((n, WIDTH)) * [4e-5, 48.0, 1.0, 0.0, 1.0] + [0.0, 1e5, -3.0, 7.3, 0.0]
        audio[:, 4] = (rng.random(n) < 0.05) * audio[:, 4]
        if i % 4 == 1 and n > 1:
            audio[rng.integers(n), 2] = np.inf
        given = None if i % 7 == 3 else audio.astype("f4")
        yield RawSample(f"{split}/{i}", split, "text", MELD.labels[i % 7], given, where=f"row {i}")


def source() -> Source:
    return Source("made", samples, ["train", "valid", "test"], [])


def valid_frames() -> np.ndarray:
    given = [raw.audio for raw in samples("train") if raw.audio is not None]
    frames = np.concatenate(given).astype(np.float64)
    return frames[np.isfinite(frames).all(1)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Summary]:
    folder = tmp_path_factory.mktemp("prepared")
    return {
        mode: prepare_source(MELD, source(), folder / mode, standardise=mode) for mode in ("mean", "robust", "none")
    }  # type: ignore[arg-type]


def test_mean_and_deviation_are_those_of_all_valid_frames_of_train(prepared: dict[str, Summary]) -> None:
    frames = valid_frames()
    entry = prepared["mean"].record["standardisation"]
    stats = entry["features"]["audio"]
    assert stats is not None
    scaler = StandardScaler().fit(frames)
    assert stats["frames"] == len(frames)
    np.testing.assert_allclose(stats["mean"], scaler.mean_, rtol=1e-12)
    np.testing.assert_allclose(np.square(stats["deviation"]), scaler.var_, rtol=1e-9, atol=1e-20)
    np.testing.assert_array_equal(stats["minimum"], frames.min(0))
    np.testing.assert_array_equal(stats["maximum"], frames.max(0))
    assert stats["constant"] == [3]
    assert entry["features"]["video"] is None
    applied = open_dataset(prepared["mean"].path).standardisation
    assert list(applied) == ["audio"]
    assert applied["audio"].limit == CLIP
    assert applied["audio"].scale_F[3] == 1.0
    varies = [0, 1, 2, 4]
    got = ((frames - applied["audio"].mean_F) * applied["audio"].scale_F)[:, varies]
    np.testing.assert_allclose(got, scaler.transform(frames)[:, varies], rtol=1e-5, atol=1e-4)


def test_robust_statistics_are_those_of_scikit_learn(prepared: dict[str, Summary]) -> None:
    frames = valid_frames()
    stats = prepared["robust"].record["standardisation"]["features"]["audio"]
    assert stats is not None
    scaler = RobustScaler(unit_variance=True).fit(frames)
    varies = [0, 1, 2]
    np.testing.assert_allclose(np.array(stats["median"])[varies], scaler.center_[varies], rtol=1e-12)
    np.testing.assert_allclose(np.array(stats["iqr"])[varies] / NORMAL_IQR, scaler.scale_[varies], rtol=1e-9)
    assert (stats["constant"], stats["narrow"]) == ([3], [4])
    applied = open_dataset(prepared["robust"].path).standardisation["audio"]
    np.testing.assert_allclose(applied.mean_F[varies], scaler.center_[varies], rtol=1e-6)
    assert applied.scale_F[4] == pytest.approx(1 / frames[:, 4].std(), rel=1e-6)  # its quartiles are 0


def test_statistics_are_the_same_bit_by_bit_for_any_processes_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = Source("parts", lambda split: read_part(split, 0, 1), ["train", "valid", "test"], [], part=read_part)
    monkeypatch.setattr(feature_statistics, "BLOCK_VALUES", 36)
    made = [
        prepare_source(MELD, src, tmp_path / str(n), drop_bad="train", standardise="robust", workers=n)
        for n in (1, 2, 3)
    ]
    monkeypatch.setattr(rows, "FLUSH_ROWS", 3)
    made.append(prepare_source(MELD, src, tmp_path / "small", drop_bad="train", standardise="robust"))
    assert all(one.record["standardisation"] == made[0].record["standardisation"] for one in made)
    assert len({one.fingerprint for one in made}) == 1
    stats = made[0].record["standardisation"]["features"]["audio"]
    kept = [raw for raw in read_part("train", 0, 1) if raw.audio is not None][:33]
    frames = np.concatenate([raw.audio[: raw.audio_length] for raw in kept]).astype(np.float64)
    frames = frames[np.isfinite(frames).all(1)]
    assert stats is not None
    assert stats["frames"] == len(frames)
    np.testing.assert_allclose(stats["mean"], frames.mean(0), atol=1e-14)
    np.testing.assert_allclose(stats["deviation"], frames.std(0), rtol=1e-12)


def test_large_means_do_not_eat_small_deviations() -> None:
    """Sums of squares would lose all digits: 1e8 squared is 1e16."""
    values = 1e8 + np.random.default_rng(0).integers(-4, 5, (5000, 3)).astype(np.float64)
    count, mean, square = 0, np.zeros(3), np.zeros(3)
    for block in np.array_split(values, 17):
        count, mean, square = feature_statistics.merge(count, mean, square, block)
    np.testing.assert_allclose(np.sqrt(square / count), (values - 1e8).std(0), rtol=1e-9)


def test_a_sample_for_quartiles_is_spread_over_all_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of 20 steps whose values depend on the step: every step is drawn about equally often."""
    count, width = 100_000, 2048
    step = np.arange(count) % 20
    monkeypatch.setattr(feature_statistics, "SAMPLE_VALUES", 5000 * width)
    blocks = (np.broadcast_to(part[:, None], (len(part), width)) for part in np.array_split(step, 9))
    drawn = feature_statistics._sample(blocks, count, width)
    assert drawn.shape == (5000, width)
    np.testing.assert_allclose(np.bincount(drawn[:, 0].astype(int), minlength=20) / 5000, 0.05, atol=0.005)
    whole = feature_statistics._sample(iter([np.arange(7.0)[:, None]]), 7, 1)
    np.testing.assert_array_equal(whole[:, 0], np.arange(7))


def test_the_fingerprint_knows_the_statistics_and_without_them_is_that_of_earlier_versions(
    prepared: dict[str, Summary], tmp_path: Path
) -> None:
    assert len({one.fingerprint for one in prepared.values()}) == 3
    assert open_dataset(prepared["none"].path).standardisation == {}
    out = tmp_path / "earlier"
    earlier = prepare_source(MELD, source(), out, standardise="none")
    record = json.loads((out / "record.json").read_text())
    del record["standardisation"]
    (out / "record.json").write_text(json.dumps(record))
    assert open_dataset(out).standardisation == {}
    assert prepare_source(MELD, source(), out, standardise="none").unchanged
    with pytest.raises(DataError, match=r"(?s)holds another dataset: the same samples .* statistics .* --force"):
        prepare_source(MELD, source(), out)
    touched = Source("made", lambda split: (replace(raw, text="other") for raw in samples(split)), ["train", "valid", "test"], [])  # fmt: skip
    with pytest.raises(DataError, match=r"holds another dataset of task meld \(fingerprint"):
        prepare_source(MELD, touched, out)
    replaced = prepare_source(MELD, source(), out, force=True)
    assert replaced.fingerprint == prepared["mean"].fingerprint != earlier.fingerprint
    with pytest.raises(DataError, match="prepared with standardise=mean, not robust: choose another --out"):
        prepare_source(MELD, source(), out, standardise="robust")
    with pytest.raises(DataError, match="standardise is one of none, mean, robust, not 'z'"):
        prepare_source(MELD, source(), out, standardise="z")  # type: ignore[arg-type]


def test_statistics_that_do_not_fit_are_refused(prepared: dict[str, Summary]) -> None:
    entry = prepared["mean"].record["standardisation"]
    with pytest.raises(ValueError, match="statistics of audio are of 5 features instead of 4"):
        standardisations(entry, {"audio": 4, "video": 0})
    stats = entry["features"]["audio"]
    assert stats is not None
    for bad in (float("nan"), 0.0):
        broken = {**entry, "features": {"audio": {**stats, "deviation": [bad, *stats["deviation"][1:]]}}}
        with pytest.raises(ValueError, match=r"not finite or have deviations of 0"):
            standardisations(broken, {"audio": WIDTH})  # type: ignore[arg-type]


def test_a_dataset_says_what_its_features_are_like(prepared: dict[str, Summary], tmp_path: Path) -> None:
    text = "\n".join(standardisation_lines(prepared["mean"].record))
    assert "standardised by mean and deviation of train, cut at 10 deviations" in text
    assert f"means {valid_frames()[:, 2].mean():.3g} to 1e+05" in text
    assert "1 of them (3) constant" in text
    assert "1 of them (1) with |mean| above 10 deviations" in text
    assert "warning: audio: deviations differ by a factor of" in text
    assert "1 of them (4) with equal quartiles" in "\n".join(standardisation_lines(prepared["robust"].record))
    assert standardisation_lines(prepared["none"].record) == ["features: not standardised (--standardise=none)"]

    def far(split: str) -> Iterator[RawSample]:
        for i, raw in enumerate(samples(split)):
            yield replace(raw, audio=None if raw.audio is None else raw.audio + np.float32(1e4) * (i == 5))

    record = prepare_source(MELD, Source("far", far, ["train", "valid", "test"], []), tmp_path / "far", standardise="robust").record  # fmt: skip
    summary = standardisation_json(record)["features"]["audio"]
    assert summary is not None
    assert 2 in summary["far"]
    assert "with values beyond 100 deviations" in "\n".join(standardisation_lines(record))


def test_no_frame_in_train_is_no_statistics(tmp_path: Path) -> None:
    def without(split: str) -> Iterator[RawSample]:
        return (replace(raw, audio=None) if split == "train" else raw for raw in samples(split))

    src = Source("made", without, ["train", "valid", "test"], [], widths={"audio": WIDTH, "video": 0})
    record = prepare_source(MELD, src, tmp_path / "out").record
    assert record["standardisation"]["features"]["audio"] is None
    assert open_dataset(tmp_path / "out").standardisation == {}
    assert "warning: audio: not standardised, train has no valid frame" in standardisation_lines(record)
