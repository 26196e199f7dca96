"""What a run needs, before any GPU is asked for: weights, memory of a rank, steps, bytes on the wire, checkpoints, hours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from transformers import PretrainedConfig

from launch.plan.fake_model import build_fake_model, fake_tensors
from launch.plan.lengths import Lengths, LengthsRecord, run_lengths
from launch.plan.memory import Memory, Setting, checkpoint_bytes, rank_memory, wire_bytes
from launch.plan.recorded_pass import SAMPLE_LAYERS, Pass, extrapolate_layers, record_pass
from launch.plan.weights import Weights, count_weights
from launch.units import GIB
from trainer.config import RunConfig
from trainer.distributed.deepspeed_config import (
    deepspeed_config,
    dtype_of,
    offload_faults,
    offloads_optimizer,
    zero_elements,
    zero_stage,
)
from trainer.models.backbone.loading import load_shape
from trainer.models.backbone.quantization import check_sizes
from trainer.models.backbone.tiny import tiny_shape

STAGES = (0, 1, 2, 3)
RESERVED = 2 * GIB  # of a GPU: CUDA's context, NCCL's buffers, holes of the allocator
LEFT_OUT = (
    "workspace of single kernels (matrix products, attention)",
    "holes that PyTorch's allocator leaves between blocks: 2 GiB of a GPU are kept free for these, CUDA and NCCL",
    "loading: reading and quantising a checkpoint may need more for a moment",
    "evaluation (eval.tokens) and free generation",
    "overlap, latency and congestion of the network: bytes are those of rings over all ranks",
    "time for evaluation, checkpoints and starting",
)


@dataclass(frozen=True)
class Throughput:
    """The throughput stated by the user, in one of these units. Samples and positions per second: of all GPUs; TFLOP/s: of each."""

    samples: float | None = None
    positions: float | None = None
    tflops: float | None = None


@dataclass(frozen=True)
class Option:
    """A combination of ZeRO stage, optimizer offload and activation checkpointing, and the memory of a rank under it."""

    stage: int
    offload: bool
    checkpointing: bool
    memory: Memory

    def overrides(self) -> list[str]:
        return [
            f"train.zero={self.stage}",
            f"train.offload={'cpu' if self.offload else 'none'}",
            f"model.backbone.gradient_checkpointing={str(self.checkpointing).lower()}",
        ]


class OptionRecord(TypedDict):
    """An option in the JSON of a plan; sizes in bytes, of one rank."""

    zero: int
    offload: bool
    checkpointing: bool
    bytes: int
    parts: Mapping[str, int]
    host_bytes: int
    fits: bool


class RecommendedRecord(OptionRecord):
    """The recommended option, and the overrides that choose it."""

    overrides: list[str]


class PlanRecord(TypedDict):
    """A plan as JSON; see :meth:`MemoryPlan.to_json` for units."""

    backbone: str
    tasks: list[str]
    nodes: int
    gpus_per_node: int
    ranks: int
    gpu_memory_gib: float
    reserved_bytes: int
    parameters: Mapping[str, object]  # the fields of Weights
    lengths: LengthsRecord
    activations: dict[str, dict[str, int]]
    memory: list[OptionRecord]
    configured: OptionRecord
    recommended: RecommendedRecord | None
    wire_bytes_per_step: dict[str, dict[str, int]]
    checkpoint_bytes: dict[str, int]
    flops_per_rank_and_step: float
    steps: int | None
    hours: float | None
    assumptions: list[str]
    left_out: list[str]


@dataclass(frozen=True)
class Model:
    """What the model consists of, and what the largest micro-batch takes with and without checkpointing."""

    weights: Weights
    passes: Mapping[bool, Pass]
    layers: int


@dataclass(frozen=True)
class MemoryPlan:
    """See :meth:`to_json` for units."""

    config: RunConfig
    nodes: int
    gpus_per_node: int
    gpu_memory: float
    model: Model
    lengths: Lengths
    options: tuple[Option, ...]
    wire: Mapping[int, Mapping[str, int]]
    checkpoint: Mapping[str, int]
    flops_per_step: float  # of one rank
    steps: int | None
    hours: float | None

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def option(self, stage: int, offload: bool, checkpointing: bool) -> Option:
        wanted = (stage, offload, checkpointing)
        return next(o for o in self.options if (o.stage, o.offload, o.checkpointing) == wanted)

    def fits(self, option: Option) -> bool:
        return option.memory.total + RESERVED <= self.gpu_memory * GIB

    @property
    def configured(self) -> Option:
        """The run as its config has it."""
        stage = zero_stage(self.config)
        offload = offloads_optimizer(deepspeed_config(self.config)) and stage > 0
        return self.option(stage, offload, self.config.model.backbone.gradient_checkpointing)

    @property
    def recommended(self) -> Option | None:
        """The fastest that fits: states cut up before anything is computed twice, weights cut up, offload last."""
        if self.fits(self.configured):
            return self.configured
        order = [(s, o, c) for o in (False, True) for s, c in ((2, False), (2, True), (3, False), (3, True))]
        return next((o for key in order if self.fits(o := self.option(*key))), None)

    def to_json(self) -> PlanRecord:
        """Sizes in bytes, of one rank unless the key names another scope; None: not known."""
        chosen = self.recommended
        return {
            "backbone": self.config.model.backbone.name,
            "tasks": self.config.tasks,
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node,
            "ranks": self.ranks,
            "gpu_memory_gib": self.gpu_memory,
            "reserved_bytes": RESERVED,
            "parameters": dataclasses.asdict(self.model.weights),
            "lengths": self.lengths.to_json(),
            "activations": {
                "checkpointing" if key else "plain": dataclasses.asdict(work) for key, work in self.model.passes.items()
            },
            "memory": [self._option(option) for option in self.options],
            "configured": self._option(self.configured),
            "recommended": None if chosen is None else {**self._option(chosen), "overrides": chosen.overrides()},
            "wire_bytes_per_step": {f"zero{stage}": dict(parts) for stage, parts in self.wire.items()},
            "checkpoint_bytes": dict(self.checkpoint),
            "flops_per_rank_and_step": self.flops_per_step,
            "steps": self.steps,
            "hours": self.hours,
            "assumptions": self.lengths.assumptions,
            "left_out": list(LEFT_OUT),
        }

    def _option(self, option: Option) -> OptionRecord:
        return {
            "zero": option.stage,
            "offload": option.offload,
            "checkpointing": option.checkpointing,
            "bytes": option.memory.total,
            "parts": option.memory.device,
            "host_bytes": option.memory.host_total,
            "fits": self.fits(option),
        }


def make_plan(
    config: RunConfig,
    nodes: int,
    gpus_per_node: int,
    gpu_memory: float,
    throughput: Throughput,
    *,
    positions: int | None = None,
    samples: int | None = None,
) -> MemoryPlan:
    """Plan a run.

    Args:
        gpu_memory: of one GPU, GiB.
        positions, samples: see :func:`launch.plan.lengths.run_lengths`.

    Raises:
        ValueError: the backbone's configuration cannot be read, or the run cannot be as configured.
    """
    _check(config, nodes, gpus_per_node, gpu_memory)
    ranks = nodes * gpus_per_node
    shape = backbone_shape(config)
    lengths = run_lengths(config, ranks, positions=positions, samples=samples)
    model = profile_model(config, shape, lengths)
    options = []
    for stage in STAGES:
        for offload in (False, True) if stage else (False,):
            for checkpointing, work in model.passes.items():
                setting = make_setting(config, ranks, lengths.micro_steps, stage=stage, offload=offload)
                memory = rank_memory(model.weights, work, setting)
                options.append(Option(stage, offload, checkpointing, memory))
    settings = {stage: make_setting(config, ranks, lengths.micro_steps, stage=stage) for stage in STAGES}
    steps = config.train.steps
    if steps is None and lengths.steps_per_epoch is not None:
        steps = math.ceil(config.train.epochs * lengths.steps_per_epoch)
    work = model.passes[config.model.backbone.gradient_checkpointing]
    mean = lengths.step_positions / lengths.micro_batches
    flops = work.flops / lengths.largest[0].positions * mean * lengths.micro_steps  # of the fullest rank
    return MemoryPlan(
        config=config,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu_memory=gpu_memory,
        model=model,
        lengths=lengths,
        options=tuple(options),
        wire={stage: wire_bytes(model.weights, setting) for stage, setting in settings.items()},
        checkpoint=checkpoint_bytes(model.weights, settings[zero_stage(config)]),
        flops_per_step=flops,
        steps=steps,
        hours=_hours(throughput, config, lengths, flops, steps),
    )


def backbone_shape(config: RunConfig) -> PretrainedConfig:
    """The backbone's configuration: a folder's, the hub's, or the tiny one's.

    Raises:
        ValueError: it cannot be read, or has sizes that 4 bits cannot hold.
    """
    backbone = config.model.backbone
    shape = tiny_shape(backbone.tiny) if backbone.name == "tiny" else load_shape(backbone)
    if backbone.quantization == "nf4":
        check_sizes(shape, backbone.name, backbone.trust_remote_code)
    return shape


def profile_model(config: RunConfig, shape: PretrainedConfig, lengths: Lengths) -> Model:
    """Count the whole model's weights, and record passes of the largest micro-batches through a few layers of it."""
    dtype, layers = dtype_of(config), int(shape.num_hidden_layers)
    zero = deepspeed_config(config)["zero_optimization"]
    with fake_tensors():
        weights = count_weights(
            build_fake_model(config, shape, lengths.widths, dtype, answers=lengths.answers, shared=lengths.shared),
            zero_elements(zero, "stage3_param_persistence_threshold"),
        )
        passes = {}
        for checkpointing in (False, True):
            sampled = []
            for few in SAMPLE_LAYERS if layers > max(SAMPLE_LAYERS) else (layers,):
                model = build_fake_model(
                    config,
                    shape,
                    lengths.widths,
                    dtype,
                    answers=lengths.answers,
                    shared=lengths.shared,
                    layers=few,
                    checkpointing=checkpointing,
                )
                sampled.append([record_pass(model, rows) for rows in lengths.largest])
            first, last = sampled[0], sampled[-1]
            grown = (
                [extrapolate_layers(*pair, layers) for pair in zip(first, last, strict=True)]
                if len(sampled) > 1
                else first
            )
            passes[checkpointing] = Pass(
                max(work.peak for work in grown), max(work.peak_with_gradients for work in grown), grown[0].flops
            )
    return Model(weights, passes, layers)


def make_setting(
    config: RunConfig, ranks: int, micro_steps: float, *, stage: int, offload: bool = False, touched: bool = False
) -> Setting:
    """The setting of a combination of stage and offload under this config."""
    zero = deepspeed_config(config)["zero_optimization"]
    return Setting(stage, offload, ranks, dtype_of(config), micro_steps, zero, touched)


def _check(config: RunConfig, nodes: int, gpus_per_node: int, gpu_memory: float) -> None:
    faults = [
        f"--{name}={value:g} must be more than 0"
        for name, value in (("nodes", nodes), ("gpus-per-node", gpus_per_node), ("gpu-memory", gpu_memory))
        if value <= 0
    ]
    faults += offload_faults(config)
    if faults:
        raise ValueError("\n".join(faults))


def _hours(
    throughput: Throughput, config: RunConfig, lengths: Lengths, flops: float, steps: int | None
) -> float | None:
    if steps is None:
        return None
    if throughput.samples:
        return steps * config.train.global_batch / throughput.samples / 3600
    if throughput.positions:
        return steps * lengths.step_positions / throughput.positions / 3600
    if throughput.tflops:
        return steps * flops / (throughput.tflops * 1e12) / 3600
    return None
