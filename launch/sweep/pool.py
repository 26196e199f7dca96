"""Runs on this machine, several at once: each in a worker that is used again, or, with several processes, in a launcher's.

One loop in one thread: it waits for answers and for ends of processes, and starts the next run where a slot is free.
A `concurrent.futures.ProcessPoolExecutor` would do for neither: it ends all its work when one process dies, passes no
signals on, and gives every process the same environment.
"""

from __future__ import annotations

import contextlib
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

from launch.start.local import die_with_parent, forward_signals, train_command
from launch.sweep.messages import RunRequest, RunResult
from trainer.distributed.launcher import RANK_VARIABLES, STOPPED

WORKER_GRACE = 60.0  # seconds that a worker with nothing more to do has for its end


class Job(Protocol):
    """A run to be made: its config file and its folder."""

    @property
    def file(self) -> Path: ...
    @property
    def out(self) -> Path: ...


AnyJob = TypeVar("AnyJob", bound=Job)


@dataclass(frozen=True)
class Budget:
    """What the runs share: `parallel` at once, each of `procs` processes, on these cores and GPUs."""

    parallel: int = 1
    procs: int = 1
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    gpus: tuple[str, ...] = ()

    def environment(self, slot: int) -> dict[str, str]:
        """Of the processes in `slot` (from 0): its share of the cores, unless OMP_NUM_THREADS is set, and of the GPUs."""
        variables = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
        variables.setdefault("OMP_NUM_THREADS", str(max(1, self.cores // (self.parallel * self.procs))))
        if self.gpus:
            each = max(1, len(self.gpus) // self.parallel)
            first = slot * each % len(self.gpus)
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[first : first + each])
        return variables


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs that this process may use."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return tuple(name.strip() for name in listed.split(",") if name.strip() not in ("", "-1"))
    import torch

    return tuple(str(number) for number in range(torch.cuda.device_count()))


class Pool(Generic[AnyJob]):
    """Makes all `jobs`; `on_start` and `on_end` are called for each. `logs`: folder for what the processes write.

    A run that fails, or whose process dies, is reported as such and the others go on. A stop signal to this process is
    passed to all runs, and no further one begins.
    """

    def __init__(
        self,
        budget: Budget,
        logs: Path,
        on_start: Callable[[AnyJob], None],
        on_end: Callable[[AnyJob, RunResult], None],
        *,
        debug: bool = False,
    ) -> None:
        self.stopping = False
        self._on_start, self._on_end = on_start, on_end
        self._slots: list[_Slot[AnyJob]] = [
            _Slot(budget.procs, budget.environment(number), logs / f"worker-{number}.log", debug)
            for number in range(budget.parallel)
        ]

    def run(self, jobs: Iterable[AnyJob]) -> None:
        waiting = deque(jobs)
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as events:
            for slot in self._slots:
                stack.callback(slot.close)
            stack.enter_context(forward_signals(self._stop))
            while True:
                for slot in self._slots:
                    if waiting and slot.job is None and not self.stopping:
                        self._on_start(waiting[0])
                        slot.start(waiting.popleft(), events)
                        if self.stopping:  # asked for meanwhile
                            slot.signal(signal.SIGTERM)
                if all(slot.job is None for slot in self._slots):
                    return
                for slot in {key.data for key, _ in events.select()}:
                    job, result = slot.poll(events)
                    if job is not None and result is not None:
                        # it could not listen yet when the signal came
                        interrupted = self.stopping and result.code and result.failure is None
                        self._on_end(job, RunResult(STOPPED) if interrupted else result)

    def _stop(self, number: int) -> None:
        self.stopping = True
        for slot in self._slots:
            slot.signal(number)


class _Slot(Generic[AnyJob]):
    """Room for one run at a time, and the process there."""

    def __init__(self, procs: int, environment: dict[str, str], log: Path, debug: bool) -> None:
        self.job: AnyJob | None = None
        self._procs, self._environment, self._log, self._debug = procs, environment, log, debug
        self._process: subprocess.Popen[str] | None = None
        self._end: int | None = None  # file descriptor that becomes readable when the process ends
        self._answers: IO[str] | None = None  # of a worker

    def start(self, job: AnyJob, events: selectors.BaseSelector) -> None:
        self.job = job
        if self._procs > 1:
            line = train_command(job.file, [], job.out, debug=self._debug)
            self._open([*line[:3], "launch", "local", "--procs", str(self._procs), *line[4:]], events)
            return
        if self._process is None:
            readable, writable = os.pipe()
            self._answers = os.fdopen(readable, encoding="utf-8")
            self._open([sys.executable, "-m", "launch.sweep.worker", str(writable)], events, writable)
            os.close(writable)
            events.register(self._answers, selectors.EVENT_READ, self)
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, as the end of the process says
            self._process.stdin.write(RunRequest(str(job.file), str(job.out), self._debug).to_line())
            self._process.stdin.flush()

    def poll(self, events: selectors.BaseSelector) -> tuple[AnyJob | None, RunResult | None]:
        """The run that has ended and how, if one has; called when something happened."""
        job = self.job
        result = self._answer()
        code = None if self._process is None else self._process.poll()
        if result is None and code is None:
            return None, None
        if result is None:
            result = RunResult(code or 0)
            if self._procs == 1 and result.code == 0:
                result = RunResult(1, "its process ended without an answer")
        if code is not None or result.leaves:
            self._close(events)
        self.job = None
        return job, result

    def signal(self, number: int) -> None:
        if self._process is not None and self.job is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def close(self) -> None:
        """End the process now, unless it ends by itself for want of work."""
        self._close(None)

    def _answer(self) -> RunResult | None:
        if self._answers is None or self.job is None:
            return None
        with selectors.DefaultSelector() as ready:
            ready.register(self._answers, selectors.EVENT_READ)
            line = self._answers.readline() if ready.select(0) else ""
        return RunResult.from_line(line) if line.endswith("\n") else None

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
                preexec_fn=lambda: die_with_parent(parent),
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
            self._process.wait(0.0 if self.job is not None and events is None else WORKER_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for source in (self._end, self._answers):
            if source is not None and events is not None:
                events.unregister(source)
        if self._end is not None:
            os.close(self._end)
        if self._answers is not None:
            self._answers.close()
        self._process = self._end = self._answers = None
