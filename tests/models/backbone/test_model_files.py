"""Every fault of a model folder's files is named with its file, its tensors and what to do, all of them at once."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.tiny_models import save_family
from trainer.config import AdapterConfig, BackboneConfig
from trainer.models.backbone.causal_lm import build_backbone
from trainer.models.backbone.loading import BackboneError, load_model, load_shape, load_tokenizer
from trainer.models.backbone.model_files import folder_faults, tokenizer_faults, weight_files
from trainer.models.ranks import SingleProcess

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"
HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_family("llama", tmp_path_factory.mktemp("sharded") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="120KB")
    return folder


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_json(path: Path, work: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    work(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def refusal(folder: Path, quantization: str = "none", read: str = "each") -> str:
    config = BackboneConfig(name=str(folder), quantization=quantization, read=read)
    with pytest.raises(BackboneError) as caught:
        build_backbone(config, AdapterConfig(), torch.float32, "cpu")
    return str(caught.value).replace(str(folder), "FOLDER")


def missing(folder: Path) -> str:
    lost = shards(folder)[1]
    tensors = list(load_file(lost))
    lost.unlink()
    return f"{lost.name} is missing; {INDEX} places {len(tensors)} tensors in it: {min(tensors)}"


def cut_short(folder: Path) -> str:
    path = shards(folder)[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])  # of the tensor that lies last
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    return (
        f"{path.name} is cut short: {len(whole) - 4:,} of {len(whole):,} bytes, without {last}: copy or fetch it again"
    )


def cut_within_the_header(folder: Path) -> str:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:50])
    return f"{path.name} is cut short within its header (50 bytes): copy or fetch it again"


def empty(folder: Path) -> str:
    shards(folder)[1].write_bytes(b"")
    return f"{shards(folder)[1].name} is empty: copy or fetch it again"


def pointer(folder: Path) -> str:
    shards(folder)[1].write_bytes(LFS)
    return f"{shards(folder)[1].name} is a Git LFS pointer and not the file: git lfs pull brings that"


def page(folder: Path) -> str:
    shards(folder)[1].write_bytes(HTML)
    return f"{shards(folder)[1].name} is an HTML page"


def zeros(folder: Path) -> str:
    shards(folder)[1].write_bytes(b"\0" * 5000)
    return f"{shards(folder)[1].name} is nothing but 5,000 zero bytes"


def noise(folder: Path) -> str:
    shards(folder)[1].write_bytes(b"\1\2\3\4\5\6\7\0" * 50)
    return f"{shards(folder)[1].name} is damaged ("


def subfolder(folder: Path) -> str:
    path = shards(folder)[1]
    path.unlink()
    path.mkdir()
    return f"{path.name} is a folder and not a file"


def without_index(folder: Path) -> str:
    (folder / INDEX).unlink()
    return f"there is neither model.safetensors nor {INDEX}, but {shards(folder)[0].name}"


def index_of_other_tensors(folder: Path) -> str:
    first = shards(folder)[0].name
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.layers.9.mlp.up_proj.weight": first}))
    return f"{INDEX} places model.layers.9.mlp.up_proj.weight in {first}, and no file has it"


def index_is_no_json(folder: Path) -> str:
    (folder / INDEX).write_text("{")
    return f"{INDEX} is no JSON (Expecting"


def index_without_map(folder: Path) -> str:
    edit_json(folder / INDEX, lambda index: index.pop("weight_map"))
    return f"{INDEX} has no weight_map"


def index_is_a_list(folder: Path) -> str:
    (folder / INDEX).write_text("[]")
    return f"{INDEX} has no JSON object but a list"


def twice(folder: Path) -> str:
    one, two = shards(folder)[:2]
    name, value = next(iter(load_file(one).items()))
    save_file({**load_file(two), name: value + 1}, two, metadata={"format": "pt"})
    return f"{name} is both in {one.name} and in {two.name}"


def stray_adapter(folder: Path) -> str:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    return "adapter_config.json lies beside a full model"


def config_is_no_json(folder: Path) -> str:
    (folder / "config.json").write_text("{oops")
    return "config.json is no JSON (Expecting"


def config_is_a_pointer(folder: Path) -> str:
    (folder / "config.json").write_bytes(LFS)
    return "config.json is a Git LFS pointer"


def config_is_a_list(folder: Path) -> str:
    (folder / "config.json").write_text("[1]")
    return "config.json has no JSON object but a list"


def no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "no tokenizer: none of tokenizer.json, tokenizer.model"


def tokenizer_is_a_pointer(folder: Path) -> str:
    (folder / "tokenizer.json").write_bytes(LFS)
    return "tokenizer.json is a Git LFS pointer"


def tokenizer_config_is_no_json(folder: Path) -> str:
    (folder / "tokenizer_config.json").write_text("{")
    return "tokenizer_config.json is no JSON"


WEIGHTS = [
    missing, cut_short, cut_within_the_header, empty, pointer, page, zeros, noise, subfolder, without_index,
    index_of_other_tensors, index_is_no_json, index_without_map, index_is_a_list, twice, stray_adapter,
]  # fmt: skip
TEXTS = [
    config_is_no_json, config_is_a_pointer, config_is_a_list, no_tokenizer, tokenizer_is_a_pointer, tokenizer_config_is_no_json,
]  # fmt: skip


@pytest.mark.parametrize("damage", [*WEIGHTS, *TEXTS])
@pytest.mark.parametrize(("quantization", "read"), [("none", "each"), ("nf4", "each"), ("none", "rank0")])
def test_a_fault_is_one_sentence(folder, damage, quantization, read):
    expected = damage(folder)
    message = refusal(folder, quantization, read)
    assert message.startswith(f"FOLDER: {expected}"), message
    assert "\n" not in message


@pytest.mark.parametrize("damage", WEIGHTS)
def test_weights_are_checked_before_one_is_read(folder, damage, monkeypatch):
    expected = damage(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("reads weights"))
    with pytest.raises(BackboneError) as caught:
        load_model(BackboneConfig(name=str(folder)), torch.float32, torch.device("cpu"), None)
    assert expected in str(caught.value)


def test_all_faults_come_at_once(folder):
    names = [path.name for path in shards(folder)]
    shards(folder)[2].write_bytes(HTML)
    expected = [no_tokenizer(folder), stray_adapter(folder), missing(folder), config_is_no_json(folder)]
    message = refusal(folder)
    assert message.startswith("FOLDER has 5 faults:\n")
    for part in (*expected, f"{names[2]} is an HTML page"):
        assert message.count(f"\n  - {part}") == 1, message


def test_sound_folders_have_no_faults(folder, sharded, tmp_path):
    found = weight_files(folder)
    assert found.faults == []
    assert found.size == sum(path.stat().st_size for path in shards(folder))
    assert found.file_of == json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))  # read all the same
    assert folder_faults(folder) == tokenizer_faults(folder) == []
    whole = save_family("qwen2", tmp_path / "whole", tied=True)
    assert folder_faults(whole) == tokenizer_faults(whole) == []
    bare = Path(
        shutil.copytree(sharded, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    )
    assert folder_faults(bare) == []  # fetched without weights, to plan with


def test_shape_and_tokenizer_are_read_without_weights_and_with_damaged_ones(folder):
    config, names = BackboneConfig(name=str(folder)), [path.name for path in shards(folder)]
    for damage in (missing, stray_adapter):
        damage(folder)
        assert load_shape(config).model_type == "llama"
        assert len(load_tokenizer(config)) == 320
    for path in shards(folder):
        path.unlink()
    assert load_shape(config).model_type == "llama"
    assert refusal(folder).count("is missing;") == len(names)


def test_a_value_of_another_type_in_config_json_is_a_fault_in_words(folder):
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings="llama"))
    assert "tie_word_embeddings" in refusal(folder)


@dataclass
class SecondRank(SingleProcess):
    """Rank 1 of 2, which gets what rank 0 found."""

    found: list[str]
    size, is_rank_zero = 2, False

    def broadcast_object(self, value: Any) -> Any:
        assert value == []  # this rank has no files to look at
        return self.found


def test_under_read_rank0_every_rank_refuses_what_rank_0_found(folder):
    for path in shards(folder):
        path.unlink()
    config = BackboneConfig(name=str(folder), read="rank0")
    with pytest.raises(BackboneError, match="a shard is missing"):
        load_model(config, torch.float32, torch.device("cpu"), None, ranks=SecondRank(["a shard is missing"]))
