"""The micro-batches of a non-finite step, written down with the weights so that the step can be repeated."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.batch import AnswerTrie, Batch, Choices, Features, FusionInput, PackedBatch, Packing
from trainer.distributed.world import World
from trainer.files import load_json, write_json

ABOUT, WEIGHTS = "about.json", "model.safetensors"


class StepFacts(TypedDict):
    """Of a step whose loss or gradient was not finite."""

    step: int  # from 1
    task: str
    samples: list[str]  # those with a non-finite loss
    seed: int


class MicroBatchFacts(TypedDict):
    """Of one of its micro-batches; a non-finite loss is written as text."""

    file: str
    rank: int
    micro_step: int
    losses: dict[str, float | str]


class DumpFacts(StepFacts):
    """``about.json`` of a dump."""

    micro_batches: list[MicroBatchFacts]


class NonFiniteDump:
    """The micro-batches of a step, kept until it is known to be good, to be written down when it is not."""

    def __init__(self) -> None:
        self._micros: list[tuple[Batch | PackedBatch, Tensor]] = []

    def add(self, batch: Batch | PackedBatch, loss_B: Tensor) -> None:
        self._micros.append((batch, loss_B))

    def bad_ids(self) -> list[str]:
        """This rank's samples whose loss is not finite."""
        return [
            sample
            for batch, loss_B in self._micros
            for sample, good in zip(batch.ids, torch.isfinite(loss_B).tolist(), strict=True)
            if not good
        ]

    def write(self, folder: Path, world: World, about: StepFacts, weights: dict[str, Tensor]) -> None:
        """rankR.microJ.safetensors for every micro-batch, model.safetensors, about.json; called by all ranks."""
        with world.on_rank_zero() as first:
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(weights, folder / WEIGHTS)
        own: list[MicroBatchFacts] = []
        with world.fail_together():
            for place, (batch, loss_B) in enumerate(self._micros):
                name = f"rank{world.rank}.micro{place}.safetensors"
                save_batch(batch, folder / name)
                losses = {i: x if math.isfinite(x) else str(x) for i, x in zip(batch.ids, loss_B.tolist(), strict=True)}
                own.append({"file": name, "rank": world.rank, "micro_step": place, "losses": losses})
        parts = world.gather(own)
        with world.on_rank_zero() as first:
            if first:
                assert parts is not None
                facts = DumpFacts(**about, micro_batches=[micro for part in parts for micro in part])
                write_json(folder / ABOUT, facts)


def save_batch(batch: Batch | PackedBatch, path: Path) -> None:
    """A batch as one safetensors file; everything but tensors goes into its metadata."""
    tensors: dict[str, Tensor] = {}
    plain = _to_json(batch, "", tensors)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, {"plain": json.dumps(plain)})


def load_batch(path: Path) -> Batch | PackedBatch:
    """What :func:`save_batch` wrote."""
    with safe_open(path, "pt") as handle:
        plain = load_json(handle.metadata()["plain"])
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no dictionary)
    return cast(Batch | PackedBatch, _from_json(plain, tensors))


_KINDS = {kind.__name__: kind for kind in (Batch, PackedBatch, Packing, FusionInput, Features, Choices, AnswerTrie)}


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON knows it; its tensors go into `tensors` under dotted names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if is_dataclass(value):
        inner = {
            f.name: _to_json(getattr(value, f.name), f"{name}.{f.name}".lstrip("."), tensors) for f in fields(value)
        }
        return {"kind": type(value).__name__, "fields": inner}
    if isinstance(value, list):
        return [_to_json(inner, f"{name}.{i}", tensors) for i, inner in enumerate(value)]
    return value


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(inner, tensors) for inner in value]
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        fields_of = {key: _from_json(inner, tensors) for key, inner in value["fields"].items()}
        return _KINDS[value["kind"]](**fields_of)
    return value
