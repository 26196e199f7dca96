"""Which trainable parameters an optimizer treats alike."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.models.egmf import EGMF


def parameter_groups(model: EGMF, fusion_lr: float, backbone_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for an optimizer: fusion and backbone, each with and without weight decay.

    Only matrices of layers decay: no norms, biases, embeddings, slots. Groups are named and never empty.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():  # a weight shared by embedding and head comes once, as embedding
        if not parameter.requires_grad:
            continue
        owner, _, leaf = name.rpartition(".")
        part = name.partition(".")[0]
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        layer = not isinstance(model.get_submodule(owner), nn.Embedding) and (part != "fusion" or "weight" in leaf)
        decay = weight_decay if matrix and layer else 0.0
        group = groups.setdefault(
            part if matrix and layer else f"{part}-nodecay",
            {"params": [], "lr": fusion_lr if part == "fusion" else backbone_lr, "weight_decay": decay},
        )
        group["params"].append(parameter)
    return [{"name": name, **group} for name, group in sorted(groups.items())]
