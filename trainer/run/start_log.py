"""What a run logs before its first step: positions and idle ranks, class weights, size, devices, MLflow."""

from __future__ import annotations

import logging

from trainer.data.sampling import micro_batches
from trainer.run.run import Run

log = logging.getLogger(__name__)

STEPS_COUNTED = 50  # for the positions of a sample
UNEVEN = 100.0  # between the weights of two classes: worth a warning


def log_start(run: Run, start: int) -> None:
    """Log what the steps from `start` on will be, and warn of what is likely not meant."""
    _log_layout(run)
    _log_weights(run)
    tracker = run.tracker
    trainable = sum(
        p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in run.parts.model.parameters() if p.requires_grad
    )
    log.info(
        "%d trainable parameters, %d process%s, ZeRO-%d, %s; steps %d to %d of %d samples; MLflow %s",
        trainable,
        run.world.size,
        "" if run.world.size == 1 else "es",
        run.identity.zero,
        run.config.train.precision,
        start + 1,
        run.steps,
        run.config.train.global_batch,
        tracker.uri if tracker.enabled else "off",
    )


def _log_layout(run: Run) -> None:
    """Log the positions a sample costs in the first steps, and warn of idle ranks."""
    steps = range(min(run.order.steps_per_epoch, run.steps, STEPS_COUNTED))
    samples = positions = idle = 0
    for step in steps:
        batch = run.order.step(step)
        micros = micro_batches(batch.indices, run.step_context.sizes[batch.task], run.step_context.limits, 0, 1)
        samples += len(batch.indices)
        positions += sum(run.step_context.positions(batch.task, micro) for micro in micros)
        idle = max(idle, run.world.size - len(micros))
    log.info("%s: %.1f positions a sample through the backbone", run.config.data.layout, positions / samples)
    if idle > 0:
        log.warning(
            "%d of %d ranks are idle in some steps: a global batch has too few micro-batches. Set "
            "train.micro_batch=%d, or raise train.global_batch",
            idle, run.world.size, -(-run.config.train.global_batch // run.world.size),
        )  # fmt: skip


def _log_weights(run: Run) -> None:
    """Log the weights of classes, and warn where few samples get most of the loss."""
    for name, collate in run.parts.collators.items():
        weight_C = collate.objective.weight_C
        if weight_C is None:
            continue
        weights = {a: w for a, w in zip(run.parts.tries[name].answers, weight_C.tolist(), strict=True) if w}
        log.info("class weights of %s: %s", name, ", ".join(f"{answer} {w:.3g}" for answer, w in weights.items()))
        if max(weights.values()) > UNEVEN * min(weights.values()):
            log.warning(
                "a sample of the rarest class of %s weighs %.0f times as much as one of the most frequent: "
                "train.class_weights=effective with a smaller train.class_weight_beta is more even",
                name, max(weights.values()) / min(weights.values()),
            )  # fmt: skip
