"""Runs on this machine, several at once: each in a worker that is used again, or, with several processes, in a launcher's.

One loop in one thread: it waits for answers and for ends of processes, and starts the next run where a place is free.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Generic, Protocol, TypeVar

from launch.start.local import STOPPED, command, die_with, passing_signals

LEAVE = 60.0  # seconds that a worker with nothing more to do has for its end
LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Job(Protocol):
    """A run to be made: its config file and its folder."""

    @property
    def file(self) -> Path: ...
    @property
    def out(self) -> Path: ...


AnyJob = TypeVar("AnyJob", bound=Job)


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: a signal), what made it fail where that is known, and whether its process leaves."""

    code: int
    failure: str | None = None
    leaves: bool = False


@dataclass(frozen=True)
class Budget:
    """What the runs share: `parallel` at once, each of `procs` processes, on these cores and GPUs."""

    parallel: int = 1
    procs: int = 1
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    gpus: tuple[str, ...] = ()

    def environment(self, place: int) -> dict[str, str]:
        """Of the processes at `place` (from 0): its share of the cores, unless OMP_NUM_THREADS is set, and of the GPUs."""
        own = {key: value for key, value in os.environ.items() if key not in LAUNCHER_KEYS}
        own.setdefault("OMP_NUM_THREADS", str(max(1, self.cores // (self.parallel * self.procs))))
        if self.gpus:
            each = max(1, len(self.gpus) // self.parallel)
            first = place * each % len(self.gpus)
            own["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[first : first + each])
        return own


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip() not in ("", "-1"))
    import torch

    return tuple(str(number) for number in range(torch.cuda.device_count()))


class Pool(Generic[AnyJob]):
    """Makes all `jobs`; `begins` and `ends` are told of each. `logs`: folder for what the processes write.

    A run that fails, or whose process dies, is told as such and the others go on. A stop signal to this process is passed to all
    runs, and no further one begins.
    """

    def __init__(
        self,
        budget: Budget,
        logs: Path,
        begins: Callable[[AnyJob], None],
        ends: Callable[[AnyJob, Ended], None],
        *,
        debug: bool = False,
    ) -> None:
        self.stopping = False
        self._budget, self._begins, self._ends = budget, begins, ends
        self._places: list[_Place[AnyJob]] = [
            _Place(budget.procs, budget.environment(number), logs / f"worker-{number}.log", debug)
            for number in range(budget.parallel)
        ]

    def run(self, jobs: Iterable[AnyJob]) -> None:
        waiting = deque(jobs)
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as events:
            for place in self._places:
                stack.callback(place.close)
            stack.enter_context(passing_signals(self._stop))
            while True:
                for place in self._places:
                    if waiting and place.job is None and not self.stopping:
                        self._begins(waiting[0])
                        place.start(waiting.popleft(), events)
                        if self.stopping:  # asked for meanwhile
                            place.signal(signal.SIGTERM)
                if all(place.job is None for place in self._places):
                    return
                for place in {key.data for key, _ in events.select()}:
                    job, ended = place.look(events)
                    if job is not None and ended is not None:
                        unheard = self.stopping and ended.code and ended.failure is None  # before it could listen
                        self._ends(job, Ended(STOPPED) if unheard else ended)

    def _stop(self, number: int) -> None:
        self.stopping = True
        for place in self._places:
            place.signal(number)


class _Place(Generic[AnyJob]):
    """Room for one run at a time, and the process there."""

    def __init__(self, procs: int, environment: dict[str, str], log: Path, debug: bool) -> None:
        self.job: AnyJob | None = None
        self._procs, self._environment, self._log, self._debug = procs, environment, log, debug
        self._process: subprocess.Popen[str] | None = None
        self._end: int | None = None  # file descriptor that tells the end of the process
        self._answers: IO[str] | None = None  # of a worker

    def start(self, job: AnyJob, events: selectors.BaseSelector) -> None:
        self.job = job
        if self._procs > 1:
            line = command(job.file, [], job.out, debug=self._debug)
            self._open([*line[:3], "launch", "local", "--procs", str(self._procs), *line[4:]], events)
            return
        if self._process is None:
            readable, writable = os.pipe()
            self._answers = os.fdopen(readable, encoding="utf-8")
            self._open([sys.executable, "-m", "launch.sweep.worker", str(writable)], events, writable)
            os.close(writable)
            events.register(self._answers, selectors.EVENT_READ, self)
        asked = {"config": str(job.file), "out": str(job.out), "debug": self._debug}
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; its end tells
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()

    def look(self, events: selectors.BaseSelector) -> tuple[AnyJob | None, Ended | None]:
        """The run that has ended and how, if one has; called when something happened."""
        job = self.job
        ended = self._answer()
        code = None if self._process is None else self._process.poll()
        if ended is None and code is None:
            return None, None
        if ended is None:
            ended = Ended(code or 0)
            if self._procs == 1 and ended.code == 0:
                ended = Ended(1, "its process left without a word")
        if code is not None or ended.leaves:
            self._close(events)
        self.job = None
        return job, ended

    def signal(self, number: int) -> None:
        if self._process is not None and self.job is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def close(self) -> None:
        """End the process now, unless it ends by itself for want of work."""
        self._close(None)

    def _answer(self) -> Ended | None:
        if self._answers is None or self.job is None:
            return None
        with selectors.DefaultSelector() as ready:
            ready.register(self._answers, selectors.EVENT_READ)
            line = self._answers.readline() if ready.select(0) else ""
        return Ended(**json.loads(line)) if line.endswith("\n") else None

    def _open(self, line: Sequence[str], events: selectors.BaseSelector, *fds: int) -> None:
        parent = os.getpid()
        with self._log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                line,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=fds,
                start_new_session=True,
                text=True,
                preexec_fn=lambda: die_with(parent),
            )
        self._end = os.pidfd_open(self._process.pid)
        events.register(self._end, selectors.EVENT_READ, self)

    def _close(self, events: selectors.BaseSelector | None) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # a worker ends when it is asked for nothing more
        try:
            self._process.wait(0.0 if self.job is not None and events is None else LEAVE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for held in (self._end, self._answers):
            if held is not None and events is not None:
                events.unregister(held)
        if self._end is not None:
            os.close(self._end)
        if self._answers is not None:
            self._answers.close()
        self._process = self._end = self._answers = None
