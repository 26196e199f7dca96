"""``egmf.json`` of an exported model: what is in the folder, and all that answering needs beside weights and tokenizer.

    README.md            the model card
    LICENSE              what the weights are derived from, and under which licences that stands
    egmf.json            this description, with the size and sha256 of every other file
    adapter/             LoRA in PEFT form                                     (model.adapter.kind=lora)
    backbone/            the trained backbone, whole, in Hugging Face form     (model.adapter.kind=full)
    base/                the offline backbone that the run was trained on      (model.backbone.name=tiny)
    merged/              base and adapter as one model, in Hugging Face form   (egmf export --merge)
    fusion.safetensors   the fusion network                                    (model.fusion.pseudo_tokens > 0)
    tokenizer/           the backbone's tokenizer, file by file
    code/                plug-ins with experts of the user's own

Light to import: whoever asks whether a folder is an artefact, or checks its files, loads no model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.files import file_digest, load_json, write_text

DESCRIPTION, CARD, LICENSE = "egmf.json", "README.md", "LICENSE"
ADAPTER, BACKBONE, BASE, MERGED, TOKENIZER, CODE = "adapter", "backbone", "base", "merged", "tokenizer", "code"
FUSION = "fusion.safetensors"
FORMAT = 1  # raised when what older versions would read wrongly is added
LARGEST = 64 << 20  # bytes of a description that is read
EDITABLE = (CARD,)  # a card is edited on a hub; another one changes no answer
IGNORED = (".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store")  # what clones, hubs and desktops leave
_SHOWN = 5  # faults in a message


class ArtefactError(ValueError):
    """An exported model that cannot be written, or cannot be used as it is; the message says what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Part):
    """A file of the folder."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class PromptText(_Part):
    """What stands before the pseudo tokens, and between the sample's text and the answer."""

    before: str
    after: str


class TaskEntry(_Part):
    """A task that the model answers.

    Attributes:
        definition: as a task's YAML file has it, with all defaults written out.
        prompt: as the model reads it.
        answers: every answer, as it follows the prompt.
        widths: features of a frame of audio and video; 0: none.
        rates: frames a second of the data that the model was trained with; None: not known.
        zero_frames: what became of frames of zeros.
        dataset: the name of the encoders that it shares with other questions about the same samples; None: its own.
        max_rate: the frames a second to which streams were resampled, from `source_rates`.
        recipe: by what the features were extracted; None: not known.
        fingerprint: of the prepared dataset.
        samples: split -> how many there were.
    """

    definition: dict[str, Any]
    prompt: PromptText
    answers: list[str]
    widths: dict[str, int]
    rates: dict[str, float | None]
    zero_frames: Literal["mask", "keep"]
    dataset: str | None
    max_rate: float | None
    source_rates: dict[str, float | None]
    recipe: dict[str, Any] | None
    fingerprint: str
    samples: dict[str, int]


class BaseEntry(_Part):
    """The backbone that the run was trained on.

    Attributes:
        place: where its weights are: in this folder (the offline one, or one that was trained whole), in a folder of the machine that
            exported, or on a hub.
        name: of the hub's model or the folder's path; `tiny` of the offline one.
        revision: the hub's commit, where it is known.
        hash: of the frozen weights, as the run's checkpoints have it.
        quantization, double_quantization, precision: how the run held them, on which the hash depends.
        license: as its folder or its card says it; None: neither does.
    """

    place: Literal["inside", "folder", "hub"]
    name: str
    revision: str | None
    hash: str
    quantization: Literal["none", "nf4"]
    double_quantization: bool
    precision: Literal["fp32", "bf16", "fp16"]
    license: str | None


class AdapterEntry(_Part):
    """What of the backbone was trained. `pairs` is the number of pairs of LoRA matrices; `tensors` of all trained tensors of the backbone."""

    kind: Literal["lora", "full", "frozen"]
    rank: int | None = None
    alpha: float | None = None
    pairs: int = 0
    tensors: int = 0


class MergedEntry(_Part):
    """The merged backbone: its type of numbers; `dequantised`: the base is what 4 bits gave back."""

    dtype: Literal["bf16", "fp16", "fp32"]
    dequantised: bool


class RunEntry(_Part):
    """The run that was exported: its name, seed, and where its chosen checkpoint stood."""

    name: str
    seed: int
    checkpoint: str
    step: int
    epoch: float
    steps: int | None
    world: int
    zero: int
    fold: dict[str, Any] | None
    commit: str | None
    mlflow_run: str | None


class Description(_Part):
    """The whole file.

    Attributes:
        config: the run's config as far as answering needs it; paths of plug-ins are relative to the folder.
        joining: how the pieces of prompts are tokenised (:class:`trainer.text.Pieces`).
        code: file of a plug-in -> its sha256; the same stands in `files`.
        hash: sha256 over all of the rest, by which the artefact is known.
    """

    format: int
    version: str | None
    created: str
    versions: dict[str, str | None]
    run: RunEntry
    config: dict[str, Any]
    joining: Literal["running", "apart"]
    tasks: dict[str, TaskEntry] = Field(min_length=1)
    base: BaseEntry
    adapter: AdapterEntry
    merged: MergedEntry | None
    pseudo_tokens: int = Field(ge=0)
    code: dict[str, str]
    files: dict[str, FileEntry]
    hash: str = ""

    @property
    def digest(self) -> str:
        """What `hash` must be."""
        rest = self.model_dump(mode="json", exclude={"hash"})
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def is_artefact(folder: Path) -> bool:
    """Whether a folder holds an exported model, whole or not."""
    return (folder / DESCRIPTION).is_file()


def write_description(folder: Path, description: Description) -> Description:
    """Write it with its hash; the same with the hash is returned."""
    whole = description.model_copy(update={"hash": description.digest})
    text = json.dumps(whole.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / DESCRIPTION, text + "\n")
    return whole


def read_description(folder: Path) -> Description:
    """The description in a folder, whose hash fits. Of the other files nothing is read: see :func:`check_files`.

    Raises:
        ArtefactError: no artefact, one of another format, or a description that is damaged.
    """
    path = folder / DESCRIPTION
    try:
        if path.stat().st_size > LARGEST:
            raise ArtefactError(f"{path} is larger than {LARGEST >> 20} MiB: it is no description of a model")
        raw = load_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtefactError(
            f"{folder} is no exported model: it has no {DESCRIPTION} (egmf export writes one)"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{path} is damaged ({error}): export the run, or fetch the folder, again") from error
    if not isinstance(raw, dict):
        raise ArtefactError(f"{path} is damaged (it holds no object): export the run, or fetch the folder, again")
    if raw.get("format") != FORMAT:
        writer = f" ({raw['version']})" if isinstance(raw.get("version"), str) else ""
        raise ArtefactError(
            f"{path} has format {raw.get('format')!r}, and this version of egmf-trainer reads format {FORMAT}: use the version that wrote "
            f"it{writer}, or export the run again"
        )
    try:
        description = Description.model_validate(raw)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ArtefactError(
            f"{path} does not have what its format asks for ({some(faults)}): export the run, or fetch the folder, again"
        ) from error
    if description.digest != description.hash:
        raise ArtefactError(
            f"{path} has changed since it was written (its hash does not fit): export the run, or fetch the folder, again"
        )
    if odd := [name for name in description.files if not _is_inside(name)]:
        raise ArtefactError(f"{path} names files outside of its folder: {some(odd)}")
    return description


def check_files(folder: Path, description: Description) -> list[str]:
    """Refuse a folder of which a file is missing, has another size or other bytes, or that holds files that nobody wrote there.

    All are read whole, in threads. Returned are sentences about the card, which may be edited.

    Raises:
        ArtefactError: every such file, by its name.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda one: _fault(folder / one[0], one[1]), description.files.items()))
    faults = {name: fault for name, fault in zip(description.files, found, strict=True) if fault is not None}
    known = {*description.files, DESCRIPTION}
    faults |= {name: "is not part of the exported model" for name in files_below(folder) if name not in known}
    notes = [f"{folder / name} {faults.pop(name)}: answers do not depend on it" for name in EDITABLE if name in faults]
    if faults:
        listed = some([f"{name} {fault}" for name, fault in faults.items()])
        raise ArtefactError(f"{folder} is not as it was exported: {listed}. Export the run, or fetch the folder, again")
    return notes


def entries(folder: Path) -> dict[str, FileEntry]:
    """Every file of a folder but the description, with its size and hash."""
    names = [name for name in files_below(folder) if name != DESCRIPTION]
    return {name: FileEntry(bytes=(folder / name).stat().st_size, sha256=file_digest(folder / name)) for name in names}


def files_below(folder: Path) -> list[str]:
    """The files of a folder, by their names with slashes, in order; without what clones and hubs leave in it."""
    return sorted(_walk(folder, folder))


def some(items: list[str]) -> str:
    """The first few of a list, for a message."""
    more = f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more


def plain_config(description: Description) -> Mapping[str, Any]:
    """The config as it is written, without references, which no artefact has.

    Raises:
        ArtefactError: it has some.
    """
    if "${" in json.dumps(description.config):
        raise ArtefactError(f"{DESCRIPTION} has a config that refers to something (${{…}}): it is not read")
    return description.config


def _walk(folder: Path, top: Path) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name in IGNORED or path.name.startswith(".egmf-"):
            continue
        if path.is_dir() and not path.is_symlink():  # a link may lead in a circle
            yield from _walk(path, top)
        else:
            yield path.relative_to(top).as_posix()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and path.as_posix() == name


def _fault(path: Path, about: FileEntry) -> str | None:
    try:
        size = path.stat().st_size
        if not path.is_file():
            return "is no file"
        if size != about.bytes:
            return f"has {size:,} bytes and not {about.bytes:,}"
        return None if file_digest(path) == about.sha256 else "has changed since it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
