"""Encoders of sound: hidden states against transformers' own extractor and model, means over time against a loop, and what is refused."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from tests.features.small_encoders import CONVOLUTIONAL, WINDOW, save_convolutional, save_whisper
from tests.features.sounds import joined, noise, pooled, tone
from trainer.features.audio import encoder as audio_encoder
from trainer.features.audio.encoder import plan_chunks
from trainer.features.audio.features import audio_features
from trainer.features.recipe import AudioEncoder
from trainer.features.types import Sound


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

    with pytest.raises(ValueError, match=r"layers 0 .* to 3"):
        load(folders["hubert"], layers=4)
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
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
    save_file(
        {key: value for key, value in weights.items() if key != gone}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="lacks weights, which would be random"):
        audio_features(AudioEncoder(kind="encoder", name=str(tmp_path)))


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_checkpoints_as_they_were_published_are_read(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Of another head, without what trains alone, with the names of weights that older versions had, in torch's format."""
    from safetensors.torch import load_file

    shutil.copytree(folders[kind], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    named = {}
    for key, value in weights.items():
        for new, before in old.items():
            key = key.replace(new, before)
        if "masked" not in key:
            named[f"{kind}.{key}"] = value
    torch.save({**named, "lm_head.weight": torch.zeros(32, 16)}, tmp_path / "pytorch_model.bin")
    sound = noise(0.5)
    expected = audio_features(AudioEncoder(kind="encoder", name=str(folders[kind])))(sound).values_TF
    found = audio_features(AudioEncoder(kind="encoder", name=str(tmp_path)))(sound).values_TF
    np.testing.assert_array_equal(found, expected)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (str(self.path), "w")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    save_convolutional("hubert", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be loaded"):
        audio_features(AudioEncoder(kind="encoder", name=str(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"encoder": Evil(tmp_path / "ran")}, file, protocol=2)
    with pytest.raises(ValueError, match="cannot be loaded"):
        audio_features(AudioEncoder(kind="encoder", name=str(tmp_path)))
    assert not (tmp_path / "ran").exists()
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot be read as an audio encoder"):
        audio_features(AudioEncoder(kind="encoder", name=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_hub_name_without_network_says_what_to_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set: run 'hf download someone/something'.*give a folder"):
        audio_features(AudioEncoder(kind="encoder", name="someone/something"))
    with pytest.raises(ValueError, match=r"neither a folder in .* nor a name on the hub"):
        audio_features(AudioEncoder(kind="encoder", name="some thing"))
