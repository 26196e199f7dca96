"""Features of sound: against float64 signal processing, transformers' own models, openSMILE's own output, and sounds whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from tests.features.small_encoders import CONVOLUTIONAL, WINDOW, save_convolutional, save_whisper
from tests.features.sounds import joined, noise, silence, tone
from trainer.features import audio_encoder, log_mel
from trainer.features.audio import audio_features, feature_names
from trainer.features.audio_encoder import plan_chunks
from trainer.features.recipe import AudioEncoder, LogMel, OpenSmile
from trainer.features.timeline import average_by_time, frame_count
from trainer.features.types import ClipError, Sound

PITCH, VOICED, LEVEL = "log2 pitch", "voiced share", "log RMS"


def column(section: LogMel, sound: Sound, name: str) -> np.ndarray:
    return audio_features(section)(sound).values_TF[:, feature_names(section).index(name)]


# ---- the time axis


@pytest.mark.parametrize(
    ("samples", "rate", "expected"), [(0, 25, 1), (1, 25, 1), (320, 50, 1), (480, 50, 2), (479, 50, 1), (16000, 12.5, 13)]
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
    taper = np.zeros(size)
    taper[(size - window) // 2 : (size - window) // 2 + window] = 0.5 - 0.5 * np.cos(
        2 * np.pi * np.arange(window) / window
    )

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
        first = j * hop + hop // 2 - size // 2
        window_n = np.array([signal[i] if 0 <= i < len(signal) else 0.0 for i in range(first, first + size)])
        power = np.abs(np.fft.rfft(window_n * taper)) ** 2
        inside[math.floor((j + 0.5) * hop / sampling_rate * rate + 1e-9)].append(np.log(np.maximum(filters @ power, 1e-10)))
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


@pytest.mark.parametrize("frequency", [70.0, 110.0, 155.5, 220.0, 347.0, 520.0])
def test_a_tone_has_its_pitch_and_its_band(frequency: float) -> None:
    section = LogMel(kind="log_mel")
    names, values = feature_names(section), audio_features(section)(tone(frequency, 1.0)).values_TF[2:-2]
    np.testing.assert_allclose(100 * 2 ** values[:, names.index(PITCH)], frequency, rtol=0.01)
    assert (values[:, names.index(VOICED)] == 1).all()
    np.testing.assert_allclose(values[:, names.index(LEVEL)], math.log(0.3 / math.sqrt(2)), atol=0.05)


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 2500.0, 6000.0])
def test_the_band_with_the_most_energy_has_the_tone(frequency: float) -> None:
    section = LogMel(kind="log_mel", pitch=False, energy=False)
    mels = [hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4) for hz in (50, 8000, frequency)]
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


# ---- encoders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder an encoder; wav2vec2 has the form of the large ones, with normalisation and attention mask."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in (*CONVOLUTIONAL, "whisper")}
    for kind in CONVOLUTIONAL:
        save_convolutional(kind, made[kind], norm="layer" if kind == "wav2vec2" else "group")
    save_whisper(made["whisper"])
    return made


def by_hand(folder: Path, samples: np.ndarray, layers: str | int = "last") -> np.ndarray:
    """Transformers' own extractor and model on one sound: the encoder's own frames."""
    extractor, model = AutoFeatureExtractor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = extractor(samples, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        run = model.encoder if model.config.model_type == "whisper" else model
        out = run(**inputs, output_hidden_states=True)
    states = {"last": out.last_hidden_state, "mean": sum(out.hidden_states[1:]) / len(out.hidden_states[1:])}
    chosen = states[layers] if isinstance(layers, str) else out.hidden_states[layers]
    return chosen[0].numpy()


def pooled(own: np.ndarray, middles: np.ndarray, rate: float, count: int) -> np.ndarray:
    """Means of the frames whose middle is in each window, else the nearest frame, by a loop."""
    rows = []
    for k in range(count):
        inside = [i for i, time in enumerate(middles) if k / rate - 1e-9 <= time < (k + 1) / rate - 1e-9]
        rows.append(own[inside].mean(0) if inside else own[np.abs(middles - (k + 0.5) / rate).argmin()])
    return np.array(rows)


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
@pytest.mark.parametrize("layers", ["last", "mean", 0, 2, -1])
def test_a_convolutional_encoder_is_transformers_own(folders: dict[str, Path], kind: str, layers: str | int) -> None:
    sound = joined(tone(200, 0.7), noise(0.63))
    section = AudioEncoder(kind="encoder", name=str(folders[kind]), layers=layers, rate=12.5)
    extract = audio_features(section)
    features = extract(sound)
    own = by_hand(folders[kind], sound.samples_n, layers)
    middles = np.arange(len(own)) * 0.02 + 0.0125
    expected = pooled(own, middles, 12.5, math.floor(1.33 * 12.5 + 0.5))
    np.testing.assert_allclose(features.values_TF, expected, atol=1e-5)
    assert (extract.width, extract.rate, extract.sampling_rate) == (16, 12.5, 16000)


def test_without_a_rate_frames_are_the_encoders_own(folders: dict[str, Path]) -> None:
    extract = audio_features(AudioEncoder(kind="encoder", name=str(folders["hubert"])))
    features = extract(noise(1.0))
    own = by_hand(folders["hubert"], noise(1.0).samples_n)
    assert extract.rate == 50
    assert (len(own), len(features.values_TF)) == (49, 50)
    np.testing.assert_allclose(features.values_TF, own[[*range(49), 48]], atol=1e-5)


def test_a_sound_shorter_than_one_frame_is_one_frame(folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        values = audio_features(AudioEncoder(kind="encoder", name=str(folder)))(Sound(np.ones(1, np.float32), 16000))
        assert values.values_TF.shape == (1, 16), kind
        assert np.isfinite(values.values_TF).all()


@pytest.mark.parametrize("seconds", [0.31, 2.0, 5.37, 4.003])
@pytest.mark.parametrize("layers", ["last", "mean", 1])
def test_whispers_windows_are_transformers_own(folders: dict[str, Path], seconds: float, layers: str | int) -> None:
    sound = noise(seconds, seed=3)
    extract = audio_features(AudioEncoder(kind="encoder", name=str(folders["whisper"]), layers=layers, rate=10))
    parts = []
    for start in range(0, len(sound.samples_n), WINDOW * 16000):
        piece = sound.samples_n[start : start + WINDOW * 16000]
        inside = [i for i in range(50 * WINDOW) if (i + 0.5) * 320 <= len(piece)]
        parts.append(by_hand(folders["whisper"], piece, layers)[inside])
    own = np.concatenate(parts)
    expected = pooled(own, (np.arange(len(own)) + 0.5) / 50, 10, math.floor(seconds * 10 + 0.5))
    np.testing.assert_allclose(extract(sound).values_TF, expected, atol=1e-5)


def test_chunks_of_a_long_sound_cover_it_once_with_context() -> None:
    for samples in (400, 480000, 480001, 480320, 16000 * 33, 16000 * 61 + 7, 16000 * 600 - 1):
        kept: list[int] = []
        for start, stop, first, last in plan_chunks(samples, 320, 400, 16000):
            frames = (stop - start - 400) // 320 + 1
            assert start % 320 == 0
            assert stop - start <= 480000
            assert first == 0 or first >= 100
            assert last == frames or frames - last >= 99
            assert first == 0 or start > 0
            kept += range(start // 320 + first, start // 320 + min(last, frames))
        assert kept == list(range((samples - 400) // 320 + 1))


def test_a_long_sound_is_read_in_chunks_of_thirty_seconds(folders: dict[str, Path]) -> None:
    sound = noise(33.0, seed=5)
    extract = audio_encoder.load_audio_encoder(AudioEncoder(kind="encoder", name=str(folders["hubert"])), "cpu")
    own, _ = extract.own_frames(sound.samples_n)
    first = by_hand(folders["hubert"], sound.samples_n[: 30 * 16000])
    second = by_hand(folders["hubert"], sound.samples_n[26 * 16000 :])
    np.testing.assert_allclose(own, np.concatenate([first[: 28 * 50], second[2 * 50 :]]), atol=1e-5)


def test_what_is_no_audio_encoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def load(name: object, **more: object) -> None:
        audio_features(AudioEncoder.model_validate({"kind": "encoder", "name": str(name), **more}))

    with pytest.raises(ValueError, match="layers 0 .* to 3"):
        load(folders["hubert"], layers=4)
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"without config\.json"):
        load(tmp_path)
    save_convolutional("hubert", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="cannot be read as an audio encoder"):
        load(tmp_path)


def test_missing_weights_are_never_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_convolutional("hubert", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in weights if "layers.1" in key)
    save_file({key: value for key, value in weights.items() if key != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights, which would be random"):
        audio_features(AudioEncoder(kind="encoder", name=str(tmp_path)))


def test_a_hub_name_without_network_says_what_to_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set: run 'hf download someone/something'.*give a folder"):
        audio_features(AudioEncoder(kind="encoder", name="someone/something"))
    with pytest.raises(ValueError, match="neither a folder nor a name on the hub"):
        audio_features(AudioEncoder(kind="encoder", name="some thing"))


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
    middles = np.arange(len(own)) / 100 + 0.005
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
