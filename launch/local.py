"""Several processes on this machine: one per GPU, or as many as asked for on a CPU.

Own processes rather than torchrun's agent, since a stop signal must reach each of them once, their exit codes must
arrive (85: stopped and resumable), and none may outlive the launcher, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

STOPPED = 85
GRACE = 5.0  # seconds that the others have to end by themselves, then again after a SIGTERM, before a SIGKILL
PR_SET_PDEATHSIG = 1


def command(config: Path, overrides: Sequence[str], out: Path, *, debug: bool = False) -> list[str]:
    """The command of every process of a run."""
    more = ["--debug"] if debug else []
    return [sys.executable, "-m", "trainer", "train", str(config), "--out", str(out), *more, *overrides]


def environments(procs: int, faults: Path) -> list[dict[str, str]]:
    """What each process needs to find the others; cores are shared out unless OMP_NUM_THREADS is set.

    A process that fails says why in a file of the folder `faults`, as torchrun's workers do.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = str(max(1, len(os.sched_getaffinity(0)) // procs))
    common = {
        "WORLD_SIZE": str(procs),
        "LOCAL_WORLD_SIZE": str(procs),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        {"RANK": str(r), "LOCAL_RANK": str(r), "TORCHELASTIC_ERROR_FILE": str(_fault_file(faults, r))}
        for r in range(procs)
    ]
    return [{"OMP_NUM_THREADS": threads, **os.environ, **common, **rank} for rank in ranks]


def launch(line: Sequence[str], procs: int, out: Path) -> int:
    """Run `line` in `procs` processes and wait for the run to end.

    Returns 0 only when all of them ended well and the run's own record says done; 85 when it stopped and can go on;
    otherwise the code of the process that failed first (a signal as 128 + its number).
    """
    parent = os.getpid()
    with tempfile.TemporaryDirectory(prefix="egmf-") as name:
        workers = [
            subprocess.Popen(line, env=env, start_new_session=True, preexec_fn=lambda: _die_with(parent))
            for env in environments(procs, Path(name))
        ]
        with _passing_signals(workers):
            first = _wait(workers)
        if first is not None:
            sys.stderr.write(_told(*first, out, Path(name)))
            return 128 - first[1] if first[1] < 0 else first[1]
    if any(worker.returncode == STOPPED for worker in workers):
        return STOPPED
    state = _state(out)
    if state != "done":
        sys.stderr.write(f"the processes ended, but {out / 'run.json'} says {state!r} and not 'done'\n")
        return 1
    return 0


def _told(rank: int, code: int, out: Path, faults: Path) -> str:
    """What the user reads last: who failed first, and why."""
    what = f"exit code {code}"
    why = "it said nothing; see its log"
    if code < 0:
        what = f"signal {signal.Signals(-code).name}"
        why = "killed from outside: by the kernel when memory runs out (dmesg says so), by the scheduler, or by hand"
        if code != -signal.SIGKILL:
            why = "the process crashed or was ended by that signal"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        why = json.loads(_fault_file(faults, rank).read_text(encoding="utf-8"))["message"]["message"]
    return (
        f"the run failed: rank {rank} ended first, with {what}; log: {out / 'log.txt'}\nerror on rank {rank}: {why}\n"
    )


def _fault_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Wait for all; the rank and code of the first failure, after which the others are ended.

    A thread waits for each process: one that fails takes its peers along within milliseconds, and it is the first that counts.
    """
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for rank, worker in enumerate(workers):
        threading.Thread(target=lambda r=rank, w=worker: ended.put((r, w.wait())), daemon=True).start()
    for _ in workers:
        rank, code = ended.get()
        if code not in (0, STOPPED):
            _end(workers)
            return rank, code
    return None


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: let it notice by itself, then ask, then force."""
    for ask in (None, signal.SIGTERM, signal.SIGKILL):
        if ask is not None:
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, ask)
        until = time.monotonic() + GRACE
        while time.monotonic() < until and any(worker.poll() is None for worker in workers):
            time.sleep(0.1)


@contextlib.contextmanager
def _passing_signals(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """A signal to the launcher goes to every process once."""

    def handle(number: int, _: object) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {name: signal.signal(name, handle) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
        _end_now(workers)


def _end_now(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def _die_with(parent: int) -> None:
    """In the child: be told to stop when the launcher is gone (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _state(out: Path) -> str | None:
    try:
        return str(json.loads((out / "run.json").read_text(encoding="utf-8")).get("state"))
    except (OSError, ValueError):
        return None
