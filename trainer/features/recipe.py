"""Recipes: how clips become feature arrays, as strict YAML.

A recipe has a section each for `audio`, `video` and `text`; a modality without one is missing. What is not in a recipe is not a choice of the
user: the code decides it, and the version of the code is in the recipe's hash (:mod:`trainer.features.identity`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from trainer.config_files import ConfigError, read_mapping
from trainer.schema import describe, nearest
from trainer.shipped import list_recipes, locate_recipe

Speech = Literal["off", "feature", "mask"]


class Section(BaseModel):
    """Unknown keys are faults, numbers are finite, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class LogMel(Section):
    """Logarithms of mel bands, with pitch and energy: needs no weights."""

    kind: Literal["log_mel"]
    rate: float = Field(25.0, gt=0, le=100, description="frames a second")
    sampling_rate: int = Field(16000, ge=8000, le=48000, description="of the sound, in Hz")
    bands: int = Field(40, ge=8, le=128, description="mel bands between 50 Hz and half the sampling rate")
    pitch: bool = Field(
        True,
        description="two features: log2 of the fundamental frequency in 100 Hz (0 without one), and the share of the frame that has one",
    )
    energy: bool = Field(True, description="one feature: the logarithm of the root mean square")
    speech: Speech = Field(
        "off", description="speech activity by silero-vad: a feature, or a mask of frames without speech"
    )


class AudioEncoder(Section):
    """A Hugging Face audio encoder: wav2vec 2, HuBERT, WavLM, Whisper's encoder and what has their form."""

    kind: Literal["encoder"]
    name: str = Field(min_length=1, description="name on the hub, or a folder")
    revision: str | None = Field(None, description="commit of the hub")
    layers: Literal["last", "mean"] | int = Field(
        "last", description="the last hidden state, the mean of all layers, or one layer (0: what enters the first)"
    )
    rate: float | None = Field(
        None, gt=0, le=100, description="frames a second: means over the encoder's own; null: those of the encoder"
    )
    speech: Speech = Field(
        "off", description="speech activity by silero-vad: a feature, or a mask of frames without speech"
    )


class OpenSmile(Section):
    """A set of openSMILE's low-level descriptors. Its licence is for research only; it is an extra, and in no default."""

    kind: Literal["opensmile"]
    set: Literal["eGeMAPSv02", "GeMAPSv01b", "ComParE_2016"] = "eGeMAPSv02"
    rate: float = Field(25.0, gt=0, le=100, description="frames a second: means over openSMILE's own 100")
    speech: Speech = Field(
        "off", description="speech activity by silero-vad: a feature, or a mask of frames without speech"
    )


class Face(Section):
    """Which face of a picture is read, and how it is cut out."""

    choose: Literal["largest", "track"] = Field(
        "track", description="the largest face of each picture, or the one that is longest to be seen"
    )
    detector: Literal["short_range", "full_range"] = Field(
        "full_range", description="for faces within two metres, or within five"
    )
    min_score: float = Field(0.5, gt=0, lt=1, description="of the detector")
    size: int = Field(224, ge=32, le=1024, description="pixels of the square that is cut out, for encoders")
    margin: float = Field(0.25, ge=0, le=2, description="around the face, as a share of its size")


class Landmarks(Section):
    """Face landmarks in the face's own coordinates, openings and head pose, by weights that a package ships: needs no download."""

    kind: Literal["landmarks"]
    rate: float = Field(10.0, gt=0, le=60, description="frames a second")
    face: Face = Face()


class VideoEncoder(Section):
    """A Hugging Face vision encoder, of single pictures (CLIP, DINOv2, ViT) or of windows of them (VideoMAE)."""

    kind: Literal["encoder"]
    name: str = Field(min_length=1, description="name on the hub, or a folder")
    revision: str | None = Field(None, description="commit of the hub")
    rate: float = Field(5.0, gt=0, le=60, description="frames a second: pictures, or windows of a video encoder")
    window_rate: float | None = Field(
        None, gt=0, le=60, description="of a video encoder: pictures a second inside its windows; null: 8"
    )
    pooling: Literal["pooled", "mean"] = Field(
        "pooled",
        description="the encoder's pooled output (its first token where it has none), or the mean of its tokens",
    )
    face: Face | None = Field(Face(), description="read faces; null: whole pictures")


class Given(Section):
    """Text as the manifest gives it."""

    kind: Literal["given"] = "given"


class Transcribed(Section):
    """Text by a Whisper model where the manifest gives none; its words and their times are kept beside it."""

    kind: Literal["whisper"]
    name: str = Field(min_length=1, description="name on the hub, or a folder")
    revision: str | None = Field(None, description="commit of the hub")
    language: str | None = Field(None, description="of what is said, such as en; null: the model finds it")


KINDS: dict[str, dict[str, type[Section]]] = {
    "audio": {"log_mel": LogMel, "encoder": AudioEncoder, "opensmile": OpenSmile},
    "video": {"landmarks": Landmarks, "encoder": VideoEncoder},
    "text": {"given": Given, "whisper": Transcribed},
}
Audio = Annotated[LogMel | AudioEncoder | OpenSmile, Field(discriminator="kind")]
Video = Annotated[Landmarks | VideoEncoder, Field(discriminator="kind")]
Text = Annotated[Given | Transcribed, Field(discriminator="kind")]


class Recipe(Section):
    """One way from clips to arrays."""

    audio: Audio | None = None
    video: Video | None = None
    text: Text = Given()
    max_seconds: float = Field(
        120.0, gt=0, le=7200, description="a longer clip is left out: it needs start and end in the manifest"
    )

    @property
    def encoders(self) -> tuple[AudioEncoder | VideoEncoder | Transcribed, ...]:
        """The sections that name weights of Hugging Face form."""
        sections = (self.audio, self.video, self.text)
        return tuple(s for s in sections if isinstance(s, (AudioEncoder, VideoEncoder, Transcribed)))


def read_recipe(name: str | Path) -> Recipe:
    """The recipe in a YAML file, or one that comes with the package, by its name (`basic`).

    Raises:
        ConfigError: no such recipe, or every fault in it, each with its dotted key.
    """
    path = locate_recipe(name)
    if not path.is_file():
        raise ConfigError(f"there is no recipe {name}{nearest(str(name), [recipe.name for recipe in list_recipes()])}")
    return check_recipe(OmegaConf.to_container(read_mapping(path, "a recipe"), resolve=False), str(path))


def check_recipe(plain: Any, where: str) -> Recipe:
    """A recipe from plain values.

    Raises:
        ConfigError: every fault, each with its dotted key.
    """
    try:
        recipe = Recipe.model_validate(plain)
    except ValidationError as error:
        faults = "\n".join(f"  {_fault(fault)}" for fault in error.errors())
        raise ConfigError(f"{where} is no recipe that can be used:\n{faults}") from error
    if recipe.audio is None and recipe.video is None:
        raise ConfigError(f"{where}: a recipe needs a section audio or video")
    return recipe


def _fault(fault: ErrorDetails) -> str:
    """One validation error in words; pydantic names the kind of a section inside its key, which no file has there."""
    loc = tuple(
        part for part in fault["loc"] if part != "int" and not str(part).startswith("literal[")
    )  # branches of layers
    fault = {**fault, "loc": loc}
    modality, kind, *rest = [*(str(part) for part in loc), "", ""]
    known = KINDS.get(modality, {})
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = str(fault.get("ctx", {}).get("tag", "")) or "nothing"
        return f"{modality}.kind: {given}{nearest(given, list(known))}"
    if kind in known and any(rest):
        return f"{modality}.{describe({**fault, 'loc': fault['loc'][2:]}, known[kind])}"
    return describe(fault, Recipe)
