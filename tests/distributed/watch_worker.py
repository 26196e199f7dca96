"""Runs of two processes that hang, each in its own way, under the watch; all at once, forked from one process.

python -m tests.distributed.watch_worker FOLDER: writes FOLDER/results.json, case -> rank -> exit code and seconds.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.processes import free_port
from trainer.distributed.flight import turn_on
from trainer.distributed.watch import Watch
from trainer.distributed.world import World
from trainer.files import write_json
from trainer.logs import set_up_logging
from trainer.run.record import record_failure

SECONDS, PATIENCE, STEPS, PLANTED = 4.0, 4.0, 4, 2


def load_sample(rank: int, case: str) -> None:
    """Where the planted faults are; what a healthy run does takes a moment."""
    time.sleep(0.05)
    if rank == 1 and case == "sleeps":
        time.sleep(600)
    if rank == 1 and case == "native":
        ctypes.PyDLL(None).sleep(600)  # does not let go of Python's lock
    if (rank, case) in ((1, "stopped"), (0, "stopped first")):
        os.kill(os.getpid(), signal.SIGSTOP)


def step(number: int, rank: int, case: str, watch: Watch) -> None:
    watch.heartbeat(f"step {number}")
    if number == PLANTED:
        load_sample(rank, case)
        if case == "mismatched" and rank == 1:
            dist.barrier()
        if case == "other kind" and rank == 1:
            dist.broadcast(torch.ones(3), 0)
        if case == "slow" and rank == 1:  # the other waits longer than is allowed, and this one moves
            for part in range(12):
                watch.heartbeat(f"step {number}, part {part}")
                time.sleep(SECONDS / 8)
        if case == "alone" and rank == 0:
            time.sleep(600)
    dist.all_reduce(torch.ones(4))


def work(rank: int, size: int, case: str, out: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(out / f"fault{rank}.json")
    os.dup2(os.open(out / f"stderr{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
    turn_on(os.environ, nccl=False)
    dist.init_process_group("gloo")
    set_up_logging(out, rank)
    world = World(rank, size, torch.device("cpu"))
    if rank == 0:
        write_json(out / "run.json", {"state": "running"})
    with Watch(out, world, SECONDS, patience=PATIENCE, record_failure=functools.partial(record_failure, out)) as watch:
        if rank == 0:
            watch.closing = lambda why: write_json(out / "run.json", {"state": "failed", "failure": why})
        try:
            for number in range(STEPS):
                step(number, rank, case, watch)
                watch.started()
        except RuntimeError as error:
            watch.block_while_aborting()
            logging.error("the step failed: %s", error)
            os._exit(7)
    dist.destroy_process_group()
    os._exit(0)


CASES = {
    "sleeps": 2,
    "stopped": 2,
    "stopped first": 2,
    "mismatched": 2,
    "other kind": 2,
    "native": 2,
    "slow": 2,
    "alone": 1,
}


def main(folder: Path) -> None:
    began = time.monotonic()
    running: dict[int, tuple[str, int]] = {}
    for case, size in CASES.items():
        (folder / case).mkdir()
        port = free_port()
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                try:
                    work(rank, size, case, folder / case, port)
                finally:
                    os._exit(9)
            running[pid] = case, rank
    ended: dict[str, dict[int, tuple[int, float]]] = {case: {} for case in CASES}
    while running and time.monotonic() - began < 120:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            case, rank = running.pop(pid)
            ended[case][rank] = os.waitstatus_to_exitcode(status), time.monotonic() - began
        left = list(running.values())
        if running and all(any(c == case and r != rank for r in ended[c]) for case, rank in left for c in [case]):
            break  # of every case some rank ended: what is left does not end by itself
        time.sleep(0.05)
    time.sleep(2.0)
    for pid, (case, rank) in running.items():
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        ended[case][rank] = os.waitstatus_to_exitcode(status), time.monotonic() - began
    (folder / "results.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
