"""Several processes on this machine: one per GPU, or as many as asked for on a CPU.

Not torchrun's agent, because a stop signal must reach each process once, exit code 85 (stopped and resumable) must
arrive, and no process may outlive the launcher however that ends: torchrun restarts, turns 85 into 1, and dies of
SIGUSR1 while its workers train on. What it leaves for others to read is used: its environment variables and error files.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainer.distributed.faults import Fault, read_fault
from trainer.distributed.launcher import EGMF_LAUNCHER, EGMF_SECRET, STOPPED, run_secret
from trainer.files import load_json

FAILURE_GRACE = (
    12.0  # seconds for ranks to end by themselves after another failed, and to say why (MLflow hears of it too)
)
TERMINATE_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1


def train_command(
    config: Path, overrides: Sequence[str], out: Path, *, force: bool = False, debug: bool = False
) -> list[str]:
    """The command of every process of a run."""
    flags = [flag for flag, on in (("--force", force), ("--debug", debug)) if on]
    return [sys.executable, "-m", "trainer", "train", str(config), "--out", str(out), *flags, *overrides]


@dataclass(frozen=True)
class NodeRanks:
    """The ranks of one machine, `first` to `first + count - 1` of `world_size`, and where all ranks find rank 0."""

    command: tuple[str, ...]  # of every process
    first: int
    count: int
    world_size: int
    master_addr: str
    master_port: int


@dataclass(frozen=True)
class Outcome:
    """How the processes of one machine ended: 0, 85 (stopped), or the code of `rank`, which failed first."""

    code: int  # of a signal: its number, negative
    rank: int | None = None
    reason: str = ""
    missed_peer: bool = False  # it failed only because another rank had ended, which has the cause

    @property
    def exit_code(self) -> int:
        return 128 - self.code if self.code < 0 else self.code


def single_node_ranks(command: Sequence[str], count: int) -> NodeRanks:
    """All ranks on this machine, at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return NodeRanks(tuple(command), 0, count, count, "127.0.0.1", probe.getsockname()[1])


def rank_environments(ranks: NodeRanks, faults: Path, launcher: str) -> list[dict[str, str]]:
    """What each process needs to find the others; cores are shared out unless OMP_NUM_THREADS is set.

    A process that fails leaves its reason in a file of the folder `faults`, as torchrun's workers do.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks.count))
    common = {
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_WORLD_SIZE": str(ranks.count),
        "MASTER_ADDR": ranks.master_addr,
        "MASTER_PORT": str(ranks.master_port),
        EGMF_LAUNCHER: launcher,
    }
    if ranks.count == ranks.world_size:  # else the launcher of all nodes gives them one
        common[EGMF_SECRET] = run_secret()
    own = [
        {"RANK": str(ranks.first + i), "LOCAL_RANK": str(i), "TORCHELASTIC_ERROR_FILE": str(_fault_file(faults, i))}
        for i in range(ranks.count)
    ]
    return [{"OMP_NUM_THREADS": threads, **os.environ, **common, **variables} for variables in own]


def launch(ranks: NodeRanks, out: Path) -> int:
    """Start this machine's ranks and wait for the run to end.

    Returns 0 only when all its processes ended well and the run's own record says done; 85 when it stopped and can go
    on; otherwise the code of the process that failed first (a signal as 128 + its number).
    """
    with Workers(ranks, "local") as workers, forward_signals(workers.signal):
        outcome = workers.wait()
    if outcome.rank is not None:
        sys.stderr.write(describe_failure(outcome, out))
        return outcome.exit_code
    if outcome.code == STOPPED:
        return STOPPED
    return check_done(out)


def check_done(out: Path) -> int:
    """0 where the run's record says done; else 1, and a message: processes that end well are not enough."""
    state = run_state(out).state
    if state == "done":
        return 0
    sys.stderr.write(f"the processes ended, but {out / 'run.json'} says {state!r} and not 'done'\n")
    return 1


def describe_failure(outcome: Outcome, out: Path) -> str:
    """What the user reads last: who failed first, and why."""
    what = f"exit code {outcome.code}" if outcome.code > 0 else f"signal {signal.Signals(-outcome.code).name}"
    return (
        f"the run failed: rank {outcome.rank} failed first, with {what}; log: {out / 'log.txt'}\n"
        f"error on rank {outcome.rank}: {outcome.reason}\n"
    )


class Workers:
    """The processes of one machine. None outlives the block, and none this process."""

    def __init__(self, ranks: NodeRanks, launcher: str) -> None:
        self.ranks, self._launcher = ranks, launcher
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Workers:
        parent = os.getpid()
        self._faults = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="egmf-")))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stack.callback(self._kill)
        for env in rank_environments(self.ranks, self._faults, self._launcher):
            self._processes.append(
                subprocess.Popen(
                    self.ranks.command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=lambda: die_with_parent(parent),
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def signal(self, number: int) -> None:
        """Send a signal to every process once."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def end(self) -> None:
        """Ask every running process to stop, then force it."""
        _end(self._processes, grace=0.0)

    def wait(self) -> Outcome:
        """Until all have ended; once one fails, the others get some time to notice."""
        failures = _wait(self._processes)
        if failures:
            place, code = _first_cause(failures, self._faults)
            fault = read_fault(_fault_file(self._faults, place))
            if fault is None:
                fault = Fault(explain_signal(-code) if code < 0 else "it gave no reason; see its log", False)
            return Outcome(code, self.ranks.first + place, fault.message, fault.missed_peer)
        return Outcome(STOPPED if any(p.returncode == STOPPED for p in self._processes) else 0)

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _first_cause(failures: Sequence[tuple[int, int]], faults: Path) -> tuple[int, int]:
    """The first failure that is more than the loss of another rank; such ranks end sooner than the one that explains itself."""
    for place, code in failures:
        fault = read_fault(_fault_file(faults, place))
        if fault is None or not fault.missed_peer:
            return place, code
    return failures[0]


def explain_signal(number: int) -> str:
    """What ended a process that died of this signal, as far as that is known."""
    if number == signal.SIGKILL:
        return "killed from outside: by the kernel when memory runs out (dmesg says so), by the scheduler, or by hand"
    return "the process crashed or was ended by that signal"


def _fault_file(folder: Path, local_rank: int) -> Path:
    return folder / f"rank{local_rank}.json"


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


def _end(workers: Sequence[subprocess.Popen[bytes]], grace: float = FAILURE_GRACE) -> list[tuple[int, int]]:
    """End the running processes: wait, then SIGTERM, then SIGKILL. Rank and code of those that ended by themselves."""
    by_themselves: list[tuple[int, int]] = []
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, number)
        until = time.monotonic() + (grace if number is None else TERMINATE_GRACE)
        while time.monotonic() < until and any(worker.poll() is None for worker in workers):
            time.sleep(0.1)
        if number is None:
            by_themselves = [(rank, w.returncode) for rank, w in enumerate(workers) if w.poll() is not None]
    return by_themselves


@contextlib.contextmanager
def forward_signals(send: Callable[[int], None]) -> Iterator[None]:
    """A stop signal to this process is passed to `send`; a closed terminal asks as SIGTERM does, but not under nohup."""
    names = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        names.append(signal.SIGHUP)

    def handle(number: int, _: object) -> None:
        send(signal.SIGTERM if number == signal.SIGHUP else number)

    before = {name: signal.signal(name, handle) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def die_with_parent(parent: int) -> None:
    """In the child: ask the kernel for a SIGTERM when the launcher is gone (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


class RunState(NamedTuple):
    """What ``run.json`` says of a run; None where there is no record."""

    state: str | None
    started: str | None


def run_state(out: Path) -> RunState:
    """The state of a run, and when it was started."""
    try:
        record = load_json((out / "run.json").read_text(encoding="utf-8"))
        return RunState(record.get("state"), record.get("started"))
    except (OSError, ValueError):
        return RunState(None, None)
