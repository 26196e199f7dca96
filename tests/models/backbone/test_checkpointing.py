"""Both names of checkpointing in transformers 5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.models.backbone.checkpointing import is_checkpointing, set_checkpointing

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_is_switched_on_and_off(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2)).train()
    assert not is_checkpointing(model)
    ids = torch.arange(8)[None]
    runs, losses = [0], []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    for on in (False, True, False):
        set_checkpointing(model, on=on, reentrant=reentrant)
        assert is_checkpointing(model) == on
        runs[0] = 0
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert runs[0] == (2 if on else 1), "computed again in the backward pass"
        losses.append(loss.item())
    assert len(set(losses)) == 1


class Older(nn.Module):
    """What a model has of it before 5.18."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.layer.gradient_checkpointing = False
        self.given: object = None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
        self.given, self.layer.gradient_checkpointing = gradient_checkpointing_kwargs, True

    def gradient_checkpointing_disable(self) -> None:
        self.layer.gradient_checkpointing = False


def test_older_versions_have_the_older_names() -> None:
    model: Any = Older()
    for on in (True, False):
        set_checkpointing(model, on=on, reentrant=True)
        assert is_checkpointing(model) == on
        assert model.given == {"use_reentrant": True}
