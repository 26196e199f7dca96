"""A backbone's weights one at a time: the same fingerprint and values as the model that is loaded whole."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

from tests.models.families import FAMILIES, save_public
from tests.models.tiny_models import load, save_family
from trainer.config import BackboneConfig
from trainer.models.backbone.loading import BackboneError
from trainer.models.backbone.streamed import StreamedBase

DENSE = ("Llama 2, 3", "Gemma 2", "Qwen 2, 2.5", "Phi 3, 4", "OPT", "GPT-2", "Falcon", "Command R")


@pytest.mark.parametrize("name", DENSE)
def test_the_fingerprint_is_that_of_loading(name: str, tmp_path: Path) -> None:
    folder = save_public(FAMILIES[name], tmp_path)
    streamed = StreamedBase(BackboneConfig(name=str(folder)), torch.bfloat16)
    assert streamed.is_whole
    assert streamed.fingerprint() == load(folder, torch.bfloat16).fingerprints


@pytest.mark.parametrize("doubly", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_4_bits_values_are_what_the_bits_stand_for(
    dtype: torch.dtype, tied: bool, doubly: bool, tmp_path: Path
) -> None:
    folder = save_family("qwen3", tmp_path, tied=tied)
    config = BackboneConfig(name=str(folder), quantization="nf4", double_quantization=doubly)
    streamed = StreamedBase(config, dtype)
    whole = load(folder, dtype, quantization="nf4", double_quantization=doubly)
    assert streamed.fingerprint() == whole.fingerprints
    place = {parameter: name for name, parameter in streamed.parameter_of.items()}
    quantised = 0
    for name, parameter in whole.base.named_parameters():
        if "lora_" in name:
            continue
        found = streamed.weight(place[name.replace(".base_layer.", ".")])
        state = getattr(parameter, "quant_state", None)
        expected = parameter.data if state is None else bnb.functional.dequantize_4bit(parameter.data, state)
        assert torch.equal(found.values, expected.reshape(found.values.shape)), name
        assert found.quantised == (state is not None)
        quantised += found.quantised
    assert quantised == 14


@pytest.mark.parametrize(("name", "part"), [("Mixtral", ".experts."), ("GPT-NeoX, Pythia", "embed_out")])
def test_a_family_whose_files_have_other_tensors_has_no_fingerprint(name: str, part: str, tmp_path: Path) -> None:
    """Experts one by one, that the model has in one weight; a head of another name, in versions of transformers that rename it."""
    folder = save_public(FAMILIES[name], tmp_path)
    streamed = StreamedBase(BackboneConfig(name=str(folder)), torch.float32)
    if any(part in own and own in streamed.files for own, _ in load(folder, torch.float32).base.named_parameters()):
        assert streamed.is_whole
        assert streamed.fingerprint() == load(folder, torch.float32).fingerprints
        return
    assert not streamed.is_whole
    assert streamed.fingerprint() is None
    assert any(part in file for file in streamed.files.keys() - streamed.parameter_of.keys())


def test_what_cannot_be_read_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no model folder"):
        StreamedBase(BackboneConfig(name=str(tmp_path / "none")), torch.float32)
    folder = save_family("qwen2", tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(BackboneError, match=r"model\.safetensors cannot be read"):
        StreamedBase(BackboneConfig(name=str(folder)), torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="has no safetensors weights"):
        StreamedBase(BackboneConfig(name=str(folder)), torch.float32)
