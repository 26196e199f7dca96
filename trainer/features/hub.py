"""Folders of encoders in Hugging Face form: where they are, and which of their files are read.

An encoder is resolved to a folder of this machine once, and everything is read from there, so what is hashed is what is loaded. Code that comes
with a model never runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from trainer.files import load_json

SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "vocab.json",
    "merges.txt",
)
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # transformers reads tensors alone from them


class Named(Protocol):
    """A section of a recipe that names an encoder."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str | None: ...


def locate_model(section: Named) -> Path:
    """The folder of the encoder that a section names; what is not in the local cache of the hub is fetched first.

    Raises:
        ValueError: there is no such folder or model, or it cannot be fetched; the message says what to do.
    """
    name = section.name
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} is a folder without config.json: no encoder of Hugging Face form")
        return path
    here = "" if path.is_absolute() else f" in {Path.cwd()}"
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name} with an encoder{here} (a name on the hub is written owner/name)")
    return _fetch(name, section.revision)


def model_files(folder: Path) -> list[Path]:
    """The files of an encoder that decide what it computes: settings and weights. Safetensors count before others, as in transformers.

    Raises:
        ValueError: it has no weights, or an index of them that names a file that is not there.
    """
    weights = _weights(folder, SAFE_WEIGHTS) or _weights(folder, OTHER_WEIGHTS)
    if not weights:
        raise ValueError(f"{folder} has no weights (none of {', '.join((*SAFE_WEIGHTS, *OTHER_WEIGHTS))})")
    return sorted([*weights, *(folder / name for name in SETTINGS if (folder / name).is_file())])


def text_files(folder: Path) -> list[Path]:
    """The files of a model that writes text which decide what it writes: its tokenizer, and how it generates."""
    return [folder / name for name in TEXT_FILES if (folder / name).is_file()]


def _weights(folder: Path, names: tuple[str, str]) -> list[Path]:
    """The one file of weights; where there is none, an index and the files that it names."""
    whole, index = (folder / name for name in names)
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    found = [folder / name for name in _shards(index)]
    if absent := [path.name for path in found if not path.is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(absent)}, which {index.name} names: fetch it again")
    return [index, *found]


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(load_json(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights: {error}") from error
    if odd := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{index} names {odd[0]!r}, which is no file beside it")
    return names


def _fetch(name: str, revision: str | None) -> Path:
    """The folder of a hub model in the local cache, with what is missing of it fetched."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    kept = [*SETTINGS, *TEXT_FILES]
    try:
        for weights in ((SAFE_WEIGHTS[0], "model-*.safetensors", SAFE_WEIGHTS[1]), OTHER_WEIGHTS):
            shards = ("pytorch_model-*.bin",) if weights is OTHER_WEIGHTS else ()
            folder = Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=[*kept, *weights, *shards],
                    local_files_only=bool(constants.HF_HUB_OFFLINE),
                )
            )
            if any((folder / one).exists() for one in weights):
                break
    except HFValidationError as error:
        raise ValueError(f"{name} is neither a folder in {Path.cwd()} nor a name on the hub (owner/name)") from error
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(_explain(name, revision, error)) from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} on the hub has no config.json: no encoder of Hugging Face form")
    return folder


def _explain(name: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants

    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    at = f" at revision {revision}" if revision else ""
    if constants.HF_HUB_OFFLINE:
        return (
            f"{name}{at} is not in the local cache of the hub ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set: run '{command}' "
            "where there is a network, or give a folder instead of the name"
        )
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"{name}{at} is not in the local cache of the hub ({constants.HF_HUB_CACHE}) and cannot be fetched ({first}): check the name; "
        f"where there is no network, run '{command}' on a machine that has one, or give a folder instead of the name"
    )


def pretrained_options(folder: Path) -> dict[str, Any]:
    """The arguments with which everything is loaded from an encoder's folder: nothing is fetched, no code of the model runs."""
    return {
        "pretrained_model_name_or_path": os.fspath(folder),
        "local_files_only": True,
        "trust_remote_code": False,
    }
