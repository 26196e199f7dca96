"""Checkpoints of a run: written whole or not at all, verified before they are used, the newest and the best kept.

    checkpoints/step-00000100/model.safetensors       trainable weights and gate usage, whole (any world size can read them)
                              engine/                 DeepSpeed's own: optimizer, loss scale (of this world size: run/universal.py)
                              random.rankN.safetensors  every random generator of a rank
                              state.json              step, schedule, identity of the run, validation, MLflow run
                              manifest.json           size and SHA-256 of every other file
    checkpoints/best                                  the name of the best one, by validation

All ranks write under a temporary name, rank 0 writes the manifest last and renames. The frozen base is not in a
checkpoint: it is rebuilt from its source, and its hash is compared. Nothing is unpickled but plain tensors and four
named classes of DeepSpeed's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.checkpoint.random_state import random_state, restore_random_state
from trainer.checkpoint.universal import load_universal, universal
from trainer.checkpoint.weights import WEIGHTS, CheckpointError, load_weights, trainable_state
from trainer.distributed.world import World
from trainer.files import sync, write_json, write_text

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

FORMAT = 1
STATE, MANIFEST, ENGINE, BEST = "state.json", "manifest.json", "engine", "best"
RANDOM = "random.rank{}.safetensors"
READ = 1 << 22  # bytes at once
WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")  # in the RuntimeErrors of torch.save's writer


class Checkpoints:
    """The checkpoint folder of one run. Its methods are called by all ranks together, but `best` and `names`."""

    def __init__(self, folder: Path, world: World, keep: int = 1) -> None:
        self.folder, self.world, self.keep = folder, world, keep

    def open(self) -> None:
        """Make the folder ready for writing: what an interrupted save or removal left is cleared away."""
        with self.world.on_rank_zero() as first:
            if first:
                self.folder.mkdir(parents=True, exist_ok=True)
                for pattern in (".writing-*", ".removing-*", ".converting-*"):
                    for left in self.folder.glob(pattern):
                        shutil.rmtree(left)

    def save(self, engine: DeepSpeedEngine, step: int, state: dict[str, Any], best: str | None) -> Path:
        """Write the checkpoint of `step`; `best` names the best one so far, or it may be this one.

        Raises:
            CheckpointError: it could not be written (disk full, folder gone, ...). Earlier ones stay.
        """
        name = step_name(step)
        target, writing = self.folder / name, self.folder / f".writing-{name}"
        with _explained(f"the checkpoint of step {step}", self.folder):
            with self.world.on_rank_zero() as first:
                if first and not self.folder.is_dir():
                    raise FileNotFoundError(f"{self.folder} is gone: it was removed while the run was going on")
            try:
                self._write(engine, writing, {**state, "format": FORMAT, "step": step, "best": best})
            except BaseException:
                shutil.rmtree(writing, ignore_errors=True)  # a full disk must have room to say so
                raise
            with self.world.on_rank_zero() as first:
                if first:
                    writing.rename(target)
                    sync(self.folder)
                    self.mark(best)
                    self._retain(best)
        return target

    def _write(self, engine: DeepSpeedEngine, writing: Path, state: dict[str, Any]) -> None:
        engine.save_checkpoint(str(writing), tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
        weights = trainable_state(engine.module, self.world)
        with self.world.fail_together():
            save_file(random_state(), writing / RANDOM.format(self.world.rank))
            if self.world.is_rank_zero:
                save_file(weights, writing / WEIGHTS)
                write_json(writing / STATE, state)
        names = self.world.broadcast_object(_files(writing) if self.world.is_rank_zero else None)
        mine: dict[str, dict[str, Any]] = {}
        with self.world.fail_together():
            for name in names[self.world.rank :: self.world.size]:
                sync(writing / name)
                mine[name] = {"bytes": (writing / name).stat().st_size, "sha256": _digest(writing / name)}
        parts = self.world.gather(mine)
        with self.world.on_rank_zero() as first:
            if first:
                assert parts is not None
                everything = {name: about for part in parts for name, about in part.items()}
                write_json(writing / MANIFEST, {"format": FORMAT, "files": dict(sorted(everything.items()))})
                sync(writing / MANIFEST)
                sync(writing)

    def newest(self, *, repair: bool = False) -> Path | None:
        """The newest whole checkpoint; what is damaged is passed over with a warning, and with `repair` put aside.

        Raises:
            CheckpointError: there are checkpoints, and every one of them is damaged.
        """
        damaged: dict[str, list[str]] = {}
        for name in self.world.broadcast_object(list(reversed(self.names()))):
            faults = self.verify(self.folder / name)
            if not faults:
                self._pass_over(damaged, self.folder / name, repair)
                return self.folder / name
            damaged[name] = faults
        if damaged:
            told = "\n".join(f"  {name}: {'; '.join(faults[:3])}" for name, faults in damaged.items())
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole:\n{told}\n"
                "bring one back from a copy, or start anew with train.resume=never"
            )
        return None

    def verify(self, checkpoint: Path) -> list[str]:
        """What is wrong with a checkpoint, read in full, the ranks sharing the work; the same answer on every rank."""
        rank, size = self.world.rank, self.world.size
        faults: list[str]
        try:
            manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
            files = sorted(manifest["files"].items())
            faults = [fault for name, about in files[rank::size] if (fault := _fault(checkpoint / name, about))]
        except FileNotFoundError:
            faults = [f"it has no {MANIFEST}: its writing was not finished"] if rank == 0 else []
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            faults = [f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"] if rank == 0 else []
        return [fault for part in self.world.gather_all(faults) for fault in part]

    def names(self) -> list[str]:
        """The checkpoints that are there, whole or not, oldest first."""
        return sorted(path.name for path in self.folder.glob("step-*") if path.is_dir())

    def best(self) -> Path | None:
        """The checkpoint that validation chose, None where none was.

        Raises:
            CheckpointError: it was chosen and is no longer there.
        """
        mark = self.folder / BEST
        if not mark.is_file():
            return None
        path = self.folder / mark.read_text(encoding="utf-8").strip()
        if not path.is_dir():
            raise CheckpointError(
                f"validation chose {path.name}, which is no longer in {self.folder}: bring it back, or remove {mark} to use the newest"
            )
        return path

    def mark(self, best: str | None) -> None:
        """Write down which is the best; on rank 0."""
        if best is None:
            (self.folder / BEST).unlink(missing_ok=True)
        else:
            write_text(self.folder / BEST, best)

    def _pass_over(self, damaged: dict[str, list[str]], good: Path, repair: bool) -> None:
        with self.world.on_rank_zero() as first:
            for name, faults in damaged.items() if first else ():
                log.warning("checkpoint %s is damaged (%s): %s is used", name, "; ".join(faults[:3]), good.name)
                if repair:
                    aside = self.folder / f"damaged-{name}"
                    shutil.rmtree(aside, ignore_errors=True)
                    (self.folder / name).rename(aside)

    def _retain(self, best: str | None) -> None:
        for name in self.names()[: -self.keep]:
            if name != best:
                going = self.folder / f".removing-{name}"
                (self.folder / name).rename(going)
                shutil.rmtree(going)


def step_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The record beside a checkpoint's weights."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {error}") from error
    assert isinstance(state, dict)
    return state


def check_fit(state: dict[str, Any], expected: dict[str, Any], checkpoint: Path, *, force: bool = False) -> None:
    """Refuse to continue `checkpoint` in a run that differs from it in any of `expected`.

    Another number of ranks fits always. With `force`, other settings and other data are a warning; another base or ZeRO
    stage never is.

    Raises:
        CheckpointError: every difference, and what to do.
    """
    faults: list[str] = []
    forced: list[str] = []
    for key, value in expected.items():
        theirs = state.get(key)
        if key == "world":
            continue
        if key == "settings" and isinstance(theirs, dict):
            changed = sorted(name for name in {**theirs, **value} if theirs.get(name) != value.get(name))
            forced += [f"  {n}: the checkpoint has {theirs.get(n)!r}, this run {value.get(n)!r}" for n in changed]
        elif theirs != value:
            (forced if key == "data" else faults).append(f"  {key}: the checkpoint has {theirs!r}, this run {value!r}")
    if force and forced and not faults:
        log.warning("--force: %s is continued although this run differs:\n%s", checkpoint.name, "\n".join(forced))
        return
    if faults or forced:
        raise CheckpointError(
            "\n".join(
                [
                    f"{checkpoint} was written by another run:",
                    *faults,
                    *forced,
                    "continue it under the same settings"
                    + ("" if faults else ", or all the same with --force")
                    + ", or start anew with another --out or train.resume=never",
                ]
            )
        )


def resume_engine(engine: DeepSpeedEngine, checkpoint: Path, world: World) -> None:
    """Put a checkpoint's weights, optimizer and random state into `engine`, whatever number of ranks wrote it.

    On another number of ranks random states are those of the writer's ranks, in turn.

    Raises:
        CheckpointError: DeepSpeed finds no state of its own there, or one that asks for more than plain tensors.
    """
    writers = len(list(checkpoint.glob(RANDOM.format("*"))))
    with _restricted():
        try:
            if writers == world.size or not engine.zero_optimization():
                loaded, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE, load_module_strict=False)
            else:
                log.info("%s was written by %d ranks: converting it for %d", checkpoint.name, writers, world.size)
                place = checkpoint.with_name(f".converting-{checkpoint.name}")
                with (
                    _explained(f"the conversion of {checkpoint.name}", checkpoint.parent),
                    universal(checkpoint / ENGINE, place, world) as converted,
                ):
                    loaded = load_universal(engine, converted)
                load_weights(engine.module, checkpoint, world)
        except Exception as error:
            if "weights_only" not in str(error) and "Weights only" not in str(error):
                raise
            raise CheckpointError(f"{checkpoint / ENGINE} holds more than tensors and is not read: {error}") from error
    if loaded is None:
        raise CheckpointError(f"checkpoint {checkpoint}: DeepSpeed found no state under {ENGINE}/")
    restore_random_state(load_file(checkpoint / RANDOM.format(world.rank % writers)))


@contextlib.contextmanager
def _restricted() -> Iterator[None]:
    """Inside the block torch.load takes tensors, plain containers and DeepSpeed's four classes, and nothing else.

    DeepSpeed asks for weights_only=False; torch's own variable overrules it.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


@contextlib.contextmanager
def _explained(what: str, folder: Path) -> Iterator[None]:
    """A failure to write `what` becomes one message that says why and what stays."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in WRITER):
            raise
        why = "a file could not be written to its end" if isinstance(error, RuntimeError) else str(error)
        with contextlib.suppress(OSError):
            why += f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free there)"
        kept = sorted(path.name for path in folder.glob("step-*") if (path / MANIFEST).is_file())
        stays = f"{kept[-1]} stays" if kept else "there was none before it"
        raise CheckpointError(
            f"{what} could not be written under {folder}: {why}; {stays}: make it writable or free some space, then the same command goes on"
        ) from error


def _fault(path: Path, about: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != about["bytes"]:
        return f"{path.name} has {size} bytes and not {about['bytes']}"
    return None if _digest(path) == about["sha256"] else f"{path.name} has changed since it was written"


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(READ):
            digest.update(block)
    return digest.hexdigest()
