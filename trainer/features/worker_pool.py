"""A function over many items, in processes that may die or hang: that costs the item, not the others and not this process.

Decoders and encoders are foreign code that reads foreign bytes. Light to import: each process imports it.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout  # of its own before Python 3.11
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, NamedTuple, TypeVar

from trainer.features.types import ClipError
from trainer.termination import exit_on_termination

Item = TypeVar("Item")
Value = TypeVar("Value")

STARTS = 3  # of processes that die before they begin an item, one after the other, until that is a fault
WATCH = 0.2  # seconds between two looks at a process's memory and parent
TOO_MUCH_MEMORY = 113  # exit code of a process that says so


class WorkerError(RuntimeError):
    """No process can be started, or what is to be built once in each fails: every item would fail."""


def run_in_processes(
    function: Callable[[Item], Value],
    items: Iterable[Item],
    *,
    workers: int = 1,
    time_limit: float | None = None,
    memory_limit: int | None = None,
    initializer: Callable[..., object] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[tuple[Item, Value | ClipError]]:
    """Each item with `function(item)`, in the order in which they are done, or with the :class:`ClipError` that tells why there is no value.

    `function`, items, values and `arguments` are pickled. There is always a process, also for `workers` 0 or 1. An item is taken from `items` when a process
    is free for it. `initializer(*arguments)` runs once in each process before its first item, and again where one is replaced.

    A ClipError that the function raises is passed on. The kind is `crashed` where it raises anything else, where the process ends (by a signal, by exit, or for
    having more than `memory_limit` bytes resident), and `timed out` where the item takes longer than `time_limit` seconds, without the initializer's. Ctrl-C,
    SIGTERM and SIGHUP end the processes; so does closing the iterator; they also end when this process is gone.

    Raises:
        ValueError: raised by the initializer, or Pebble is not installed.
        WorkerError: the initializer raises anything else, or processes die before their first item.
    """
    begin = functools.partial(_begin, memory_limit, initializer, arguments)
    waiting = iter(items)
    free = [_Process(begin, time_limit) for _ in range(max(1, workers))]
    everyone = tuple(free)
    running: dict[Future[_Answer], tuple[_Process, Item]] = {}
    with exit_on_termination(), contextlib.ExitStack() as stack:
        stack.callback(_stop, everyone)
        while True:
            while free and (batch := _take(waiting)):
                process = free.pop()
                running[process.start(function, batch[0])] = process, batch[0]
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            results = []
            for future in done:
                process, item = running.pop(future)
                outcome = process.outcome(future, memory_limit)
                if outcome is None:  # it died before it began: another one tries
                    running[process.start(function, item)] = process, item
                    continue
                free.append(process)
                results.append((item, outcome[0]))
            while free and (batch := _take(waiting)):  # before the results: the caller may take its time with them
                process = free.pop()
                running[process.start(function, batch[0])] = process, batch[0]
            yield from results


class StandingProcess:
    """One process that waits for items as long as it is not closed; for services, which do not know their items beforehand.

    Arguments are those of :func:`run_in_processes`. One thread at a time may use it.
    """

    def __init__(
        self,
        time_limit: float | None = None,
        memory_limit: int | None = None,
        initializer: Callable[..., object] | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> None:
        self._process = _Process(functools.partial(_begin, memory_limit, initializer, arguments), time_limit)
        self._memory_limit = memory_limit

    def run(self, function: Callable[[Item], Value], item: Item) -> Value | ClipError:
        """`function(item)`, or why there is no value; raises as :func:`run_in_processes` does."""
        while True:
            future = self._process.start(function, item)
            wait([future])
            outcome = self._process.outcome(future, self._memory_limit)
            if outcome is not None:
                found: Value | ClipError = outcome[0]
                return found

    def start(self) -> None:
        """Start the process and what is built in it, before the first item; raises as :func:`run_in_processes` does."""
        self.run(_nothing, None)

    def close(self) -> None:
        """End the process, also in the middle of an item."""
        self._process.stop()
        self._process.join()


def _take(waiting: Iterator[Item]) -> list[Item]:
    """The next item, in a list; an empty one where there is none."""
    for item in waiting:
        return [item]
    return []


def _stop(processes: Iterable[_Process]) -> None:
    """End all processes, at once rather than one after the other."""
    for process in processes:
        process.stop()
    for process in processes:
        process.join()


class _Answer(NamedTuple):
    """What comes back from a process that lives."""

    kind: Literal["value", "told", "fault"]
    content: Any


class _Process:
    """One process at a time, and its successor when it has died.

    Each is a pool of its own: the processes of one Pebble pool share a lock, which one that dies at the wrong moment would keep.
    """

    def __init__(self, begin: Callable[[], None], time_limit: float | None) -> None:
        self._begin, self._time_limit = begin, time_limit
        self._pool: Any = None  # a ProcessPool of Pebble, whose methods have no types
        self._failed_starts = 0

    def start(self, function: Callable[[Item], Value], item: Item) -> Future[_Answer]:
        if self._pool is not None and not self._pool.active:  # its process died between two items
            self.stop()
            self.join()
        if self._pool is None:
            try:
                from pebble import ProcessPool
            except ImportError as error:
                raise ValueError(f"clips need Pebble ({error}): pip install 'egmf-trainer[clips]'") from error
            context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
            self._pool = ProcessPool(1, initializer=self._begin, context=context)
        future: Future[_Answer] = self._pool.schedule(_call, (function, item), timeout=self._time_limit)
        return future

    def outcome(self, future: Future[_Answer], memory_limit: int | None) -> tuple[Any] | None:
        """The value or the ClipError; None where the process died before it began the item."""
        from pebble import ProcessExpired

        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                raise WorkerError(f"{STARTS} processes ended one after the other before they began their work")
            return None
        self._failed_starts = 0
        if isinstance(error, FutureTimeout):
            return (ClipError("timed out", f"took longer than the time limit of {self._time_limit:g} seconds"),)
        if isinstance(error, ProcessExpired):
            return (ClipError("crashed", _end(error.exitcode, memory_limit)),)
        if error is not None:
            raise error
        answer = future.result()
        if answer.kind == "fault":
            raise answer.content
        return (answer.content,)

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()

    def join(self) -> None:
        if self._pool is not None:
            self._pool.join()
            self._pool = None


def _end(code: int, memory_limit: int | None) -> str:
    """How a process ended, in words."""
    if code == TOO_MUCH_MEMORY and memory_limit is not None:
        return f"the process that read it was ended: it took more than {memory_limit / 2**30:g} GiB of memory"
    if code >= 0:
        return f"the process that read it ended with exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        hint = ", which is how the system ends a process when memory runs out" if name == "SIGKILL" else ""
        return f"the process that read it was ended by {name}{hint}"
    return f"the process that read it was ended by signal {-code}"


# ── in the process ───────────────────────────────────────────────────────────────────────────────────────────────────


def _nothing(item: None) -> None:
    """What a process does that is only to be started."""


class _State:
    """Of this process."""

    working = False  # inside the function: only then may it end itself, for then it holds no lock of the pool
    fault: Exception | None = None  # of the initializer


def _begin(memory_limit: int | None, initializer: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_watch, args=(os.getppid(), memory_limit), daemon=True).start()
    if initializer is not None:
        try:
            initializer(*arguments)
        except ValueError as error:
            _State.fault = ValueError(str(error))
        except Exception:  # noqa: BLE001 - it may not survive pickling, so its words are kept
            _State.fault = WorkerError(f"a process cannot be set up:\n{traceback.format_exc()}")


def _watch(parent: int, memory_limit: int | None) -> None:
    """End this process when it takes too much memory, or when its parent is gone."""
    import psutil

    this = psutil.Process()
    while os.getppid() == parent:
        if memory_limit is not None and this.memory_info().rss > memory_limit and _State.working:
            os._exit(TOO_MUCH_MEMORY)
        time.sleep(WATCH)
    os._exit(1)


def _call(function: Callable[[Item], Value], item: Item) -> _Answer:
    """The function's value, or why there is none."""
    if _State.fault is not None:
        return _Answer("fault", _State.fault)
    _State.working = True
    try:
        value = function(item)
        ForkingPickler.dumps(value)  # here, where a value that cannot be pickled costs its item alone
        return _Answer("value", value)
    except ClipError as error:
        return _Answer("told", error)
    except Exception as error:  # noqa: BLE001 - it costs this item alone
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}:{last.lineno}"
        return _Answer("told", ClipError("crashed", f"{type(error).__name__} at {place}: {error}"))
    finally:
        _State.working = False
