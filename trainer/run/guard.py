"""Guards of a step: non-finite losses and gradients are found, their step is skipped, and its batch can be kept.

DeepSpeed's own checks differ between ZeRO stages and precisions (deepspeed 0.19: stage 0 in fp32 and stages 1 and 2 in
bf16 have none), so one decision is made for all ranks before the step, and it works the same at every stage: the whole
step runs, but its optimizer does not move. The schedule and the order of samples go on as if it had.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.batch import AnswerTrie, Batch, Choices, Features, FusionInput, PackedBatch, Packing
from trainer.checkpoint.state import LossMonitorState
from trainer.distributed.world import World
from trainer.files import write_json

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

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


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Guard:
    """Watches the local gradients of trainable parameters, and can freeze the optimizer.

    Args:
        engine: its trainable parameters are watched, its optimizer's step is wrapped.
        gradients: watch gradients too; off for fp16, where DeepSpeed's loss scaling expects some to overflow.
    """

    def __init__(self, engine: DeepSpeedEngine, device: torch.device, *, gradients: bool) -> None:
        self._sum = torch.zeros((), device=device)
        self._frozen = False
        if gradients:
            for parameter in engine.module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._watch)
        optimizer = engine.basic_optimizer
        step = optimizer.step

        def guarded(*arguments: Any, **named: Any) -> Any:
            return None if self._frozen else step(*arguments, **named)

        optimizer.step = guarded

    def _watch(self, gradient: Tensor) -> None:
        self._sum += gradient.detach().sum(dtype=torch.float32) * 0.0  # 0, or nan where any element is inf or nan

    def found(self) -> Tensor:
        """Whether a local gradient since the last call held inf or nan (1 or 0, on the device)."""
        bad = torch.isfinite(self._sum).logical_not().double()
        self._sum.zero_()
        return bad

    @contextlib.contextmanager
    def freeze_optimizer(self, frozen: bool) -> Iterator[None]:
        """Inside the block the optimizer does not move, if `frozen`."""
        self._frozen = frozen
        try:
            yield
        finally:
            self._frozen = False


class LossMonitor:
    """Counts skipped steps, and losses far above the recent ones. Part of a checkpoint.

    A loss is a spike when it exceeds median + `factor` · 1.4826 · MAD of the last `WINDOW` losses (of `LEAST` or more).
    The deviation counts as `FLOOR` at least: small fluctuations near zero are not flagged.
    """

    WINDOW, LEAST, FLOOR = 64, 16, 0.01

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.skipped = self.in_a_row = self.spikes = 0
        self._recent: deque[float] = deque(maxlen=self.WINDOW)

    def step(self, loss: float, skipped: bool) -> bool:
        """Count a step; whether its loss is a spike."""
        if skipped:
            self.skipped += 1
            self.in_a_row += 1
            return False
        self.in_a_row = 0
        spike = False
        if len(self._recent) >= self.LEAST:
            recent = torch.tensor(list(self._recent), dtype=torch.float64)
            median = recent.quantile(0.5)
            spread = 1.4826 * (recent - median).abs().quantile(0.5)
            spike = loss > float(median + self.factor * spread.clamp_min(self.FLOOR))
        self.spikes += spike
        self._recent.append(loss)
        return spike

    def state(self) -> LossMonitorState:
        return LossMonitorState(
            skipped=self.skipped, in_a_row=self.in_a_row, spikes=self.spikes, recent=list(self._recent)
        )

    def restore(self, state: LossMonitorState) -> None:
        self.skipped, self.in_a_row, self.spikes = state.skipped, state.in_a_row, state.spikes
        self._recent.extend(state.recent)


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
        plain = json.loads(handle.metadata()["plain"])
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no dictionary)
    return _from_json(plain, tensors)


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
