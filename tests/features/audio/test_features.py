"""Features of sound: against float64 signal processing, transformers' own models, openSMILE's own output, and sounds whose truth is known."""

from __future__ import annotations

import importlib.util
import math
import sys

import numpy as np
import pytest

from tests.features.sounds import joined, noise, pooled, silence, tone
from trainer.features.audio import log_mel
from trainer.features.audio.features import audio_features, feature_names
from trainer.features.recipe import LogMel, OpenSmile
from trainer.features.timeline import average_by_time, frame_count
from trainer.features.types import ClipError, Sound

PITCH, VOICED, LEVEL = "log2 pitch", "voiced share", "log RMS"


def column(section: LogMel, sound: Sound, name: str) -> np.ndarray:
    return audio_features(section)(sound).values_TF[:, feature_names(section).index(name)]


# ---- the time axis


@pytest.mark.parametrize(
    ("samples", "rate", "expected"),
    [(0, 25, 1), (1, 25, 1), (320, 50, 1), (480, 50, 2), (479, 50, 1), (16000, 12.5, 13)],
)
def test_a_sound_has_its_seconds_times_the_rate_rounded(samples: int, rate: float, expected: int) -> None:
    assert frame_count(samples, 16000, rate) == expected


def test_means_by_time_are_those_of_a_loop_over_the_rows() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        times = np.sort(random.uniform(0, 3, random.integers(1, 60)))
        rows, rate = random.normal(size=(len(times), 3)), random.uniform(1, 20)
        count = max(1, int(3 * rate))
        expected = []
        for k in range(count):
            inside = [row for row, time in zip(rows, times, strict=True) if k / rate <= time < (k + 1) / rate]
            nearest = min(range(len(times)), key=lambda i: abs(times[i] - (k + 0.5) / rate))
            expected.append(np.mean(inside, axis=0) if inside else rows[nearest])
        np.testing.assert_allclose(average_by_time(rows, times, rate, count), expected, rtol=1e-6, atol=1e-6)


def test_times_on_a_boundary_belong_to_the_later_frame() -> None:
    times = np.arange(300) / 100.0
    rows = np.arange(300.0)[:, None]
    np.testing.assert_allclose(average_by_time(rows, times, 100 / 3, 100)[:, 0], np.arange(100) * 3 + 1)


# ---- log-mel, energy, pitch


def reference_log_mel(samples: np.ndarray, sampling_rate: int, bands: int, rate: float, count: int) -> np.ndarray:
    """The definition in float64: every window by itself, Slaney's mel scale from its formula, means by a loop."""
    hop, window = sampling_rate // 100, round(0.025 * sampling_rate)
    size = 2 ** math.ceil(math.log2(window))
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)

    def mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)

    def hertz(value: float) -> float:
        return value * 200 / 3 if value < 15 else 1000 * math.exp((value - 15) * math.log(6.4) / 27)

    edges = [hertz(value) for value in np.linspace(mel(50), mel(sampling_rate / 2), bands + 2)]
    bins = np.arange(size // 2 + 1) * sampling_rate / size
    filters = np.zeros((bands, len(bins)))
    for band, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
        filters[band] = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
    signal = samples.astype(np.float64)
    inside: list[list[np.ndarray]] = [[] for _ in range(count + 2)]
    j = 0
    while (j + 0.5) * hop < len(signal):
        first = j * hop + hop // 2 - window // 2
        window_n = np.array([signal[i] if 0 <= i < len(signal) else 0.0 for i in range(first, first + window)])
        power = np.abs(np.fft.rfft(window_n * taper, size)) ** 2
        inside[math.floor((j + 0.5) * hop / sampling_rate * rate + 1e-9)].append(
            np.log(np.maximum(filters @ power, 1e-10))
        )
        j += 1
    return np.array([np.mean(rows, axis=0) for rows in inside[:count]])


@pytest.mark.parametrize(
    ("sampling_rate", "bands", "rate"), [(16000, 40, 25.0), (16000, 80, 100.0), (22050, 64, 30.0), (8000, 24, 12.5)]
)
def test_bands_are_those_of_a_reference_in_float64(sampling_rate: int, bands: int, rate: float) -> None:
    random = np.random.default_rng(2)
    samples = random.normal(0, 0.05, round(0.73 * sampling_rate))
    samples += 0.4 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / sampling_rate)
    samples = samples.astype(np.float32)
    section = LogMel(kind="log_mel", sampling_rate=sampling_rate, bands=bands, rate=rate, pitch=False, energy=False)
    found = audio_features(section)(Sound(samples, sampling_rate)).values_TF
    expected = reference_log_mel(samples, sampling_rate, bands, rate, len(found))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("frequency", [62.0, 70.0, 110.0, 155.5, 220.0, 347.0, 520.0, 590.0])
def test_a_tone_has_its_pitch_and_its_band(frequency: float) -> None:
    section = LogMel(kind="log_mel")
    names, values = feature_names(section), audio_features(section)(tone(frequency, 1.0)).values_TF[2:-2]
    np.testing.assert_allclose(100 * 2 ** values[:, names.index(PITCH)], frequency, rtol=0.01)
    assert (values[:, names.index(VOICED)] == 1).all()
    np.testing.assert_allclose(values[:, names.index(LEVEL)], math.log(0.3 / math.sqrt(2)), atol=0.05)


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 2500.0, 6000.0])
def test_the_band_with_the_most_energy_has_the_tone(frequency: float) -> None:
    section = LogMel(kind="log_mel", pitch=False, energy=False)
    mels = [
        hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4) for hz in (50, 8000, frequency)
    ]
    place = (mels[2] - mels[0]) / (mels[1] - mels[0]) * (section.bands + 1) - 1  # band b has its middle at b
    found = audio_features(section)(tone(frequency, 0.5)).values_TF.mean(0).argmax()
    assert abs(found - place) <= 0.6


def test_a_voice_with_harmonics_has_the_pitch_of_its_fundamental() -> None:
    times = np.arange(32000) / 16000
    pitch = 120 * 2 ** (times / 2)  # from 120 to 240 Hz
    phase = 2 * np.pi * np.cumsum(pitch) / 16000
    voice = sum(np.sin(k * phase) / k for k in range(1, 12))
    found = column(LogMel(kind="log_mel"), Sound((0.1 * np.asarray(voice)).astype(np.float32), 16000), PITCH)
    middles = (np.arange(len(found)) + 0.5) / 25
    np.testing.assert_allclose(found[2:-2], np.log2(1.2 * 2 ** (middles / 2))[2:-2], atol=math.log2(1.02))


def test_periods_are_those_of_the_definition() -> None:
    random = np.random.default_rng(6)
    times = np.arange(log_mel.yin_length(8000)) / 8000
    windows = np.array(
        [
            np.sin(2 * np.pi * f * times)
            + 0.3 * np.sin(4 * np.pi * f * times + 1)
            + random.normal(0, level, len(times))
            for f, level in ((75, 0.0), (133, 0.05), (210, 0.2), (480, 0.4), (300, 5.0))
        ]
    )
    found, aperiodic = log_mel.yin(windows, 8000)
    for x, pitch, distance in zip(windows, found, aperiodic, strict=True):
        longest = math.ceil(8000 / 60)
        d = [sum((x[i] - x[i + p]) ** 2 for i in range(2 * longest)) for p in range(longest + 2)]
        normal = [1.0, *(d[p] * p / sum(d[1 : p + 1]) for p in range(1, longest + 2))]
        inside = range(math.floor(8000 / 600), longest + 1)
        deep = [p for p in inside if normal[p] < 0.1 and normal[p - 1] > normal[p] <= normal[p + 1]]
        best = deep[0] if deep else min(inside, key=normal.__getitem__)
        place = best + (d[best - 1] - d[best + 1]) / (2 * (d[best - 1] - 2 * d[best] + d[best + 1]))
        assert pitch == pytest.approx(8000 / min(max(place, best - 0.5), best + 0.5), rel=1e-6)
        assert distance == pytest.approx(normal[best], abs=1e-9)


def test_silence_is_at_the_floors_and_noise_has_no_pitch() -> None:
    section = LogMel(kind="log_mel")
    names = feature_names(section)
    quiet = audio_features(section)(silence(1.0)).values_TF
    assert quiet.shape == (25, len(names)) == (25, 43)
    np.testing.assert_allclose(quiet[:, :40], math.log(1e-10))
    np.testing.assert_allclose(quiet[:, names.index(LEVEL)], math.log(1e-5))
    assert (quiet[:, [names.index(PITCH), names.index(VOICED)]] == 0).all()
    loud = audio_features(section)(noise(2.0)).values_TF
    assert loud[:, names.index(VOICED)].mean() < 0.05
    assert (loud[loud[:, names.index(VOICED)] == 0, names.index(PITCH)] == 0).all()
    np.testing.assert_allclose(loud[:, names.index(LEVEL)].mean(), math.log(0.1), atol=0.02)


def test_half_voiced_frames_keep_the_pitch_of_their_voiced_half() -> None:
    sound = joined(tone(200, 0.5), silence(0.5))
    pitch, share = (column(LogMel(kind="log_mel", rate=2), sound, name) for name in (PITCH, VOICED))
    assert share[0] > 0.95
    assert share[1] < 0.1
    np.testing.assert_allclose(100 * 2 ** pitch[0], 200, rtol=0.01)
    slow = column(LogMel(kind="log_mel", rate=1), sound, PITCH)
    np.testing.assert_allclose(100 * 2**slow, 200, rtol=0.02)  # not the mean with the silence


def test_twice_the_loudness_adds_the_logarithm_of_two_and_of_four() -> None:
    section = LogMel(kind="log_mel")
    quiet = noise(1.0, 0.05)
    loud = Sound(2 * quiet.samples_n, 16000)
    difference = audio_features(section)(loud).values_TF - audio_features(section)(quiet).values_TF
    np.testing.assert_allclose(difference[:, feature_names(section).index(LEVEL)], math.log(2), atol=1e-5)
    np.testing.assert_allclose(difference[:, :40], math.log(4), atol=1e-5)


def test_the_level_is_that_of_the_frames_own_samples() -> None:
    sound = noise(0.71, 0.1, seed=4)
    found = column(LogMel(kind="log_mel", rate=30), sound, LEVEL)
    for k, value in enumerate(found):
        own = [s for i, s in enumerate(sound.samples_n.astype(float)) if k / 30 <= (i + 0.5) / 16000 < (k + 1) / 30]
        assert value == pytest.approx(math.log(math.sqrt(sum(s * s for s in own) / len(own))), abs=1e-5)


def test_where_blocks_end_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    section, sound = LogMel(kind="log_mel"), joined(tone(150, 0.6), noise(0.6))
    whole = audio_features(section)(sound).values_TF
    monkeypatch.setattr(log_mel, "BLOCK", 7)
    np.testing.assert_allclose(audio_features(section)(sound).values_TF, whole, atol=1e-5)


@pytest.mark.parametrize("sampling_rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("rate", [1.0, 23.976, 100.0])
def test_every_rate_gives_its_number_of_finite_frames(sampling_rate: int, rate: float) -> None:
    section = LogMel(kind="log_mel", sampling_rate=sampling_rate, rate=rate)
    for seconds in (0.004, 0.5, 1.234):
        features = audio_features(section)(tone(200, seconds, rate=sampling_rate))
        expected = max(1, math.floor(round(seconds * sampling_rate) / sampling_rate * rate + 0.5))
        assert features.values_TF.shape == (expected, 43)
        assert np.isfinite(features.values_TF).all()
        assert features.valid_T.all()
        assert features.values_TF.dtype == np.float32


def test_one_sample_is_one_frame_and_no_sample_is_one_that_is_not_valid() -> None:
    extract = audio_features(LogMel(kind="log_mel"))
    one = extract(Sound(np.array([0.5], np.float32), 16000))
    assert one.values_TF.shape == (1, 43)
    assert np.isfinite(one.values_TF).all()
    assert one.valid_T.tolist() == [True]
    none = extract(Sound(np.zeros(0, np.float32), 16000))
    assert (none.values_TF.shape, none.valid_T.tolist(), none.values_TF.any()) == ((1, 43), [False], False)
    assert [note.kind for note in none.notes] == ["empty"]


def test_sound_that_cannot_be_read_is_refused() -> None:
    extract = audio_features(LogMel(kind="log_mel"))
    broken = tone(200, 0.2)
    broken.samples_n[5] = np.nan
    with pytest.raises(ClipError, match="not finite"):
        extract(broken)
    with pytest.raises(ValueError, match="8000 Hz, and 16000"):
        extract(tone(200, 0.2, rate=8000))


def test_names_follow_the_section() -> None:
    section = LogMel(kind="log_mel", bands=8, energy=False, speech="feature")
    assert feature_names(section) == (*(f"mel {i}" for i in range(8)), PITCH, VOICED, "speech")
    assert audio_features(section).width == len(feature_names(section))


# ---- openSMILE


@pytest.mark.parametrize("chosen", ["eGeMAPSv02", "GeMAPSv01b", "ComParE_2016"])
def test_opensmile_is_the_packages_own(chosen: str) -> None:
    opensmile = pytest.importorskip("opensmile")
    sound = joined(tone(180, 0.5), noise(0.5))
    section = OpenSmile(kind="opensmile", set=chosen, rate=10)
    smile = opensmile.Smile(
        feature_set=opensmile.FeatureSet[chosen], feature_level=opensmile.FeatureLevel.LowLevelDescriptors
    )
    own = smile(sound.samples_n, 16000)[0].T  # descriptors of windows that begin every 10 ms
    middles = (np.arange(len(own)) + 1) / 100
    extract = audio_features(section)
    np.testing.assert_allclose(extract(sound).values_TF, pooled(own, middles, 10, 10), rtol=1e-5, atol=1e-5)
    assert feature_names(section) == tuple(smile.feature_names)
    assert extract.width == len(smile.feature_names)


def test_opensmile_takes_short_and_full_scale_sounds() -> None:
    pytest.importorskip("opensmile")
    extract = audio_features(OpenSmile(kind="opensmile"))
    for samples in (1, 100, 800, 1700):
        values = extract(Sound(np.full(samples, 1.0, np.float32), 16000)).values_TF
        assert np.isfinite(values).all()
    loudness = feature_names(OpenSmile(kind="opensmile")).index("Loudness_sma3")
    full = extract(tone(400, 0.5, level=1.0)).values_TF[3:-3, loudness]
    half = extract(tone(400, 0.5, level=0.5)).values_TF[3:-3, loudness]
    assert (full > half).all()  # 1.0 does not turn into -1.0


# ---- what is not installed


@pytest.mark.parametrize(
    ("package", "section", "remedy"),
    [
        ("librosa", LogMel(kind="log_mel"), r"pip install 'egmf-trainer\[clips\]'"),
        ("opensmile", OpenSmile(kind="opensmile"), r"pip install 'egmf-trainer\[opensmile\]'.*research only.*bought"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(
    package: str, section: LogMel | OpenSmile, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}, which is not installed: {remedy}"):
        audio_features(section)


def test_missing_silero_vad_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"silero-vad, which is not installed: pip install 'egmf-trainer\[clips\]'"):
        audio_features(LogMel(kind="log_mel", speech="mask"))
