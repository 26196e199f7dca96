"""Speech activity: real speech by espeak-ng against silence and noise, and silero's model run by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.features.small_encoders import save_convolutional
from tests.features.sounds import joined, noise, say, silence
from trainer.features.audio.features import audio_features, feature_names
from trainer.features.audio.speech import SpeechActivity, weights_file
from trainer.features.recipe import AudioEncoder, LogMel
from trainer.features.types import Sound

SENTENCE = "The quick brown fox jumps over the lazy dog, and then it runs home."


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return say(SENTENCE, tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def activity() -> SpeechActivity:
    return SpeechActivity()


def test_speech_is_told_from_silence_and_noise(speech: Sound, activity: SpeechActivity) -> None:
    assert np.median(activity.windows(speech)) > 0.8
    assert activity.windows(silence(2.0)).max() < 0.2
    assert activity.windows(noise(2.0, 0.05)).mean() < 0.3


@pytest.mark.parametrize("voice", ["de", "es", "cmn", "en+f3"])
def test_other_voices_are_speech_too(voice: str, activity: SpeechActivity, tmp_path: Path) -> None:
    said = say(
        {"cmn": "今天天气很好，我们出去走走。"}.get(voice, "Radio Berlin, Madrid, Lima und Paris"), tmp_path, voice
    )
    assert (activity.windows(said) > 0.5).mean() > 0.5


def test_windows_are_those_of_the_model_run_by_hand(speech: Sound, activity: SpeechActivity) -> None:
    model = torch.jit.load(str(weights_file()))
    model.reset_states()
    samples = torch.from_numpy(speech.samples_n)
    expected = [model(torch.nn.functional.pad(part, (0, 512 - len(part))), 16000).item() for part in samples.split(512)]
    np.testing.assert_allclose(activity.windows(speech), expected, atol=1e-6)


def test_no_sound_remembers_the_one_before(speech: Sound, activity: SpeechActivity) -> None:
    before = activity.windows(noise(0.5))
    activity.windows(speech)
    np.testing.assert_array_equal(activity.windows(noise(0.5)), before)


def test_another_sampling_rate_tells_the_same(speech: Sound, activity: SpeechActivity, tmp_path: Path) -> None:
    other = activity.windows(say(SENTENCE, tmp_path, rate=44100))
    assert np.corrcoef(other[: len(activity.windows(speech))], activity.windows(speech)[: len(other)])[0, 1] > 0.9


def test_the_feature_is_the_mean_probability_of_each_frame(speech: Sound, activity: SpeechActivity) -> None:
    section = LogMel(kind="log_mel", rate=5, speech="feature")
    features = audio_features(section)(speech)
    windows = activity.windows(speech)
    expected = [
        np.mean([p for i, p in enumerate(windows) if k / 5 <= (i + 0.5) * 0.032 < (k + 1) / 5])
        for k in range(len(features.values_TF))
    ]
    np.testing.assert_allclose(features.values_TF[:, -1], expected, atol=1e-6)
    assert feature_names(section)[-1] == "speech"
    assert features.valid_T.all()


def test_the_mask_leaves_frames_with_speech(speech: Sound) -> None:
    sound = joined(silence(1.0), speech, silence(1.0))
    features = audio_features(LogMel(kind="log_mel", speech="mask"))(sound)
    plain = audio_features(LogMel(kind="log_mel"))(sound)
    seconds = len(speech.samples_n) / 16000
    inside = features.valid_T[round((1 + 0.2) * 25) : round((1 + seconds - 0.4) * 25)]
    assert inside.mean() > 0.75
    assert features.valid_T[:20].mean() < 0.1
    assert features.valid_T[-15:].mean() < 0.1
    np.testing.assert_array_equal(features.values_TF[features.valid_T], plain.values_TF[features.valid_T])
    assert not features.values_TF[~features.valid_T].any()
    assert not features.notes


def test_a_clip_without_speech_says_so() -> None:
    features = audio_features(LogMel(kind="log_mel", speech="mask"))(silence(1.0))
    assert not features.valid_T.any()
    assert not features.values_TF.any()
    assert [(note.kind, note.modality) for note in features.notes] == [("no speech", "audio")]


def test_an_encoder_can_have_it_too(speech: Sound, activity: SpeechActivity, tmp_path: Path) -> None:
    save_convolutional("hubert", tmp_path)
    extract = audio_features(AudioEncoder(kind="encoder", name=str(tmp_path), speech="feature"))
    values = extract(speech).values_TF
    assert extract.width == values.shape[1] == 17
    np.testing.assert_allclose(values[:, -1], activity.frames(speech, 50, len(values)), atol=1e-6)


def test_neither_silero_vad_nor_torchaudio_is_imported() -> None:
    code = (
        "import sys, torch; before = torch.get_num_threads(); from trainer.features.audio.speech import SpeechActivity; SpeechActivity(); "
        "assert not {'silero_vad', 'torchaudio'} & set(sys.modules), 'imported'; assert torch.get_num_threads() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
