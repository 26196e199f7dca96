"""Hooks called at fixed points of a training. The run's own tracking, progress and watch are such hooks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from trainer.answers.scores import SplitScores
from trainer.data.sampling import all_micro_batches
from trainer.distributed.deepspeed_config import slow_precision
from trainer.distributed.watch import Watch
from trainer.run.evaluate import flatten_metrics
from trainer.run.run import Run
from trainer.run.scalars import StepScalars
from trainer.run.step import StepResult
from trainer.tracking.journal import SPEED
from trainer.tracking.outbox import source_of_uri
from trainer.tracking.progress import Progress
from trainer.tracking.tracker import Tracker

log = logging.getLogger(__name__)

STEPS_COUNTED = 50  # for the positions of a sample
UNEVEN = 100.0  # between the weights of two classes: worth a warning


@dataclass(frozen=True)
class FinishedStep:
    """One optimizer step, when it is done; the same on every rank but for `seconds`."""

    step: int  # optimizer steps taken, this one included
    result: StepResult
    spike: bool  # the loss is far above the recent ones
    learning_rates: list[float]  # of the parameter groups, fusion's first and the backbone's last
    seconds: float


class Callback:
    """Override what you need; the rest does nothing.

    Every rank calls every method, in the order of the callbacks, so that collectives are allowed unless a method says otherwise.
    What a method raises ends the run.
    """

    def on_train_start(self, run: Run, step: int) -> None:
        """The engine is built and a checkpoint, if any, is loaded; `step` steps are done."""

    def on_step_scalars(self, run: Run, scalars: StepScalars) -> None:
        """Before a step's numbers are reduced over ranks: add further ones, the same names on every rank."""

    def on_step_end(self, run: Run, finished: FinishedStep) -> None:
        """A step was taken, or skipped."""

    def on_evaluation_progress(self, run: Run, split: str) -> None:
        """An evaluation begins, or one more batch of it is answered; not equally often on all ranks: no collectives here."""

    def on_validation_end(self, run: Run, step: int, metrics: SplitScores) -> None:
        """The validation split was scored; it is known whether this step is the best so far (`run.selection.best`)."""

    def on_save_start(self, run: Run, step: int) -> None:
        """A checkpoint is about to be written."""

    def on_save_end(self, run: Run, step: int, checkpoint: Path) -> None:
        """A checkpoint is whole."""

    def on_best_evaluated(self, run: Run, split: str, metrics: SplitScores, predictions: Path) -> None:
        """The best checkpoint was evaluated on a split at the run's end; rank 0 has written the predictions."""

    def on_train_end(self, run: Run) -> None:
        """No step follows: all are done, the run was stopped, or it failed."""


class StartLogCallback(Callback):
    """Logs what the run will do, before its first step: positions, idle ranks, class weights, sizes, devices, MLflow."""

    def on_train_start(self, run: Run, step: int) -> None:
        _log_layout(run)
        _log_weights(run)
        _log_sizes(run, step)
        _warn_of_precision(run)


class WatchCallback(Callback):
    """Tells the watch of the run's progress; a run without any is ended."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_end(self, run: Run, finished: FinishedStep) -> None:
        self.watch.started()

    def on_evaluation_progress(self, run: Run, split: str) -> None:
        self.watch.heartbeat(f"evaluating {split}")

    def on_save_start(self, run: Run, step: int) -> None:
        self.watch.heartbeat(f"saving the checkpoint of step {step}", slack=3.0)


class ProgressCallback(Callback):
    """A progress bar on a terminal, or lines in the log, on rank 0."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_start(self, run: Run, step: int) -> None:
        self.progress.start()

    def on_step_end(self, run: Run, finished: FinishedStep) -> None:
        result = finished.result
        rate = finished.learning_rates[0]
        self.progress.step(finished.step, result.loss, rate, result.samples, finished.seconds)
        if is_logged(run, finished):
            self.progress.line(finished.step)

    def on_train_end(self, run: Run) -> None:
        self.progress.stop()


class TrackingCallback(Callback):
    """Gives the numbers of steps, validations and the final evaluation to the tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_step_end(self, run: Run, finished: FinishedStep) -> None:
        if not is_logged(run, finished):
            return
        result = finished.result
        values: dict[str, float | None] = {
            "train/loss": result.loss,
            "train/auxiliary_loss": result.auxiliary_loss,
            "train/lr_fusion": finished.learning_rates[0],
            "train/lr_backbone": finished.learning_rates[-1],
            SPEED: result.samples / finished.seconds,
            "train/positions_per_sample": result.positions / result.samples,
        }
        marks = {"train/skipped": result.skipped, "train/overflow": result.overflowed, "train/spike": finished.spike}
        values.update({name: 1.0 for name, present in marks.items() if present})
        if result.loss_scale is not None:
            values["train/loss_scale"] = result.loss_scale
        norm = run.step_context.loss_scale.gradient_norm(result.loss_scale)
        if norm is not None and not (result.skipped or result.overflowed):
            values["train/gradient_norm"] = norm
        if run.parts.model.fusion is not None:
            names = run.parts.model.fusion.experts_built
            values.update({f"gate/{name}": usage for name, usage in zip(names, result.usage, strict=True)})
        self.tracker.metrics(values, finished.step)

    def on_validation_end(self, run: Run, step: int, metrics: SplitScores) -> None:
        self.tracker.metrics(flatten_metrics("valid", metrics), step)

    def on_best_evaluated(self, run: Run, split: str, metrics: SplitScores, predictions: Path) -> None:
        self.tracker.metrics(flatten_metrics(f"best/{split}", metrics), run.steps)
        self.tracker.artifact(predictions, "predictions")


def is_logged(run: Run, finished: FinishedStep) -> bool:
    """Whether a step's numbers are recorded: every `train.log_every`, the first and last, skipped steps, overflows and spikes."""
    step, result = finished.step, finished.result
    return (
        step % run.config.train.log_every == 0
        or step in (1, run.steps)
        or result.skipped
        or result.overflowed
        or finished.spike
    )


def _log_sizes(run: Run, start: int) -> None:
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
        f"{tracker.uri} ({source_of_uri(run.config.track)})" if tracker.enabled else "off",
    )


def _warn_of_precision(run: Run) -> None:
    if (slow := slow_precision(run.config, run.world.device)) is not None:
        log.warning("%s", slow)


def _log_layout(run: Run) -> None:
    """Log the positions a sample costs in the first steps, and warn of idle ranks."""
    steps = range(min(run.order.steps_per_epoch, run.steps, STEPS_COUNTED))
    samples = positions = idle = 0
    for step in steps:
        batch = run.order.step(step)
        context = run.step_context
        micros = all_micro_batches(batch.indices, context.sizes[batch.task], context.limits, run.world.size)
        samples += len(batch.indices)
        positions += sum(run.step_context.positions(batch.task, micro) for micro in micros)
        idle = max(idle, run.world.size - len(micros))
    log.info("%s: %.1f positions a sample through the backbone", run.config.data.layout, positions / samples)
    if idle > 0:
        log.warning(
            "%d of %d ranks are idle in some steps: a global batch has too few %s",
            idle, run.world.size,
            "samples. Raise train.global_batch" if run.step_context.limits.even
            else f"micro-batches. Set train.micro_batch={-(-run.config.train.global_batch // run.world.size)}, leave it out "
            "(null), or raise train.global_batch",
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
