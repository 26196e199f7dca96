"""Real ranks for benchmarks: processes on this machine that join one run, and a run's optimizer steps without its loop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

    from trainer.distributed.world import World

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(arguments: Sequence[str], procs: int, logs: Path, timeout: float | None = None, **more: str) -> None:
    """Run ``python -m ARGUMENTS`` as `procs` ranks of one run on CPU, with the variables `more`; logs to ``rankN.log``.

    Raises:
        RuntimeError: a rank failed; with the end of every log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(procs):
        env = {
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(procs),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), **more,
        }  # fmt: skip
        with (logs / f"rank{rank}.log").open("w") as output:
            command = [sys.executable, "-m", *arguments]
            ranks.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output))
    try:
        codes = [rank.wait(timeout=timeout) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        ends = "\n".join((logs / f"rank{rank}.log").read_text()[-3000:] for rank in range(procs))
        raise RuntimeError(f"exit codes {codes}\n{ends}")


@dataclass
class Steps:
    """A run's optimizer steps: `step` takes one by its index; a step has `samples`."""

    engine: DeepSpeedEngine
    samples: int
    step: Callable[[int], None]


def prepare_steps(
    overrides: Sequence[str],
    out: Path,
    world: World,
    steps: int,
    prepare: Callable[[torch.nn.Module], None] = lambda model: None,
) -> Steps:
    """The steps of a run of ``configs/tiny.yaml`` with `overrides`; `prepare` gets the model before the engine wraps it."""
    from trainer.config import load_config
    from trainer.data.sampling import GlobalBatchSampler
    from trainer.distributed.deepspeed_config import dtype_of
    from trainer.distributed.signals import StopRequest
    from trainer.run.assemble import assemble
    from trainer.run.engine import Schedule, build_engine
    from trainer.run.guards.dump import NonFiniteDump
    from trainer.run.guards.guard import Guard
    from trainer.run.step import StepContext, train_step

    config = load_config(ROOT / "configs/tiny.yaml", list(overrides))
    parts = assemble(config, out, world, dtype_of(config))
    prepare(parts.model)
    engine = build_engine(parts.model, config)
    schedule = Schedule(engine, config.train, steps)
    context = StepContext(engine, parts, config, world, Guard(engine, world.device, gradients=True), StopRequest())
    lengths = {name: opened["train"].lengths() for name, opened in parts.data.items()}
    order = GlobalBatchSampler(lengths, global_batch=config.train.global_batch, seed=config.train.seed)

    def step(index: int) -> None:
        schedule.set(index)
        train_step(context, order.step(index), index, NonFiniteDump())

    return Steps(engine, config.train.global_batch, step)
