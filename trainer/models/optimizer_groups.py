"""The optimizer's parameter groups."""

from __future__ import annotations

from typing import TypedDict

from torch import nn

from trainer.models.egmf import EGMF


class ParameterGroup(TypedDict):
    """As PyTorch's optimizers and DeepSpeed take it."""

    name: str
    params: list[nn.Parameter]
    lr: float
    weight_decay: float


def parameter_groups(model: EGMF, fusion_lr: float, backbone_lr: float, weight_decay: float) -> list[ParameterGroup]:
    """Trainable parameters for an optimizer: fusion and backbone, each with and without weight decay.

    Only matrices of layers decay: no norms, biases, embeddings, slots. Groups are named and never empty.
    """
    groups: dict[str, ParameterGroup] = {}
    for name, parameter in model.named_parameters():  # a weight shared by embedding and head comes once, as embedding
        if not parameter.requires_grad:
            continue
        owner, _, leaf = name.rpartition(".")
        part = name.partition(".")[0]
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        layer = not isinstance(model.get_submodule(owner), nn.Embedding) and (part != "fusion" or "weight" in leaf)
        decays = matrix and layer
        group = part if decays else f"{part}-nodecay"
        if group not in groups:
            lr = fusion_lr if part == "fusion" else backbone_lr
            groups[group] = ParameterGroup(name=group, params=[], lr=lr, weight_decay=weight_decay if decays else 0.0)
        groups[group]["params"].append(parameter)
    return [group for _, group in sorted(groups.items())]
