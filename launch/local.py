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
PATIENCE = 12.0  # seconds that the others have to end by themselves, and to say why (a run's end is told to MLflow)
GRACE = 5.0  # seconds after a SIGTERM, before a SIGKILL
PR_SET_PDEATHSIG = 1


def command(
    config: Path, overrides: Sequence[str], out: Path, *, force: bool = False, debug: bool = False
) -> list[str]:
    """The command of every process of a run."""
    more = [flag for flag, on in (("--force", force), ("--debug", debug)) if on]
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
            failures = _wait(workers)
        if failures:
            rank, code = _first_cause(failures, Path(name))
            sys.stderr.write(_told(rank, code, out, Path(name)))
            return 128 - code if code < 0 else code
    if any(worker.returncode == STOPPED for worker in workers):
        return STOPPED
    state = _state(out)
    if state != "done":
        sys.stderr.write(f"the processes ended, but {out / 'run.json'} says {state!r} and not 'done'\n")
        return 1
    return 0


def _first_cause(failures: Sequence[tuple[int, int]], faults: Path) -> tuple[int, int]:
    """The first failure that is not only the loss of another rank; those end sooner than the one that explains itself."""
    for rank, code in failures:
        why = _fault(faults, rank)
        if why is None or not (why.startswith("PeerFault") or " by peer" in why):
            return rank, code
    return failures[0]


def _told(rank: int, code: int, out: Path, faults: Path) -> str:
    """What the user reads last: who failed first, and why."""
    what = f"exit code {code}"
    why = "it said nothing; see its log"
    if code < 0:
        what = f"signal {signal.Signals(-code).name}"
        why = "killed from outside: by the kernel when memory runs out (dmesg says so), by the scheduler, or by hand"
        if code != -signal.SIGKILL:
            why = "the process crashed or was ended by that signal"
    why = _fault(faults, rank) or why
    return (
        f"the run failed: rank {rank} failed first, with {what}; log: {out / 'log.txt'}\nerror on rank {rank}: {why}\n"
    )


def _fault(faults: Path, rank: int) -> str | None:
    """What a rank left as its reason."""
    try:
        told = json.loads(_fault_file(faults, rank).read_text(encoding="utf-8"))
        return str(told["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fault_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Wait for all; rank and code of the first failure, after which the others are ended, and of those that failed with it.

    A thread waits for each process: one that fails takes its peers along within milliseconds, and the order counts.
    """
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for rank, worker in enumerate(workers):
        threading.Thread(target=lambda r=rank, w=worker: ended.put((r, w.wait())), daemon=True).start()
    for _ in workers:
        rank, code = ended.get()
        if code not in (0, STOPPED):
            others = [(r, c) for r, c in _end(workers) if c not in (0, STOPPED) and r != rank]
            return [(rank, code), *others]
    return []


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """End what still runs: let it notice by itself, then ask, then force. Rank and code of those that ended by themselves."""
    alone: list[tuple[int, int]] = []
    for ask in (None, signal.SIGTERM, signal.SIGKILL):
        if ask is not None:
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, ask)
        until = time.monotonic() + (PATIENCE if ask is None else GRACE)
        while time.monotonic() < until and any(worker.poll() is None for worker in workers):
            time.sleep(0.1)
        if ask is None:
            alone = [(rank, worker.returncode) for rank, worker in enumerate(workers) if worker.poll() is not None]
    return alone


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
