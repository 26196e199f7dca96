"""Checkpoints of a run: written whole or not at all, verified before they are used, the newest and the best kept.

    checkpoints/step-00000100/model.safetensors       trainable weights and gate usage, whole (any world size can read them)
                              engine/                 DeepSpeed's own: optimizer, loss scale (of this world size: see universal.py)
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
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.checkpoint.random_state import random_state, restore_random_state
from trainer.checkpoint.state import FORMAT, STATE, CheckpointState, check_format
from trainer.checkpoint.torch_files import ForbiddenContentError, tensors_only, torch_writing
from trainer.checkpoint.universal import load_universal, universal
from trainer.checkpoint.weights import WEIGHTS, CheckpointError, load_weights, trainable_state
from trainer.distributed.world import World
from trainer.files import file_digest, load_json, sync, write_json, write_text

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

MANIFEST, ENGINE, BEST = "manifest.json", "engine", "best"
RANDOM = "random.rank{}.safetensors"
STEP_NAME, READ_NAME = re.compile(rb"step-[0-9]{8,}"), 64


class FileRecord(TypedDict):
    """Of a file in a manifest."""

    bytes: int
    sha256: str


class Checkpoints:
    """The checkpoint folder of one run. Its methods are called by all ranks together, but `best` and `names`."""

    def __init__(self, folder: Path, world: World, keep: int = 1) -> None:
        self.folder, self.world, self.keep = folder, world, keep

    def open(self) -> None:
        """Make the folder ready for writing: remove what an interrupted save or removal left."""
        with self.world.on_rank_zero() as first:
            if first:
                self.folder.mkdir(parents=True, exist_ok=True)
                for pattern in (".writing-*", ".removing-*", ".converting-*"):
                    for left in self.folder.glob(pattern):
                        _remove(left)

    def save(self, engine: DeepSpeedEngine, state: CheckpointState) -> Path:
        """Write the checkpoint of `state.step`; `state.best` names the best one so far, and it may be this one.

        Raises:
            CheckpointError: it could not be written (disk full, folder gone, ...). Earlier ones stay.
        """
        name = step_name(state.step)
        target, writing = self.folder / name, self.folder / f".writing-{name}"
        with _write_errors_explained(f"the checkpoint of step {state.step}", self.folder):
            with self.world.on_rank_zero() as first:
                if first and not self.folder.is_dir():
                    raise FileNotFoundError(f"{self.folder} is gone: it was removed while the run was going on")
                if first and os.path.lexists(writing):
                    _remove(writing)  # DeepSpeed would write into what a link leads to
            try:
                self._write(engine, writing, state)
            except BaseException:
                shutil.rmtree(writing, ignore_errors=True)  # a full disk must have room to say so
                raise
            with self.world.on_rank_zero() as first:
                if first:
                    writing.rename(target)
                    sync(self.folder)
                    self.mark(state.best)
                    self._retain(state.best)
        return target

    def _write(self, engine: DeepSpeedEngine, writing: Path, state: CheckpointState) -> None:
        with torch_writing():
            engine.save_checkpoint(str(writing), tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
        weights = trainable_state(engine.module, self.world)
        with self.world.fail_together():
            save_file(random_state(), writing / RANDOM.format(self.world.rank))
            if self.world.is_rank_zero:
                save_file(weights, writing / WEIGHTS)
                write_json(writing / STATE, state.model_dump(mode="json"))
        names = self.world.broadcast_object(_files(writing) if self.world.is_rank_zero else [])
        mine: dict[str, FileRecord] = {}
        with self.world.fail_together():
            for name in names[self.world.rank :: self.world.size]:
                sync(writing / name)
                mine[name] = {"bytes": (writing / name).stat().st_size, "sha256": file_digest(writing / name)}
        parts = self.world.gather(mine)
        with self.world.on_rank_zero() as first:
            if first:
                assert parts is not None
                records = {name: record for part in parts for name, record in part.items()}
                write_json(writing / MANIFEST, {"format": FORMAT, "files": dict(sorted(records.items()))})
                sync(writing / MANIFEST)
                sync(writing)

    def newest(self, *, repair: bool = False) -> Path | None:
        """The newest whole checkpoint; damaged ones are skipped with a warning, and renamed with `repair`.

        Raises:
            CheckpointError: there are checkpoints, and every one of them is damaged.
        """
        damaged: dict[str, list[str]] = {}
        for name in self.world.broadcast_object(list(reversed(self.names()))):
            faults = self.verify(self.folder / name)
            if not faults:
                self._skip_damaged(damaged, self.folder / name, repair)
                return self.folder / name
            damaged[name] = faults
        if damaged:
            listed = "\n".join(f"  {name}: {'; '.join(faults[:3])}" for name, faults in damaged.items())
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole:\n{listed}\n"
                "bring one back from a copy, or start anew with train.resume=never"
            )
        return None

    def verify(self, checkpoint: Path) -> list[str]:
        """The faults of a checkpoint, read in full, the ranks sharing the work; the same answer on every rank.

        Raises:
            CheckpointError: it is of another format, so that this version cannot say.
        """
        rank, size = self.world.rank, self.world.size
        faults: list[str]
        found: object = FORMAT
        try:
            manifest = load_json((checkpoint / MANIFEST).read_text(encoding="utf-8"))
            files = sorted(manifest["files"].items())
            found = manifest.get("format")
            faults = [fault for name, about in files[rank::size] if (fault := _fault(checkpoint / name, about))]
        except FileNotFoundError:
            faults = [f"it has no {MANIFEST}: its writing was not finished"] if rank == 0 else []
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            faults = [f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"] if rank == 0 else []
        parts = self.world.gather_all((faults, found))
        for _, found in parts:
            check_format(found, checkpoint)
        return [fault for faults, _ in parts for fault in faults]

    def names(self) -> list[str]:
        """The checkpoints that are there, whole or not, oldest first."""
        return sorted(path.name for path in self.folder.glob("step-*") if path.is_dir())

    def best(self) -> Path | None:
        """The checkpoint that validation chose, None where none was.

        Raises:
            CheckpointError: it was chosen and is no longer there, or `best` does not name a checkpoint of this folder.
        """
        mark = self.folder / BEST
        if not mark.is_file():
            return None
        with mark.open("rb") as file:
            name = file.read(READ_NAME).strip()
        if not STEP_NAME.fullmatch(name):
            raise CheckpointError(
                f"{mark} does not hold the name of a checkpoint such as {step_name(100)}: write one of {', '.join(self.names()) or 'none'} "
                "into it, or remove it to use the newest"
            )
        path = self.folder / name.decode()
        if not path.is_dir():
            raise CheckpointError(
                f"validation chose {path.name}, which is no longer in {self.folder}: restore it, or remove {mark} to use the newest"
            )
        return path

    def mark(self, best: str | None) -> None:
        """Record which is the best; on rank 0."""
        if best is None:
            (self.folder / BEST).unlink(missing_ok=True)
        else:
            write_text(self.folder / BEST, best)

    def _skip_damaged(self, damaged: dict[str, list[str]], good: Path, repair: bool) -> None:
        with self.world.on_rank_zero() as first:
            for name, faults in damaged.items() if first else ():
                log.warning("checkpoint %s is damaged (%s): %s is used", name, "; ".join(faults[:3]), good.name)
                if repair:
                    renamed = self.folder / f"damaged-{name}"
                    if os.path.lexists(renamed):
                        _remove(renamed)
                    (self.folder / name).rename(renamed)

    def _retain(self, best: str | None) -> None:
        for name in self.names()[: -self.keep]:
            if name != best:
                removing = self.folder / f".removing-{name}"
                (self.folder / name).rename(removing)
                _remove(removing)


def step_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def resume_engine(engine: DeepSpeedEngine, checkpoint: Path, world: World) -> None:
    """Put a checkpoint's weights, optimizer and random state into `engine`, whatever number of ranks wrote it.

    On another number of ranks random states are those of the writer's ranks, in turn.

    Raises:
        CheckpointError: DeepSpeed finds no state of its own there, or one that asks for more than plain tensors.
    """
    writers = len(list(checkpoint.glob(RANDOM.format("*"))))
    try:
        with tensors_only():
            if writers == world.size or not engine.zero_optimization():
                loaded, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE, load_module_strict=False)
            else:
                log.info("%s was written by %d ranks: converting it for %d", checkpoint.name, writers, world.size)
                place = checkpoint.with_name(f".converting-{checkpoint.name}")
                with (
                    _write_errors_explained(f"the conversion of {checkpoint.name}", checkpoint.parent),
                    universal(checkpoint / ENGINE, place, world) as converted,
                ):
                    loaded = load_universal(engine, converted)
                load_weights(engine.module, checkpoint)
    except ForbiddenContentError as error:
        raise CheckpointError(
            f"{checkpoint / ENGINE} holds more than tensors ({error}) and is not read: bring back the run's own from a copy, or start anew with train.resume=never"
        ) from error
    if loaded is None:
        raise CheckpointError(f"checkpoint {checkpoint}: DeepSpeed found no state under {ENGINE}/")
    restore_random_state(load_file(checkpoint / RANDOM.format(world.rank % writers)))


def _remove(path: Path) -> None:
    """Remove a folder and what it holds; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def _write_errors_explained(what: str, folder: Path) -> Iterator[None]:
    """A failure to write `what` becomes one message: why, and which checkpoint remains."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = str(error)
        with contextlib.suppress(OSError):
            why += f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free there)"
        kept = sorted(path.name for path in folder.glob("step-*") if (path / MANIFEST).is_file())
        stays = f"{kept[-1]} stays" if kept else "there was none before it"
        raise CheckpointError(
            f"{what} could not be written under {folder}: {why}; {stays}: make it writable or free some space, then the same command goes on"
        ) from error


def _fault(path: Path, about: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != about["bytes"]:
        return f"{path.name} has {size} bytes and not {about['bytes']}"
    return None if file_digest(path) == about["sha256"] else f"{path.name} has changed since it was written"


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
