"""Safetensors that are written tensor by tensor, against the library that reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.serving.artefact import tensors
from trainer.serving.artefact.description import ArtefactError
from trainer.serving.artefact.tensors import Form, StoredTensors, copy_tensors, write_shards, write_tensors

TYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)
VALUES = {
    **{str(dtype): torch.arange(-3, 9).reshape(3, 4).abs().to(dtype) for dtype in TYPES},
    "scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "truth": torch.tensor([True, False]),
    "odd": torch.tensor([torch.nan, -0.0, torch.inf]), "turned": torch.arange(6.0).reshape(2, 3).T,
}  # fmt: skip
FORMS = {name: Form(value.dtype, tuple(value.shape)) for name, value in VALUES.items()}


def bits(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", FORMS, VALUES.__getitem__)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert (found[name].dtype, found[name].shape, bits(found[name])) == (value.dtype, value.shape, bits(value)), (
            name
        )
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert all(value.data_ptr() % value.dtype.itemsize == 0 for value in found.values())


def test_one_tensor_is_made_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counted(torch.Tensor):
        pass

    def make(name: str) -> torch.Tensor:
        alive.append(len(alive))
        return torch.full((1000,), float(name))

    write_tensors(tmp_path / "x.safetensors", {str(i): Form(torch.float32, (1000,)) for i in range(5)}, make)
    assert len(alive) == 5  # each once


def test_a_tensor_of_another_form_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"x is torch.float32 \(2,\), and Form"):
        write_tensors(tmp_path / "x.safetensors", {"x": Form(torch.float32, (3,))}, lambda _: torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_copies_have_other_names_and_the_same_bits(tmp_path: Path) -> None:
    save_file({name: value.contiguous() for name, value in VALUES.items()}, tmp_path / "from.safetensors")
    source = StoredTensors([tmp_path / "from.safetensors"])
    copy_tensors(tmp_path / "to.safetensors", source, {name: f"new.{name}" for name in VALUES})
    found = load_file(tmp_path / "to.safetensors")
    assert {name: bits(value) for name, value in found.items()} == {f"new.{n}": bits(v) for n, v in VALUES.items()}


def test_shards_follow_the_index(tmp_path: Path) -> None:
    forms = {f"w{i}": Form(torch.float32, (100,)) for i in range(7)}
    write_shards(tmp_path, forms, lambda name: torch.full((100,), float(name[1:])), most=1000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert (tmp_path / tensors.INDEX).is_file()
    found = StoredTensors(files)
    assert {name: float(found[name].mean()) for name in found} == {f"w{i}": float(i) for i in range(7)}


def test_what_is_no_safetensors_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(ArtefactError, match=r"x\.safetensors cannot be read"):
        StoredTensors([tmp_path / "x.safetensors"])
