"""The merged backbone: its logits are those of base plus adapter, of every family, dense and in 4 bits, with tied and untied heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.models.families import FAMILIES, Family, save_public
from tests.models.tiny_models import load, save_family
from trainer.config import AdapterConfig, RunConfig, check_config
from trainer.distributed.deepspeed_config import dtype_of
from trainer.models.backbone.causal_lm import Backbone
from trainer.serving.artefact.description import ADAPTER, BACKBONE, MERGED, ArtefactError
from trainer.serving.artefact.merge import merge
from trainer.serving.artefact.tensors import StoredTensors
from trainer.serving.artefact.weights import (
    check_trained,
    trained_backbone,
    trained_state,
    write_weights,
    write_whole_backbone,
)

OPEN = {name: family for name, family in FAMILIES.items() if family.refused is None}
USUAL = (  # of each way to name, store and join weights one; the others are slow to go through
    "Llama 2, 3", "Mixtral", "Gemma 2", "Qwen 2, 2.5", "Qwen 3 MoE", "Phi 3, 4", "OPT", "GPT-2", "GPT-NeoX, Pythia", "Falcon",
    "DeepSeek V3, R1", "gpt-oss", "Granite MoE", "Command R",
)  # fmt: skip
IDS = torch.arange(3, 40)[None]


def config_of(folder: Path, precision: str = "fp32", kind: str = "lora", **backbone: Any) -> RunConfig:
    adapter = {"kind": kind, "rank": 4, "alpha": 12.0, "dropout": 0.0}
    model = {"backbone": {"name": str(folder), **backbone}, "adapter": adapter, "fusion": {"pseudo_tokens": 0}}
    return check_config({"task": "meld", "model": model, "train": {"precision": precision}})


def trained(config: RunConfig, folder: Path) -> tuple[Backbone, StoredTensors]:
    """A backbone with an adapter that changes its answers, and its trained weights as a checkpoint has them."""
    backbone = config.model.backbone
    changes = {"quantization": backbone.quantization, "double_quantization": backbone.double_quantization}
    model = load(Path(backbone.name), dtype_of(config), config.model.adapter, **changes).eval()
    if config.model.adapter.kind == "full":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    state = {f"backbone.{n}": p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    return model, StoredTensors([folder / "model.safetensors"])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of the language model by itself, in float32."""
    return model(input_ids=IDS, use_cache=False).logits.float()


def merged_logits(out: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(out / MERGED, dtype=dtype).eval())


def assert_close(found: Tensor, expected: Tensor, share: float) -> None:
    """Within a share of the logits' spread."""
    assert float((found - expected).abs().max()) <= share * float(expected.std())


@pytest.mark.parametrize("name", [one if one in USUAL else pytest.param(one, marks=pytest.mark.slow) for one in OPEN])
def test_merged_is_base_plus_adapter_of_every_family(name: str, tmp_path: Path) -> None:
    config = config_of(save_public(OPEN[name], tmp_path / "base"))
    model, weights = trained(config, tmp_path / "checkpoint")
    expected = trained_backbone(config.model, None)
    assert check_trained(weights, expected, config.model, 3, False) == []
    tmp_path.joinpath("out").mkdir()
    merge(tmp_path / "out", weights, config, tmp_path, "fp32")
    alone = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval())
    together = logits(model.model)
    assert float((together - alone).abs().max()) > 0.05 * float(alone.std())  # the adapter does something
    assert_close(merged_logits(tmp_path / "out"), together, 1e-4)


@pytest.mark.parametrize("doubly", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_of_a_base_in_4_bits_what_they_stand_for_is_merged(
    precision: str, tied: bool, doubly: bool, tmp_path: Path
) -> None:
    base = save_family("qwen3", tmp_path / "base", tied=tied)
    config = config_of(base, precision, quantization="nf4", double_quantization=doubly)
    model, weights = trained(config, tmp_path / "checkpoint")
    tmp_path.joinpath("out").mkdir()
    merge(tmp_path / "out", weights, config, tmp_path, "fp32")
    together = logits(model.model)
    found = merged_logits(tmp_path / "out")  # computed in float32, whatever the run computes in
    assert_close(found, together, 1e-4 if precision == "fp32" else 0.2)
    raw = json.loads((tmp_path / "out" / MERGED / "config.json").read_text())
    assert (raw["dtype"], raw["tie_word_embeddings"], "quantization_config" in raw) == ("float32", tied, False)
    # not the weights before: merged with those, the answers are others
    dense = config_of(base, precision)
    (tmp_path / "other").mkdir()
    merge(tmp_path / "other", weights, dense, tmp_path, "fp32")
    far = (merged_logits(tmp_path / "other") - together).abs().mean()
    assert far > 3 * (found - together).abs().mean()


@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.1), ("fp16", 0.01)])
def test_sums_are_rounded_once_to_the_type_that_is_asked_for(precision: str, share: float, tmp_path: Path) -> None:
    config = config_of(save_family("llama", tmp_path / "base"))
    model, weights = trained(config, tmp_path / "checkpoint")
    tmp_path.joinpath("out").mkdir()
    merge(tmp_path / "out", weights, config, tmp_path, precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    merged = StoredTensors((tmp_path / "out" / MERGED).glob("*.safetensors"))
    whole = model.model.merge_and_unload()  # peft's own
    for name, parameter in whole.named_parameters():
        assert torch.equal(merged[name], parameter.detach().to(dtype)), name
    assert_close(merged_logits(tmp_path / "out"), logits(whole), share)


def test_shards_have_an_index_and_one_weight_is_held_at_a_time(tmp_path: Path) -> None:
    config = config_of(save_family("qwen2", tmp_path / "base"))
    model, weights = trained(config, tmp_path / "checkpoint")
    tmp_path.joinpath("out").mkdir()
    merge(tmp_path / "out", weights, config, tmp_path, "fp32", most=100_000)
    files = sorted((tmp_path / "out" / MERGED).glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / MERGED / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    total = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            total += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert total == index["metadata"]["total_size"]
    assert_close(merged_logits(tmp_path / "out"), logits(model.model), 1e-4)


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    config = config_of(save_family("qwen2", tmp_path / "base"))
    _, weights = trained(config, tmp_path / "checkpoint")
    state = {name: weights[name].clone() for name in weights}
    state[next(name for name in state if "lora_B" in name)].fill_(1e5)
    save_file(state, tmp_path / "large.safetensors")
    tmp_path.joinpath("out").mkdir()
    with pytest.raises(ArtefactError, match=r"is not finite in fp16 after merging: choose --dtype bf16 or fp32"):
        merge(tmp_path / "out", StoredTensors([tmp_path / "large.safetensors"]), config, tmp_path, "fp16")


@pytest.mark.parametrize("name", ["Qwen 3", "GPT-2", "Gemma 2", "OPT", "Mixtral"])
def test_a_backbone_that_was_trained_whole_opens_by_itself(name: str, tmp_path: Path) -> None:
    config = config_of(save_public(OPEN[name], tmp_path / "base"), kind="full")
    model, weights = trained(config, tmp_path / "checkpoint")
    expected = trained_backbone(config.model, None)
    assert check_trained(weights, expected, config.model, 3, False) == []
    out = tmp_path / "out"
    out.mkdir()
    assert write_weights(out, weights, config.model, expected, None).pairs == 0
    assert not (out / ADAPTER).exists()
    write_whole_backbone(out, weights, config.model, None)
    opened = AutoModelForCausalLM.from_pretrained(out / BACKBONE, dtype=torch.float32).eval()
    assert torch.equal(logits(opened), logits(model.model))
    state = trained_state(out, "full")
    assert state.keys() == set(weights)
    assert all(torch.equal(state[key], weights[key]) for key in state)


def test_layers_that_the_files_do_not_have_are_refused(tmp_path: Path) -> None:
    config = config_of(save_family("qwen2", tmp_path / "base"))
    _, weights = trained(config, tmp_path / "checkpoint")
    other = config_of(save_public(Family("gpt2", OPEN["GPT-2"].changes), tmp_path / "other"))
    tmp_path.joinpath("out").mkdir()
    with pytest.raises(ArtefactError, match="do not have these weights as its model does"):
        merge(tmp_path / "out", weights, other, tmp_path, "fp32")


def test_targets_by_name_are_counted(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    config = config_of(base)
    _, weights = trained(config, tmp_path / "checkpoint")
    named = config.model.adapter.model_copy(update={"targets": ["q_proj", "v_proj"]})
    fewer = config.model.model_copy(update={"adapter": named})
    assert isinstance(named, AdapterConfig)
    assert sum("lora_A" in name for name in trained_backbone(fewer, None).forms) == 4  # two layers of two
    with pytest.raises(ArtefactError, match=r"\(4 layers get LoRA\): .* is none of the layers that the config trains"):
        check_trained(weights, trained_backbone(fewer, None), fewer, 3, False)
