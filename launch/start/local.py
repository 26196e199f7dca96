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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.distributed.launcher import OURS

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


@dataclass(frozen=True)
class Part:
    """The ranks of one machine, `first` to `first + slots - 1` of `world`, and where rank 0 is."""

    line: tuple[str, ...]  # the command of every process
    first: int
    slots: int
    world: int
    address: str
    port: int


@dataclass(frozen=True)
class Outcome:
    """How the processes of one machine ended: 0, 85 (stopped), or the code of `rank`, which failed first."""

    code: int  # of a signal: its number, negative
    rank: int | None = None
    why: str = ""
    follows: bool = False  # it only missed another rank, which knows more

    @property
    def exit_code(self) -> int:
        return 128 - self.code if self.code < 0 else self.code


def alone(line: Sequence[str], procs: int) -> Part:
    """All ranks on this machine, at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Part(tuple(line), 0, procs, procs, "127.0.0.1", probe.getsockname()[1])


def environments(part: Part, faults: Path, launcher: str) -> list[dict[str, str]]:
    """What each process needs to find the others; cores are shared out unless OMP_NUM_THREADS is set.

    A process that fails says why in a file of the folder `faults`, as torchrun's workers do.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // part.slots))
    common = {
        "WORLD_SIZE": str(part.world),
        "LOCAL_WORLD_SIZE": str(part.slots),
        "MASTER_ADDR": part.address,
        "MASTER_PORT": str(part.port),
        OURS: launcher,
    }
    ranks = [
        {"RANK": str(part.first + i), "LOCAL_RANK": str(i), "TORCHELASTIC_ERROR_FILE": str(_fault_file(faults, i))}
        for i in range(part.slots)
    ]
    return [{"OMP_NUM_THREADS": threads, **os.environ, **common, **rank} for rank in ranks]


def launch(part: Part, out: Path) -> int:
    """Run this machine's part and wait for the run to end.

    Returns 0 only when all its processes ended well and the run's own record says done; 85 when it stopped and can go
    on; otherwise the code of the process that failed first (a signal as 128 + its number).
    """
    with Workers(part, "local") as workers, passing_signals(workers.signal):
        outcome = workers.wait()
    if outcome.rank is not None:
        sys.stderr.write(told(outcome, out))
        return outcome.exit_code
    if outcome.code == STOPPED:
        return STOPPED
    state = run_state(out)[0]
    if state != "done":
        sys.stderr.write(f"the processes ended, but {out / 'run.json'} says {state!r} and not 'done'\n")
        return 1
    return 0


def told(outcome: Outcome, out: Path) -> str:
    """What the user reads last: who failed first, and why."""
    what = f"exit code {outcome.code}" if outcome.code > 0 else f"signal {signal.Signals(-outcome.code).name}"
    return (
        f"the run failed: rank {outcome.rank} failed first, with {what}; log: {out / 'log.txt'}\n"
        f"error on rank {outcome.rank}: {outcome.why}\n"
    )


class Workers:
    """The processes of one machine. None outlives the block, and none this process."""

    def __init__(self, part: Part, launcher: str) -> None:
        self.part, self._launcher = part, launcher
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Workers:
        parent = os.getpid()
        self._faults = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="egmf-")))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stack.callback(self._end_now)
        for env in environments(self.part, self._faults, self._launcher):
            self._processes.append(
                subprocess.Popen(
                    self.part.line,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=lambda: die_with(parent),
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
        """Ask what still runs to stop, then force it."""
        _end(self._processes, patience=0.0)

    def wait(self) -> Outcome:
        """Until all have ended; once one fails, the others get some time to notice."""
        failures = _wait(self._processes)
        if failures:
            place, code = _first_cause(failures, self._faults)
            fault = _fault(self._faults, place)
            why = fault or (killed(-code) if code < 0 else "it said nothing; see its log")
            follows = fault is not None and _follows(fault)
            return Outcome(code, self.part.first + place, why, follows)
        return Outcome(STOPPED if any(p.returncode == STOPPED for p in self._processes) else 0)

    def _end_now(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _first_cause(failures: Sequence[tuple[int, int]], faults: Path) -> tuple[int, int]:
    """The first failure that is not only the loss of another rank; those end sooner than the one that explains itself."""
    for rank, code in failures:
        why = _fault(faults, rank)
        if why is None or not _follows(why):
            return rank, code
    return failures[0]


def _follows(why: str) -> bool:
    return why.startswith("PeerFault") or " by peer" in why


def killed(number: int) -> str:
    if number == signal.SIGKILL:
        return "killed from outside: by the kernel when memory runs out (dmesg says so), by the scheduler, or by hand"
    return "the process crashed or was ended by that signal"


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


def _end(workers: Sequence[subprocess.Popen[bytes]], patience: float = PATIENCE) -> list[tuple[int, int]]:
    """End what still runs: let it notice by itself, then ask, then force. Rank and code of those that ended by themselves."""
    alone: list[tuple[int, int]] = []
    for ask in (None, signal.SIGTERM, signal.SIGKILL):
        if ask is not None:
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, ask)
        until = time.monotonic() + (patience if ask is None else GRACE)
        while time.monotonic() < until and any(worker.poll() is None for worker in workers):
            time.sleep(0.1)
        if ask is None:
            alone = [(rank, worker.returncode) for rank, worker in enumerate(workers) if worker.poll() is not None]
    return alone


@contextlib.contextmanager
def passing_signals(send: Callable[[int], None]) -> Iterator[None]:
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


def die_with(parent: int) -> None:
    """In the child: be told to stop when the launcher is gone (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def run_state(out: Path) -> tuple[str | None, str | None]:
    """The state of a run, and when it was started; None where there is no record."""
    try:
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
        return record.get("state"), record.get("started")
    except (OSError, ValueError):
        return None, None
