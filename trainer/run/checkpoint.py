"""Checkpoints of a run: written whole or not at all, the newest and the best kept.

    checkpoints/step-00000100/model.safetensors   trainable weights and gate usage, whole (any world size can read them)
                              engine/             DeepSpeed's own: optimizer, schedule, loss scale (this world size)
                              state.json          step, world, stage, fingerprints, validation
    checkpoints/best                              the name of the best one, by validation

The frozen base is not in a checkpoint: it is rebuilt from its source, and its hash is compared.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.models.egmf import EGMF
from trainer.run.distributed import World
from trainer.run.files import write_json, write_text

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

WEIGHTS, STATE, ENGINE, BEST = "model.safetensors", "state.json", "engine", "best"


class CheckpointError(ValueError):
    """A checkpoint that is not there or does not fit the run."""


class Checkpoints:
    """The checkpoint folder of one run. Its methods that write are called by all ranks together."""

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        with world.first_does() as first:
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                for left in folder.glob(".writing-*"):
                    shutil.rmtree(left)

    def save(self, engine: DeepSpeedEngine, step: int, state: dict[str, Any], *, best: bool) -> Path:
        """Write the checkpoint of `step`; `best` makes it the best so far."""
        from trainer.run.engine import trainable_state

        name = f"step-{step:08d}"
        target, writing = self.folder / name, self.folder / f".writing-{name}"
        if not target.exists():
            engine.save_checkpoint(str(writing), tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
            weights = trainable_state(engine.module, self.world)
            with self.world.first_does() as first:
                if first:
                    save_file(weights, writing / WEIGHTS)
                    write_json(writing / STATE, {**state, "step": step})
                    writing.rename(target)
        with self.world.first_does() as first:
            if first:
                if best:
                    write_text(self.folder / BEST, name)
                self._retain()
        return target

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = self._complete()
        return found[-1] if found else None

    def best(self) -> Path | None:
        """The checkpoint that validation chose."""
        mark = self.folder / BEST
        if not mark.is_file():
            return None
        path = self.folder / mark.read_text(encoding="utf-8").strip()
        return path if (path / STATE).is_file() else None

    def _complete(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if (path / STATE).is_file())

    def _retain(self) -> None:
        best = self.best()
        for path in self._complete()[: -self.keep]:
            if path != best:
                shutil.rmtree(path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The record beside a checkpoint's weights."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {error}") from error
    assert isinstance(state, dict)
    return state


def check_fit(state: dict[str, Any], expected: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue `checkpoint` in a run that differs from it in any of `expected`.

    Raises:
        CheckpointError: every difference, and what to do.
    """
    faults = []
    for key, value in expected.items():
        theirs = state.get(key)
        if key == "settings" and isinstance(theirs, dict):
            changed = [name for name in {**theirs, **value} if theirs.get(name) != value.get(name)]
            faults += [
                f"  {n}: the checkpoint has {theirs.get(n)!r}, this run {value.get(n)!r}" for n in sorted(changed)
            ]
        elif theirs != value:
            faults.append(f"  {key}: the checkpoint has {theirs!r}, this run {value!r}")
    if faults:
        raise CheckpointError(
            "\n".join(
                [
                    f"{checkpoint} was written by another run:",
                    *faults,
                    "continue it under the same settings, or start anew with another --out or train.resume=never",
                ]
            )
        )


def resume_engine(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Put a checkpoint's weights, optimizer and schedule into `engine`; the world size is that of the writer."""
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE, load_module_strict=False)
    if loaded is None:
        raise CheckpointError(f"checkpoint {checkpoint}: DeepSpeed found no state under {ENGINE}/")


def load_weights(model: EGMF, checkpoint: Path, world: World) -> None:
    """Put a checkpoint's trainable weights into `model`, on any number of ranks and any ZeRO stage."""
    from trainer.run.engine import load_trainable_state

    path = checkpoint / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"checkpoint {checkpoint} has no {WEIGHTS}")
    weights: dict[str, Tensor] = load_file(path)
    load_trainable_state(model, weights, world)
