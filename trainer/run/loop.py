"""The run, top to bottom: assemble, resume, train, validate, keep the best, evaluate it, record everything."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trainer.answers.prediction_table import write_predictions
from trainer.answers.scores import SplitScores
from trainer.checkpoint.identity import identify, training_settings
from trainer.checkpoint.state import CheckpointState, Position, SelectionState, check_fit, read_state, this_version
from trainer.checkpoint.store import Checkpoints, resume_engine, step_name
from trainer.checkpoint.weights import load_weights, trainable_state
from trainer.config import RunConfig, dump_config
from trainer.data.sampling import GlobalBatch
from trainer.distributed.consistency import check_consistency
from trainer.distributed.deepspeed_config import check_machine, dtype_of, for_world
from trainer.distributed.faults import report_to_launcher
from trainer.distributed.launcher import STOPPED
from trainer.distributed.signals import StopRequest, StopRequested
from trainer.distributed.versions import environment
from trainer.distributed.watch import Watch
from trainer.distributed.world import World, lost_connections_typed
from trainer.files import write_json, write_text
from trainer.run.assemble import assemble, older_selecting_metrics, warn_of_raw_features
from trainer.run.calibrate import write_calibration
from trainer.run.callbacks import (
    Callback,
    FinishedStep,
    ProgressCallback,
    StartLogCallback,
    TrackingCallback,
    WatchCallback,
)
from trainer.run.determinism import deterministic_algorithms
from trainer.run.evaluate import evaluate, format_selection_metrics, selecting_metrics, selection_values
from trainer.run.expert_load import warn_of_dead
from trainer.run.folder import archive_previous_run, open_folder
from trainer.run.guards.dump import NonFiniteDump, StepFacts
from trainer.run.guards.guard import NonFiniteError
from trainer.run.guards.probe import memory_explained, probe
from trainer.run.guards.probe_record import once
from trainer.run.lengths import cut_record
from trainer.run.profiling import ProfileCallback
from trainer.run.recipes import check_recipes, recipes_of
from trainer.run.record import (
    RecordValues,
    Report,
    RunRecord,
    State,
    close_run,
    close_stuck_run,
    now,
    read_record,
    record_failure,
)
from trainer.run.run import Run
from trainer.run.scalars import StepScalars
from trainer.run.step import StepResult, train_step
from trainer.saved_config import as_begun, saved_config
from trainer.tracking.journal import JOURNAL, MEDIAN_SPEED, SPEED, read_journal
from trainer.tracking.progress import Progress
from trainer.tracking.tracker import Tracker
from trainer.trust import remember

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def fit(
    config: RunConfig,
    out: Path,
    world: World,
    *,
    stop: StopRequest,
    force: bool = False,
    report: Report | None = None,
    callbacks: Sequence[Callback] = (),
) -> int:
    """Train, and evaluate the best checkpoint; called by every rank. Returns the exit code (0 done, 85 stopped).

    Args:
        stop: already listening, so that a signal during start-up counts.
        force: continue a checkpoint although settings or data differ.
        report: called on rank 0 when the run ends, however it ends; its pictures go to MLflow.
        callbacks: called after the run's own, at the moments that :class:`trainer.run.callbacks.Callback` names.

    Raises:
        ValueError: the run cannot be what was asked for, its folder cannot be written, or its loss is not finite.
    """
    check_machine(config, world.device)
    check_consistency(config, out, world)
    with (
        deterministic_algorithms(config.train.deterministic),
        open_folder(out, world),
        _watch(config, out, world) as watch,
    ):
        checkpoints = Checkpoints(out / "checkpoints", world, config.train.keep)
        _archive_stale_run(config, out, world, checkpoints)
        record = RunRecord(out, enabled=world.is_rank_zero)
        fresh, begun = not record.values, False
        state: State = "failed"
        tracker: Tracker | None = None
        try:
            if world.is_rank_zero:
                remember(config)
            last = checkpoints.newest(repair=True)
            saved = None if last is None else read_state(last)
            config = config if last is None else as_begun(config, out)
            joining = "running" if saved is None else saved.joining
            trained = for_world(config, world, None if saved is None else saved.zero)
            parts = assemble(trained, out, world, dtype_of(config), partition=True, joining=joining)
            if world.is_rank_zero:
                warn_of_raw_features(config, parts.data)
            base = parts.model.backbone.fingerprints
            identity = identify(trained, data=parts.fingerprints, base=base.source, world_size=world.size)
            recipes = recipes_of(parts.data)
            if saved is not None and last is not None:
                check_recipes(record.values.get("recipe", {}), parts.data, f"the run {out}", warn=world.is_rank_zero)
                check_fit(saved, identity, last, force=force, base=base)
            with world.on_rank_zero() as first:
                if first:
                    write_text(out / "config.yaml", dump_config(config))
            begun = True
            process = {**environment(), "pid": os.getpid(), "host": socket.gethostname()}
            begin: RecordValues = {"state": "running", "started": now(), "ended": None, "failure": None}
            record.update(begin | cast(RecordValues, process))
            tracked = record.values.get("mlflow")
            run_id = (tracked["run_id"] if tracked else None) or (saved.mlflow_run if saved else None)
            tracker = Tracker(config, out, enabled=world.is_rank_zero, run_id=run_id)
            run = Run(
                trained, out, world, parts, identity, tracker=tracker, checkpoints=checkpoints, watch=watch, stop=stop
            )
            record.update(
                {
                    "precision": config.train.precision,
                    "deterministic": config.train.deterministic or world.device.type == "cpu",
                    "seed": config.train.seed,
                    "steps": run.steps,
                    "mlflow": {"uri": tracker.uri, "run_id": tracker.run_id} if tracker.enabled else None,
                    "tasks": identity.tasks,
                    "select": selecting_metrics(parts),
                    "data": identity.data,
                    "base": identity.base,
                    "world": identity.world,
                    "zero": identity.zero,
                    "texts": cut_record(parts.lengths, config),
                }
            )
            if saved is None:
                record.values.pop("recipe", None)  # of an earlier beginning in this folder
            if recipes:
                record.update({"recipe": recipes})
            if parts.fold is not None:
                record.update({"fold": parts.fold})
            tracker.start(config, _tags(record.values))
            tracker.artifact(out / "config.yaml")
            watch.closing = functools.partial(close_stuck_run, out, record, tracker) if world.is_rank_zero else None
            with _skips_recorded(run, record):
                state = Trainer(run, callbacks).train(last, saved)
        except BaseException as error:
            watch.block_while_aborting()
            report_to_launcher(error)
            if begun or fresh:
                with contextlib.suppress(OSError):  # the disk may be what failed
                    record.update({"failure": f"{type(error).__name__}: {error}", "state": "failed", "ended": now()})
            raise
        finally:
            if begun:
                close_run(out, record, tracker, state, report if world.is_rank_zero else None)
    return 0 if state == "done" else STOPPED


@contextlib.contextmanager
def _skips_recorded(run: Run, record: RunRecord) -> Iterator[None]:
    """At the block's end, however it ends, the record says how many of the run's steps moved nothing, and why."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the disk may be what failed
            record.update({"steps_skipped": {"not_finite": run.health.skipped, "loss_scale": run.health.overflowed}})


def _watch(config: RunConfig, out: Path, world: World) -> Watch:
    return Watch(out, world, config.train.stuck_seconds, record_failure=functools.partial(record_failure, out))


def _archive_stale_run(config: RunConfig, out: Path, world: World, checkpoints: Checkpoints) -> None:
    """Archive what another run left in the folder: if asked for, or if it has other settings and no checkpoint to continue."""
    with world.on_rank_zero() as first:
        if first:
            anew = config.train.resume == "never" or (not checkpoints.names() and _has_other_settings(config, out))
            archive = archive_previous_run(out) if anew else None
            if archive is not None:
                log.warning("an earlier run's files in %s were moved to %s", out, archive.name)
    checkpoints.open()


def _has_other_settings(config: RunConfig, out: Path) -> bool:
    """Whether the folder holds the beginnings of a run with other settings."""
    if not (out / "config.yaml").is_file():
        return "baseline" in (read_record(out) or {})  # a baseline's files are not this run's either
    try:
        return training_settings(saved_config(out)) != training_settings(config)
    except ValueError:  # it uses a setting that this version does not have
        return True


def _tags(values: RecordValues) -> dict[str, object]:
    """What MLflow shows of a run beside its settings, from the record."""
    tags: dict[str, object] = {f"version.{name}": version for name, version in values["versions"].items()}
    tags.update({f"git.{key}": value for key, value in values["git"].items()})
    tags.update({f"data.{task}": fingerprint for task, fingerprint in values["data"].items()})
    tags.update({f"recipe.{task}": recipe["hash"] for task, recipe in values.get("recipe", {}).items()})
    about = {"world_size": values["world"], "zero_stage": values["zero"], "base": values["base"]}
    if "fold" in values:
        tags.update({"egmf.fold": values["fold"]["name"], "egmf.folds": json.dumps(values["fold"])})
    return {**tags, **about, "device": values["device"]}


class Trainer:
    """Carries a run from its last checkpoint to its end. `callbacks` follow the run's own."""

    def __init__(self, run: Run, callbacks: Sequence[Callback] = ()) -> None:
        self.run, self.config, self.world, self.parts, self.engine = run, run.config, run.world, run.parts, run.engine
        progress = Progress(run.steps, enabled=run.world.is_rank_zero)
        own = (StartLogCallback(), TrackingCallback(run.tracker), ProgressCallback(progress), WatchCallback(run.watch))
        steps = run.config.train.profile
        profiles = () if steps is None else (ProfileCallback(*steps, run.tracker),)
        self.callbacks: tuple[Callback, ...] = (*own, *profiles, *callbacks)
        run.step_context.contribute = self._contribute

    @lost_connections_typed()
    def train(self, last: Path | None, saved: CheckpointState | None) -> State:
        """Train to the last step and evaluate, or until asked to stop; returns the run's state."""
        state: State = "done"
        try:
            self._resume(last, saved)
            self._try_largest_batches()
            if saved is not None and saved.validation_due:
                self._validate_late()
            for callback in self.callbacks:
                callback.on_train_start(self.run, self.run.steps_done)
            self._take_steps()
            self._evaluate_best()
        except StopRequested:
            log.warning("stopped at step %d of %d; the same command continues it", self.run.steps_done, self.run.steps)
            state = "stopped"
        finally:
            self.run.step_context.prefetcher.close()
            for callback in self.callbacks:
                callback.on_train_end(self.run)
        self.engine.destroy()  # its hooks would keep the model in memory, and this process may train another
        return state

    def _resume(self, last: Path | None, saved: CheckpointState | None) -> None:
        if last is not None and saved is not None:
            resume_engine(self.engine, last, self.world)
            self._restore_selection(saved.selection)
            self.run.health.restore(saved.health)
            self.run.steps_done = saved.step
            log.info("continuing from %s", last)
        self._stop_if_asked()

    def _restore_selection(self, saved: SelectionState) -> None:
        """Go on choosing among all validations, or anew where they were of another metric."""
        before, now = saved.metrics or older_selecting_metrics(self.config), selecting_metrics(self.parts)
        if before == now:
            self.run.selection.restore(saved.model_dump())
            self._mark_best()  # a kill may have come between a checkpoint and its mark
            return
        changed = ", ".join(f"{name} by {before.get(name)}" for name in now if before.get(name) != now[name])
        log.warning(
            "the checkpoint was chosen so far: %s. From the next validation on it is chosen by %s, the earlier ones left out",
            changed,
            ", ".join(f"{name} {metric}" for name, metric in now.items()),
        )

    def _try_largest_batches(self) -> None:
        if self.config.train.probe and self.run.steps_done < self.run.steps:
            run = self.run
            once(
                run.out,
                self.config,
                self.parts,
                self.world,
                lambda: probe(self.engine, self.parts, self.config, self.world, run.guard),
            )
            self._stop_if_asked()

    def _take_steps(self) -> None:
        train = self.config.train
        eval_every = train.eval_every or self.run.order.steps_per_epoch
        save_every = train.save_every or eval_every
        for step in range(self.run.steps_done, self.run.steps):
            result = self._take_step(step)
            if step + 1 == self.run.steps or (step + 1) % eval_every == 0:
                self._validate_and_save()
            elif result.stop or (step + 1) % save_every == 0:
                self._save()
            else:
                continue
            self._stop_if_asked()  # during the step, or since

    def _take_step(self, step: int) -> StepResult:
        began = time.perf_counter()
        self.run.schedule.set(step - self.run.health.overflowed)
        rates = self.engine.get_lr()
        batch, dump = self.run.order.step(step), NonFiniteDump()
        what = f"a micro-batch of step {step + 1}"
        with memory_explained(what, "train.micro_tokens", self.config.train.micro_tokens):
            result = train_step(self.run.step_context, batch, step, dump)
        spike = self.run.health.step(result.loss, result.skipped, result.overflowed)
        if spike:
            log.warning("step %d: the loss jumped to %.4f", step + 1, result.loss)
        if result.skipped:
            self._report_skipped(step, batch, dump)
        if result.overflowed:
            log.warning(
                "step %d: a gradient overflowed at loss scale %g: no update, the schedule waits (%d such steps in all); the scale is %g now",
                step + 1,
                result.loss_scale,
                self.run.health.overflowed,
                self.run.step_context.loss_scale.value,
            )
        self.run.steps_done = step + 1
        finished = FinishedStep(step + 1, result, spike, rates, time.perf_counter() - began)
        for callback in self.callbacks:
            callback.on_step_end(self.run, finished)
        return result

    def _report_skipped(self, step: int, batch: GlobalBatch, dump: NonFiniteDump) -> None:
        """Name the samples of a skipped step, and end the run after too many in a row."""
        ids = [i for part in self.world.gather_all(dump.bad_ids()) for i in part] or ["unknown: a gradient"]
        first_ids = ", ".join(ids[:8])
        log.warning(
            "step %d skipped: non-finite loss or gradient (%d in all); samples %s",
            step + 1,
            self.run.health.skipped,
            first_ids,
        )
        if self.run.health.in_a_row < self.config.train.max_skipped:
            return
        folder = self.run.out / "nonfinite" / step_name(step + 1)
        step_facts = StepFacts(step=step + 1, task=batch.task, samples=ids, seed=self.config.train.seed)
        dump.write(folder, self.world, step_facts, trainable_state(self.engine.module, self.world))
        raise NonFiniteError(
            f"the loss or a gradient was not finite in {self.run.health.in_a_row} steps in a row, the last of them step "
            f"{step + 1}; samples: {first_ids}\nthe batch and the weights are in {folder}: look at them with "
            f"'egmf replay {folder}'; then lower train.lr, or look at these samples' features"
        )

    def _validate_and_save(self) -> None:
        """A stop interrupts the validation; the checkpoint then records that it is due."""
        try:
            self._validate()
        except StopRequested:
            self._save(validation_due=True)
            raise
        self._save()

    def _validate_late(self) -> None:
        """The validation of the checkpoint that was just loaded, which a stop had interrupted."""
        self._validate()
        self._mark_best()

    def _validate(self) -> None:
        """Score the validation split, and decide whether this step is the best so far."""
        step = self.run.steps_done
        _, metrics = self._evaluate("valid")
        nll = {name: values.get("nll") for name, values in metrics.items()}
        self.run.selection.add(step_name(step), selection_values(self.parts, metrics), nll)
        for callback in self.callbacks:
            callback.on_validation_end(self.run, step, metrics)
        log.info("step %d: %s", step, format_selection_metrics("valid", self.parts, metrics))

    def _save(self, *, validation_due: bool = False) -> None:
        step = self.run.steps_done
        for callback in self.callbacks:
            callback.on_save_start(self.run, step)
        state = CheckpointState(
            **self.run.identity.model_dump(),
            step=step,
            best=self.run.selection.best,
            selection=SelectionState(**self.run.selection.state(), metrics=selecting_metrics(self.parts)),
            health=self.run.health.state(),
            position=Position(step=step, epoch=step / self.run.order.steps_per_epoch),
            mlflow_run=self.run.tracker.run_id,
            validation_due=validation_due,
            version=this_version(),
            joining=self.parts.joining,
        )
        path = self.run.checkpoints.save(self.engine, state)
        log.info("saved %s%s", path, ", the best so far" if self.run.selection.best == path.name else "")
        for callback in self.callbacks:
            callback.on_save_end(self.run, step, path)

    def _mark_best(self) -> None:
        with self.world.on_rank_zero() as first:
            if first:
                self.run.checkpoints.mark(self.run.selection.best)

    def _evaluate_best(self) -> None:
        """Evaluate the best checkpoint on the configured splits; write predictions, metrics and temperatures."""
        out, tracker, checkpoints = self.run.out, self.run.tracker, self.run.checkpoints
        chosen = checkpoints.best()
        if chosen is None:
            chosen = checkpoints.newest()
            log.warning("validation chose no checkpoint (its metric was undefined): the last one is evaluated")
        assert chosen is not None
        if self.world.is_rank_zero:
            speeds = [speed for _, speed in read_journal(out / JOURNAL).get(SPEED, [])]
            tracker.metrics({MEDIAN_SPEED: statistics.median(speeds) if speeds else None}, self.run.steps)
        load_weights(self.parts.model, chosen)
        scores: dict[str, SplitScores] = {}
        tables: dict[str, pd.DataFrame] = {}
        for split in self.config.eval.splits:
            tables[split], scores[split] = self._evaluate(split)
            path = out / "predictions" / f"{split}.parquet"
            with self.world.on_rank_zero() as first:
                if first:
                    write_predictions(tables[split], path)
            for callback in self.callbacks:
                callback.on_best_evaluated(self.run, split, scores[split], path)
            log.info("%s: %s", chosen.name, format_selection_metrics(split, self.parts, scores[split]))
        with self.world.on_rank_zero() as first:
            if first:
                write_json(out / "metrics.json", {"checkpoint": chosen.name, **scores})
                tracker.artifact(out / "metrics.json")
                write_calibration(self.parts, tables, out, chosen.name, tracker, self.run.steps)
                if self.parts.model.fusion is not None and "test" in tables:
                    experts = self.parts.model.fusion.experts_built
                    warn_of_dead(list(self.parts.tasks), experts, "test", tables["test"])

    def _evaluate(self, split: str) -> tuple[pd.DataFrame, SplitScores]:
        """The predictions and metrics of a split with the weights that are loaded; a stop breaks it off."""

        def progress(samples: int = 0) -> None:
            for callback in self.callbacks:
                callback.on_evaluation_progress(self.run, split)

        self.engine.eval()
        try:
            progress()
            return evaluate(
                self.engine, self.parts, self.config, split, self.world,
                advance=progress, before_batch=self._stop_if_asked,
            )  # fmt: skip
        finally:
            self.engine.train()

    def _stop_if_asked(self) -> None:
        self.run.stop.raise_if_stop_requested(self.world)

    def _contribute(self, scalars: StepScalars) -> None:
        for callback in self.callbacks:
            callback.on_step_scalars(self.run, scalars)
