"""Devices, precisions and quantisations of a predictor: what is refused, and what they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn

from tests.distributed.processes import egmf
from tests.serving.conftest import ROOT
from trainer import Predictor
from trainer.distributed.deepspeed_config import dtype_of
from trainer.models.backbone.linear4bit import FrozenLinear4bit
from trainer.serving.precision import choose_device

SAMPLES = [{"text": f"red {'so ' * n}", "task": "meld"} for n in range(6)]


def probabilities(predictor: Predictor) -> np.ndarray:
    return np.array([list((one.probabilities or {}).values()) for one in predictor.predict(SAMPLES)])


def linear_layers(predictor: Predictor) -> dict[str, Any]:
    base = predictor.opened.parts.model.backbone.base
    return {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n and n != "lm_head"}


def test_half_precision_is_near_the_full_one(run: Path) -> None:
    full, half = Predictor.load(run), Predictor.load(run, dtype="bf16")
    model = half.opened.parts.model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    buffers = dict(full.opened.parts.model.named_buffers())
    assert {n: b.dtype for n, b in model.named_buffers()} == {n: b.dtype for n, b in buffers.items()}
    assert dtype_of(half.opened.config) is torch.bfloat16
    found = probabilities(half)
    assert 0 < np.abs(found - probabilities(full)).max() < 0.05
    prompt = half.prompt_embeds(SAMPLES[0])
    assert prompt.embeds_LH.dtype is torch.bfloat16


def test_nf4_rounds_every_frozen_layer_as_bitsandbytes_does(run: Path) -> None:
    dense, packed = Predictor.load(run), Predictor.load(run, quantization="nf4")
    before, after = linear_layers(dense), linear_layers(packed)
    assert before.keys() == after.keys()
    for name, layer in after.items():
        assert type(layer) is FrozenLinear4bit, name
        values, state = quantize_4bit(before[name].weight.data, quant_type="nf4", compress_statistics=True)
        assert torch.equal(layer.weight.data, values), name
        rounded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        torch.testing.assert_close(rounded, dequantize_4bit(values, state))
    assert packed.opened.config.model.backbone.quantization == "nf4"
    rounded_only = Predictor.load(run)
    for name, layer in linear_layers(rounded_only).items():
        layer.weight.data = dequantize_4bit(after[name].weight.data, after[name].weight.quant_state)
    np.testing.assert_allclose(probabilities(packed), probabilities(rounded_only), atol=1e-5)
    assert np.abs(probabilities(packed) - probabilities(dense)).max() > 1e-5


def test_none_gives_the_values_that_nf4_stands_for(run: Path, tmp_path: Path) -> None:
    words = ["train.steps=1", "model.backbone.tiny.vocab_size=400", "train.global_batch=8", "train.micro_batch=4"]
    words += ["eval.batch=4", "track.mlflow=false", "track.report=false", "task=meld", f"data.path={run.parent}/meld"]
    words += ["model.backbone.quantization=nf4", "train.probe=false", "eval.splits=[test]"]
    done = egmf("train", f"{ROOT}/configs/tiny.yaml", *words, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    trained, dense = Predictor.load(tmp_path / "run"), Predictor.load(tmp_path / "run", quantization="none")
    assert not any(isinstance(m, Linear4bit) for m in dense.opened.parts.model.modules())
    assert all(type(layer) is nn.Linear for layer in linear_layers(dense).values())
    np.testing.assert_allclose(probabilities(dense), probabilities(trained), atol=1e-5)
    half = Predictor.load(tmp_path / "run", dtype="bf16")
    assert np.abs(probabilities(half) - probabilities(trained)).max() < 0.05


def test_an_exported_folder_changes_as_its_run_does(run: Path, tmp_path: Path) -> None:
    done = egmf("export", str(run), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    for options in ({}, {"dtype": "bf16"}, {"quantization": "nf4"}):
        exported, own = Predictor.load(tmp_path / "out", **options), Predictor.load(run, **options)
        np.testing.assert_array_equal(probabilities(exported), probabilities(own))


def test_what_cannot_be_is_refused(run: Path) -> None:
    for device, wanted in (("gpu", "device is auto, cpu, cuda or cuda:N, not 'gpu'"), ("cuda:7", "this machine has ")):
        with pytest.raises(ValueError, match=wanted):
            choose_device(device)
    with pytest.raises(
        ValueError, match=r"(?s)dtype is fp32, bf16, fp16, not 'int8'.*quantization is none or nf4, not 'q4'"
    ):
        Predictor.load(run / "none", device="cpu", dtype="int8", quantization="q4")  # before anything is opened
    with pytest.raises(ValueError, match="dtype=fp16 needs a GPU: on a CPU use fp32 or bf16"):
        Predictor.load(run / "none", device="cpu", dtype="fp16")
    with pytest.raises(ValueError, match=r"overrides is a list of key=value, such as \['eval\.batch=8'\]"):
        Predictor.load(run, overrides="eval.batch=8")
    with pytest.raises(ValueError, match=r"eval\.tokens"):
        Predictor.load(run, tokens=0)
    with pytest.raises(ValueError, match="is not a run folder"):
        Predictor.load(run / "none")
