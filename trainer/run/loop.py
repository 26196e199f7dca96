"""The run, top to bottom: assemble, resume, train, validate, keep the best, evaluate it, record everything."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.checkpoint.identity import RunIdentity, identify, training_settings
from trainer.checkpoint.selection import Selection
from trainer.checkpoint.state import CheckpointState, Position, SelectionState, check_fit, read_state, this_version
from trainer.checkpoint.store import Checkpoints, resume_engine, step_name
from trainer.checkpoint.weights import load_weights, trainable_state
from trainer.config import RunConfig, dump_config, saved_config
from trainer.data.imbalance import training_order
from trainer.data.sampling import GlobalBatch, MicroBatch, micro_batches
from trainer.distributed.consistency import check_consistency
from trainer.distributed.deepspeed_config import check_machine, dtype_of
from trainer.distributed.process_group import tell_launcher
from trainer.distributed.signals import STOPPED, StopRequest, StopRequested
from trainer.distributed.versions import environment
from trainer.distributed.watch import Watch
from trainer.distributed.world import World
from trainer.files import write_json, write_text
from trainer.run.assemble import RunComponents, assemble
from trainer.run.calibrate import write_calibration
from trainer.run.engine import Schedule, build_engine
from trainer.run.evaluate import (
    evaluate,
    flatten_metrics,
    format_selection_metrics,
    selection_values,
    write_predictions,
)
from trainer.run.expert_load import warn_of_dead
from trainer.run.folder import archive_previous_run, open_folder
from trainer.run.guard import Guard, LossMonitor, NonFiniteDump, NonFiniteError
from trainer.run.prefetch import workers
from trainer.run.probe import memory_explained, probe
from trainer.run.record import RunRecord, now, record_failure
from trainer.run.step import StepContext, StepResult, train_step
from trainer.tracking.journal import JOURNAL, MEDIAN_SPEED, SPEED, read_journal
from trainer.tracking.progress import Progress
from trainer.tracking.tracker import Tracker

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

STEPS_LOOKED_AT = 50  # for the positions told at the start
UNEVEN = 100.0  # between the weights of two classes: worth a warning
Report = Callable[[Path], list[Path]]  # makes pictures of a run folder and says where they are


def fit(
    config: RunConfig,
    out: Path,
    world: World,
    *,
    stop: StopRequest,
    force: bool = False,
    report: Report | None = None,
) -> int:
    """Train, and evaluate the best checkpoint; called by every rank. Returns the exit code (0 done, 85 stopped).

    Args:
        stop: already listening, so that a signal during start-up counts.
        force: continue a checkpoint although settings or data differ.
        report: called on rank 0 when the run ends, however it ends; its pictures go to MLflow.

    Raises:
        ValueError: the run cannot be what was asked for, its folder cannot be written, or its loss is no number.
    """
    check_machine(config, world.device)
    check_consistency(config, out, world)
    with open_folder(out, world), _watch(config, out, world) as watch:
        checkpoints = Checkpoints(out / "checkpoints", world, config.train.keep)
        _archive_stale_run(config, out, world, checkpoints)
        record = RunRecord(out, enabled=world.is_rank_zero)
        fresh, begun, state = not record.values, False, "failed"
        tracker: Tracker | None = None
        try:
            last = checkpoints.newest(repair=True)
            parts = assemble(config, out, world, dtype_of(config), partition=True)
            base = parts.model.backbone.fingerprint
            identity = identify(config, data=parts.fingerprints, base=base, world_size=world.size)
            saved = None if last is None else read_state(last)
            if saved is not None and last is not None:
                check_fit(saved, identity, last, force=force)
            with world.on_rank_zero() as first:
                if first:
                    write_text(out / "config.yaml", dump_config(config))
            begun = True
            record.update(state="running", started=now(), ended=None, failure=None, **environment(), **_process())
            known = (record.values.get("mlflow") or {}).get("run_id") or (
                saved.mlflow_run if saved is not None else None
            )
            tracker = Tracker(config, out, enabled=world.is_rank_zero, run_id=known)
            run = Run(config, out, world, parts, identity, tracker, stop, checkpoints, watch)
            record.update(
                precision=config.train.precision,
                seed=config.train.seed,
                steps=run.steps,
                mlflow={"uri": tracker.uri, "run_id": tracker.run_id} if tracker.enabled else None,
                **identity.model_dump(exclude={"settings"}),
            )
            tracker.start(config, _tags(record.values))
            tracker.artifact(out / "config.yaml")
            watch.closing = functools.partial(_stuck, out, record, tracker) if world.is_rank_zero else None
            state = run.train(last, saved)
        except BaseException as error:
            watch.block_while_aborting()
            tell_launcher(error)
            if begun or fresh:
                with contextlib.suppress(OSError):  # the disk may be what failed
                    record.update(failure=f"{type(error).__name__}: {error}", state="failed", ended=now())
            raise
        finally:
            if begun:
                _end(out, record, tracker, state, report if world.is_rank_zero else None)
    return 0 if state == "done" else STOPPED


def _watch(config: RunConfig, out: Path, world: World) -> Watch:
    return Watch(out, world, config.train.stuck_seconds, record_failure=functools.partial(record_failure, out))


def _archive_stale_run(config: RunConfig, out: Path, world: World, checkpoints: Checkpoints) -> None:
    """Put aside what another run left in the folder: asked for, or of other settings and with nothing to continue."""
    with world.on_rank_zero() as first:
        if first:
            anew = config.train.resume == "never" or (not checkpoints.names() and _other_settings(config, out))
            aside = archive_previous_run(out) if anew else None
            if aside is not None:
                log.warning("an earlier run's files in %s were put into %s", out, aside.name)
    checkpoints.open()


def _other_settings(config: RunConfig, out: Path) -> bool:
    """Whether the folder holds the beginnings of a run with other settings."""
    if not (out / "config.yaml").is_file():
        return False
    try:
        return training_settings(saved_config(out)) != training_settings(config)
    except ValueError:  # it uses a setting that this version does not have
        return True


def _end(out: Path, record: RunRecord, tracker: Tracker | None, state: str, report: Report | None) -> None:
    """Close the record however the run ended; no trouble here may hide what ended it.

    A failed run tells MLflow first and draws its report last: its other ranks, and the launcher, do not wait long.
    """
    with _only_warned("the run's end could not be recorded"):
        record.update(state=state, ended=now())
    if state == "failed":
        _close(out, record, tracker, state, [])
    pictures: list[Path] = []
    with _only_warned("the run's report could not be written"):
        pictures = report(out) if report is not None else []
    if state != "failed":
        _close(out, record, tracker, state, pictures)


def _stuck(out: Path, record: RunRecord, tracker: Tracker, why: str) -> None:
    """Close the record of a run whose main thread hangs; called by the watch."""
    record.update(failure=f"StuckError: {why}", state="failed", ended=now())
    _close(out, record, tracker, "failed", [])


def _close(out: Path, record: RunRecord, tracker: Tracker | None, state: str, pictures: list[Path]) -> None:
    if tracker is None:
        return
    with _only_warned("the run's end could not be told to MLflow"):
        tracked = tracker.enabled
        for path in [out / "run.json", *pictures]:
            tracker.artifact(path, "report" if path in pictures else None)
        tracker.finish(state)
        if tracked:
            record.update(mlflow={"uri": tracker.uri, "run_id": tracker.run_id})


@contextlib.contextmanager
def _only_warned(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001
        log.warning("%s: %s: %s", what, type(error).__name__, error)


class Run:
    """One training: the engine, the order of samples, and where it stands."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        world: World,
        parts: RunComponents,
        identity: RunIdentity,
        tracker: Tracker,
        stop: StopRequest,
        checkpoints: Checkpoints,
        watch: Watch,
    ) -> None:
        self.watch = watch
        self.config, self.out, self.world, self.parts = config, out, world, parts
        self.identity, self.tracker, self.checkpoints = identity, tracker, checkpoints
        train = config.train
        self.order = training_order(config, {name: data["train"] for name, data in parts.data.items()})
        self.steps = train.steps or math.ceil(train.epochs * self.order.steps_per_epoch)
        self.dtype = dtype_of(config)
        self.engine: DeepSpeedEngine = build_engine(parts.model, config)
        self.schedule = Schedule(self.engine, train, self.steps)
        self.guard = Guard(self.engine, world.device, gradients=self.dtype is not torch.float16)
        self.stop = stop
        self.training = StepContext(self.engine, parts, config, world, self.guard, stop, watch.heartbeat)
        self.training.feed.work_ahead(workers(config, world.device), self._planned, self.steps)
        self.health = LossMonitor(train.spike)
        self.progress = Progress(self.steps, enabled=world.is_rank_zero)
        self.selection = Selection({name: task.maximise for name, task in parts.tasks.items()})
        self.at = 0  # optimizer steps taken

    def _planned(self, step: int) -> tuple[GlobalBatch, list[MicroBatch]]:
        batch = self.order.step(step)
        return batch, self.training.micro_batches(batch)

    def train(self, last: Path | None, saved: CheckpointState | None) -> str:
        """Train to the last step and evaluate, or until asked to stop; returns the run's state."""
        state = "done"
        try:
            self._train(last, saved)
        except StopRequested:
            log.warning("stopped at step %d of %d; the same command continues it", self.at, self.steps)
            state = "stopped"
        finally:
            self.training.feed.close()
        self.engine.destroy()  # its hooks would keep the model in memory, and this process may train another
        return state

    def _train(self, last: Path | None, saved: CheckpointState | None) -> None:
        train = self.config.train
        eval_every = train.eval_every or self.order.steps_per_epoch
        save_every = train.save_every or eval_every
        self.at = start = self._resume(last, saved)
        self.stop.raise_if_stop_requested(self.world)
        if train.probe and start < self.steps:
            probe(self.engine, self.parts, self.config, self.world, self.guard, self.dtype)
            self.stop.raise_if_stop_requested(self.world)
        if saved is not None and saved.validation_due:
            self._validate_late(start)
        _log_start(self, start)
        with self.progress:
            for step in range(start, self.steps):
                began = time.perf_counter()
                self.schedule.set(step)
                rates = self.engine.get_lr()
                result, spike = self._step(step)
                self.at = step + 1
                self._tell(step + 1, result, spike, rates, time.perf_counter() - began)
                self.watch.started()
                if step + 1 == self.steps or (step + 1) % eval_every == 0:
                    self._validate_and_save(step + 1)
                elif result.stop or (step + 1) % save_every == 0:
                    self._save(step + 1)
                else:
                    continue
                self.stop.raise_if_stop_requested(self.world)  # asked for during the step, or since
            self._finish()

    def _resume(self, last: Path | None, saved: CheckpointState | None) -> int:
        if last is None or saved is None:
            return 0
        resume_engine(self.engine, last, self.world)
        self.selection.restore(saved.selection.model_dump())
        self.health.restore(saved.health)
        with self.world.on_rank_zero() as first:
            if first:  # a kill between a checkpoint and its mark
                self.checkpoints.mark(self.selection.best)
        log.info("continuing from %s", last)
        return saved.step

    def _step(self, step: int) -> tuple[StepResult, bool]:
        batch = self.order.step(step)
        evidence = NonFiniteDump()
        what = f"a micro-batch of step {step + 1}"
        with memory_explained(what, "train.micro_tokens", self.config.train.micro_tokens):
            result = train_step(self.training, batch, step, evidence)
        spike = self.health.step(result.loss, result.skipped)
        if spike:
            log.warning("step %d: the loss jumped to %.4f", step + 1, result.loss)
        if result.skipped:
            ids = [i for part in self.world.gather_all(evidence.bad_ids()) for i in part] or ["unknown: a gradient"]
            log.warning(
                "step %d skipped: a loss or gradient is no number (%d in all); samples %s",
                step + 1, self.health.skipped, ", ".join(ids[:8]),
            )  # fmt: skip
            if self.health.in_a_row >= self.config.train.max_skipped:
                self._give_up(step, batch, evidence, ids)
        return result, spike

    def _give_up(self, step: int, batch: GlobalBatch, evidence: NonFiniteDump, ids: list[str]) -> None:
        folder = self.out / "nonfinite" / step_name(step + 1)
        about = {
            "step": step + 1,
            "task": batch.task,
            "samples": ids,
            "seed": self.config.train.seed,
        }
        evidence.write(folder, self.world, about, trainable_state(self.engine.module, self.world))
        raise NonFiniteError(
            f"the loss or a gradient was no number in {self.health.in_a_row} steps in a row, the last of them step "
            f"{step + 1}; samples: {', '.join(ids[:8])}\nthe batch and the weights are in {folder}: look at them with "
            f"'egmf replay {folder}'; then lower train.lr, or look at these samples' features"
        )

    def _validate_and_save(self, step: int) -> None:
        """A stop during the validation breaks it off: the checkpoint says that it is due."""
        try:
            self._validate(step)
        except StopRequested:
            self._save(step, validation_due=True)
            raise
        self._save(step)

    def _validate_late(self, step: int) -> None:
        """The validation of the checkpoint that was just loaded, which a stop had broken off."""
        self._validate(step)
        with self.world.on_rank_zero() as first:
            if first:
                self.checkpoints.mark(self.selection.best)

    def _save(self, step: int, *, validation_due: bool = False) -> None:
        self.watch.heartbeat(f"saving the checkpoint of step {step}", slack=3.0)
        state = CheckpointState(
            **self.identity.model_dump(),
            step=step,
            best=self.selection.best,
            selection=SelectionState(**self.selection.state()),
            health=self.health.state(),
            position=Position(step=step, epoch=step / self.order.steps_per_epoch),
            mlflow_run=self.tracker.run_id,
            validation_due=validation_due,
            version=this_version(),
        )
        path = self.checkpoints.save(self.engine, state)
        log.info("saved %s%s", path, ", the best so far" if self.selection.best == path.name else "")

    def _validate(self, step: int) -> None:
        """Score the validation split, and say whether this step is the best so far."""
        _, metrics = self._evaluate("valid")
        nll = {name: values.get("nll") for name, values in metrics.items()}
        self.selection.add(step_name(step), selection_values(self.parts, metrics), nll)
        self.tracker.metrics(flatten_metrics("valid", metrics), step)
        log.info("step %d: %s", step, format_selection_metrics("valid", self.parts, metrics))

    def _finish(self) -> None:
        """Evaluate the best checkpoint on the configured splits and write what it says."""
        chosen = self.checkpoints.best()
        if chosen is None:
            chosen = self.checkpoints.newest()
            log.warning("validation chose no checkpoint (its metric was undefined): the last one is evaluated")
        assert chosen is not None
        if self.world.is_rank_zero:
            speeds = [speed for _, speed in read_journal(self.out / JOURNAL).get(SPEED, [])]
            self.tracker.metrics({MEDIAN_SPEED: statistics.median(speeds) if speeds else None}, self.steps)
        load_weights(self.parts.model, chosen, self.world)
        results: dict[str, Any] = {"checkpoint": chosen.name}
        tables: dict[str, Any] = {}
        for split in self.config.eval.splits:
            table, results[split] = self._evaluate(split)
            tables[split] = table
            self.tracker.metrics(flatten_metrics(f"best/{split}", results[split]), self.steps)
            log.info("%s: %s", chosen.name, format_selection_metrics(split, self.parts, results[split]))
            with self.world.on_rank_zero() as first:
                if first:
                    path = self.out / "predictions" / f"{split}.parquet"
                    write_predictions(table, path)
                    self.tracker.artifact(path, "predictions")
        with self.world.on_rank_zero() as first:
            if first:
                write_json(self.out / "metrics.json", results)
                self.tracker.artifact(self.out / "metrics.json")
                write_calibration(self.parts, tables, self.out, chosen.name, self.tracker, self.steps)
                if self.parts.model.fusion is not None and "test" in tables:
                    experts = self.parts.model.fusion.experts_built
                    warn_of_dead(list(self.parts.tasks), experts, "test", tables["test"])

    def _evaluate(self, split: str) -> Any:
        self.engine.eval()
        try:
            self.watch.heartbeat(f"evaluating {split}")
            return evaluate(
                self.engine, self.parts, self.config, split, self.world, self.dtype,
                advance=lambda n: self.watch.heartbeat(f"evaluating {split}"),
                before_batch=functools.partial(self.stop.raise_if_stop_requested, self.world),
            )  # fmt: skip
        finally:
            self.engine.train()

    def _tell(self, step: int, result: StepResult, spike: bool, rates: list[float], seconds: float) -> None:
        values = {
            "train/loss": result.loss,
            "train/auxiliary_loss": result.auxiliary_loss,
            "train/lr_fusion": rates[0],
            "train/lr_backbone": rates[-1],
            SPEED: result.samples / seconds,
            "train/positions_per_sample": result.positions / result.samples,
        }
        marks = {"train/skipped": result.skipped, "train/spike": spike}
        values.update({name: 1.0 for name, there in marks.items() if there})
        self.progress.step(step, result.loss, rates[0], result.samples, seconds)
        if step % self.config.train.log_every == 0 or step in (1, self.steps) or any(marks.values()):
            norm = self.engine.get_global_grad_norm()
            if norm is not None and not result.skipped:
                values["train/gradient_norm"] = float(norm)
            if self.parts.model.fusion is not None:
                names = self.parts.model.fusion.experts_built
                values.update({f"gate/{name}": u for name, u in zip(names, result.usage, strict=True)})
            self.tracker.metrics(values, step)
            self.progress.line(step)


def _process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _tags(values: dict[str, Any]) -> dict[str, Any]:
    tags = {f"version.{name}": version for name, version in values["versions"].items()}
    tags.update({f"git.{key}": value for key, value in values["git"].items()})
    tags.update({f"data.{task}": fingerprint for task, fingerprint in values["data"].items()})
    about = {"world_size": values["world"], "zero_stage": values["zero"], "base": values["base"]}
    return {**tags, **about, "device": values["device"]}


def _log_layout(run: Run) -> None:
    """Say what the first epoch's beginning costs in positions, and which ranks it leaves idle."""
    steps = range(min(run.order.steps_per_epoch, run.steps, STEPS_LOOKED_AT))
    samples = positions = idle = 0
    for step in steps:
        batch = run.order.step(step)
        micros = micro_batches(batch.indices, run.training.sizes[batch.task], run.training.limits, 0, 1)
        samples += len(batch.indices)
        positions += sum(run.training.positions(batch.task, micro) for micro in micros)
        idle = max(idle, run.world.size - len(micros))
    log.info("%s: %.1f positions a sample through the backbone", run.config.data.layout, positions / samples)
    if idle > 0:
        log.warning(
            "%d of %d processes have nothing to do in some steps: a global batch makes too few micro-batches. Set "
            "train.micro_batch=%d, or raise train.global_batch",
            idle, run.world.size, -(-run.config.train.global_batch // run.world.size),
        )  # fmt: skip


def _log_weights(run: Run) -> None:
    """Say what classes weigh, and warn where few samples get most of the loss."""
    for name, collate in run.parts.collators.items():
        weight_C = collate.objective.weight_C
        if weight_C is None:
            continue
        there = {a: w for a, w in zip(run.parts.tries[name].answers, weight_C.tolist(), strict=True) if w}
        log.info("class weights of %s: %s", name, ", ".join(f"{answer} {w:.3g}" for answer, w in there.items()))
        if max(there.values()) > UNEVEN * min(there.values()):
            log.warning(
                "a sample of the rarest class of %s weighs %.0f times as much as one of the most frequent: "
                "train.class_weights=effective with a smaller train.class_weight_beta is more even",
                name, max(there.values()) / min(there.values()),
            )  # fmt: skip


def _log_start(run: Run, start: int) -> None:
    _log_layout(run)
    _log_weights(run)
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
        run.tracker.uri if run.tracker.enabled else "off",
    )
