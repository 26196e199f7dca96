"""What a model consists of: its weights counted, in elements and in bytes as they are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.models.egmf import EGMF
from trainer.models.optimizer_groups import parameter_groups


@dataclass(frozen=True)
class Weights:
    """What a model consists of. Elements are numbers of weights, bytes as they are stored.

    `largest_layer` is the dtype's bytes of the largest decoder layer as ZeRO-3 gathers it (4-bit: packed).
    """

    trainable: int  # elements
    trainable_parts: dict[str, int]  # elements of fusion, of LoRA or of the backbone
    groups: list[int]  # elements of each of the optimizer's groups
    largest_trainable: int  # elements
    frozen: int  # elements, 4-bit ones included
    dense_bytes: int  # frozen, not quantised
    four_bit: int  # elements
    packed_bytes: int
    scale_bytes: int  # absmax and what goes with it
    gathered_bytes: int  # frozen and trainable: what ZeRO-3 cuts up
    gathered_elements: int  # as DeepSpeed counts them: a packed byte is one
    persistent_bytes: int  # below DeepSpeed's threshold, whole on every rank
    largest_module_bytes: int
    buffer_bytes: int


def count_weights(model: EGMF, persistence: int) -> Weights:
    """Count a whole model; `persistence` is ZeRO-3's threshold in elements."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    packed = [p for p in frozen if hasattr(p, "quant_state")]
    dense_bytes = sum(map(tensor_bytes, frozen)) - sum(map(tensor_bytes, packed))
    parts: dict[str, int] = {}
    for name, p in trainable:
        part = "fusion" if name.startswith("fusion.") else "LoRA" if "lora_" in name else "backbone"
        parts[part] = parts.get(part, 0) + p.numel()
    groups = parameter_groups(model, 1.0, 1.0, 0.0)
    every = list(model.parameters())
    return Weights(
        trainable=sum(p.numel() for _, p in trainable),
        trainable_parts=parts,
        groups=[sum(p.numel() for p in group["params"]) for group in groups],
        largest_trainable=max((p.numel() for _, p in trainable), default=0),
        frozen=sum(_elements(p) for p in frozen),
        dense_bytes=dense_bytes,
        four_bit=sum(_elements(p) for p in packed),
        packed_bytes=sum(map(tensor_bytes, packed)),
        scale_bytes=sum(_scale_bytes(p) for p in packed),
        gathered_bytes=sum(map(tensor_bytes, every)),
        gathered_elements=sum(p.numel() for p in every),
        persistent_bytes=sum(tensor_bytes(p) for p in every if p.numel() <= persistence),
        largest_module_bytes=max(sum(map(tensor_bytes, m.parameters(recurse=False))) for m in model.modules()),
        buffer_bytes=sum(map(tensor_bytes, model.buffers())),
    )


def _elements(parameter: Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _scale_bytes(parameter: Any) -> int:
    state = parameter.quant_state
    parts = [state.absmax, state.code, state.offset]
    if state.state2 is not None:
        parts += [state.state2.absmax, state.state2.code]
    return sum(tensor_bytes(part) for part in parts if part is not None)


def tensor_bytes(tensor: Tensor) -> int:
    """As it is stored."""
    return tensor.numel() * tensor.element_size()
