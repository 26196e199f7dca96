"""Spoken clips: balanced as they are said to be, and what was planted can be measured in the media files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import av
import librosa
import numpy as np
import pytest
from skimage.feature import match_template

from trainer.data.generated import spoken
from trainer.data.generated.spoken import FORMATS, KINDS, ClipPlan, generate_clips, plan_clips
from trainer.data.generated.spoken_media import SPEECH_RATE, make_clip, make_poses, make_sound, picture_times
from trainer.tasks import BUILT_IN

LABELS = BUILT_IN["spoken"].labels
PLANS = plan_clips(3, {"train": 12})


class Decoded(NamedTuple):
    """What PyAV decodes from a clip: the sound [n] at 16 kHz, grey pictures [N, height, width] and their times."""

    sound_n: np.ndarray
    grey_NHW: np.ndarray
    times_N: np.ndarray
    codecs: tuple[str, str]


def decode(path: Path) -> Decoded:
    with av.open(str(path)) as media:
        video, audio = media.streams.video[0], media.streams.audio[0]
        resampler = av.AudioResampler("flt", "mono", 16000)
        sound, pictures, times = [], [], []
        for frame in media.decode(video, audio):
            if isinstance(frame, av.VideoFrame):
                pictures.append(frame.to_ndarray(format="gray"))
                times.append(frame.time)
            else:
                sound += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        sound += [part.to_ndarray()[0] for part in resampler.resample(None)]
        codecs = (video.codec_context.codec.canonical_name, audio.codec_context.codec.canonical_name)
    return Decoded(np.concatenate(sound), np.stack(pictures), np.array(times), codecs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("spoken")
    for plan in PLANS:
        make_clip(plan, out / plan.file)
    return out


@pytest.fixture(scope="module")
def clips(folder: Path) -> list[tuple[ClipPlan, Decoded]]:
    return [(plan, decode(folder / plan.file)) for plan in PLANS]


# ---- the plan


def test_kinds_labels_and_combinations_of_cues_are_even() -> None:
    plans = plan_clips(0, {"train": 240, "test": 120})
    for split, n in (("train", 240), ("test", 120)):
        chosen = [p for p in plans if p.split == split]
        assert Counter((p.kind, p.label) for p in chosen) == {(k, label): n // 6 for k in KINDS for label in LABELS}
        both = [p for p in chosen if p.kind == "both"]
        assert set(Counter((p.voice, p.movement) for p in both).values()) == {n // 12}
        for cue in ("voice", "movement"):  # alone, neither tells the label
            assert set(Counter((getattr(p, cue), p.label) for p in both).values()) == {n // 12}
    assert {p.movement for p in plans if p.kind == "voice"} == {"still"}
    assert {p.voice for p in plans if p.kind == "face"} == {"level"}


def test_the_text_is_independent_of_the_label_in_every_kind() -> None:
    for split, n in (("train", 240), ("valid", 36)):
        plans = plan_clips(1, {split: n})
        counts = Counter((p.kind, p.text, p.label) for p in plans)
        for kind, text, _ in counts:
            assert counts[kind, text, "sure"] == counts[kind, text, "unsure"], (kind, text)
        assert len({text for _, text, _ in counts}) == min(n // 12, sum(map(len, spoken.SENTENCES.values())))


def test_a_size_that_is_no_multiple_is_as_even_as_can_be() -> None:
    plans = plan_clips(0, {"train": 100})
    counts = Counter((p.kind, p.label) for p in plans)
    assert len(counts) == 6
    assert max(counts.values()) - min(counts.values()) <= 2


def test_every_container_codec_rate_and_size_occurs_with_every_label() -> None:
    plans = plan_clips(0, {"train": 240})
    assert Counter(p.format for p in plans) == dict.fromkeys(FORMATS, 40)
    assert {(p.format, p.label) for p in plans} == {(form, label) for form in FORMATS for label in LABELS}
    assert {p.rate for p in plans} == set(spoken.RATES)
    assert {p.height for p in plans} == set(spoken.HEIGHTS)
    assert {p.channels for p in plans} == {1, 2}
    assert all(p.rate is not None for p in plans if not p.format.variable)


def test_speakers_are_in_one_split_and_their_pitches_lie_apart() -> None:
    plans = plan_clips(0, spoken.SIZES)
    split_of = {p.speaker.name: p.split for p in plans}
    assert all(split_of[p.speaker.name] == p.split for p in plans)
    assert Counter(split_of.values()) == {split: 3 * n for split, n in spoken.SPEAKERS.items()}
    assert {p.speaker.language for p in plans} == set(spoken.VOICES)


def test_seeds_and_sizes_are_all_that_matters() -> None:
    assert plan_clips(3, {"train": 12}) == PLANS
    assert plan_clips(3, {"train": 12, "test": 24})[:12] == PLANS
    others = plan_clips(4, {"train": 12})
    assert all(a.seed != b.seed for a, b in zip(PLANS, others, strict=True))
    assert [p.text for p in others] != [p.text for p in PLANS] or [p.kind for p in others] != [p.kind for p in PLANS]
    assert not np.array_equal(make_sound(PLANS[0])[:100], make_sound(others[0])[:100])


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"too few clips to hold every kind and label: \{'test': 11\}; 12 at least"):
        plan_clips(0, {"train": 12, "test": 11})
    with pytest.raises(ValueError, match="the splits train, valid, test, not dev"):
        plan_clips(0, {"dev": 12})


# ---- the media


def test_files_hold_the_codecs_sizes_and_times_that_were_planned(clips: list[tuple[ClipPlan, Decoded]]) -> None:
    names = {"libx264": "h264", "libvpx": "vp8", "libvpx-vp9": "vp9", "libopus": "opus", "libmp3lame": "mp3"}
    assert {plan.format for plan, _ in clips} == set(FORMATS)
    for plan, decoded in clips:
        form = plan.format
        assert decoded.codecs == (names.get(form.video, form.video), names.get(form.audio, form.audio)), plan.file
        assert decoded.grey_NHW.shape[1] == plan.height
        seconds = len(make_sound(plan)) / SPEECH_RATE
        assert 1.2 < seconds < 4
        late = 1 / plan.rate if plan.format.suffix == "avi" and plan.rate else 0.0011  # AVI has no times of its own
        np.testing.assert_allclose(decoded.times_N, picture_times(plan, seconds), atol=1.01 * late)
        assert abs(len(decoded.sound_n) / 16000 - seconds) < 0.12  # codecs work in blocks


def halves(plan: ClipPlan, sound_n: np.ndarray) -> float:
    """By how many octaves the median pitch of the second half of what is said lies above that of the first."""
    pitch_T = librosa.yin(sound_n, fmin=55, fmax=450, sr=16000, frame_length=1024, hop_length=256)
    loudness_T = librosa.feature.rms(y=sound_n, frame_length=1024, hop_length=256)[0]
    said = np.flatnonzero(loudness_T > 0.06 * loudness_T.max())
    first, second = np.split(said, [np.searchsorted(said, (said[0] + said[-1]) / 2)])
    return float(np.median(np.log2(pitch_T[second])) - np.median(np.log2(pitch_T[first])))


def test_the_pitch_goes_where_it_was_planned_to(clips: list[tuple[ClipPlan, Decoded]]) -> None:
    for plan, decoded in clips:
        rise = halves(plan, decoded.sound_n)
        expected = {"rising": 0.25 < rise < 1.2, "falling": -1.2 < rise < -0.25, "level": abs(rise) < 0.2}
        assert expected[plan.voice], f"{plan.file}: {plan.voice}, {rise:+.2f} octaves"


def track(grey_NHW: np.ndarray, x: float, y: float) -> np.ndarray:
    """Where the eyes and the nose of the first picture are in each, [N, 2] (right, down) as shares of the height, by correlation; nan where they are hidden."""
    height, width = grey_NHW.shape[1:]
    half, cx, cy = round(0.13 * height), round(width / 2 + x * height), round(height / 2 + y * height)
    patch = grey_NHW[0, cy - half : cy + half, cx - half : cx + half].astype(float)
    found = np.full((len(grey_NHW), 2), np.nan)
    for k, grey in enumerate(grey_NHW):
        score = match_template(grey.astype(float), patch)
        down, right = np.unravel_index(score.argmax(), score.shape)
        if score.max() > 0.6:
            found[k] = (right - (cx - half)) / height, (down - (cy - half)) / height
    return found


def test_the_head_moves_as_it_was_planned_to(clips: list[tuple[ClipPlan, Decoded]]) -> None:
    seen = set()
    for plan, decoded in clips:
        sound_n = make_sound(plan)
        poses = make_poses(plan, sound_n, picture_times(plan, len(sound_n) / SPEECH_RATE))
        every = max(1, len(decoded.times_N) // 16)
        found = track(decoded.grey_NHW[::every, ::2, ::2], poses.x_N[0], poses.y_N[0])
        planted = np.stack([poses.x_N - poses.x_N[0], poses.y_N - poses.y_N[0]], 1)[::every]
        assert np.isfinite(found).mean() > 0.5, plan.file
        assert np.nanmedian(np.abs(found - planted)) < 0.02, plan.file
        aside, down = np.nanmax(found, axis=0) - np.nanmin(found, axis=0)
        moved = {"shake": aside > 2 * down, "nod": down > 2 * aside, "still": max(aside, down) < 0.07}
        assert moved[plan.movement], f"{plan.file}: {plan.movement}, {aside:.3f} aside, {down:.3f} down"
        seen.add(plan.movement)
    assert seen == {"nod", "shake", "still"}


def test_generation_by_processes_gives_the_same_bytes_goes_on_and_refuses_others(folder: Path, tmp_path: Path) -> None:
    out, ticks = tmp_path / "clips", []
    manifest = generate_clips(out, 3, {"train": 12}, workers=2, progress=lambda *tick: ticks.append(tick))
    assert ticks[-1] == ("train", 12, 12)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [plan.id for plan in PLANS]
    assert set(rows[0]) == {"clip", "id", "text", "label", "split", "speaker", "kind"}
    for row in rows:
        assert (out / row["clip"]).read_bytes() == (folder / row["clip"]).read_bytes(), row["clip"]
    lost, kept = out / PLANS[0].file, out / PLANS[1].file
    time = kept.stat().st_mtime_ns
    lost.unlink()
    manifest.unlink()
    assert generate_clips(out, 3, {"train": 12}) == manifest
    assert lost.read_bytes() == (folder / lost.name).read_bytes()
    assert kept.stat().st_mtime_ns == time
    with pytest.raises(ValueError, match="holds other clips"):
        generate_clips(out, 4, {"train": 12})
    with pytest.raises(ValueError, match="not empty and holds no generated clips"):
        generate_clips(tmp_path, 3, {"train": 12})


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="espeak-ng, which speaks: apt-get install espeak-ng"):
        generate_clips(tmp_path / "clips", sizes={"train": 12})
    assert not (tmp_path / "clips").exists()
