"""A non-finite step, once more: the saved batch through the saved weights, to find the module where it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.checkpoint.random_state import derive_seed
from trainer.checkpoint.weights import load_trainable_state
from trainer.distributed.deepspeed_config import dtype_of
from trainer.distributed.world import World
from trainer.files import load_json
from trainer.run.assemble import assemble
from trainer.run.guards.dump import ABOUT, WEIGHTS, DumpFacts, load_batch
from trainer.saved_config import saved_config
from trainer.trust import check_trust


@dataclass
class Replay:
    """What one micro-batch gave: each sample's loss, the first module (in order of execution) whose output is not finite,
    and the trainable weights whose gradient is not."""

    file: str
    losses: dict[str, float]
    first_module: str | None
    gradients: list[str]


def replay(folder: Path, world: World, overrides: Sequence[str] = (), agreed: str | None = None) -> list[Replay]:
    """Repeat the micro-batches that a run left in its ``nonfinite/step-…`` folder, with the same dropout.

    Raises:
        ValueError: the folder is not one of these, or its run cannot be rebuilt.
    """
    if not (folder / ABOUT).is_file():
        raise ValueError(f"{folder} has no {ABOUT}: give a folder nonfinite/step-… of a run")
    about: DumpFacts = load_json((folder / ABOUT).read_text(encoding="utf-8"))
    run = folder.resolve().parent.parent
    config = saved_config(run, overrides)
    check_trust(run, config, agreed)
    parts = assemble(config, run, world, dtype_of(config), saved=True)
    model = parts.model.train()
    load_trainable_state(model, load_file(folder / WEIGHTS))
    found: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(_Watch(name, found))
    replays = []
    for micro in about["micro_batches"]:
        found.clear()
        model.zero_grad()
        torch.manual_seed(derive_seed(about["seed"], about["step"] - 1, micro["micro_step"], micro["rank"]))
        batch = load_batch(folder / micro["file"]).to(world.device)
        output = model(batch)
        (output.loss_B.sum() + output.auxiliary_B.sum() + output.unused_param_zero).backward()
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        losses = dict(zip(batch.ids, output.loss_B.detach().tolist(), strict=True))
        replays.append(Replay(micro["file"], losses, found[0] if found else None, bad))
    return replays


class _Watch:
    """Notes the first module whose output is not finite; inner modules finish before those that hold them."""

    def __init__(self, name: str, found: list[str]) -> None:
        self.name, self.found = name or "the model", found

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self.found and any(not t.isfinite().all() for t in _tensors(output)):
            self.found.append(self.name)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, (tuple, list)):
        return [t for inner in value for t in _tensors(inner)]
    return []
