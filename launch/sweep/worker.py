"""A process that trains one run after another: torch and DeepSpeed are imported, and the process group made, once.

Reads a :class:`~launch.sweep.messages.RunRequest` per run on stdin and answers each with a
:class:`~launch.sweep.messages.RunResult` on the file descriptor given as its first argument. Ends when stdin does, after a
run that did not end well, since what that leaves behind concerns no other run, and after one with ZeRO-3, whose model
DeepSpeed (0.19) keeps in memory. A run here is bit by bit the run of a fresh process.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from launch.sweep.messages import RunRequest, RunResult
from trainer.distributed.process_group import quiet_deepspeed

if TYPE_CHECKING:
    from trainer.distributed.signals import StopRequest
    from trainer.distributed.world import World

log = logging.getLogger(__name__)


def main() -> None:
    quiet_deepspeed()
    from trainer.distributed.process_group import start_world, stop_world
    from trainer.run.determinism import set_variables

    set_variables()  # any of the runs may be deterministic, and cuBLAS reads them once
    from trainer.distributed.signals import StopRequest
    from trainer.logs import set_up_logging

    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as answers, StopRequest() as stop:
        set_up_logging(None, 0)
        world = start_world()
        for line in sys.stdin:
            with _restored_process():
                result = _train(RunRequest.from_line(line), world, stop)
            answers.write(result.to_line())
            answers.flush()
            if result.leaves:
                break
    stop_world()


def _train(request: RunRequest, world: World, stop: StopRequest) -> RunResult:
    from trainer.config import load_config
    from trainer.distributed.deepspeed_config import zero_stage
    from trainer.logs import set_up_logging
    from trainer.results.report.report import write_report
    from trainer.run.loop import fit

    out = Path(request.out)
    sys.argv[1:] = ["train", request.config, "--out", request.out]  # for the run's record
    try:
        config = load_config(request.config)
        set_up_logging(out, world.rank, debug=request.debug)
        log.info("run %s", out)
        code = fit(config, out, world, stop=stop, report=write_report if config.track.report else None)
        return RunResult(code, leaves=code != 0 or zero_stage(config) == 3)
    except Exception as error:  # noqa: BLE001 - whatever it is, only this run fails
        traceback.print_exc()
        return RunResult(1, f"{type(error).__name__}: {error}", leaves=True)
    finally:
        set_up_logging(None, world.rank)


@contextmanager
def _restored_process() -> Iterator[None]:
    """Afterwards random numbers, environment and arguments are as before, and the run's memory is free."""
    import torch

    from trainer.checkpoint.random_state import random_state, restore_random_state

    numbers, variables, arguments = random_state(), dict(os.environ), list(sys.argv)
    try:
        yield
    finally:
        restore_random_state(numbers)
        os.environ.clear()
        os.environ.update(variables)
        sys.argv[:] = arguments
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
