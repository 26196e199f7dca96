"""Trained weights leave a model and come back into one, or are refused."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_egmf import LENGTHS, scores
from tests.models.tiny_models import make_batch, make_model, save_family
from trainer.checkpoint.weights import load_trainable_state, trainable_tensors
from trainer.config import AdapterConfig


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return save_family("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


@pytest.mark.parametrize("tied", [False, True])
def test_the_state_of_full_tuning_comes_back(tmp_path, tied):
    folder = save_family("qwen2", tmp_path / "m", tied=tied)
    model = make_model(folder, adapter=AdapterConfig(kind="full"))
    state = {name: tensor.clone() for name, tensor in trainable_tensors(model).items()}
    want = scores(model, make_batch(LENGTHS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    load_trainable_state(model, state)
    assert torch.equal(scores(model, make_batch(LENGTHS)), want)


def test_trained_weights_move_to_a_fresh_model(qwen3):
    model = make_model(qwen3, quantization="nf4")
    model.fusion.gate.usage_E.copy_(torch.tensor([0.7, 0.2, 0.1]))
    state = {name: tensor.clone() for name, tensor in trainable_tensors(model).items()}
    assert "fusion.gate.usage_E" in state
    assert all("lora_" in name or name.startswith("fusion.") for name in state)
    fresh = make_model(qwen3, quantization="nf4")
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    batch = make_batch(LENGTHS)
    assert not torch.allclose(scores(fresh, batch), scores(model, batch))
    load_trainable_state(fresh, state)
    assert torch.equal(scores(fresh, batch), scores(model, batch))
    assert fresh.fusion.gate.usage_E.tolist() == pytest.approx([0.7, 0.2, 0.1])


def test_weights_of_another_model_are_refused_and_change_nothing(qwen3):
    model = make_model(qwen3)
    state = {name: tensor.clone() for name, tensor in trainable_tensors(model).items()}
    name = next(iter(state))
    bad = {key: torch.zeros_like(value) for key, value in state.items()}
    bad["fusion.stranger"] = bad.pop("fusion.gate.slot_KD")
    bad[name] = bad[name][:1]
    with pytest.raises(
        ValueError, match=r"(?s)another shape.*missing: fusion.gate.slot_KD.*not of this model: fusion.str"
    ):
        load_trainable_state(model, bad)
    assert all(torch.equal(value, state[key]) for key, value in trainable_tensors(model).items())
