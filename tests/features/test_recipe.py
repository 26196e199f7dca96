"""Recipes: every shipped one loads, every fault is told at once with the nearest name, and kinds choose what a section may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from trainer.config_files import ConfigError
from trainer.features.recipe import (
    KINDS,
    AudioEncoder,
    Given,
    Landmarks,
    LogMel,
    OpenSmile,
    Transcribed,
    VideoEncoder,
    check_recipe,
    read_recipe,
)
from trainer.shipped import list_recipes


def check(**sections: Any) -> Any:
    return check_recipe(sections, "mine.yaml")


def faults(**sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check(**sections)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


@pytest.mark.parametrize("shipped", list_recipes(), ids=lambda shipped: shipped.name)
def test_every_shipped_recipe_loads_and_says_what_it_is(shipped: Any) -> None:
    recipe = read_recipe(shipped.name)
    assert recipe == read_recipe(shipped.path)
    assert recipe == check_recipe(recipe.model_dump(mode="json"), "written out")
    assert len(shipped.description) > 20


def test_the_shipped_recipes_are_those_that_the_documentation_names() -> None:
    assert {shipped.name for shipped in list_recipes()} == {"basic", "egemaps", "wavlm-clip", "whisper-videomae"}
    basic, whisper = read_recipe("basic"), read_recipe("whisper-videomae")
    assert basic.encoders == ()
    assert (type(basic.audio), type(basic.video), type(basic.text)) == (LogMel, Landmarks, Given)
    assert type(read_recipe("egemaps").audio) is OpenSmile
    assert [type(section) for section in whisper.encoders] == [AudioEncoder, VideoEncoder, Transcribed]


def test_all_faults_come_at_once_with_the_nearest_names() -> None:
    told = faults(
        audio={"kind": "log_mel", "band": 40, "rate": -1, "speech": "featur"},
        video={"kind": "landmark"},
        text={"kind": "whisper"},
        max_second=3,
    )
    assert told == [
        "audio.rate: must be greater than 0, not -1",
        "audio.speech: must be 'off', 'feature' or 'mask', not 'featur'; did you mean feature?",
        "audio.band: unknown key; did you mean bands?",
        "video.kind: landmark; did you mean landmarks?",
        "text.name: missing",
        "max_second: unknown key; did you mean max_seconds?",
    ]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"audio": {"rate": 25}}, "audio.kind: nothing; known: log_mel, encoder, opensmile"),
        ({"audio": {"kind": "encoder", "name": ""}}, "audio.name: String should have at least 1 character"),
        ({"audio": {"kind": "encoder", "name": "a/b", "bands": 4}}, "audio.bands: unknown key"),
        ({"audio": {"kind": "encoder", "name": "a/b", "layers": "first"}}, "audio.layers"),
        ({"audio": {"kind": "log_mel", "sampling_rate": 16000.5}}, "audio.sampling_rate"),
        ({"audio": {"kind": "log_mel", "rate": float("nan")}}, "audio.rate"),
        ({"audio": {"kind": "opensmile", "set": "eGeMAPSv2"}}, "audio.set"),
        ({"video": {"kind": "landmarks", "face": {"size": 8}}}, "video.face.size"),
        (
            {"video": {"kind": "landmarks", "face": {"chose": "track"}}},
            "video.face.chose: unknown key; did you mean choose?",
        ),
        ({"video": {"kind": "landmarks", "face": None}}, "video.face"),
        ({"audio": 5}, "audio"),
    ],
)
def test_a_fault_names_its_key(sections: dict[str, Any], expected: str) -> None:
    told = faults(**sections)
    assert len({line.split(":")[0] for line in told}) == 1, told
    assert told[0].startswith(expected), told


def test_a_recipe_needs_something_to_see_or_hear() -> None:
    with pytest.raises(ConfigError, match="needs a section audio or video"):
        check(text={"kind": "given"})
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        check_recipe([], "mine.yaml")


def test_kinds_choose_the_section() -> None:
    for modality, kinds in KINDS.items():
        for kind, section in kinds.items():
            plain = {"kind": kind, **({"name": "a/b"} if "name" in section.model_fields else {})}
            other = {} if modality != "text" else {"audio": {"kind": "log_mel"}}
            assert type(getattr(check(**{modality: plain}, **other), modality)) is section


def test_a_recipe_does_not_change_after_it_was_read() -> None:
    recipe = read_recipe("basic")
    with pytest.raises(ValidationError):
        recipe.max_seconds = 3  # type: ignore[misc]


def test_a_name_that_is_none_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe basik; did you mean basic"):
        read_recipe("basik")
    path = tmp_path / "mine.yaml"
    path.write_text("audio: {kind: log_mel, bands: 20}\n")
    assert read_recipe(path).audio == LogMel(kind="log_mel", bands=20)
    path.write_text("audio: [")
    with pytest.raises(ConfigError, match="not readable YAML"):
        read_recipe(path)


def test_the_recipe_in_the_document_loads() -> None:
    page = (Path(__file__).parents[2] / "docs" / "clips.md").read_text(encoding="utf-8")
    shown = check_recipe(yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0]), "docs/clips.md")
    assert isinstance(shown.audio, AudioEncoder)
    assert isinstance(shown.video, VideoEncoder)
    assert shown.video.face is not None
    assert isinstance(shown.text, Transcribed)
