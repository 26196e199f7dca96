"""What is wrong with a file is told, and what is right in it is used."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from tests.features import media_files as made
from tests.features.media_files import PictureTrack, SoundTrack, steady, tones, write
from tests.features.media_truth import LIMIT, RATE, lag, shown, sound_of, true_tones
from trainer.features.media.clip import probe, read_pictures, read_sound
from trainer.features.types import Clip, ClipError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


def kind_of(path: Path, start: float | None = None, end: float | None = None, limit: float = LIMIT) -> str:
    """The kind of error, the same for sound and pictures."""
    clip = Clip(path, start, end)
    with pytest.raises(ClipError) as of_sound:
        read_sound(clip, RATE, limit)
    with pytest.raises(ClipError) as of_pictures:
        read_pictures(clip, 5, limit)
    assert of_sound.value.kind == of_pictures.value.kind
    assert str(path) in str(of_sound.value)
    return of_sound.value.kind


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    return write(
        folder / "good.mp4", PictureTrack(steady(50, 25)), SoundTrack(tones(2)), options={"movflags": "faststart"}
    )


def test_files_that_are_none(folder: Path, tmp_path: Path, clip: Path) -> None:
    for name, content in {
        "text.mp4": b"This is a text.\n" * 100,
        "noise.mp4": random.Random(0).randbytes(5000),
        "list.mp4": f"ffconcat version 1.0\nfile {clip}\n".encode(),
        "playlist.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n".encode(),
        "subtitles.mkv": b"1\n00:00:00,000 --> 00:00:02,000\nHello.\n\n2\n00:00:03,000 --> 00:00:04,000\nYou.\n",
        "headless.mp4": clip.read_bytes()[-3000:],
    }.items():
        (tmp_path / name).write_bytes(content)
        assert kind_of(tmp_path / name) == "unreadable", name
    assert kind_of(tmp_path) == "unreadable"
    assert kind_of(tmp_path / "missing.mp4") == "unreadable"
    (tmp_path / "empty.mp4").touch()
    assert kind_of(tmp_path / "empty.mp4") == "empty"


def test_times_that_leave_nothing(clip: Path) -> None:
    assert kind_of(clip, 1.0, 1.0) == "empty"
    assert kind_of(clip, 1.5, 0.5) == "empty"
    assert kind_of(clip, 50.0, 60.0) == "empty"
    assert kind_of(clip, -1.0, 1.0) == "empty"
    assert kind_of(clip, math.nan, 1.0) == "empty"


def test_files_without_anything_in_them(folder: Path) -> None:
    wav = write(folder / "one.wav", sound=SoundTrack(tones(0.1), "pcm_s16le")).read_bytes()
    head = wav[: wav.index(b"data") + 4] + b"\0\0\0\0"
    (folder / "none.wav").write_bytes(head)
    with pytest.raises(ClipError) as error:
        read_sound(Clip(folder / "none.wav"), RATE, LIMIT)
    assert error.value.kind in ("empty", "unreadable")


def test_too_long_where_no_duration_is_stated(folder: Path) -> None:
    path = write(folder / "stream.webm", sound=SoundTrack(tones(5, 48000), "libopus", 48000), options={"live": "1"})
    assert math.isnan(probe(path).seconds)
    assert kind_of_sound(path, 3.0) == "too long"
    assert len(sound_of(path).samples_n) == pytest.approx(5 * RATE, abs=RATE // 20)
    mp3 = write(folder / "long.mp3", sound=SoundTrack(tones(5), "libmp3lame"))
    assert kind_of_sound(mp3, 3.0) == "too long"
    assert len(sound_of(mp3, 1.0, 3.5).samples_n) == round(2.5 * RATE)


def kind_of_sound(path: Path, limit: float) -> str:
    with pytest.raises(ClipError) as error:
        read_sound(Clip(path), RATE, limit)
    return error.value.kind


SOUND_OF = {"mp4": "aac", "mkv": "flac", "avi": "pcm_s16le"}


@pytest.mark.parametrize("suffix", SOUND_OF)
def test_a_truncated_file_gives_what_it_has(suffix: str, folder: Path) -> None:
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    track = PictureTrack(steady(250, 25), codec="mpeg4", options={"g": "10"})
    path = write(folder / f"whole.{suffix}", track, SoundTrack(tones(10), SOUND_OF[suffix]), options=options)
    half = folder / f"half.{suffix}"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sound, notes = read_sound(Clip(half), RATE, LIMIT)
    assert sound is not None
    assert [note.kind for note in notes] == ["truncated"]
    seconds = len(sound.samples_n) / RATE
    assert 3 < seconds < 7
    assert f"{seconds:.2f} of" in notes[0].text
    with read_pictures(Clip(half), 10, LIMIT) as pictures:
        seen = [made.number_of(picture.rgb) for picture in pictures]
    assert len(seen) == pictures.count == int(seconds * 10 + 0.5)
    assert seen[:30] == shown(steady(250, 25), 10, 30)
    assert [note.kind for note in pictures.notes] == ["truncated"]


def test_a_track_that_cannot_be_decoded_costs_that_track(folder: Path) -> None:
    path = write(
        folder / "broken.avi",
        PictureTrack(steady(50, 25), "mjpeg", pixels="yuvj420p"),
        SoundTrack(tones(2), "pcm_s16le"),
    )
    data = bytearray(path.read_bytes())
    place = data.find(b"\xff\xd8")
    while place >= 0:  # every picture of it
        data[place : place + 200] = bytes(200)
        place = data.find(b"\xff\xd8", place)
    path.write_bytes(data)
    pictures = read_pictures(Clip(path), 5, LIMIT)
    assert pictures.count == 0
    assert [(note.kind, note.modality) for note in pictures.notes] == [("unreadable", "video")]
    assert abs(lag(sound_of(path, end=1.0).samples_n, true_tones(1.0))) <= 1


def test_flipped_bytes_cost_packets_and_are_told(folder: Path) -> None:
    path = write(
        folder / "flipped.mkv",
        PictureTrack(steady(50, 25), "ffv1", pixels="yuv420p", options={"slicecrc": "1"}),
        SoundTrack(tones(2), "flac"),
    )
    data = bytearray(path.read_bytes())
    draw = random.Random(1)
    for _ in range(60):
        data[draw.randrange(len(data) // 3, 2 * len(data) // 3)] ^= 0xFF
    path.write_bytes(data)
    with read_pictures(Clip(path), 5, LIMIT) as pictures:
        assert len(list(pictures)) == pictures.count
    sound, notes = read_sound(Clip(path), RATE, LIMIT)
    assert sound is not None
    assert {note.kind for note in [*notes, *pictures.notes]} == {"truncated"}
