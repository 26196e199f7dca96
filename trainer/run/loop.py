"""The run, top to bottom: assemble, resume, train, validate, keep the best, evaluate it, record everything."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.answers.metrics import primary
from trainer.config import RunConfig, dump_config, flatten
from trainer.data.sampling import GlobalBatch, Order, micro_batches
from trainer.models.backbone import base_fingerprint
from trainer.run.assemble import Parts, assemble
from trainer.run.checkpoint import (
    Checkpoints,
    check_fit,
    load_weights,
    read_state,
    resume_engine,
)
from trainer.run.distributed import World
from trainer.run.engine import build_engine, check_machine, dtype_of, zero_stage
from trainer.run.evaluate import evaluate, write_predictions
from trainer.run.files import write_json, write_text
from trainer.run.progress import Progress
from trainer.run.record import RunRecord, environment, now
from trainer.run.signals import STOPPED, StopRequest
from trainer.run.tracking import Tracker

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

# settings that may change when a run is continued: they say where and how often, or how much memory, not what
FREE = frozenset(
    {
        "data.path",
        "model.backbone.attention",
        "model.backbone.gradient_checkpointing",
        "train.micro_batch",
        "train.log_every",
        "train.eval_every",
        "train.save_every",
        "train.keep",
        "train.resume",
    }
)


@dataclass
class StepResult:
    """What a step tells, the same on every rank."""

    loss: float  # weighted mean over the global batch, balance term not included
    balance: float
    samples: int
    positions: int  # that this rank passed through the backbone
    stop: bool  # some rank was asked to stop


def fit(config: RunConfig, out: Path, world: World) -> int:
    """Train, and evaluate the best checkpoint; called by every rank. Returns the exit code (0 done, 85 stopped).

    Raises:
        ValueError: the run cannot be what was asked for; nothing was trained.
        FloatingPointError: the loss is no longer a number.
    """
    check_machine(config, world.device)
    with world.first_does() as first:
        if first:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "config.yaml", dump_config(config))
    record = RunRecord(out, enabled=world.first)
    tracker: Tracker | None = None
    state = "failed"
    try:
        with StopRequest() as stop:
            record.update(state="running", started=now(), ended=None, failure=None, **environment())
            parts = assemble(config, out, world, dtype_of(config))
            identity = _identity(config, parts, world)
            record.update(
                precision=config.train.precision,
                seed=config.train.seed,
                **{key: value for key, value in identity.items() if key != "settings"},
            )
            tracker = Tracker(config, out, enabled=world.first, run_id=_known_run(config, record))
            record.update(mlflow={"uri": tracker.uri, "run_id": tracker.run_id} if tracker.enabled else None)
            tracker.start(config, _tags(record.values))
            tracker.artifact(out / "config.yaml")
            state = Run(config, out, world, parts, identity, tracker, stop).train()
    except BaseException as error:
        record.update(failure=f"{type(error).__name__}: {error}")
        raise
    finally:
        record.update(state=state, ended=now())
        if tracker is not None:
            tracker.artifact(out / "run.json")
            tracker.finish(state)
    return 0 if state == "done" else STOPPED


class Run:
    """One training: the engine, the order of samples, and where it stands."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        world: World,
        parts: Parts,
        identity: dict[str, Any],
        tracker: Tracker,
        stop: StopRequest,
    ) -> None:
        self.config, self.out, self.world, self.parts = config, out, world, parts
        self.identity, self.tracker, self.stop = identity, tracker, stop
        train = config.train
        lengths = {name: data["train"].lengths() for name, data in parts.data.items()}
        self.order = Order(lengths, global_batch=train.global_batch, seed=train.seed, weights=config.data.weights)
        self.steps = train.steps or math.ceil(train.epochs * self.order.steps_per_epoch)
        self.dtype = dtype_of(config)
        self.engine: DeepSpeedEngine = build_engine(parts.model, config, self.steps)
        self.checkpoints = Checkpoints(out / "checkpoints", world, train.keep)
        self.progress = Progress(self.steps, enabled=world.first)
        self.best: float | None = None

    def train(self) -> str:
        """Train to the last step, or until asked to stop; returns the run's state."""
        train = self.config.train
        eval_every = train.eval_every or self.order.steps_per_epoch
        save_every = train.save_every or eval_every
        start = self._resume()
        _log_start(self, start)
        with self.progress:
            for step in range(start, self.steps):
                began, rates = time.perf_counter(), self.engine.get_lr()
                result = train_step(
                    self.engine, self.parts, self.order.step(step), step, self.config, self.world, self.stop
                )
                self._tell(step + 1, result, rates, time.perf_counter() - began)
                last = step + 1 == self.steps
                if last or (step + 1) % eval_every == 0:
                    better = self._validate(step + 1)
                    self._save(step + 1, better)
                elif result.stop or (step + 1) % save_every == 0:
                    self._save(step + 1, False)
                if result.stop and not last:
                    log.warning("stopped at step %d of %d; the same command continues it", step + 1, self.steps)
                    return "stopped"
            self._finish()
        return "done"

    def _resume(self) -> int:
        checkpoint = self.checkpoints.latest()
        if checkpoint is None or self.config.train.resume == "never":
            return 0
        state = read_state(checkpoint)
        check_fit(state, self.identity, checkpoint)
        resume_engine(self.engine, checkpoint)
        self.best = state["best"]
        log.info("continuing from %s", checkpoint)
        return int(state["step"])

    def _save(self, step: int, best: bool) -> None:
        state = {**self.identity, "best": self.best}
        path = self.checkpoints.save(self.engine, step, state, best=best)
        log.info("saved %s%s", path, ", the best so far" if best else "")

    def _validate(self, step: int) -> bool:
        """Score the validation split; whether it is the best so far (a value that is undefined never is)."""
        _, metrics = self._evaluate("valid")
        score = _selection(self.parts, metrics)
        self.tracker.metrics(_named("valid", metrics), step)
        log.info("step %d: %s", step, _shown("valid", self.parts, metrics))
        better = score is not None and (self.best is None or score > self.best)
        if better:
            self.best = score
        return better

    def _finish(self) -> None:
        """Evaluate the best checkpoint on the configured splits and write what it says."""
        chosen = self.checkpoints.best()
        if chosen is None:
            chosen = self.checkpoints.latest()
            log.warning("validation chose no checkpoint (its metric was undefined): the last one is evaluated")
        assert chosen is not None
        load_weights(self.parts.model, chosen, self.world)
        results: dict[str, Any] = {"checkpoint": chosen.name}
        for split in self.config.eval.splits:
            table, results[split] = self._evaluate(split)
            self.tracker.metrics(_named(f"best/{split}", results[split]), self.steps)
            log.info("%s: %s", chosen.name, _shown(split, self.parts, results[split]))
            with self.world.first_does() as first:
                if first:
                    path = self.out / "predictions" / f"{split}.parquet"
                    write_predictions(table, path)
                    self.tracker.artifact(path, "predictions")
        with self.world.first_does() as first:
            if first:
                write_json(self.out / "metrics.json", results)
                self.tracker.artifact(self.out / "metrics.json")

    def _evaluate(self, split: str) -> Any:
        self.engine.eval()
        try:
            return evaluate(self.engine, self.parts, self.config, split, self.world, self.dtype)
        finally:
            self.engine.train()

    def _tell(self, step: int, result: StepResult, rates: list[float], seconds: float) -> None:
        values = {
            "train/loss": result.loss,
            "train/balance": result.balance,
            "train/lr_fusion": rates[0],
            "train/lr_backbone": rates[-1],
            "train/samples_per_second": result.samples / seconds,
            "train/positions_per_sample": result.positions * self.world.size / result.samples,
        }
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            values["train/gradient_norm"] = float(norm)
        if self.parts.model.fusion is not None:
            usage = self.parts.model.fusion.gate.usage_E.tolist()
            values.update(
                {f"gate/{name}": u for name, u in zip(self.parts.model.fusion.experts_built, usage, strict=True)}
            )
        self.progress.step(step, result.loss, rates[0], result.samples, seconds)
        if step % self.config.train.log_every == 0 or step in (1, self.steps):
            self.tracker.metrics(values, step)
            self.progress.line(step)


def train_step(
    engine: DeepSpeedEngine,
    parts: Parts,
    batch: GlobalBatch,
    step: int,
    config: RunConfig,
    world: World,
    stop: StopRequest,
) -> StepResult:
    """One optimizer step over a global batch.

    loss = Σ_i w_i (loss_i + balance_i) / Σ_i w_i over the global batch. DeepSpeed averages gradients over ranks, so
    each rank's sum is multiplied by their number. Module dropout is reseeded at every micro-step from
    (seed, step, micro-step, rank).
    """
    view, collate = parts.data[batch.task]["train"], parts.collators[batch.task]
    micros = micro_batches(batch, config.train.micro_batch, world.rank, world.size)
    dtype = dtype_of(config)
    total = len(batch.indices)
    told = torch.zeros(3, dtype=torch.float64, device=world.device if world.device.type == "cuda" else None)
    positions = 0
    for place, micro in enumerate(micros):
        samples = [view[i] for i in micro.indices]
        rows = collate(samples, weight=micro.weight, epoch=batch.epoch).to(world.device, dtype)
        positions += rows.input_ids_BL.numel() if micro.weight else 0
        torch.manual_seed(_mix(config.train.seed, step, place, world.rank))
        engine.set_gradient_accumulation_boundary(place == len(micros) - 1)
        output = engine(rows)
        loss_B, balance_B = output.loss_B * rows.weight_B, output.balance_B * rows.weight_B
        engine.backward((loss_B.sum() + balance_B.sum()) * (world.size / total) + output.idle, scale_wrt_gas=False)
        told[0] += loss_B.detach().sum().double()
        told[1] += balance_B.detach().sum().double()
    told[2] = float(stop.asked)
    engine.step()
    if parts.model.fusion is not None:
        parts.model.fusion.gate.update_usage(world.sum)
    world.sum(told)
    loss, balance, asked = told.tolist()
    if not math.isfinite(loss):
        ids = ", ".join(view[i].id for micro in micros for i in micro.indices)
        raise FloatingPointError(f"the loss of step {step + 1} is {loss / total}; samples on rank {world.rank}: {ids}")
    return StepResult(loss / total, balance / total, total, positions, asked > 0)


def _mix(*parts: int) -> int:
    """A seed from several numbers (SplitMix64 over them)."""
    mask, state = (1 << 64) - 1, 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state


def _identity(config: RunConfig, parts: Parts, world: World) -> dict[str, Any]:
    """What a checkpoint and the run that continues it must agree on."""
    return {
        "tasks": list(parts.tasks),
        "data": parts.fingerprints,
        "base": base_fingerprint(parts.model.backbone),
        "world": world.size,
        "zero": zero_stage(config),
        "settings": {
            key: value
            for key, value in flatten(config).items()
            if key.startswith(("task", "data.", "model.", "train.", "deepspeed")) and key not in FREE
        },
    }


def _known_run(config: RunConfig, record: RunRecord) -> str | None:
    known = record.values.get("mlflow") or {}
    return known.get("run_id") if config.train.resume == "auto" else None


def _tags(values: dict[str, Any]) -> dict[str, Any]:
    tags = {f"version.{name}": version for name, version in values["versions"].items()}
    tags.update({f"git.{key}": value for key, value in values["git"].items()})
    tags.update({f"data.{task}": fingerprint for task, fingerprint in values["data"].items()})
    return {**tags, "world_size": values["world"], "zero_stage": values["zero"], "base": values["base"]}


def _selection(parts: Parts, metrics: dict[str, dict[str, Any]]) -> float | None:
    """The number that chooses a checkpoint, more is better: the mean over tasks of their selecting metric."""
    values = []
    for name, task in parts.tasks.items():
        value = primary(task, metrics[name])
        if value is None:
            return None
        values.append(value if task.maximise else -value)
    return sum(values) / len(values)


def _named(head: str, metrics: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Scalar metrics under slashed names; the task's name stands in them when there are several."""
    out: dict[str, float | None] = {}
    for task, values in metrics.items():
        middle = f"{task}/" if len(metrics) > 1 else ""
        for key, value in values.items():
            if value is None or isinstance(value, (int, float)):
                out[f"{head}/{middle}{key}"] = value
    return out


def _shown(split: str, parts: Parts, metrics: dict[str, dict[str, Any]]) -> str:
    shown = []
    for name, task in parts.tasks.items():
        value = primary(task, metrics[name])
        shown.append(f"{name} {split} {task.select} {'undefined' if value is None else f'{value:.4f}'}")
    return ", ".join(shown)


def _log_start(run: Run, start: int) -> None:
    trainable = sum(
        p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in run.parts.model.parameters() if p.requires_grad
    )
    log.info(
        "%d trainable parameters, %d process%s, ZeRO-%d, %s; steps %d to %d of %d samples; MLflow %s",
        trainable,
        run.world.size,
        "" if run.world.size == 1 else "es",
        run.identity["zero"],
        run.config.train.precision,
        start + 1,
        run.steps,
        run.config.train.global_batch,
        run.tracker.uri if run.tracker.enabled else "off",
    )
