"""The optimizer's groups of parameters, by counting."""

from __future__ import annotations

import pytest

from tests.models.tiny_models import make_model, save_family
from trainer.config import AdapterConfig
from trainer.models.optimizer_groups import parameter_groups


def test_parameter_groups_cover_every_trainable_parameter_once(tmp_path):
    model = make_model(save_family("qwen2", tmp_path / "m"))
    groups = {group["name"]: group for group in parameter_groups(model, 1e-3, 2e-4, 0.01)}
    assert set(groups) == {"backbone", "fusion", "fusion-nodecay"}
    assert (groups["backbone"]["lr"], groups["fusion"]["lr"], groups["fusion-nodecay"]["lr"]) == (2e-4, 1e-3, 1e-3)
    assert (groups["fusion"]["weight_decay"], groups["fusion-nodecay"]["weight_decay"]) == (0.01, 0.0)
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    undecayed = {id(p) for p in groups["fusion-nodecay"]["params"]}
    assert id(model.fusion.gate.slot_KD) in undecayed
    assert id(model.fusion.gate.context.task.weight) in undecayed
    assert id(model.fusion.pseudo.linear.weight) not in undecayed


@pytest.mark.parametrize("tied", [False, True])
def test_full_tuning_groups(tmp_path, tied):
    folder = save_family("qwen2", tmp_path / "m", tied=tied)
    model = make_model(folder, adapter=AdapterConfig(kind="full"))
    groups = {group["name"]: group for group in parameter_groups(model, 1e-3, 2e-4, 0.01)}
    still = {id(p) for p in groups["backbone-nodecay"]["params"]}
    assert id(model.backbone.base.get_input_embeddings().weight) in still
    assert id(model.backbone.base.model.norm.weight) in still
    assert id(model.backbone.base.model.layers[0].self_attn.q_proj.bias) in still
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}
