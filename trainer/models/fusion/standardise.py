"""Standardisation of features, as a part of the model: checkpoints, predictions and other datasets of the task get that of the run.

Shapes: B samples, T time, F features of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.batch import Standardisation
from trainer.models.fusion.float32_buffers import Float32Buffers


class Standardise(Float32Buffers):
    """``clip((x - mean) * scale, -limit, limit)`` in float32 (float64 for features in float64).

    Without statistics it is the identity, and has no place in the state dict: a run on data that have none, and checkpoints
    of earlier versions, are what they were. A state dict decides: one without statistics makes it the identity, one
    with them sets them, whatever the data at hand have.
    """

    mean_F: Tensor
    scale_F: Tensor
    limit: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.identity = True
        for name, value in (("mean_F", torch.zeros(features)), ("scale_F", torch.ones(features))):
            self.register_buffer(name, value.float())  # whatever the default of floats is, as inside zero.Init
        self.register_buffer("limit", torch.tensor(math.inf).float())

    def use(self, statistics: Standardisation | None) -> None:
        """Standardise by `statistics`; None: the identity.

        Raises:
            ValueError: statistics of another number of features.
        """
        if statistics is not None and statistics.mean_F.shape != self.mean_F.shape:
            raise ValueError(f"statistics of {len(statistics.mean_F)} features for an encoder of {len(self.mean_F)}")
        self.identity = statistics is None
        with torch.no_grad():
            if statistics is None:
                self.mean_F.zero_()
                self.scale_F.fill_(1.0)
                self.limit.fill_(math.inf)
            else:
                self.mean_F.copy_(torch.as_tensor(statistics.mean_F))
                self.scale_F.copy_(torch.as_tensor(statistics.scale_F))
                self.limit.fill_(statistics.limit)

    def forward(self, values_BTF: Tensor) -> Tensor:
        if self.identity:
            return values_BTF
        values_BTF = values_BTF.to(torch.promote_types(values_BTF.dtype, torch.float32))
        return ((values_BTF - self.mean_F) * self.scale_F).clamp(-self.limit, self.limit)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.identity:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if any(f"{prefix}{name}" in state_dict for name, _ in self.named_buffers()):
            self.identity = False
            super()._load_from_state_dict(state_dict, prefix, *rest)
        else:
            self.use(None)


def standardise_modules(model: nn.Module) -> Iterator[tuple[str, Standardise]]:
    """Every :class:`Standardise` in `model` with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Standardise))
