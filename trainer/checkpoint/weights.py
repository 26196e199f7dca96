"""The trainable weights of a model, whole, whatever the ZeRO stage that holds them; and those of a checkpoint put into a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.distributed.world import World
from trainer.models.egmf import EGMF
from trainer.models.fusion.standardise import standardise_modules

WEIGHTS = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is not there, is damaged, cannot be written, or does not fit the run."""


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside the block these parameters are whole on every rank, whatever the ZeRO stage; writes by rank 0 are kept."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed  # it has partitioned them

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


def trainable_state(model: EGMF, world: World) -> dict[str, Tensor]:
    """The trainable weights and the gate's usage, whole and on the CPU, on rank 0; an empty dictionary elsewhere."""
    state: dict[str, Tensor] = {}
    with gathered([p for p in model.parameters() if p.requires_grad]):
        if world.is_rank_zero:
            state = {name: t.to("cpu", copy=True).contiguous() for name, t in trainable_tensors(model).items()}
    return state


def trainable_tensors(model: EGMF) -> dict[str, Tensor]:
    """All that training changes, by name: the trainable parameters and the fusion network's buffers (the gate's usage, statistics of features).

    These are the model's own tensors, not copies: clone to keep them, gather what ZeRO-3 partitioned. Shared weights appear once.
    """
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if model.fusion is not None:
        state |= {f"fusion.{name}": value.detach() for name, value in model.fusion.state_dict().items()}
    return state


def load_trainable_state(model: EGMF, state: dict[str, Tensor]) -> None:
    """Put `state` (the same on every rank) into `model`, partitioned or not; dtypes may differ, names and shapes may not.

    Statistics by which features are standardised are those of `state` afterwards, and none where it has none, whatever
    the data that the model was built for have.

    Raises:
        ValueError: with all names that are missing, unknown or of another shape; nothing is changed then.
    """
    with torch.no_grad(), gathered([p for p in model.parameters() if p.requires_grad]):
        own = trainable_tensors(model)
        modules = dict(standardise_modules(model))
        standardised = {}
        for place, module in modules.items():
            buffers = {f"{place}.{name}": buffer for name, buffer in module.named_buffers()}
            standardised[place] = not buffers.keys().isdisjoint(state)
            own = {name: tensor for name, tensor in own.items() if name not in buffers}
            own |= buffers if standardised[place] else {}
        _check_belongs(state, own)
        for place, module in modules.items():
            module.use(None)
            module.identity = not standardised[place]
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _check_belongs(state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    faults = [f"missing: {name}" for name in own.keys() - state.keys()]
    faults += [f"not of this model: {name}" for name in state.keys() - own.keys()]
    faults += [
        f"another shape: {name} is {tuple(state[name].shape)}, here {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if faults:
        listed = [f"  {fault}" for fault in sorted(faults)[:10]]
        if len(faults) > len(listed):
            listed.append(f"  … {len(faults)} in all")
        raise ValueError(
            "these trained weights do not belong to this model (other adapter, fusion or task?):\n" + "\n".join(listed)
        )


def load_weights(model: EGMF, checkpoint: Path) -> None:
    """Put a checkpoint's trainable weights into `model`, on any number of ranks and any ZeRO stage."""
    path = checkpoint / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"checkpoint {checkpoint} has no {WEIGHTS}")
    try:
        weights: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    load_trainable_state(model, weights)
