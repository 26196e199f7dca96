"""Hooks of a training, called at its named moments. The run's own tracking, progress and watch are such hooks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.distributed.watch import Watch
from trainer.run.evaluate import flatten_metrics
from trainer.run.run import Run
from trainer.run.scalars import StepScalars
from trainer.run.step import StepResult
from trainer.tracking.journal import SPEED
from trainer.tracking.progress import Progress
from trainer.tracking.tracker import Tracker

Metrics = dict[str, dict[str, Any]]  # task -> metric -> value


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

    def on_validation_end(self, run: Run, step: int, metrics: Metrics) -> None:
        """The validation split was scored; it is known whether this step is the best so far (`run.selection.best`)."""

    def on_save_start(self, run: Run, step: int) -> None:
        """A checkpoint is about to be written."""

    def on_save_end(self, run: Run, step: int, checkpoint: Path) -> None:
        """A checkpoint is whole."""

    def on_best_evaluated(self, run: Run, split: str, metrics: Metrics, predictions: Path) -> None:
        """The best checkpoint was evaluated on a split at the run's end; rank 0 has written the predictions."""

    def on_train_end(self, run: Run) -> None:
        """No step follows: all are done, the run was stopped, or it failed."""


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
        marks = {"train/skipped": result.skipped, "train/spike": finished.spike}
        values.update({name: 1.0 for name, present in marks.items() if present})
        norm = run.engine.get_global_grad_norm()
        if norm is not None and not result.skipped:
            values["train/gradient_norm"] = float(norm)
        if run.parts.model.fusion is not None:
            names = run.parts.model.fusion.experts_built
            values.update({f"gate/{name}": usage for name, usage in zip(names, result.usage, strict=True)})
        self.tracker.metrics(values, finished.step)

    def on_validation_end(self, run: Run, step: int, metrics: Metrics) -> None:
        self.tracker.metrics(flatten_metrics("valid", metrics), step)

    def on_best_evaluated(self, run: Run, split: str, metrics: Metrics, predictions: Path) -> None:
        self.tracker.metrics(flatten_metrics(f"best/{split}", metrics), run.steps)
        self.tracker.artifact(predictions, "predictions")


def is_logged(run: Run, finished: FinishedStep) -> bool:
    """Whether a step's numbers are recorded: every `train.log_every`, the first and last, skipped steps and spikes."""
    step, result = finished.step, finished.result
    return step % run.config.train.log_every == 0 or step in (1, run.steps) or result.skipped or finished.spike
