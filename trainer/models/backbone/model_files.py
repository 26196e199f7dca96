"""What is wrong with the files of a model folder, found from JSON and headers alone: no tensor is read.

A safetensors file is 8 bytes with the length n of its header (little endian), n bytes of JSON (name -> dtype, shape, `data_offsets`
behind the header), then the tensors. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from trainer.file_kinds import misnamed

KINDS = (".safetensors", ".json", ".model", ".txt")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")  # fmt: skip
TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")  # fmt: skip
AGAIN = "copy or fetch it again"
FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names


@dataclass
class WeightFiles:
    """The safetensors files of a folder: their bytes; the file, the shape and the stored type (safetensors' name) of every tensor; and
    what is wrong, in sentences."""

    size: int = 0
    file_of: dict[str, str] = field(default_factory=dict)
    shape_of: dict[str, tuple[int, ...]] = field(default_factory=dict)
    type_of: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def where(self, name: str) -> str:
        """` in FILE` of a parameter, whose name in the files may have another prefix; "" where no tensor is like it."""
        found = self.file_of.get(name) or next(
            (file for key, file in self.file_of.items() if name.endswith(f".{key}") or key.endswith(f".{name}")), None
        )
        return f" in {found}" if found else ""


def folder_faults(folder: Path, weights: WeightFiles | None = None) -> list[str]:
    """Everything that is wrong with config.json, with adapters beside the model and, if given, with its weight files."""
    _, faults = _json_object(folder / CONFIG_NAME)
    if (folder / ADAPTER_CONFIG_NAME).exists():
        faults.append(
            f"{ADAPTER_CONFIG_NAME} lies beside a full model, and transformers would load that adapter too: move it and "
            "adapter_model.* out of the folder to use the model alone; to use the adapter, merge it into the model first "
            "(peft's merge_and_unload) and name the result"
        )
    return faults + ([] if weights is None else weights.faults)


def tokenizer_faults(folder: Path) -> list[str]:
    """What is wrong with the tokenizer's files, or that there are none."""
    faults = [fault for name in TOKENIZER_JSON if (folder / name).exists() for fault in _json_object(folder / name)[1]]
    vocabularies = [folder / name for name in VOCABULARIES if (folder / name).exists()]
    for path in vocabularies:
        if path.name not in TOKENIZER_JSON:
            faults += _content(path)
    if not vocabularies:
        faults.append(
            f"no tokenizer: none of {', '.join(VOCABULARIES)} is there. Copy the tokenizer's files from where the model "
            'came from (hf download NAME --exclude "*.safetensors")'
        )
    return faults


def has_weights(folder: Path) -> bool:
    """Whether there is any safetensors file: a folder may have been fetched without, to plan with."""
    return next(folder.glob("*.safetensors"), None) is not None


def has_vocabulary(folder: Path) -> bool:
    return any((folder / name).exists() for name in VOCABULARIES)


def weight_files(folder: Path) -> WeightFiles:
    """Open every safetensors file that transformers would read, and compare them with the index.

    A folder without any is no fault here: it may have been fetched without weights, to plan with.
    """
    found = WeightFiles()
    named = _json_object(folder / CONFIG_NAME)[0].get("transformers_weights")
    single = named if isinstance(named, str) else SAFE_WEIGHTS_NAME
    index = single if single.endswith(".index.json") else SAFE_WEIGHTS_INDEX_NAME
    if single != index and os.path.lexists(folder / single):
        _open(folder, single, found)
        return found
    if not (folder / index).exists():
        others = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
        if others:
            found.faults.append(
                f"there is neither {single} nor {index}, but {_some(others)}: {index}, which says which of them make "
                "the model, is missing; copy or fetch it"
            )
        return found
    table, faults = _json_object(folder / index)
    weight_map = table.get("weight_map")
    if faults:
        found.faults += faults
    elif isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values()):
        _open_shards(folder, index, weight_map, found)
    else:
        found.faults.append(f"{index} has no weight_map (tensor name -> file): {AGAIN}")
    return found


def quantised_weights(found: WeightFiles) -> list[str]:
    """Weights that are stored as integers, or in 8 bits with scales beside them: read as numbers they are others than were meant."""
    scaled = {name.rpartition("_scale")[0] for name in found.type_of if "weight_scale" in name}
    odd: dict[str, list[str]] = {}
    for name, kind in found.type_of.items():
        if name.endswith(".weight") and kind not in FLOATS and (not kind.startswith("F8") or name in scaled):
            odd.setdefault(kind, []).append(name)
    return [
        f"{len(names)} weights are stored as {kind}, with no quantization_config that says how: {_some(names)}. Name the unquantised "
        "model, and set model.backbone.quantization=nf4 for 4 bits"
        for kind, names in odd.items()
    ]


def _open_shards(folder: Path, index: str, weight_map: Mapping[str, str], found: WeightFiles) -> None:
    unread = set()
    for name in sorted(set(weight_map.values())):
        placed = [tensor for tensor, file in weight_map.items() if file == name]
        if not _open(folder, name, found, f"; {index} places {len(placed)} tensors in it: {_some(placed)}"):
            unread.add(name)
    absent: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        if tensor not in found.file_of and file not in unread:
            absent.setdefault(file, []).append(tensor)
    for file, tensors in absent.items():
        found.faults.append(
            f"{index} places {_some(tensors)} in {file}, and no file has {'it' if len(tensors) == 1 else 'them'}: index and "
            "files are of different versions of the model; copy or fetch all of them again"
        )


def _open(folder: Path, name: str, found: WeightFiles, places: str = "") -> bool:
    """Add the tensors of one file; false, with a fault, where it cannot be read."""
    path = folder / name
    if not path.exists():
        link = f"is a link to {path.readlink()}, which is not there" if path.is_symlink() else "is missing"
        found.faults.append(f"{name} {link}{places}. Copy or fetch it")
        return False
    try:
        with safe_open(path, framework="pt") as file:
            headers = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            forms = {key: (tuple(header.get_shape()), str(header.get_dtype())) for key, header in headers.items()}
    except (OSError, SafetensorError) as error:
        found.faults += _content(path) or [f"{name} {_cut_short(path) or f'is damaged ({error})'}: {AGAIN}"]
        return False
    found.size += path.stat().st_size
    twice: dict[str, list[str]] = {}
    for key, (shape, kind) in forms.items():
        if key in found.file_of:
            twice.setdefault(found.file_of[key], []).append(key)
        found.file_of[key], found.shape_of[key], found.type_of[key] = name, shape, kind
    for other, tensors in twice.items():
        found.faults.append(
            f"{_some(tensors)} {'is' if len(tensors) == 1 else 'are'} both in {other} and in {name}, and which counts is "
            "chance: the files are of two models, or of two versions of one; copy or fetch all of them again"
        )
    return True


def _cut_short(path: Path) -> str | None:
    """How much of a safetensors file is there, and the first tensor that is not; None where that is not its fault."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not size > length:
            return None if size >= 8 and length > 100 << 20 else f"is cut short within its header ({size:,} bytes)"
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items() if "dtype" in entry}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None
    lost = sorted((end, name) for name, end in ends.items() if end > size)
    if not lost:
        return None
    return f"is cut short: {size:,} of {max(ends.values()):,} bytes, without {_some(name for _, name in lost)}"


def _json_object(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A JSON file that must hold an object, and what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [f"{path.name} is missing"]
    except (OSError, ValueError, RecursionError) as error:
        return {}, _content(path) or [f"{path.name} is no JSON ({error}): {AGAIN}"]
    if not isinstance(value, dict):
        return {}, [f"{path.name} has no JSON object but a {type(value).__name__}: {AGAIN}"]
    return value, []


def _content(path: Path) -> list[str]:
    """What a file is that is not what its name says, by its first bytes."""
    if path.is_dir():
        return [f"{path.name} is a folder and not a file: {AGAIN}"]
    try:
        kind = misnamed(path, KINDS)
        if kind is None and path.stat().st_size == 0:
            kind = f"is empty: {AGAIN}"
    except OSError as error:
        kind = f"cannot be read ({error.strerror})"
    return [] if kind is None else [f"{path.name} {kind}"]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
