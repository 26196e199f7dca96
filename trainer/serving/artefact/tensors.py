"""Safetensors written tensor by tensor: only one is in memory, whatever the size of the file, and each is read back and compared.

A file is 8 bytes with the length of a JSON header (little endian), the header (name -> dtype, shape, `data_offsets` behind it), then
the tensors' bytes in the order of their offsets. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.files import write_json
from trainer.serving.artefact.description import ArtefactError

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
SHARD = 4 << 30  # bytes of a file
INDEX, SINGLE, PATTERN = "model.safetensors.index.json", "model.safetensors", "model{suffix}.safetensors"


@dataclass(frozen=True)
class Form:
    """What a tensor is before its values are known."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


class StoredTensors:
    """The tensors of safetensors files, by name, read one at a time."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt", device="cpu")
                names: list[str] = file.keys()  # type: ignore[no-untyped-call]
                self._files |= dict.fromkeys(names, file)
            except (OSError, SafetensorError) as error:
                raise ArtefactError(f"{path} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def form(self, name: str) -> Form:
        """The form of one; its values stay in the file, which is mapped into memory."""
        tensor = self[name]
        return Form(tensor.dtype, tuple(tensor.shape))


def write_tensors(path: Path, forms: Mapping[str, Form], make: Callable[[str], Tensor]) -> dict[str, str]:
    """Write the tensors that `make` gives for the names of `forms`, widest numbers first, so that all are aligned; each is dropped when
    it is written.

    What was written is read back and compared. Returned is the sha256 of every tensor's bytes.

    Raises:
        ArtefactError: a tensor of another form than was said, or the file does not hold what was written.
        OSError: it cannot be written.
    """
    forms = dict(sorted(forms.items(), key=lambda one: (-one[1].dtype.itemsize, one[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, form in forms.items():
        header[name] = {
            "dtype": NAMES[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [at, at := at + form.size],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    digests = {}
    with _whole(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, form in forms.items():
            tensor = make(name).detach().cpu().contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != (form.dtype, form.shape):
                raise ArtefactError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and {form} was expected")
            flat = tensor.reshape(-1).view(torch.uint8).numpy().data
            file.write(flat)
            digests[name] = hashlib.sha256(flat).hexdigest()
    _compare(path, digests)
    return digests


def copy_tensors(path: Path, source: StoredTensors, names: Mapping[str, str]) -> None:
    """Write the tensors of `source` under other names (name there -> name in the file); every one is compared with its source.

    Raises:
        ArtefactError: what the file holds is not what the source does.
        OSError: it cannot be written.
    """
    places = {new: old for old, new in names.items()}
    write_tensors(path, {new: source.form(old) for old, new in names.items()}, lambda new: source[places[new]])
    written = StoredTensors([path])
    if odd := [new for new in places if not _same_bits(written[new], source[places[new]])]:
        raise ArtefactError(f"{path} does not hold what the checkpoint does: {', '.join(odd[:3])}")


def write_shards(folder: Path, forms: Mapping[str, Form], make: Callable[[str], Tensor], most: int = SHARD) -> None:
    """Write a model's tensors as transformers does: one file, or several of at most `most` bytes with an index.

    Raises:
        ArtefactError, OSError: as of :func:`write_tensors`.
    """
    split: Callable[..., Any] = (
        split_state_dict_into_shards_factory  # whatever stands for tensors, which its type does not say
    )
    plan = split(dict(forms), get_storage_size=lambda form: form.size, filename_pattern=PATTERN, max_shard_size=most)
    for file, names in plan.filename_to_tensors.items():
        write_tensors(folder / file, {name: forms[name] for name in names}, make)
    if plan.is_sharded:
        metadata = {"total_size": sum(form.size for form in forms.values())}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": plan.tensor_to_filename})


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is on the disk when the block ends; what fails leaves none."""
    try:
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _compare(path: Path, digests: Mapping[str, str]) -> None:
    written = StoredTensors([path])
    if set(written) != set(digests):
        raise ArtefactError(f"{path} does not hold the tensors that were written into it")
    for name, expected in digests.items():
        found = hashlib.sha256(written[name].contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        if found != expected:
            raise ArtefactError(f"{path}: {name} is not what was written")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same form and bytes: nan equals itself, 0 and -0 differ."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat, wanted = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(flat, wanted)
