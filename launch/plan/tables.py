"""A plan as tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from launch.plan.plan import LEFT_OUT, RESERVED, MemoryPlan, Option
from launch.plan.rows import Rows
from launch.units import GIB, format_bytes


def render(plan: MemoryPlan) -> Iterator[Any]:
    """What is printed, top to bottom: tables and lines."""
    yield from _head(plan)
    yield _memory(plan)
    yield f"a GPU has {plan.gpu_memory:g} GiB, of which {RESERVED / GIB:g} GiB are kept free"
    yield from _advice(plan)
    yield _wire(plan)
    saved = plan.checkpoint
    yield f"a checkpoint: {format_bytes(sum(saved.values()))} ({format_bytes(saved['trained weights'])} of it the trained weights alone)"
    yield _time(plan)
    for note in plan.lengths.assumptions:
        yield f"assumed: {note}"
    for part in LEFT_OUT:
        yield f"left out: {part}"


def _head(plan: MemoryPlan) -> Iterator[Any]:
    weights, lengths, config = plan.model.weights, plan.lengths, plan.config
    parts = ", ".join(f"{name} {_count(n)}" for name, n in weights.trainable_parts.items())
    bits = f", {_count(weights.four_bit)} of them in 4 bits" if weights.four_bit else ""
    yield (
        f"{config.model.backbone.name}, {plan.model.layers} layers: {_count(weights.trainable)} trainable parameters ({parts}), "
        f"{_count(weights.frozen)} frozen{bits}"
    )
    yield (
        f"{plan.nodes} x {plan.gpus_per_node} = {plan.ranks} GPUs; a step of {config.train.global_batch} samples is "
        f"{lengths.micro_batches:.3g} micro-batch{'es' if lengths.micro_batches > 1 else ''} of up to "
        f"{config.train.micro_tokens} positions, {lengths.micro_steps:.3g} of them on a rank"
    )
    yield (
        f"positions, {config.data.layout}: {lengths.positions_per_sample:.3g} a sample, {lengths.step_positions:,.0f} a step; "
        f"the largest micro-batch{'es' if len(lengths.largest) > 1 else ''}: {'; '.join(map(_shape, lengths.largest))}"
    )
    yield from _idle(plan)


def _shape(rows: Rows) -> str:
    sizes = rows.to_json()
    return (
        f"{sizes['samples']} samples in {sizes['positions']} positions, up to {sizes['audio_frames']} audio and "
        f"{sizes['video_frames']} video frames"
    )


def _idle(plan: MemoryPlan) -> Iterator[str]:
    """GPUs for which a step has no micro-batch, and the limits under which it has one for each."""
    train, lengths = plan.config.train, plan.lengths
    idle = math.floor(plan.ranks - lengths.micro_batches)
    if idle < 1:
        return
    advice = "raise train.global_batch"
    each = math.ceil(train.global_batch / plan.ranks)
    if train.micro_batch is not None and train.micro_batch > each:
        advice += f", or cut it finer with train.micro_batch={each}, or null"
    yield f"warning: {idle} of {plan.ranks} GPUs have nothing to do: {advice}"


def _memory(plan: MemoryPlan) -> Table:
    table = Table(title=f"memory of one GPU, {plan.config.train.precision}", title_justify="left")
    for name in ("ZeRO", "optimizer on", "checkpointing"):
        table.add_column(name)
    for name in ("weights", "states", "gradients, buckets", "activations", "gathered", "in all", "host"):
        table.add_column(name, justify="right")
    table.add_column("")
    for option in plan.options:
        marks = ["fits" if plan.fits(option) else "too large"]
        marks += ["as configured"] if option == plan.configured else []
        marks += ["recommended"] if option == plan.recommended else []
        table.add_row(*_row(option), ", ".join(marks))
    return table


def _row(option: Option) -> list[str]:
    parts = option.memory.device

    def of(*words: str) -> str:
        return format_bytes(sum(n for name, n in parts.items() if name in words))

    weights = (
        "frozen weights",
        "4-bit weights",
        "scales of 4-bit weights",
        "trainable weights",
        "small weights kept whole",
    )
    return [
        str(option.stage),
        "host" if option.offload else "GPU",
        "yes" if option.checkpointing else "no",
        of(*weights, "buffers"),
        of("fp32 master weights", "Adam's moments", "optimizer's step"),
        of("gradients", "buckets"),
        of("activations"),
        of("gathered weights"),
        format_bytes(option.memory.total),
        format_bytes(option.memory.host_total) if option.offload else "",
    ]


def _advice(plan: MemoryPlan) -> Iterator[str]:
    chosen = plan.recommended
    if chosen is None:
        smallest = min(plan.options, key=lambda option: option.memory.total)
        yield (
            f"nothing fits: the smallest needs {format_bytes(smallest.memory.total)} ({' '.join(smallest.overrides())}). Use more GPUs, "
            f"train.micro_tokens={max(1, plan.config.train.micro_tokens // 2)} (now {plan.config.train.micro_tokens}), "
            "model.backbone.quantization=nf4, or a smaller backbone"
        )
        return
    if chosen == plan.configured:
        yield "recommended: as configured"
    else:
        yield f"recommended: {' '.join(chosen.overrides())}"
    work = plan.model.passes[chosen.checkpointing].peak
    room = plan.gpu_memory * GIB - RESERVED - chosen.memory.total
    largest = max(rows.positions for rows in plan.lengths.largest)
    more = int(room // (work / largest))
    if more > 0 and plan.lengths.micro_batches > plan.ranks:
        yield f"there is room for micro-batches of about {largest + more:,} positions (train.micro_tokens)"


def _wire(plan: MemoryPlan) -> Table:
    table = Table(title="bytes that one rank sends in a step", title_justify="left")
    for name in ("ZeRO", "gradients", "weights", "in all"):
        table.add_column(name, justify="left" if name == "ZeRO" else "right")
    for stage, parts in plan.wire.items():
        gradients = parts.get("gradients", 0)
        total = sum(parts.values())
        table.add_row(str(stage), format_bytes(gradients), format_bytes(total - gradients), format_bytes(total))
    return table


def _time(plan: MemoryPlan) -> str:
    flops = f"{plan.flops_per_step / 1e12:.3g} TFLOP for the fullest rank in a step"
    if plan.steps is None:
        return f"{flops}; steps: not known without data (state --samples, or train.steps)"
    steps = f"{plan.steps:,} steps; {flops}"
    if plan.hours is None:
        return f"{steps}; hours: state --samples-per-second, --positions-per-second or --tflops"
    return f"{steps}; {plan.hours:.3g} hours"


def _count(number: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return str(number)
