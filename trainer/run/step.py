"""One optimizer step over a global batch: its micro-batches through the engine, and its numbers reduced over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from trainer.batch import AnswerTrie
from trainer.checkpoint.random_state import derive_seed
from trainer.config import RunConfig
from trainer.data.imbalance import answer_indices
from trainer.data.sampling import GlobalBatch, Limits, MicroBatch, Sizes, micro_batches
from trainer.distributed.signals import StopRequest
from trainer.distributed.world import World
from trainer.run.assemble import RunComponents
from trainer.run.guards.dump import NonFiniteDump
from trainer.run.guards.guard import Guard
from trainer.run.loss_scale import LossScale
from trainer.run.prefetch import BatchPrefetcher, Samples
from trainer.run.scalars import StepScalars

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
    heartbeat: Callable[[str], None] = lambda what: None  # called before every micro-batch
    contribute: Callable[[StepScalars], None] = lambda scalars: None  # adds further scalars, once a step
    sizes: dict[str, Sizes] = field(init=False)  # of the training samples, by task
    weights: dict[str, np.ndarray] = field(init=False)  # of the training samples, by task; none where all weigh 1
    limits: Limits = field(init=False)
    tries: dict[str, AnswerTrie] = field(init=False)  # that training batches carry, by task, on the device
    prefetcher: BatchPrefetcher = field(init=False)
    loss_scale: LossScale = field(init=False)

    def __post_init__(self) -> None:
        parts = self.parts
        self.sizes = {name: parts.collators[name].sizes(data["train"]) for name, data in parts.data.items()}
        self.weights = {
            name: collate.objective.weight_C[answer_indices(collate.task, parts.data[name]["train"].targets())]
            for name, collate in parts.collators.items()
            if collate.objective.weight_C is not None
        }
        tries = {name: collate.objective.trie_in_batch for name, collate in parts.collators.items()}
        self.tries = {name: trie.to(self.world.device) for name, trie in tries.items() if trie is not None}
        self.limits = Limits.of_training(self.config, self.world.device.type)
        self.loss_scale = LossScale(self.engine)
        self.prefetcher = BatchPrefetcher(
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
    """What a step came to, the same on every rank."""

    loss: float  # weighted mean over the global batch, the gate's own terms not included
    auxiliary_loss: float
    samples: int
    positions: int  # that all ranks passed through the backbone, those of empty micro-batches left out
    usage: list[float]  # of the experts in earlier steps, by the gate; empty without one
    skipped: bool  # a loss or gradient was not finite: nothing moved
    stop: bool  # some rank was asked to stop
    scalars: StepScalars  # all of these, and what others contributed, by name
    overflowed: bool = False  # a gradient overflowed at a loss scale that can fall, as in fp16 it does: nothing moved
    loss_scale: float | None = None  # that multiplied the loss; None but in fp16


def train_step(training: StepContext, batch: GlobalBatch, step: int, dump: NonFiniteDump) -> StepResult:
    """One optimizer step over a global batch; a step whose loss or gradient is not finite on any rank moves nothing.

    loss = Σ_i w_i (loss_i + gate_i) / Σ_i w_i over the global batch. DeepSpeed averages gradients over ranks, so
    each rank's sum is multiplied by their number. Module dropout is reseeded at every micro-step from
    (seed, step, micro-step, rank). In fp16 an overflow at a loss scale that can fall moves nothing either.
    """
    loss_scale, scale = training.loss_scale, training.loss_scale.value
    engine, config, world, guard = training.engine, training.config, training.world, training.guard
    micros = training.micro_batches(batch)
    total = training.weight(batch)
    scalars = StepScalars(world)
    for place, (micro, rows) in enumerate(zip(micros, training.prefetcher.step(step, batch, micros), strict=True)):
        training.heartbeat(f"step {step + 1}, micro-batch {place + 1} of {len(micros)}")
        rows = rows.to(world.device, trie=training.tries.get(batch.task))
        torch.manual_seed(derive_seed(config.train.seed, step, place, world.rank))
        engine.set_gradient_accumulation_boundary(place == len(micros) - 1)
        output = engine(rows)
        loss_B, auxiliary_B = output.loss_B * rows.weight_B, output.auxiliary_B * rows.weight_B
        loss = (loss_B.sum() + auxiliary_B.sum()) * (world.size / total) + output.unused_param_zero
        engine.backward(loss_scale.scaled(loss), scale_wrt_gas=False)
        scalars.add("loss", loss_B.detach().sum())
        scalars.add("auxiliary_loss", auxiliary_B.detach().sum())
        scalars.add("positions", rows.positions if micro.weight else 0)
        dump.add(rows, loss_B.detach())
    scalars.add("non_finite", guard.found())
    scalars.add("stop_requested", training.stop.asked)
    gate = None if training.parts.model.fusion is None else training.parts.model.fusion.gate
    if gate is not None:
        scalars.add("gate_usage", gate.usage_E, "mean")
        scalars.add("gate_collected", gate.collected())
    training.contribute(scalars)
    scalars.reduce()
    skipped = scalars["non_finite"] > 0 or not math.isfinite(scalars["loss"] + scalars["auxiliary_loss"])
    loss_scale.prepare()
    with guard.freeze_optimizer(skipped):
        engine.step()
    overflowed = loss_scale.overflowed() and not skipped
    if overflowed and not loss_scale.can_fall(scale):
        overflowed, skipped = False, True  # a smaller scale is no cure: the gradient itself is not finite
    if gate is not None:
        if skipped or overflowed:
            gate.discard_usage()
        else:
            gate.update_usage(lambda collected: collected.copy_(scalars.tensor("gate_collected")))
    return StepResult(
        loss=scalars["loss"] / total,
        auxiliary_loss=scalars["auxiliary_loss"] / total,
        samples=len(batch.indices),
        positions=int(scalars["positions"]),
        usage=scalars.vector("gate_usage"),
        skipped=skipped,
        stop=scalars["stop_requested"] > 0,
        scalars=scalars,
        overflowed=overflowed,
        loss_scale=scale,
    )
