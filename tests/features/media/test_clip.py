"""Sound and pictures of real files against what was put into them."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.features import media_files as made
from tests.features.media_files import PictureTrack, SoundTrack, steady, tones, write
from tests.features.media_truth import AFTER_CODEC, LIMIT, RATE, lag, numbers, shown, sound_of, true_tones
from trainer.features.media.clip import LARGEST_SIDE, probe, read_pictures, read_sound
from trainer.features.types import Clip, ClipError

# ── containers and codecs ────────────────────────────────────────────────────────────────────────────────────────────

CONTAINERS = {
    "h264.mp4": (PictureTrack(steady(50, 25), options={"bf": "2", "g": "10"}), SoundTrack(tones(2))),
    "mpeg4.mp4": (PictureTrack(steady(50, 25), codec="mpeg4"), SoundTrack(tones(2), codec="libmp3lame")),
    "h264.mov": (PictureTrack(steady(50, 25)), SoundTrack(tones(2), codec="pcm_s16le")),
    "h264.mkv": (PictureTrack(steady(50, 25)), SoundTrack(tones(2), codec="flac")),
    "mpeg4.avi": (PictureTrack(steady(50, 25), codec="mpeg4"), SoundTrack(tones(2), codec="pcm_s16le")),
    "mjpeg.avi": (PictureTrack(steady(50, 25), codec="mjpeg", pixels="yuvj420p"), SoundTrack(tones(2), "pcm_u8")),
    "vp8.webm": (PictureTrack(steady(50, 25), codec="libvpx"), SoundTrack(tones(2, 48000), "libopus", 48000)),
    "vp9.webm": (
        PictureTrack(steady(50, 25), codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"}),
        SoundTrack(tones(2, 48000), "libopus", 48000),
    ),
    "mpeg2.ts": (PictureTrack(steady(50, 25), codec="mpeg2video"), SoundTrack(tones(2), codec="mp2")),
    "h264.flv": (PictureTrack(steady(50, 25)), SoundTrack(tones(2))),
}
DELAYS = {
    "mpeg2.ts": 481 / 44100,
    "h264.flv": 1024 / 44100,
}  # what encoders put before the sound, where a container cannot say so


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_shows_its_pictures_and_sounds_its_tones(name: str, folder: Path) -> None:
    pictures, sound = CONTAINERS[name]
    path = write(folder / name, pictures, sound)
    info = probe(path)
    assert info.has_sound
    assert info.has_picture
    assert info.seconds == pytest.approx(2.0, abs=0.15)
    delay = DELAYS.get(name, 0.0)
    assert numbers(path, 10, end=1.9) == shown(steady(50, 25, start=delay), 10, 19)
    found_n = sound_of(path, end=1.9).samples_n
    assert len(found_n) == round(1.9 * RATE)
    assert abs(lag(found_n, true_tones(1.9), 600) - delay * RATE) <= (16 if delay else 3)  # they round to milliseconds
    for second in (0, 1):
        middle_n = found_n[round((second + 0.2) * RATE) : round((second + 0.8) * RATE)]
        assert made.frequency_of(middle_n, RATE) == pytest.approx(made.tone_of(second), abs=3)


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.wav", "pcm_s16le", 44100),
        ("b.wav", "pcm_f32le", 48000),
        ("c.wav", "pcm_s24le", 22050),
        ("d.flac", "flac", 44100),
        ("e.mp3", "libmp3lame", 44100),
        ("f.ogg", "flac", 44100),
        ("g.opus", "libopus", 48000),
        ("h.m4a", "aac", 44100),
        ("i.wav", "pcm_mulaw", 8000),
    ],
)
def test_sound_alone(name: str, codec: str, rate: int, folder: Path) -> None:
    path = write(folder / name, sound=SoundTrack(tones(3, rate), codec, rate))
    found_n = sound_of(path, end=2.9).samples_n
    difference_n = found_n - true_tones(2.9)
    edges = (
        np.abs((np.arange(len(found_n)) / RATE + 0.5) % 1 - 0.5) > 0.05
    )  # a jump of pitch is a click, which codecs change
    assert abs(lag(found_n, true_tones(2.9))) <= 1
    assert np.sqrt((difference_n[edges] ** 2).mean()) < AFTER_CODEC
    pictures = read_pictures(Clip(path), 5, LIMIT)
    assert pictures.count == 0
    assert list(pictures) == []
    assert [note.kind for note in pictures.notes] == ["no picture"]


def test_a_cut_after_seeking_is_the_same_part_of_the_whole(folder: Path) -> None:
    for name, codec, rate in (
        ("s.m4a", "aac", 44100),
        ("s.flac", "flac", 44100),
        ("s.mp3", "libmp3lame", 44100),
        ("s.opus", "libopus", 48000),
        ("s.aac", "aac", 44100),
        ("s.ac3", "ac3", 44100),
        ("s.ts", "aac", 44100),
    ):
        path = write(folder / name, sound=SoundTrack(tones(20, rate), codec, rate))
        whole_n = sound_of(path).samples_n
        for start, end in ((13.37, 15.0), (0.4, 0.9), (5.0, 5.25)):
            part_n = sound_of(path, start, end).samples_n
            assert len(part_n) == round((end - start) * RATE)
            true_n = whole_n[round(start * RATE) : round(end * RATE)]
            assert np.abs(part_n - true_n).max() < 0.03, (name, start)


def test_channels_are_averaged_and_formats_scaled(folder: Path) -> None:
    left_n, right_n = 0.8 * np.sin(np.arange(44100) * 0.05), np.zeros(44100)
    for codec, layout in (
        ("pcm_s16le", "stereo"),
        ("pcm_f32le", "stereo"),
        ("pcm_u8", "stereo"),
        ("pcm_f64le", "stereo"),
        ("pcm_s32le", "stereo"),
    ):
        path = write(folder / f"{codec}.wav", sound=SoundTrack(np.stack([left_n, right_n]), codec, layout=layout))
        found_n = sound_of(path, rate=44100).samples_n
        assert np.abs(found_n - left_n / 2).max() < (0.01 if codec == "pcm_u8" else 1e-4), codec
    six = np.stack([left_n, *([right_n] * 5)])
    path = write(folder / "six.wav", sound=SoundTrack(six, "pcm_s16le", layout="5.1"))
    assert np.abs(sound_of(path, rate=44100).samples_n - left_n / 6).max() < 1e-4


def test_sound_of_eight_channels(folder: Path) -> None:
    eight = np.stack([tones(2), *([np.zeros(88200, np.float32)] * 7)])
    for name, codec in (("eight.m4a", "aac"), ("eight.flac", "flac"), ("eight.wav", "pcm_s16le")):
        path = write(folder / name, sound=SoundTrack(eight, codec, layout="7.1"))
        found_n = sound_of(path, end=1.9).samples_n
        assert abs(lag(found_n, true_tones(1.9))) <= 1
        assert np.abs(found_n[2000:14000] - true_tones(1.0)[2000:14000] / 8).max() < 0.01


def test_sound_that_is_louder_than_full_scale_is_cut(folder: Path) -> None:
    loud_n = np.array([3.0, -3.0, np.nan, np.inf] * 5000, np.float32)
    sound = sound_of(write(folder / "loud.wav", sound=SoundTrack(loud_n, "pcm_f32le")), rate=44100)
    assert set(np.unique(sound.samples_n)) == {-1.0, 0.0, 1.0}


def test_sound_that_starts_late_begins_with_silence(folder: Path) -> None:
    for suffix, codec in (("mp4", "aac"), ("mkv", "flac"), ("mov", "pcm_s16le")):
        path = write(folder / f"late.{suffix}", PictureTrack(steady(75, 25)), SoundTrack(tones(2), codec, start=1.0))
        found_n = sound_of(path).samples_n
        assert len(found_n) == pytest.approx(3 * RATE, abs=RATE // 20)
        assert np.abs(found_n[: round(0.97 * RATE)]).max() < 0.02
        assert abs(lag(found_n[RATE : 2 * RATE], true_tones(1.0))) <= 16  # these containers round to milliseconds
        later_n = sound_of(path, 0.5, 2.5).samples_n
        assert np.abs(later_n[: round(0.47 * RATE)]).max() < 0.02
        assert made.frequency_of(later_n[round(0.6 * RATE) : RATE], RATE) == pytest.approx(made.tone_of(0), abs=3)


def test_a_gap_in_the_sound_is_silent(folder: Path) -> None:
    track = SoundTrack(tones(2), "pcm_s16le", gap_at=1.0, gap=0.7)
    found_n = sound_of(write(folder / "gap.mkv", sound=track)).samples_n
    assert len(found_n) == pytest.approx(2.7 * RATE, abs=200)
    assert np.abs(found_n[round(1.01 * RATE) : round(1.69 * RATE)]).max() == 0
    assert abs(lag(found_n[:RATE], true_tones(1.0))) <= 1
    assert abs(lag(found_n[round(1.7 * RATE) :], true_tones(1.0, start=1.0))) <= 1


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate(suffix: str, folder: Path) -> None:
    draw = random.Random(3)
    times = [0.0]
    while times[-1] < 6:
        times.append(round(times[-1] + draw.choice((0.01, 0.04, 0.05, 0.3, 0.9)), 3))
    path = write(folder / f"variable.{suffix}", PictureTrack(times, time_base=Fraction(1, 1000), options={"bf": "2"}))
    for rate in (2.0, 10.0, 29.97):
        count = int(6 * rate + 0.5)
        assert numbers(path, rate, end=6.0) == shown(times, rate, count)
    for start in (0.123, 2.5, 4.0):
        assert numbers(path, 10, start, start + 1.5) == shown(times, 10, 15, start)


def test_seeking_shows_the_pictures_of_the_whole(folder: Path) -> None:
    for name, track in (
        ("seek.mp4", PictureTrack(steady(500, 25), options={"bf": "3", "g": "60"})),
        ("seek.webm", PictureTrack(steady(500, 25), codec="libvpx", options={"g": "50", "cpu-used": "8"})),
        ("seek.avi", PictureTrack(steady(500, 25), codec="mpeg4", options={"g": "40"})),
        ("seek.ts", PictureTrack(steady(500, 25), codec="mpeg2video", options={"g": "12"})),
    ):
        path = write(folder / name, track)
        for start, end in ((17.03, 18.0), (3.0, 3.5), (0.7, 1.0)):
            count = int((end - start) * 12.5 + 0.5)
            assert numbers(path, 12.5, start, end) == shown(steady(500, 25), 12.5, count, start), name


def test_an_edit_list_moves_the_beginning(folder: Path) -> None:
    track = PictureTrack(steady(60, 25, start=-10 / 25), options={"bf": "0", "g": "5"})
    path = write(folder / "edited.mp4", track, options={"avoid_negative_ts": "disabled", "use_editlist": "1"})
    assert numbers(path, 25, end=1.0) == list(range(10, 35))


@pytest.mark.parametrize(("degrees", "mirrored"), [(d, m) for d in (0, 90, 180, -90) for m in (False, True)])
def test_rotation_makes_pictures_upright(degrees: int, mirrored: bool, folder: Path) -> None:
    """The players' rule: turn by the angle counter-clockwise, then mirror."""
    track = PictureTrack(
        steady(3, 5), rate=5, size=(64, 32), rotation=degrees, mirrored=mirrored, draw=made.corner_picture
    )
    path = write(folder / f"rotated{degrees}{mirrored}.mp4", track)
    (picture, *_) = read_pictures(Clip(path), 5, LIMIT)
    true = np.rot90(made.corner_picture(0, 64, 32), degrees // 90)
    true = true[:, ::-1] if mirrored else true
    assert picture.rgb.shape == true.shape
    height, width = true.shape[:2]
    for y in (height // 4, 3 * height // 4):
        for x in (width // 4, 3 * width // 4):
            assert np.abs(picture.rgb[y, x].astype(int) - true[y, x]).max() < 40


@pytest.mark.parametrize(
    ("codec", "pixels", "size"),
    [
        ("libx264", "yuv420p10le", (64, 48)),
        ("libx264", "yuv444p", (67, 51)),
        ("libx264", "yuv422p", (64, 51)),
        ("ffv1", "yuv420p16le", (67, 51)),
        ("ffv1", "gray", (66, 50)),
        ("ffv1", "bgr0", (33, 77)),
        ("png", "rgb24", (31, 63)),
        ("mjpeg", "yuvj444p", (61, 33)),
        ("libx265", "yuv420p", (64, 64)),
    ],
)
def test_pixel_formats_and_odd_sizes(codec: str, pixels: str, size: tuple[int, int], folder: Path) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    name = f"{codec}-{pixels}.{'mov' if codec == 'png' else 'mkv'}"
    path = write(folder / name, PictureTrack(steady(9, 5), codec, size, pixels, 5, options=options))
    seen = list(read_pictures(Clip(path), 5, LIMIT))
    assert [made.number_of(picture.rgb) for picture in seen] == list(range(9))
    assert {picture.rgb.shape for picture in seen} == {(size[1], size[0], 3)}
    assert {picture.rgb.dtype for picture in seen} == {np.dtype(np.uint8)}


def test_an_animation_with_a_palette(folder: Path) -> None:
    frames = [Image.fromarray(made.number_picture(k, 40, 30)).convert("P") for k in range(6)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=200)
    assert numbers(folder / "a.gif", 5) == list(range(6))


def test_colours_are_those_that_were_encoded(folder: Path) -> None:
    path = write(
        folder / "colours.mp4", PictureTrack(steady(3, 5), rate=5, draw=made.corner_picture, options={"qp": "1"})
    )
    (picture, *_) = read_pictures(Clip(path), 5, LIMIT)
    true = made.corner_picture(0, 64, 48)
    for y, x in ((12, 16), (12, 48), (36, 16), (36, 48)):
        assert np.abs(picture.rgb[y, x].astype(int) - true[y, x]).max() <= 4


@pytest.mark.parametrize(
    ("space", "full_range"), [("ITU601", False), ("ITU601", True), ("ITU709", False), ("ITU709", True)]
)
def test_colour_spaces_are_those_of_the_file(space: str, full_range: bool, folder: Path) -> None:
    path = folder / f"{space}{full_range}.mkv"
    with made.av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"qp": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.codec_context.colorspace = {"ITU601": 5, "ITU709": 1}[space]
        stream.codec_context.color_range = 2 if full_range else 1
        for k in range(3):
            rgb = made.av.VideoFrame.from_ndarray(made.corner_picture(0, 64, 48), "rgb24")
            frame = rgb.reformat(
                format="yuv444p", dst_colorspace=space, dst_color_range="JPEG" if full_range else "MPEG"
            )
            frame.pts, frame.time_base = k, Fraction(1, 5)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (picture, *_) = read_pictures(Clip(path), 5, LIMIT)
    assert np.abs(picture.rgb.astype(int) - made.corner_picture(0, 64, 48)).max() <= 4


def test_bare_streams_without_a_container(folder: Path) -> None:
    for name, track in (
        ("bare.h264", PictureTrack(steady(100, 25), options={"bf": "2"})),
        ("bare.mjpeg", PictureTrack(steady(100, 25), "mjpeg", pixels="yuvj420p")),
    ):
        path = write(folder / name, track)
        assert math.isnan(probe(path).seconds)
        assert numbers(path, 5) == shown(steady(100, 25), 5, 20)
        assert numbers(path, 5, 2.0, 3.0) == shown(steady(100, 25), 5, 5, 2.0)


def test_pixels_become_square(folder: Path) -> None:
    wide = write(folder / "wide.mp4", PictureTrack(steady(3, 5), rate=5, aspect=Fraction(4, 3)))
    tall = write(folder / "tall.mp4", PictureTrack(steady(3, 5), rate=5, aspect=Fraction(1, 2)))
    (picture, *_) = read_pictures(Clip(wide), 5, LIMIT)
    assert picture.rgb.shape == (48, 85, 3)
    (picture, *_) = read_pictures(Clip(tall), 5, LIMIT)
    assert picture.rgb.shape == (96, 64, 3)


def test_what_is_transparent_is_black(folder: Path) -> None:
    path = folder / "alpha.mkv"
    with made.av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuva444p"
        rgba = np.full((32, 32, 4), 200, np.uint8)
        rgba[:, :16, 3], rgba[:, 16:, 3] = 0, 255
        for k in range(3):
            frame = made.av.VideoFrame.from_ndarray(rgba, "rgba").reformat(format="yuva444p")
            frame.pts, frame.time_base = k, Fraction(1, 5)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (picture, *_) = read_pictures(Clip(path), 5, LIMIT)
    assert picture.rgb[:, :12].max() <= 2
    assert np.abs(picture.rgb[:, 20:].astype(int) - 200).max() <= 3


def test_large_pictures_are_made_smaller(folder: Path) -> None:
    path = write(folder / "large.mkv", PictureTrack(steady(2, 5), "mjpeg", (2560, 1000), "yuvj420p", 5))
    (picture, *_) = read_pictures(Clip(path), 5, LIMIT)
    assert picture.rgb.shape == (500, LARGEST_SIDE, 3)


def test_where_no_picture_is_shown_it_is_black_and_told(folder: Path) -> None:
    track = PictureTrack(steady(25, 25, start=2.0))
    path = write(folder / "between.mkv", track, SoundTrack(tones(6), "flac"))
    with read_pictures(Clip(path), 10, LIMIT) as pictures:
        seen = [bool(picture.rgb.any()) for picture in pictures]
    assert seen == [1.5 <= (k + 0.5) / 10 <= 3.5 for k in range(60)]
    assert [note.kind for note in pictures.notes] == ["no picture"]
    assert "40 of 60" in pictures.notes[0].text
    late = read_pictures(Clip(path, 5.0, 6.0), 10, LIMIT)
    assert late.count == 0
    assert [note.kind for note in late.notes] == ["no picture"]
    assert len(sound_of(path, 5.0, 6.0).samples_n) == RATE


def test_a_track_that_ends_is_silent_or_has_nothing(folder: Path) -> None:
    path = write(folder / "short.mkv", PictureTrack(steady(100, 25)), SoundTrack(tones(1), "flac"))
    assert np.abs(sound_of(path, 0.5, 1.5).samples_n[round(0.51 * RATE) :]).max() == 0
    sound, notes = read_sound(Clip(path, 2.0, 3.0), RATE, LIMIT)
    assert sound is None
    assert [note.kind for note in notes] == ["no sound"]


def test_no_track_of_a_kind(folder: Path) -> None:
    path = write(folder / "silent.mp4", PictureTrack(steady(25, 25)))
    sound, notes = read_sound(Clip(path), RATE, LIMIT)
    assert sound is None
    assert [(note.kind, note.modality) for note in notes] == [("no sound", "audio")]
    assert not probe(path).has_sound


def test_cover_art_is_no_picture(folder: Path) -> None:
    mp3 = write(folder / "plain.mp3", sound=SoundTrack(tones(2), "libmp3lame")).read_bytes()
    path = made.with_cover(folder / "cover.mp3", mp3)
    info = probe(path)
    assert info.has_sound
    assert not info.has_picture
    assert read_pictures(Clip(path), 5, LIMIT).count == 0
    assert abs(lag(sound_of(path, end=1.0).samples_n, true_tones(1.0))) <= 1


def test_a_clip_shorter_than_a_frame_has_one_picture(folder: Path) -> None:
    path = write(folder / "brief.mp4", PictureTrack(steady(25, 25)))
    assert numbers(path, 1.0, 0.4, 0.6) == [14]  # the last inside


# ── an hour ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_AN_HOUR = """
import resource, sys, time
from pathlib import Path
from tests.features.media_truth import AFTER_CODEC, LIMIT, RATE, lag, numbers, shown, sound_of, true_tones
from trainer.features.media.clip import read_pictures, read_sound
from trainer.features.types import Clip
import numpy, av
path = Path(sys.argv[1])
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
clip = Clip(path, 3550.0, 3560.0)
sound, _ = read_sound(clip, 16000, 120.0)
shown = list(read_pictures(clip, 5.0, 120.0))
print(time.process_time() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, len(shown))
numpy.save(sys.argv[2], sound.samples_n)
"""


@pytest.fixture(scope="module")
def an_hour(folder: Path) -> Path:
    return made.hour_long(folder / "hour.mkv")


def test_ten_seconds_of_an_hour_cost_ten_seconds(an_hour: Path, folder: Path) -> None:
    command = [sys.executable, "-c", _AN_HOUR, str(an_hour), str(folder / "part.npy")]
    seconds, mebibytes, count = map(float, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert count == 50
    assert seconds < 1.0
    assert mebibytes < 64
    found_n = np.load(folder / "part.npy")
    for second in range(10):
        middle_n = found_n[round((second + 0.2) * RATE) : round((second + 0.8) * RATE)]
        assert made.frequency_of(middle_n, RATE) == pytest.approx(made.tone_of(3550 + second), abs=3)
    assert numbers(an_hour, 1.0, 3550.0, 3560.0) == list(range(3550, 3560))


def test_an_hour_is_too_long(an_hour: Path) -> None:
    for read in (lambda: read_sound(Clip(an_hour), RATE, LIMIT), lambda: read_pictures(Clip(an_hour), 5, LIMIT)):
        with pytest.raises(ClipError, match="give start and end") as error:
            read()
        assert error.value.kind == "too long"


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    return write(folder / "good.mp4", *CONTAINERS["h264.mp4"], options={"movflags": "faststart"})


# ── the same each time ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_bytes_give_the_same_arrays(clip: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(made.flipped(clip.read_bytes(), random.Random(5)))
    for path in (clip, damaged):
        first, second = (read_sound(Clip(path), RATE, LIMIT)[0] for _ in range(2))
        assert first is not None
        assert second is not None
        assert np.array_equal(first.samples_n, second.samples_n)
        one, other = (list(read_pictures(Clip(path), 7, LIMIT)) for _ in range(2))
        assert len(one) == len(other) > 0
        assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(one, other, strict=True))


def test_a_name_is_no_address(clip: Path, tmp_path: Path) -> None:
    for name in ("concat:a|b.mp4", "picture%03d.mp4", "http:%41.mp4", "mit Umlaut ä \U0001f600.mp4", "-i.mp4"):
        (tmp_path / name).write_bytes(clip.read_bytes())
        assert probe(tmp_path / name).has_picture


def test_missing_package(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'egmf-trainer\[clips\]'"):
        read_sound(Clip(clip), RATE, LIMIT)
