"""Every fault of a model folder's files is named with its file, its tensors and what to do, all of them at once."""

from __future__ import annotations

import hashlib
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
from transformers.utils import logging as transformers_logging

from tests.models.tiny_models import save_family
from trainer.config import AdapterConfig, BackboneConfig
from trainer.models.backbone.causal_lm import build_backbone
from trainer.models.backbone.fingerprint import BLOCK, is_finite, measure
from trainer.models.backbone.loading import BackboneError, faults_before_reading, load_model, load_shape, load_tokenizer
from trainer.models.backbone.model_files import folder_faults, tokenizer_faults, weight_files
from trainer.models.backbone.rank0_reader import safetensors_files
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


MODES = [("none", "each"), ("nf4", "each"), ("none", "rank0"), ("nf4", "rank0")]


def edit_tensors(folder: Path, changes: dict[str, Callable[[torch.Tensor], object]]) -> dict[str, str]:
    """Change tensors where they are stored; returns the file of each."""
    files = {}
    for path in shards(folder):
        state = load_file(path)
        for name in changes.keys() & state.keys():
            changes[name](state[name])
            files[name] = path.name
        save_file(state, path, metadata={"format": "pt"})
    return files


@pytest.mark.parametrize(("quantization", "read"), MODES)
def test_nan_and_infinity_are_named_with_tensor_and_file(folder, quantization, read):
    up, norm, table = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
    changes = {
        up: lambda w: w[5, :3].fill_(float("nan")),
        norm: lambda w: w[:1].fill_(float("inf")),
        table: lambda w: (w[319, 7:8].fill_(float("-inf")), w[318, :2].fill_(float("nan"))),
    }
    files = edit_tensors(folder, changes)
    message = refusal(folder, quantization, read)
    assert f"{up} in {files[up]} has 3 nan among 8,192 values" in message
    assert f"{norm} in {files[norm]} has 1 infinite among 64 values" in message
    assert f"{table} in {files[table]} has 2 nan and 1 infinite among 20,480 values" in message
    assert "another checkpoint" in message


def other_config(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(intermediate_size=256, num_hidden_layers=3))


SIZES = (
    "6 weights have other sizes: model.layers.0.mlp.down_proj.weight is (64, 128) in the files, (64, 256) in the model"
)


@pytest.mark.parametrize(("quantization", "read"), MODES)
def test_missing_weights_and_other_sizes_come_at_once_from_headers(folder, quantization, read, monkeypatch):
    other_config(folder)
    monkeypatch.setattr("trainer.models.backbone.loading._from_pretrained", lambda *_: pytest.fail("reads weights"))
    message = refusal(folder, quantization, read)
    assert message.startswith("FOLDER has 2 faults:\n")
    assert "9 weights are not in its files and would be random: model.layers.2.input_layernorm.weight, " in message
    assert SIZES in message


@pytest.mark.parametrize(("quantization", "read"), MODES)
def test_what_headers_do_not_tell_comes_at_once_when_weights_are_read(folder, quantization, read, monkeypatch):
    """As of a model that is fetched from the hub: only its tensors tell."""
    edit_tensors(folder, {"model.norm.weight": lambda w: w[:1].fill_(float("nan"))})
    other_config(folder)
    monkeypatch.setattr("trainer.models.backbone.loading.faults_of_shapes", lambda *_, **__: [])
    message = refusal(folder, quantization, read)
    assert message.startswith("FOLDER has 3 faults:\n")
    assert "9 weights are not in its files" in message
    assert SIZES in message
    assert "model.norm.weight in " in message


def test_sizes_come_with_damaged_files_and_what_these_lack_is_told_once(folder):
    expected = missing(folder)
    other_config(folder)
    message = refusal(folder)
    assert message.startswith("FOLDER has 2 faults:\n")
    assert expected in message
    assert "weights have other sizes: model.layers." in message
    assert "not in its files" not in message


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_joined_into_one_weight_are_compared_with_each_other(tmp_path, family):
    sizes = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    folder = save_family(family, tmp_path / "model", **(sizes if family == "qwen3_moe" else {"num_local_experts": 4}))
    config = BackboneConfig(name=str(folder))
    assert faults_before_reading(config, folder) == []
    state = {
        name: value.clone() for name, value in load_file(folder / "model.safetensors").items()
    }  # not views into it
    names = sorted(name for name in state if ".layers.1." in name and ".experts.2." in name)
    assert len(names) == 3  # transformers writes them apart, as the published files have them
    save_file({**state, names[0]: torch.zeros(3, 5)}, folder / "model.safetensors", metadata={"format": "pt"})
    (fault,) = faults_before_reading(config, folder)
    assert fault.startswith(
        f"1 weights of experts have other sizes than those beside them: {names[0]} is (3, 5), others are ("
    )
    state.pop(names[0])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (fault,) = faults_before_reading(config, folder)
    assert (
        fault
        == f"1 weights of experts are not in its files, where other experts have them: {names[0]}: copy or fetch it again"
    )


def whole(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The folder with one weight file, changed."""
    state = {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}
    for path in (*shards(folder), folder / INDEX):
        path.unlink()
    changed = change(state)
    save_file(changed if isinstance(changed, dict) else state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_layers_that_config_json_does_not_count_are_not_left_out(folder):
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=1))
    expected = "FOLDER: config.json has 1 layers, and its files 1 more, which would be left out: model.layers.1. "
    assert refusal(folder).startswith(expected)
    whole(folder, lambda state: state.update({"model.layers.1.eh_proj.weight": torch.zeros(64, 64)}))
    assert faults_before_reading(BackboneConfig(name=str(folder)), folder) == []  # a layer for more tokens at once


@pytest.mark.parametrize(
    ("prefix", "by"), [("base_model.model.", "peft"), ("module.", "Distributed"), ("_orig_mod.", "torch")]
)
def test_names_of_a_wrapper_are_called_so(folder, prefix, by):
    whole(folder, lambda state: {prefix + name: tensor for name, tensor in state.items()})
    assert refusal(folder).startswith(
        f"FOLDER: the names of its tensors begin with {prefix}: it was saved inside of {by}"
    )


def test_integers_are_no_weights_and_8_bits_are_where_no_scales_are_beside_them(folder):
    up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"

    def change(state: dict[str, torch.Tensor]) -> None:
        state[up], state[down] = state[up].to(torch.int8), state[down].to(torch.float8_e4m3fn)

    whole(folder, change)
    assert refusal(folder).startswith(
        f"FOLDER: 1 weights are stored as I8, with no quantization_config that says how: {up}. "
    )
    state = load_file(folder / "model.safetensors")
    state |= {up: state[up].float(), down + "_scale_inv": torch.ones(1)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"1 weights are stored as F8_E4M3, with no quantization_config that says how: {down}. " in refusal(folder)
    state.pop(down + "_scale_inv")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert faults_before_reading(BackboneConfig(name=str(folder)), folder) == []


def test_a_link_to_nothing_is_called_one(folder):
    whole(folder, lambda state: None)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/0a")
    assert refusal(folder) == "FOLDER: model.safetensors is a link to ../blobs/0a, which is not there. Copy or fetch it"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"rms_norm_eps": "x"}, "the configuration of FOLDER could not be read: Validation error for field 'rms_norm_eps'"),
        ("config.json", {"hidden_act": "nope"}, "the weights of FOLDER could not be read: 'nope' is missing from its files, or is named in them"),
        ("tokenizer.json", None, "the tokenizer of FOLDER could not be read: 'added_tokens' is missing from its files"),
    ],
)  # fmt: skip
def test_wrong_values_of_json_files_are_said_to_be_in_them(folder, file, changes, message):
    edit_json(folder / file, lambda value: value.clear() if changes is None else value.update(changes))
    assert refusal(folder).startswith(message)


def test_looking_at_headers_says_nothing_and_leaves_what_transformers_says_as_it_is(folder, capfd, caplog):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    other_config(folder)
    assert len(faults_before_reading(BackboneConfig(name=str(folder)), folder)) == 2
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


@pytest.mark.parametrize("read", ["each", "rank0"])
def test_values_beyond_float16_say_which_precision_has_them(folder, read):
    edit_tensors(folder, {"model.layers.0.mlp.up_proj.weight": lambda w: w[0, :2].fill_(1e6)})
    config = BackboneConfig(name=str(folder), read=read)
    assert load_model(config, torch.bfloat16, torch.device("cpu"), None).measured
    with pytest.raises(BackboneError, match=r"has 2 infinite among .* beyond 65504: try train\.precision=bf16 or fp32"):
        load_model(config, torch.float16, torch.device("cpu"), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_finite_is_what_isfinite_says_wherever_the_value_stands(dtype):
    values = torch.full((2, BLOCK + 3), torch.finfo(dtype).max, dtype=dtype)  # their sum is infinite, they are not
    assert is_finite(values)
    weight = torch.nn.Parameter(values)
    plain = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert measure(weight).finite
    assert measure(weight).parts[0][-1] == plain
    for bad in (float("nan"), float("inf"), float("-inf")):
        for at in ((0, 0), (0, BLOCK - 1), (0, BLOCK), (1, BLOCK + 2)):
            broken = torch.nn.Parameter(values.clone().fill_(1))
            broken.data[at] = bad
            assert not is_finite(broken.data)
            assert not measure(broken).finite
    assert is_finite(torch.empty(0))
    assert is_finite(torch.tensor([3], dtype=torch.uint8))
    both = torch.tensor([float("inf"), float("-inf")], dtype=dtype)  # which cancel to nan
    assert not is_finite(both)


def test_a_single_file_counts_before_an_index_whoever_reads(folder):
    assert safetensors_files(str(folder)) == shards(folder)
    state = {name: tensor * 2 for path in shards(folder) for name, tensor in load_file(path).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.state_dict()["model.norm.weight"], state["model.norm.weight"])
    assert safetensors_files(str(folder)) == [folder / "model.safetensors"]
    assert set(weight_files(folder).file_of.values()) == {"model.safetensors"}
    for path in folder.glob("model*.safetensors"):
        path.unlink()
    (folder / INDEX).unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors or model\.safetensors\.index\.json"):
        safetensors_files(str(folder))


@pytest.mark.parametrize("family", ["qwen2", "llama", "glm"])
def test_a_folder_without_a_tokenizer_is_refused_where_transformers_makes_an_empty_one(tmp_path, family):
    folder = save_family(family, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "no tokenizer: none of tokenizer.json" in refusal(folder)


def test_a_folder_with_an_adapter_alone_is_called_one(folder):
    stray_adapter(folder)
    (folder / "config.json").unlink()
    assert refusal(folder).startswith("FOLDER has an adapter (adapter_config.json) and no model: merge it")
