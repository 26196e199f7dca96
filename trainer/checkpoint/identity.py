"""What makes a run this run: a checkpoint and the run that continues it must agree on it."""

from __future__ import annotations

from typing import Any

from trainer.config import RunConfig, flatten
from trainer.distributed.deepspeed_config import zero_stage

# settings that may change when a run is continued: they say where and how often, or how much memory, not what
FREE = frozenset(
    {
        "data.path",
        "data.layout",
        "data.workers",
        "model.backbone.attention",
        "model.fusion.compile",
        "model.backbone.read",
        "model.backbone.gradient_checkpointing",
        "model.backbone.reentrant",
        "model.fusion.gate.kernel",
        "train.micro_batch",
        "train.micro_tokens",
        "train.log_every",
        "train.eval_every",
        "train.save_every",
        "train.keep",
        "train.resume",
        "train.stop_signals",
        "train.probe",
        "train.rendezvous_seconds",
        "train.max_skipped",
        "train.spike",
        "train.stuck_seconds",
    }
)


def settings(config: RunConfig) -> dict[str, Any]:
    """The settings that say what is trained, flat."""
    return {
        key: value
        for key, value in flatten(config).items()
        if key.startswith(("task", "data.", "model.", "train.", "deepspeed")) and key not in FREE
    }


def identity(config: RunConfig, *, data: dict[str, str], base: str, world_size: int) -> dict[str, Any]:
    """Tasks, data, frozen base, world, ZeRO stage and settings of a run.

    Args:
        data: task -> fingerprint of its prepared dataset.
        base: fingerprint of the frozen backbone.
    """
    return {
        "tasks": list(data),
        "data": data,
        "base": base,
        "world": world_size,
        "zero": zero_stage(config),
        "settings": settings(config),
    }
