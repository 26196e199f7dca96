"""Checkpointing of activations under both names that transformers 5 has for it: gradient_… up to 5.17, activation_… after."""

from __future__ import annotations

from transformers import PreTrainedModel


def set_checkpointing(model: PreTrainedModel, *, on: bool, reentrant: bool = False) -> None:
    """Have the activations of each layer computed again in the backward pass, or kept."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether some layer of the model checkpoints."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
