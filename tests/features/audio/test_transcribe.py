"""Transcription by a small random Whisper: what it writes means nothing, but is transformers' own, the same every time, and placed in time."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import pipeline

from tests.features.small_encoders import WINDOW, save_convolutional, save_whisper
from tests.features.sounds import joined, noise, silence, tone
from trainer.features.audio import transcribe
from trainer.features.audio.transcribe import Transcriber, spread
from trainer.features.recipe import Transcribed
from trainer.features.types import Sound


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned")
    save_whisper(folder)
    return folder


@pytest.fixture(scope="module")
def unaligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unaligned")
    save_whisper(folder, aligned=False)
    return folder


def section(folder: Path, **more: Any) -> Transcribed:
    return Transcribed.model_validate({"kind": "whisper", "name": str(folder), **more})


def of_transformers(folder: Path, sound: Sound, language: str, times: bool | str) -> dict[str, Any]:
    """What transformers' own pipeline says, greedily."""
    recognise = pipeline("automatic-speech-recognition", str(folder), device="cpu")
    found: dict[str, Any] = recognise(
        {"raw": sound.samples_n.copy(), "sampling_rate": 16000},
        return_timestamps=times,
        generate_kwargs={"language": language, "task": "transcribe", "num_beams": 1, "max_new_tokens": None},
    )
    return found


SOUNDS = {
    "short": tone(220, 0.9),
    "one window": noise(WINDOW, seed=1),
    "long": joined(noise(1.7), tone(300, 2.2), noise(1.4)),
}


@pytest.mark.parametrize("which", SOUNDS)
def test_text_is_that_of_transformers_pipeline(aligned: Path, unaligned: Path, which: str) -> None:
    for folder in (aligned, unaligned):
        text, _ = Transcriber(section(folder, language="en"))(SOUNDS[which])
        expected = of_transformers(folder, SOUNDS[which], "en", True)["text"]
        assert text.replace(" ", "") == expected.replace(" ", "")
        assert text


def ends(words: list[tuple[str, float]]) -> dict[str, float]:
    """The end of each word by all text up to it, without spaces."""
    out: dict[str, float] = {}
    text = ""
    for word, end in words:
        text += "".join(word.split())
        out[text] = end
    return out


@pytest.mark.parametrize("which", SOUNDS)
def test_words_of_aligned_heads_are_those_of_transformers_pipeline(aligned: Path, which: str) -> None:
    _, words = Transcriber(section(aligned, language="en"))(SOUNDS[which])
    expected = [
        chunk for chunk in of_transformers(aligned, SOUNDS[which], "en", "word")["chunks"] if chunk["text"].strip()
    ]
    seconds = len(SOUNDS[which].samples_n) / 16000
    assert all(0 <= word.start <= word.end <= seconds for word in words)
    found = ends([(word.text, word.end) for word in words])
    wanted = ends([(chunk["text"], min(chunk["timestamp"][1], seconds)) for chunk in expected])
    # The pipeline joins what stands on both sides of a segment's end into one word, so it has some ends less.
    assert set(wanted) <= set(found)
    assert len(found) - len(wanted) <= len(found) / 4
    assert [found[place] for place in wanted] == pytest.approx(list(wanted.values()), abs=0.011)


def test_the_same_sound_gives_the_same_words(aligned: Path) -> None:
    first, second = Transcriber(section(aligned)), Transcriber(section(aligned))
    expected = first(SOUNDS["long"])
    first(SOUNDS["short"])
    assert first(SOUNDS["long"]) == second(SOUNDS["long"]) == expected


@pytest.mark.parametrize("which", SOUNDS)
def test_without_aligned_heads_words_share_their_segments_time(unaligned: Path, which: str) -> None:
    text, words = Transcriber(section(unaligned, language="en"))(SOUNDS[which])
    assert " ".join(word.text for word in words) == " ".join(text.split())
    assert all(0 <= word.start <= word.end <= len(SOUNDS[which].samples_n) / 16000 for word in words)
    assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(words))


def test_time_is_shared_by_letters() -> None:
    found = list(spread(["a", "quick", "fox"], 1.0, 2.8))
    assert [word for word, _, _ in found] == ["a", "quick", "fox"]
    assert [begin for _, begin, _ in found] == pytest.approx([1.0, 1.2, 2.2])
    assert [end for _, _, end in found] == pytest.approx([1.2, 2.2, 2.8])
    assert list(spread([], 0, 1)) == []


def test_chinese_has_a_word_a_character(unaligned: Path) -> None:
    text, words = Transcriber(section(unaligned, language="zh"))(SOUNDS["short"])
    assert [word.text for word in words] == [letter for letter in text if letter.strip()]


def test_longer_sound_is_read_in_pieces(unaligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcribe, "PIECE_SECONDS", 2)
    said = Transcriber(section(unaligned, language="en"))
    first, second = tone(220, 2.0), noise(1.3)
    text, words = said(joined(first, second))
    parts = [said(first), said(second)]
    assert text == " ".join(part[0] for part in parts if part[0])
    late = words[len(parts[0][1]) :]
    assert [word.text for word in late] == [word.text for word in parts[1][1]]
    assert [word.start - 2 for word in late] == pytest.approx([word.start for word in parts[1][1]])


def test_no_sound_has_no_words(aligned: Path) -> None:
    assert Transcriber(section(aligned))(silence(0)) == ("", ())


def test_what_cannot_transcribe_is_refused(aligned: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not know fr; it knows en, zh"):
        Transcriber(section(aligned, language="fr"))
    with pytest.raises(ValueError, match="8000 Hz, and 16000"):
        Transcriber(section(aligned))(tone(200, 0.5, rate=8000))
    save_convolutional("hubert", tmp_path / "hubert")
    with pytest.raises(ValueError, match="type hubert, and a Whisper is needed"):
        Transcriber(section(tmp_path / "hubert"))
    save_whisper(tmp_path / "old")
    settings = json.loads((tmp_path / "old" / "generation_config.json").read_text())
    del settings["no_timestamps_token_id"]
    (tmp_path / "old" / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no no_timestamps_token_id"):
        Transcriber(section(tmp_path / "old"))


def test_a_model_of_english_alone_takes_no_other_language(tmp_path: Path) -> None:
    save_whisper(tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings |= {"is_multilingual": False}
    del settings["lang_to_id"], settings["task_to_id"]
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert Transcriber(section(tmp_path, language="en"))(SOUNDS["short"]) == Transcriber(section(tmp_path))(
        SOUNDS["short"]
    )
    with pytest.raises(ValueError, match="knows English alone"):
        Transcriber(section(tmp_path, language="zh"))
