"""Start real processes for distributed tests: many cases in one launch, results by file."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.fork_server import run, start

ROOT = Path(__file__).parent.parent.parent
GPU_DRIVER = Path("/dev/nvidiactl")


def restore_interrupts() -> None:
    """For `preexec_fn`: SIGINT as in a terminal; a shell's background jobs, and what they start, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shared_memory() -> set[str]:
    """The names of the buffers of DeepSpeed's all-reduce; a run that starts has some for a moment."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("deepspeed_allreduce_buffer_")}


def assert_removed(names: set[str], seconds: float = 60.0) -> None:
    """None of these buffers is left; those of runs that start elsewhere at this time are soon gone."""
    end = time.monotonic() + seconds
    while left := names & shared_memory():
        assert time.monotonic() < end, left
        time.sleep(0.1)


def environment(**more: str) -> dict[str, str]:
    """Ours, without what a launcher around the tests may have set; GPUs are seen where DS_ACCELERATOR=cuda asks for them alone."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    base = {key: value for key, value in os.environ.items() if key not in dropped}
    if GPU_DRIVER.exists() and more.get("DS_ACCELERATOR") != "cuda":
        base["CUDA_VISIBLE_DEVICES"] = ""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**base, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path, **more}


def run_ranks(module: str, *arguments: str, procs: int = 2, timeout: float = 500, **more: str) -> None:
    """Run ``python -m module arguments`` on `procs` ranks; fails with their output when one fails."""
    port = str(free_port())
    command = [sys.executable, "-m", module, *arguments]
    ranks = []
    for rank in range(procs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(procs), "MASTER_ADDR": "127.0.0.1"}
        env = environment(**place, MASTER_PORT=port, **more)
        ranks.append(start(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    output = []
    try:
        for worker in ranks:
            output.append(worker.communicate(timeout=timeout)[0])
    finally:
        for worker in ranks:
            worker.kill()
    codes = [worker.returncode for worker in ranks]
    assert codes == [0] * procs, f"exit codes {codes}\n" + "\n".join(text[-4000:] for text in output)


def egmf(*arguments: str, timeout: float = 500, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "trainer", *arguments]
    return run(command, env=environment(**more), cwd=ROOT, timeout=timeout)


def install_packages(packages: Sequence[str]) -> str | None:
    """Install Debian packages, one process at a time; what went wrong."""
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with Path("/tmp/egmf-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(["apt-get", "-qq", *command], env=quiet, capture_output=True, text=True, timeout=600)
            if done.returncode:
                return f"apt-get {' '.join(command)} failed: {done.stderr[-300:]}"
    return None
