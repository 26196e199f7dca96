"""Features of video against transformers' own processors and models, and faces through a clip."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from skimage import data

from tests.features.face_pictures import astronaut, head, pictures, place_on
from trainer.features.recipe import Face, Landmarks, VideoEncoder
from trainer.features.types import Note, Picture
from trainer.features.video import features as video
from trainer.features.video.crops import aligned
from trainer.features.video.encoder import VisionEncoder
from trainer.features.video.faces import FaceFinder
from trainer.features.video.features import frames_in, video_features, windows
from trainer.features.video.landmarks import FEATURES, face_features

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
RANDOM = np.random.default_rng(0)
CLIP = [RANDOM.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(21)]


def save(folder: Path, model: Any, processor: Any) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small encoders with random weights, saved with their processors."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders")
    square, crop = {"height": 32, "width": 32}, {"shortest_edge": 32}
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 99,
    }
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=8))
    vit_config = transformers.ViTConfig(**SMALL)
    dino_config = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    mae_config = {**SMALL, "num_frames": 4, "decoder_num_hidden_layers": 1, "num_labels": 3}
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    bit = BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=square)
    mae = VideoMAEImageProcessorPil(size=crop, crop_size=square)
    for_classes = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**mae_config))
    return {
        "clip": save(folder / "clip", clip, CLIPImageProcessorPil(size=crop, crop_size=square)),
        "vit": save(folder / "vit", transformers.ViTModel(vit_config), ViTImageProcessorPil(size=square)),
        "classifier": save(
            folder / "classifier", transformers.ViTForImageClassification(vit_config), ViTImageProcessorPil(size=square)
        ),
        "dinov2": save(folder / "dinov2", transformers.Dinov2Model(transformers.Dinov2Config(**dino_config)), bit),
        "videomae": save(folder / "videomae", for_classes, mae),
    }


def by_hand(name: str, folder: str, images: list[np.ndarray], pooling: str = "pooled") -> np.ndarray:
    """What the documentation of each model shows: processor, model of its own class, output."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if name == "clip":
            output = transformers.CLIPModel.from_pretrained(folder).eval().vision_model(pixels)
        elif name == "classifier":
            model = transformers.ViTForImageClassification.from_pretrained(folder).eval().vit
            output = model(pixels)
            return np.asarray(output.last_hidden_state[:, 0].numpy())
        else:
            output = getattr(transformers, {"vit": "ViTModel", "dinov2": "Dinov2Model"}[name]).from_pretrained(folder)
            output = output.eval()(pixels)
    chosen = output.pooler_output if pooling == "pooled" else output.last_hidden_state.mean(dim=1)
    return np.asarray(chosen.numpy())


@pytest.mark.parametrize("pooling", ["pooled", "mean"])
@pytest.mark.parametrize("name", ["clip", "vit", "dinov2"])
def test_whole_pictures_equal_transformers(encoders: dict[str, str], name: str, pooling: str) -> None:
    section = VideoEncoder(kind="encoder", name=encoders[name], rate=5, pooling=pooling, face=None)
    extract = video_features(section)
    assert (extract.width, extract.rate, extract.picture_rate) == (32, 5, 5)
    result = extract(pictures(CLIP, 5), len(CLIP))
    assert result.values_TF.dtype == np.float32
    assert np.allclose(result.values_TF, by_hand(name, encoders[name], CLIP, pooling), atol=1e-5)
    assert np.ptp(result.values_TF, axis=0).min() > 1e-3  # it sees the pictures
    assert result.valid_T.all()
    assert not result.notes


def test_pooler_that_no_checkpoint_has_is_not_used(encoders: dict[str, str]) -> None:
    """Of a classifier's weights transformers makes a ViT whose pooler is random; features are the first token, which its head reads."""
    section = VideoEncoder(kind="encoder", name=encoders["classifier"], face=None)
    expected = by_hand("classifier", encoders["classifier"], CLIP)
    for _ in range(2):
        values = video_features(section)(pictures(CLIP, 5), len(CLIP)).values_TF
        assert np.allclose(values, expected, atol=1e-5)


def test_length_of_the_clip_does_not_change_a_frame(encoders: dict[str, str]) -> None:
    extract = video_features(VideoEncoder(kind="encoder", name=encoders["clip"], face=None))
    whole = extract(pictures(CLIP, 5), len(CLIP)).values_TF
    for length in (1, 7, 8, 9, 17):
        part = extract(pictures(CLIP[:length], 5), length).values_TF
        assert np.allclose(part, whole[:length], atol=1e-6)


@pytest.mark.parametrize(("rate", "window_rate"), [(2.0, 8.0), (5.0, None), (8.0, 8.0)])
def test_windows_of_videomae_equal_transformers(
    encoders: dict[str, str], rate: float, window_rate: float | None
) -> None:
    section = VideoEncoder(
        kind="encoder", name=encoders["videomae"], rate=rate, window_rate=window_rate, pooling="mean", face=None
    )
    extract = video_features(section)
    assert extract.picture_rate == 8
    result = extract(pictures(CLIP, 8), len(CLIP))
    processor = transformers.AutoImageProcessor.from_pretrained(encoders["videomae"], backend="pil")
    model = transformers.VideoMAEForVideoClassification.from_pretrained(encoders["videomae"]).eval().videomae
    expected = []
    for t in range(100):
        seconds = (t + 0.5) / rate
        if seconds >= len(CLIP) / 8:
            break
        # The four pictures whose middles, (k + 0.5) / 8, are the nearest; of two that are equally near the later.
        near = sorted(range(-9, 99), key=lambda k: (round(abs(k + 0.5 - 8 * seconds), 9), -k))[:4]
        chosen = [CLIP[min(max(k, 0), len(CLIP) - 1)] for k in sorted(near)]
        pixels = processor(chosen, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected.append(model(pixels).last_hidden_state.mean(dim=1)[0].numpy())
    assert result.values_TF.shape == (len(expected), 32)
    assert np.allclose(result.values_TF, expected, atol=1e-5)
    assert result.valid_T.all()


def test_windows_leave_out_what_shows_no_face_and_what_is_not_there() -> None:
    seen: list[int | None] = [0, 1, None, 3, None, None, None, 7]
    made = dict(windows(iter(seen), 10, 1.0, 4))
    # Window t holds the pictures t - 1 to t + 2 (its middle, t + 0.5, rounded up), the first and the last repeated.
    assert made == {0: [0, 0, 1, 1], 1: [0, 1, 1, 3], 2: [1, 1, 3, 3], 6: [7, 7, 7, 7], 7: [7, 7, 7, 7]}
    assert list(windows(iter([]), 5, 1.0, 4)) == []
    for t, window in windows(iter(range(1000)), 1000, 40.0, 4):
        assert window == list(range(40 * t + 18, 40 * t + 22))
    assert dict(windows(iter([5]), 1, 4.0, 3)) == {0: [5, 5, 5]}  # shorter than half a frame


@pytest.mark.parametrize(("count", "step"), [(1, 4.0), (5, 4.0), (21, 4.0), (21, 1.6), (16, 1.0), (3, 0.5), (0, 2.0)])
def test_frames_whose_middle_is_inside(count: int, step: float) -> None:
    inside = len([t for t in range(100) if (t + 0.5) * step <= count])
    assert frames_in(count, step) == (max(inside, 1) if count else 0)


def test_faces_are_cropped_for_an_encoder(encoders: dict[str, str]) -> None:
    gray = np.full((200, 300, 3), 127, np.uint8)
    shown = [place_on(gray, head(140), 10 + 20 * k, 30) for k in range(4)]
    shown[2] = gray
    section = VideoEncoder(kind="encoder", name=encoders["clip"], face=Face(size=64, margin=0.1))
    result = video_features(section)(pictures(shown, 5), 4)
    assert result.valid_T.tolist() == [True, True, False, True]
    assert not result.values_TF[2].any()
    assert list(result.notes) == [Note("no face", "video", "in 1 of 4 pictures")]
    finder = FaceFinder(Face())
    crops = [aligned(shown[k], finder.find(shown[k])[0].points_L3, 64, 0.1) for k in (0, 1, 3)]
    assert np.allclose(result.values_TF[[0, 1, 3]], by_hand("clip", encoders["clip"], crops), atol=1e-5)


def test_landmarks_of_a_clip() -> None:
    """Features of each picture, frames without a face 0, and what the source did not deliver not valid."""
    shown = [astronaut(), np.asarray(data.coffee())[:300, :300], astronaut()[:, ::-1].copy()]
    extract = video_features(Landmarks(kind="landmarks", rate=10))
    assert (extract.width, extract.rate, extract.picture_rate) == (len(FEATURES), 10, 10)
    result = extract(pictures(shown, 10), 5)
    assert result.valid_T.tolist() == [True, False, True, False, False]
    assert not result.values_TF[~result.valid_T].any()
    assert list(result.notes) == [Note("no face", "video", "in 1 of 3 pictures")]
    (face,) = FaceFinder(Face()).find(shown[2])
    assert np.array_equal(result.values_TF[2], face_features(face.points_L3, 512, 512))


def test_track_keeps_the_longer_seen_face_although_another_is_larger() -> None:
    gray = np.full((240, 480, 3), 127, np.uint8)
    shown = []
    for k in range(8):
        rgb = place_on(gray, head(120), 5 + 6 * k, 40)
        shown.append(place_on(rgb, head(220), 250, 10) if 2 <= k < 5 else rgb)
    x = FEATURES.index("x")
    tracked = video_features(Landmarks(kind="landmarks", face=Face(choose="track")))(pictures(shown, 10), 8)
    assert tracked.valid_T.all()
    assert (tracked.values_TF[:, x] < -0.1).all()
    largest = video_features(Landmarks(kind="landmarks", face=Face(choose="largest")))(pictures(shown, 10), 8)
    assert (largest.values_TF[:, x] > 0).tolist() == [2 <= k < 5 for k in range(8)]


@pytest.mark.parametrize("kind", ["landmarks", "crops", "pictures", "windows"])
def test_pictures_are_not_held(encoders: dict[str, str], kind: str) -> None:
    """However long the clip, only a few of its pictures are alive at a time, and the source is read to its end."""
    section: Landmarks | VideoEncoder = Landmarks(kind="landmarks")
    if kind == "crops":
        section = VideoEncoder(kind="encoder", name=encoders["clip"])
    elif kind == "pictures":
        section = VideoEncoder(kind="encoder", name=encoders["vit"], face=None)
    elif kind == "windows":
        section = VideoEncoder(kind="encoder", name=encoders["videomae"], face=None, pooling="mean")
    alive: list[weakref.ref[np.ndarray]] = []
    most, ended = 0, False

    def source() -> Iterator[Picture]:
        nonlocal most, ended
        for k in range(40):
            rgb = np.full((60, 80, 3), k, np.uint8)
            alive.append(weakref.ref(rgb))
            yield Picture(k / 5, rgb)
            del rgb
            most = max(most, sum(one() is not None for one in alive))
        ended = True

    result = video_features(section)(source(), 36)
    assert most <= 4
    assert ended
    assert result.valid_T.all() == (kind in ("pictures", "windows"))


def test_what_cannot_be_an_encoder_is_refused(encoders: dict[str, str], tmp_path: Path) -> None:
    def section(**values: Any) -> VideoEncoder:
        return VideoEncoder(**{"kind": "encoder", "name": encoders["clip"], "face": None, **values})

    with pytest.raises(ValueError, match=r"video.window_rate: .* single pictures"):
        video_features(section(window_rate=8))
    with pytest.raises(ValueError, match=r"video.pooling: .* use pooling: mean"):
        video_features(section(name=encoders["videomae"]))
    with pytest.raises(ValueError, match=r"there is no folder .*nothing with an encoder"):
        video_features(section(name=str(tmp_path / "nothing")))
    bert = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    processor = transformers.AutoImageProcessor.from_pretrained(encoders["vit"], backend="pil")
    processor.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert, which is no encoder of pictures"):
        video_features(section(name=str(tmp_path / "bert")))
    larger = transformers.ViTModel(transformers.ViTConfig(**{**SMALL, "num_hidden_layers": 1}))
    save(tmp_path / "short", larger, processor)
    transformers.ViTConfig(**SMALL).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"lack .* tensors of ViTModel"):
        video_features(section(name=str(tmp_path / "short")))


def test_batches_are_always_full(encoders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = VisionEncoder(VideoEncoder(kind="encoder", name=encoders["vit"]), "cpu")
    sizes: list[int] = []
    forward = encoder._model.forward

    def counted(pixel_values: torch.Tensor) -> Any:
        sizes.append(len(pixel_values))
        return forward(pixel_values=pixel_values)

    monkeypatch.setattr(encoder._model, "forward", counted)
    frames = ((k, encoder.prepare(rgb)) for k, rgb in enumerate(CLIP))
    values, valid = video._encode(encoder, frames, 30)
    assert sizes == [8, 8, 8]
    assert valid.tolist() == [k < 21 for k in range(30)]
    assert values.shape == (30, 32)
