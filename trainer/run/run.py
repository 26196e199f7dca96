"""One training: its parts, its engine, its order of samples and its progress; what the loop drives and callbacks see."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.checkpoint.identity import RunIdentity
from trainer.checkpoint.selection import Selection
from trainer.checkpoint.store import Checkpoints
from trainer.config import RunConfig
from trainer.data.imbalance import training_sampler
from trainer.data.sampling import GlobalBatch, GlobalBatchSampler, MicroBatch
from trainer.distributed.deepspeed_config import dtype_of
from trainer.distributed.signals import StopRequest
from trainer.distributed.watch import Watch
from trainer.distributed.world import World
from trainer.run.assemble import RunComponents
from trainer.run.engine import Schedule, build_engine
from trainer.run.guards.guard import Guard, LossMonitor
from trainer.run.step import StepContext
from trainer.tracking.tracker import Tracker

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass
class Run:
    """What a run is given, and what is built from it: a new engine for `parts`, with no checkpoint loaded yet."""

    config: RunConfig
    out: Path
    world: World
    parts: RunComponents
    identity: RunIdentity
    tracker: Tracker = field(kw_only=True)
    checkpoints: Checkpoints = field(kw_only=True)
    watch: Watch = field(kw_only=True)
    stop: StopRequest = field(kw_only=True)

    order: GlobalBatchSampler = field(init=False)
    steps: int = field(init=False)  # of the whole training
    steps_done: int = field(init=False, default=0)
    dtype: torch.dtype = field(init=False)
    engine: DeepSpeedEngine = field(init=False)
    schedule: Schedule = field(init=False)
    guard: Guard = field(init=False)
    health: LossMonitor = field(init=False)
    selection: Selection = field(init=False)
    step_context: StepContext = field(init=False)

    def __post_init__(self) -> None:
        config, world, parts, train = self.config, self.world, self.parts, self.config.train
        self.order = training_sampler(config, {name: data["train"] for name, data in parts.data.items()})
        self.steps = train.steps or math.ceil(train.epochs * self.order.steps_per_epoch)
        self.dtype = dtype_of(config)
        self.engine = build_engine(parts.model, config)
        self.schedule = Schedule(self.engine, train, self.steps)
        self.guard = Guard(self.engine, world.device, gradients=self.dtype is not torch.float16)
        self.health = LossMonitor(train.spike)
        self.selection = Selection({name: task.greater_is_better for name, task in parts.tasks.items()})
        self.step_context = StepContext(self.engine, parts, config, world, self.guard, self.stop, self.watch.heartbeat)
        self.step_context.prefetcher.work_ahead(
            config.data.workers_of_rank(world.device.type == "cuda"), self._planned, self.steps
        )

    def _planned(self, step: int) -> tuple[GlobalBatch, list[MicroBatch]]:
        batch = self.order.step(step)
        return batch, self.step_context.micro_batches(batch)
