"""fp16 on a CPU: DeepSpeed is told that the CPU can, the trainer's own refusal is left out. One rank trains at every stage, afresh and continued; several train once."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.distributed.process_group import quiet_deepspeed, start_world, stop_world
from trainer.distributed.world import World
from trainer.logs import set_up_logging

quiet_deepspeed()

STEPS, KEPT = 12, 6
SCALING = "deepspeed.fp16."
# overflows at once; a scale that grows every other step shows whether a continued run has the scaler's counters
HIGH = (f"{SCALING}initial_scale_power=13", f"{SCALING}loss_scale_window=2")


def train(data: Path, out: Path, world: World, *overrides: str) -> dict[str, Any]:
    """One training; what each of its steps was, and a hash of the trained weights after it."""
    import trainer.run.loop
    from trainer.checkpoint.weights import trainable_state
    from trainer.config import load_config
    from trainer.distributed.signals import StopRequest
    from trainer.run.callbacks import Callback, FinishedStep
    from trainer.run.run import Run

    steps: list[dict[str, Any]] = []

    class Notes(Callback):
        def on_step_end(self, run: Run, finished: FinishedStep) -> None:
            result, total = finished.result, hashlib.sha256()
            for name, tensor in sorted(trainable_state(run.engine.module, world).items()):
                if "usage" not in name:
                    total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            steps.append(
                {
                    "loss": result.loss,
                    "overflowed": result.overflowed,
                    "skipped": result.skipped,
                    "scale": result.loss_scale,
                    "lr": finished.learning_rates[0],
                    "norm": run.step_context.loss_scale.gradient_norm(result.loss_scale),
                    "usage": result.usage,
                    "weights": total.hexdigest(),
                }
            )

    trainer.run.loop.check_machine = lambda config, device: None
    config = load_config(
        "configs/tiny.yaml",
        [
            "task=meld", f"data.path={data}/meld", "model.backbone.tiny.vocab_size=400", "model.adapter.dropout=0", "model.fusion.dropout=0",
            "track.mlflow=false", "track.report=false", "train.precision=fp16", "train.global_batch=16", "train.micro_batch=8",
            f"train.steps={STEPS}", "train.keep=9", f"train.eval_every={KEPT}", "train.warmup=0.25", "train.log_every=1",
            "train.lr.fusion=2e-4", "train.lr.backbone=2e-4", *overrides,
        ],
    )  # fmt: skip
    set_up_logging(out, world.rank)
    with StopRequest() as stop:
        try:
            code: int | str = trainer.run.loop.fit(config, out, world, stop=stop, callbacks=[Notes()])
        except ValueError as error:
            code = f"{type(error).__name__}: {error}"
    return {"code": code, "steps": steps}


def halved(run: Path, copy: Path) -> None:
    """A copy of a run without its last checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08d}")
    (copy / "checkpoints" / "best").unlink(missing_ok=True)


def main(data: Path, out: Path, wanted: list[str]) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True
    world = start_world()
    set_up_logging(None, world.rank)
    results: dict[str, Any] = {}
    for stage in wanted:
        zero = f"train.zero={stage}"
        if world.size > 1:
            if (out / f"{stage}-others").exists():  # one rank's run, half of it
                results[f"{stage}-others"] = train(data, out / f"{stage}-others", world, zero, *HIGH)
            else:
                results[f"{stage}-high"] = train(data, out / f"{stage}-high", world, zero, *HIGH)
            continue
        results[f"{stage}-default"] = train(data, out / f"{stage}-default", world, zero)
        results[f"{stage}-high"] = train(data, out / f"{stage}-high", world, zero, *HIGH)
        halved(out / f"{stage}-high", out / f"{stage}-again")
        results[f"{stage}-again"] = train(data, out / f"{stage}-again", world, zero, *HIGH)
    if world.size == 1:
        fixed = ("train.zero=0", f"{SCALING}loss_scale=1e9", "train.max_skipped=3", "train.probe=false")
        results["fixed"] = train(data, out / "fixed", world, *fixed)
        results["fp32"] = train(data, out / "fp32", world, "train.zero=0", "train.precision=fp32")
    everyone = world.gather(results)
    if everyone is not None:
        (out / "results.json").write_text(json.dumps(everyone))
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
