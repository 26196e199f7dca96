"""Models and batches on the fake device."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainer.batch import AnswerTrie, Batch, PackedBatch, _map

Carried = TypeVar("Carried", Batch, PackedBatch, AnswerTrie)


def to_device(model: nn.Module) -> None:
    """Give every parameter and buffer a fake one on the device instead; inside fake tensors. What is shared stays shared."""
    made: dict[int, Any] = {}

    def fake(tensor: Any) -> Any:
        if id(tensor) not in made:
            new: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                for part in (state, state.state2):
                    for key, value in vars(part).items() if part is not None else ():
                        if isinstance(value, Tensor):
                            setattr(part, key, torch.empty(value.shape, dtype=value.dtype, device="cuda"))
                new.quant_state = state
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is not None:
                    place[name] = fake(tensor)


def on_host(batch: Carried) -> Carried:
    """A collated batch as fake tensors of the host, as if pinned; inside fake tensors."""
    return _map(batch, lambda t: torch.empty(t.shape, dtype=t.dtype))
