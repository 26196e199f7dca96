"""Loading tensor by tensor on one process: 4-bit models whole, and every fault of the files in words."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.tiny_models import load, save_family
from trainer.config import AdapterConfig, BackboneConfig
from trainer.models.backbone.causal_lm import base_fingerprint, build_backbone
from trainer.models.backbone.fingerprint import fingerprint, measure
from trainer.models.backbone.linear4bit import FrozenLinear4bit
from trainer.models.backbone.loading import BackboneError, load_model
from trainer.models.backbone.quantization import nf4_config

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return save_family("qwen2", tmp_path / "model")


def build(folder, **changes):
    return build_backbone(
        BackboneConfig(name=str(folder), quantization="nf4", **changes), AdapterConfig(), torch.float32, "cpu"
    )


def change(folder, work):
    state = load_file(folder / "model.safetensors")
    work(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
def test_a_whole_4_bit_model_is_the_one_that_transformers_loads(folder, dtype, double):
    own = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=nf4_config(dtype, double)
    ).eval()
    config = BackboneConfig(name=str(folder), quantization="nf4", double_quantization=double)
    loaded = load_model(config, dtype, CPU, None)
    assert all(type(m) is FrozenLinear4bit for m in loaded.model.modules() if isinstance(m, Linear4bit))
    assert fingerprint(loaded.measured.items()) == fingerprint((n, measure(p)) for n, p in own.named_parameters())
    for layer in own.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    ids = torch.randint(2, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(ids).logits, own(ids).logits)


def test_the_hash_made_while_loading_is_that_of_the_whole_weights(folder):
    for quantization in ("none", "nf4"):
        backbone = load(folder, quantization=quantization)
        assert backbone.fingerprints.stored == base_fingerprint(backbone)


def test_a_state_holds_no_scales_of_frozen_weights(folder):
    state = build(folder).state_dict()
    assert any("lora_A" in key for key in state)
    assert not [key for key in state if "absmax" in key or "quant" in key]


def test_fused_experts_are_refused_by_name_and_stay_usable_unquantised(tmp_path):
    folder = save_family(
        "qwen3_moe",
        tmp_path / "m",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
    )
    with pytest.raises(
        ValueError, match=r"mlp\.experts\.gate_up_proj \(4 x 128 x 64, 2 of them, .*%.*mlp\.experts\.down_proj.*none"
    ):
        build(folder)
    (folder / "model.safetensors").unlink()  # refused before anything is read
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj"):
        build(folder)


def test_a_weight_of_another_shape_is_refused(folder):
    change(folder, lambda state: state.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(128, 128)}))
    with pytest.raises(
        BackboneError, match=r"layers\.1\.mlp\.up_proj\.weight is \(128, 128\) in the files, \(128, 64\) in the model"
    ):
        build(folder)


def test_a_missing_weight_is_refused_and_an_unknown_one_is_logged(folder, caplog):
    change(folder, lambda state: state.update({"model.extra.weight": torch.zeros(3)}))
    with caplog.at_level(logging.WARNING):
        build(folder)
    assert "1 tensors in its files are no part of a qwen2 and are left out: model.extra.weight" in caplog.text
    change(folder, lambda state: state.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(BackboneError, match=r"1 weights are not in its files.*layers\.0\.self_attn\.q_proj"):
        build(folder)


def test_a_model_that_is_already_in_4_bits_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"already quantised \(bitsandbytes\): name the unquantised model"):
        build(folder)


def test_pickled_weights_are_refused_with_a_command_that_converts_them(folder):
    expected = build(folder).fingerprint
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"others \(pickles\) are not read") as refused:
        build(folder)
    command = str(refused.value)[str(refused.value).index("python -c") :]
    done = subprocess.run(
        command.replace("python", sys.executable, 1),
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert build(folder / "converted").fingerprint == expected


def test_a_4_bit_layer_that_is_cut_up_in_the_backward_pass_is_no_silence(folder):
    layer = next(m for m in load(folder, quantization="nf4").modules() if isinstance(m, FrozenLinear4bit))
    y = layer(torch.randn(2, 64, requires_grad=True))
    layer.weight.data = torch.empty(0, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="not gathered"):
        y.sum().backward()
