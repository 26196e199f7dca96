"""Backbones that no rank ever holds whole, against the same loaded whole by transformers: ZeRO-3 with and without 4 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.distributed.processes import run_ranks
from tests.distributed.sharded_worker import MODES
from tests.models.tiny_models import save_family
from tests.toy import prepare_toy
from trainer.config import AdapterConfig, BackboneConfig
from trainer.distributed.world import World
from trainer.models.backbone.causal_lm import build_backbone
from trainer.run.saved import open_run

pytestmark = pytest.mark.distributed

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NF4 = {"quantization": "nf4"}
CASES: dict[str, dict[str, Any]] = {
    "nf4": {"folder": "qwen2", "dtype": "float32", "backbone": NF4},
    "nf4-bf16": {"folder": "qwen2", "dtype": "bfloat16", "backbone": NF4},
    "nf4-single": {"folder": "qwen2", "dtype": "float32", "backbone": {**NF4, "double_quantization": False}},
    "nf4-rank0": {"folder": "qwen2", "dtype": "bfloat16", "backbone": {**NF4, "read": "rank0"}},
    "nf4-tied": {"folder": "tied", "dtype": "float32", "backbone": NF4},
    "nf4-several-files": {"folder": "files", "dtype": "bfloat16", "backbone": NF4},
    "nf4-several-files-rank0": {"folder": "files", "dtype": "float32", "backbone": {**NF4, "read": "rank0"}},
    "nf4-renamed-keys": {"folder": "renamed", "dtype": "float32", "backbone": NF4},
    "nf4-head-also-stored": {"folder": "both", "dtype": "float32", "backbone": NF4},
    "nf4-head-differs": {"folder": "apart", "dtype": "float32", "backbone": NF4},
    "none": {"folder": "qwen2", "dtype": "float32", "backbone": {}},
    "none-rank0": {"folder": "files", "dtype": "bfloat16", "backbone": {"read": "rank0"}},
    "none-experts": {"folder": "experts", "dtype": "float32", "backbone": {}},
    "none-experts-rank0": {"folder": "experts", "dtype": "bfloat16", "backbone": {"read": "rank0"}},
}
TIED = {"nf4-tied", "nf4-several-files", "nf4-several-files-rank0", "nf4-renamed-keys", "nf4-head-also-stored", "none-rank0"}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models, stored in the ways that models are stored."""
    root = tmp_path_factory.mktemp("models")
    save_family("qwen2", root / "qwen2")
    save_family("qwen3", root / "tied", tied=True)
    save_family(
        "qwen3_moe",
        root / "experts",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
    )
    shutil.copytree(root / "tied", root / "files")
    (root / "files" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(root / "tied").save_pretrained(root / "files", max_shard_size="100KB")
    assert len(list((root / "files").glob("model-*.safetensors"))) > 2
    state = load_file(root / "tied" / "model.safetensors")
    assert HEAD not in state
    variants = {
        "renamed": {key.removeprefix("model."): value for key, value in state.items()},
        "both": {**state, HEAD: state[EMBEDDING].clone()},
        "apart": {**state, HEAD: state[EMBEDDING] * 0.5},
    }
    for name, stored in variants.items():
        shutil.copytree(root / "tied", root / name)
        save_file(stored, root / name / "model.safetensors", metadata={"format": "pt"})
    for name in ("changed", "bare", "cut", "nan", "sizes"):
        shutil.copytree(root / "qwen2", root / name)
    state = load_file(root / "qwen2" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] += 1.0
    save_file(state, root / "changed" / "model.safetensors", metadata={"format": "pt"})
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, root / "nan" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "sizes" / "config.json").read_text())
    (root / "sizes" / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    (root / "bare" / "model.safetensors").unlink()
    whole = (root / "cut" / "model.safetensors").read_bytes()
    (root / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (root / "cases.json").write_text(json.dumps(CASES))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    prepare_toy("meld", folder)
    return folder


@pytest.fixture(scope="module")
def two(models: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What each of two ranks found, and their folder."""
    out = tmp_path_factory.mktemp("two")
    run_ranks(
        "tests.distributed.sharded_worker",
        str(models),
        str(data),
        str(out),
        "equality",
        "faults",
        "held",
        "run",
        timeout=500,
    )
    return json.loads((out / "results.json").read_text()), out


def same(found: dict[str, Any], name: str, ranks: int) -> None:
    assert found["finite"]
    assert found["equal"]
    assert found["hash"]
    assert found["norm"]
    assert found["buffers"]
    assert found["all cut up"]
    assert found["tied"] == (name in TIED)
    assert found["whole"] / ranks <= found["held"] <= found["whole"] / ranks + 8 * 40  # padding to equal parts


@pytest.mark.parametrize("name", CASES)
def test_a_model_in_parts_is_the_whole_model_bit_for_bit(two: Any, name: str) -> None:
    for found in two[0]:
        same(found["equality"][name], name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_so_it_is_on_other_numbers_of_ranks(models: Path, tmp_path: Path, ranks: int) -> None:
    run_ranks("tests.distributed.sharded_worker", str(models), "-", str(tmp_path), "equality", procs=ranks, timeout=400)
    for found in json.loads((tmp_path / "results.json").read_text()):
        for name in CASES:
            same(found["equality"][name], name, ranks)


def whole_fingerprint(folder: Path) -> str:
    """Of a model that one process loads whole."""
    return build_backbone(BackboneConfig(name=str(folder), **NF4), AdapterConfig(), torch.float32, "cpu").fingerprint


def test_ranks_that_find_other_files_are_refused(two: Any, models: Path) -> None:
    result = two[0][0]["faults"]
    assert "rank 1 read other weights than rank 0" in result["others differ"]
    assert result["others have none"] == whole_fingerprint(models / "qwen2")  # rank 0 read for all
    assert "no safetensors weights" in result["first has none"]
    assert "model.safetensors is cut short" in result["first is damaged"]


def test_ranks_that_keep_their_parts_refuse_nan_and_other_sizes(two: Any) -> None:
    result = two[0][0]["faults"]
    for reader in ("each", "first"):
        name = "model.layers.1.mlp.up_proj.weight"
        assert f"{name} in model.safetensors has 1 nan among 8,192 values" in result[f"{reader} finds nan"]
        assert (
            "6 weights have other sizes: model.layers.0.mlp.down_proj.weight is (64, 128) in the files"
            in (result[f"{reader} finds other sizes"])
        )


@pytest.mark.parametrize("mode", MODES)
def test_no_gathered_weight_outlives_the_forward_pass(two: Any, mode: str) -> None:
    for rank in two[0]:
        found = rank["held"][mode]
        assert found["layers"] == 14
        assert found["total"] > 0
        assert found["alive"] == [0, 0, 0]


def test_the_count_sees_what_bitsandbytes_holds(two: Any) -> None:
    for rank in two[0]:
        found = rank["held"]["bitsandbytes"]
        assert min(found["alive"]) >= found["total"] > 0


@pytest.mark.parametrize("other", [*MODES, "defaults"])
def test_checkpointing_modes_give_the_gradients_of_bitsandbytes_own_layer(two: Any, other: str) -> None:
    expected, found = (two[0][0]["held"][name]["gradients"] for name in ("bitsandbytes", other))
    assert found.keys() == expected.keys()
    assert any("lora_A" in name for name in found)
    for name, norm in expected.items():
        assert found[name] == pytest.approx(norm, rel=1e-5, abs=1e-9), name


def test_a_sharded_run_is_evaluated_by_two_ranks_and_by_one_whole(two: Any) -> None:
    found, out = two
    run = found[0]["run"]
    assert run["codes"] == [0]
    assert run["partitioned"]
    written = pd.read_parquet(out / "through" / "predictions" / "test.parquet").set_index("id")["probabilities"]
    alone = open_run(out / "through", World(0, 1, torch.device("cpu")))
    table, _ = alone.evaluate("test")
    assert not any(hasattr(p, "ds_id") for p in alone.parts.model.parameters())
    assert len(table) == len(written) == len(run["probabilities"]) == 11
    for name, probabilities in zip(table["id"], table["probabilities"], strict=True):
        np.testing.assert_allclose(probabilities, written[name], atol=2e-5)
        np.testing.assert_allclose(run["probabilities"][name], written[name], atol=1e-6)


def test_checkpoints_of_a_sharded_run_hold_nothing_of_the_base(two: Any) -> None:
    folder = two[1] / "through" / "checkpoints"
    checkpoints = sorted(folder.glob("step-*"))
    assert len(checkpoints) == 3
    files = list(checkpoints[-1].glob("engine/*model_states*"))
    assert len(files) == 2  # one of each rank
    for path in files:
        module = torch.load(path, weights_only=False)["module"]
        assert module
        assert not [key for key in module if "absmax" in key or "quant" in key or ".base_layer." in key]
    weights = load_file(checkpoints[-1] / "model.safetensors")
    assert any("lora_A" in name for name in weights)
    assert all(value.numel() for value in weights.values())
