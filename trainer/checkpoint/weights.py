"""The trainable weights of a model, whole, whatever the ZeRO stage that holds them; and those of a checkpoint put into a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import deepspeed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.distributed.world import World
from trainer.models.egmf import EGMF

WEIGHTS = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is not there, is damaged, cannot be written, or does not fit the run."""


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside the block these parameters are whole on every rank, whatever the ZeRO stage; writes by rank 0 are kept."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
        yield


def trainable_state(model: EGMF, world: World) -> dict[str, Tensor]:
    """The trainable weights and the gate's usage, whole and on the CPU, on rank 0; an empty dictionary elsewhere."""
    state: dict[str, Tensor] = {}
    with gathered([p for p in model.parameters() if p.requires_grad]):
        if world.is_rank_zero:
            state = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in model.trainable_state().items()}
    return state


def load_trainable_state(model: EGMF, state: dict[str, Tensor], world: World) -> None:
    """Put `state` (the same on every rank) into `model`, partitioned or not.

    Raises:
        ValueError: the weights are not those of this model.
    """
    with gathered([p for p in model.parameters() if p.requires_grad]):
        model.load_trainable_state(state)


def load_weights(model: EGMF, checkpoint: Path, world: World) -> None:
    """Put a checkpoint's trainable weights into `model`, on any number of ranks and any ZeRO stage."""
    path = checkpoint / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"checkpoint {checkpoint} has no {WEIGHTS}")
    try:
        weights: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    load_trainable_state(model, weights, world)
