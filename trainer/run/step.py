"""One optimizer step over a global batch: its micro-batches through the engine, and what the ranks tell each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint.random_state import mix
from trainer.config import RunConfig
from trainer.data.imbalance import answer_indices
from trainer.data.sampling import GlobalBatch, Limits, MicroBatch, Sizes, micro_batches
from trainer.distributed.deepspeed_config import dtype_of
from trainer.distributed.signals import StopRequest
from trainer.distributed.world import World
from trainer.run.assemble import RunComponents
from trainer.run.guard import Guard, NonFiniteDump
from trainer.run.prefetch import BatchPrefetcher, Samples

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass
class StepContext:
    """What a step works with."""

    engine: DeepSpeedEngine
    parts: RunComponents
    config: RunConfig
    world: World
    guard: Guard
    stop: StopRequest
    heartbeat: Callable[[str], None] = lambda what: None  # told before every micro-batch
    sizes: dict[str, Sizes] = field(init=False)  # of the training samples, by task
    weights: dict[str, np.ndarray] = field(init=False)  # of the training samples, by task; none where all weigh 1
    limits: Limits = field(init=False)
    feed: BatchPrefetcher = field(init=False)

    def __post_init__(self) -> None:
        parts = self.parts
        self.sizes = {name: parts.collators[name].sizes(data["train"]) for name, data in parts.data.items()}
        self.weights = {
            name: collate.objective.weight_C[answer_indices(collate.task, parts.data[name]["train"].targets())]
            for name, collate in parts.collators.items()
            if collate.objective.weight_C is not None
        }
        self.limits = Limits.of_training(self.config)
        self.feed = BatchPrefetcher(
            Samples({name: data["train"] for name, data in parts.data.items()}, parts.collators),
            pin=self.world.device.type == "cuda",
        )

    def micro_batches(self, batch: GlobalBatch) -> list[MicroBatch]:
        """This rank's part of a global batch."""
        return micro_batches(batch.indices, self.sizes[batch.task], self.limits, self.world.rank, self.world.size)

    def weight(self, batch: GlobalBatch) -> float:
        """Σ_i w_i over the samples of a global batch, of all ranks."""
        if batch.task not in self.weights:
            return len(batch.indices)
        return float(self.weights[batch.task][list(batch.indices)].sum(dtype=np.float64))

    def positions(self, task: str, micro: MicroBatch) -> int:
        """That a micro-batch passes through the backbone, padding included."""
        return self.sizes[task].positions(micro.indices, self.limits.packed)


@dataclass
class StepResult:
    """What a step tells, the same on every rank."""

    loss: float  # weighted mean over the global batch, the gate's own terms not included
    auxiliary_loss: float
    samples: int
    positions: int  # that all ranks passed through the backbone, those of empty micro-batches left out
    usage: list[float]  # of the experts in earlier steps, by the gate; empty without one
    skipped: bool  # a loss or gradient was no number: nothing moved
    stop: bool  # some rank was asked to stop


def train_step(training: StepContext, batch: GlobalBatch, step: int, evidence: NonFiniteDump) -> StepResult:
    """One optimizer step over a global batch; a step whose loss or gradient is no number on any rank moves nothing.

    loss = Σ_i w_i (loss_i + gate_i) / Σ_i w_i over the global batch. DeepSpeed averages gradients over ranks, so
    each rank's sum is multiplied by their number. Module dropout is reseeded at every micro-step from
    (seed, step, micro-step, rank).
    """
    engine, config, world, guard = training.engine, training.config, training.world, training.guard
    micros = training.micro_batches(batch)
    dtype = dtype_of(config)
    total, device = training.weight(batch), world.device if world.device.type == "cuda" else None
    told = torch.zeros(2, dtype=torch.float64, device=device)
    positions = 0
    for place, (micro, rows) in enumerate(zip(micros, training.feed.step(step, batch, micros), strict=True)):
        training.heartbeat(f"step {step + 1}, micro-batch {place + 1} of {len(micros)}")
        rows = rows.to(world.device, dtype)
        positions += rows.positions if micro.weight else 0
        torch.manual_seed(mix(config.train.seed, step, place, world.rank))
        engine.set_gradient_accumulation_boundary(place == len(micros) - 1)
        output = engine(rows)
        loss_B, auxiliary_B = output.loss_B * rows.weight_B, output.auxiliary_B * rows.weight_B
        engine.backward(
            (loss_B.sum() + auxiliary_B.sum()) * (world.size / total) + output.unused_param_zero, scale_wrt_gas=False
        )
        told[0] += loss_B.detach().sum().double()
        told[1] += auxiliary_B.detach().sum().double()
        evidence.add(rows, loss_B.detach())
    counted = [told.new_full((1,), float(training.stop.asked)), told.new_full((1,), float(positions))]
    told = torch.cat([told, guard.found().to(told)[None], *counted, *_usage(training)])
    world.sum(told)  # all that the ranks tell each other in a step, and all that the host waits for
    loss, auxiliary_loss, bad, asked, positions, *usage = told.tolist()
    skipped = bad > 0 or not math.isfinite(loss + auxiliary_loss)
    with guard.freeze_optimizer(skipped):
        engine.step()
    if training.parts.model.fusion is not None:
        gate = training.parts.model.fusion.gate
        if skipped:
            gate.discard_usage()
        else:
            gate.update_usage(lambda collected: collected.copy_(told[-len(collected) :]))
        usage = usage[: gate.experts]
    samples = len(batch.indices)
    return StepResult(loss / total, auxiliary_loss / total, samples, int(positions), usage, skipped, asked > 0)


def _usage(training: StepContext) -> list[Tensor]:
    """What the gate adds to the sum over ranks: its usage, shared out, and what this step collected."""
    if training.parts.model.fusion is None:
        return []
    gate = training.parts.model.fusion.gate
    return [gate.usage_E.double() / training.world.size, gate.collected().double()]
