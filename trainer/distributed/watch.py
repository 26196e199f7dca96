"""A run that makes no progress is ended, with the stacks of every rank, rather than left to hang.

Every rank has a thread that writes to the store of the rendezvous (torch's TCP store) whether its rank makes progress. When
none has for too long, the lowest rank that still answers raises the alarm; every rank answers with its stacks; the one that
raised it judges who is at fault; all end. A rank that does not answer is frozen, dead or cut off.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch.distributed as dist
from pydantic import BaseModel

from trainer.distributed.faults import report_to_launcher
from trainer.distributed.flight import FOLDER, keep_files_in, take_flight_record
from trainer.distributed.rank_snapshots import RankSnapshot, format_stacks, headline, take_snapshot
from trainer.distributed.world import World

log = logging.getLogger(__name__)

START = 1800.0  # seconds that loading, compiling and the first step may take between two heartbeats, at least
SLOWER = 3.0  # a pause up to so many times the longest one before raises no alarm
PATIENCE = 10.0  # seconds without an answer, after which a rank counts as silent
LEAVE = 10.0  # seconds that the ranks have to close their records once the alarm is judged
T = TypeVar("T")


class StuckError(RuntimeError):
    """The run made no progress; the message lists which rank waited where."""


class Verdict(BaseModel):
    """What the rank that raised the alarm found, for all that answered it."""

    reason: str
    answered: int  # ranks, its own included


class _Silent(Exception):
    """The store does not answer: the process that keeps it is frozen or gone."""


class Watch:
    """Ends the run on all ranks when no rank makes progress for `seconds`; 0 switches it off. Entered by all ranks.

    Progress is a call of :meth:`heartbeat`. One rank that is slow but makes progress keeps the alarm off. Until
    :meth:`started` (loading, compiling, the first step) at least `START` seconds are allowed, and always `SLOWER` times
    the longest pause there has been between two heartbeats.
    """

    def __init__(
        self,
        out: Path,
        world: World,
        seconds: float,
        *,
        patience: float = PATIENCE,
        record_failure: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.out, self.world, self.seconds, self.patience = out, world, seconds, patience
        self.closing: Callable[[str], None] | None = None  # how rank 0 closes its record; it gets the reason
        self._record_failure = record_failure  # how another rank closes it where rank 0 does not answer
        self._doing, self._since, self._slack = "starting", time.monotonic(), 1.0
        self._start, self._longest = START, 0.0
        self._leaving, self._alarmed = threading.Event(), threading.Event()
        self._period = min(5.0, max(0.2, seconds / 20))
        self._thread: threading.Thread | None = None
        self._store: _Store | None = None
        self._rounds = 0  # of this thread: what a living process changes in the store
        self._lives: dict[int, tuple[str, float]] = {}  # rank -> what it last wrote, and when that was first read

    def __enter__(self) -> Watch:
        if self.world.device.type == "cuda" and self.world.size > 1:
            keep_files_in(self.out, os.environ)
        if not self.seconds:
            return self
        self._lengthen_timeouts()
        key = self.world.broadcast_object(secrets.token_hex(4))
        if self.world.size > 1:
            self._store = _Store(f"egmf/watch/{key}", self.patience)
            self._store.ask(lambda store: store.set(f"life/{self.world.rank}", "starting"))
            self.world.barrier()
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.block_while_aborting()
        self._leaving.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)
            faulthandler.cancel_dump_traceback_later()

    def heartbeat(self, what: str, slack: float = 1.0) -> None:
        """Note progress: `what` begins, and it may take `slack` times as long as other work."""
        moment = time.monotonic()
        if self._doing != "starting" and self._slack == 1.0:
            self._longest = max(self._longest, moment - self._since)
        self._doing, self._since, self._slack = what, moment, slack

    def started(self) -> None:
        """Note that the first step is done, so that nothing is compiled any more. Later calls do nothing."""
        if self._start and self.seconds:
            self._start = 0.0
            self._lengthen_timeouts()

    def block_while_aborting(self) -> None:
        """Wait for the end while an alarm ends the process: what fails now fails because the other ranks are ending."""
        if self._alarmed.is_set():
            time.sleep(3600)

    def _lengthen_timeouts(self) -> None:
        """Make the process groups' own time-outs longer than the watch's: they report less, and NCCL's ends the process at once.

        Groups that libraries make have torch's defaults (NCCL: 10 minutes), whatever the first one was given.
        """
        limit = timedelta(seconds=max(START, 3 * self.seconds) + 300)
        for group in list(dist.distributed_c10d._world.pg_map) if self.world.size > 1 else ():
            with contextlib.suppress(AttributeError, ValueError):
                dist.distributed_c10d._set_pg_timeout(limit, group)

    def _pause(self) -> float:
        return time.monotonic() - self._since

    def _late(self) -> bool:
        return self._pause() > max(self.seconds * self._slack, SLOWER * self._longest, self._start)

    def _run(self) -> None:
        with _native_stacks(self.out, self.world.rank) as native:
            leaving = False
            while not leaving:
                if native is not None:  # written where this thread cannot run, since native code holds Python's lock
                    faulthandler.dump_traceback_later(self.seconds + self.patience, file=native)
                began = time.monotonic()
                leaving = self._leaving.wait(self._period)
                slept = time.monotonic() - began
                if slept > self._period + self.patience:  # the whole process was suspended, and goes on
                    self._since += slept
                judge = None if leaving else self._check()
                if judge is not None:
                    self._abort(judge)
        with contextlib.suppress(_Silent):
            if self._store is not None:
                self._store.ask(lambda store: store.set(f"life/{self.world.rank}", "left"))

    def _check(self) -> int | None:
        """The rank that raised the alarm, maybe this one; None while there is none."""
        if self._store is None:
            return self.world.rank if self._late() else None
        try:
            return self._store.ask(self._exchange)
        except _Silent:
            return self.world.rank if self._late() else None

    def _exchange(self, store: dist.Store) -> int | None:
        rank, late = self.world.rank, self._late()
        self._rounds += 1
        store.set(f"life/{rank}", f"{self._rounds} {'late' if late else 'moves'}")
        if store.check(["alarm"]):
            return int(store.get("alarm"))
        if not late:
            return None
        for other in range(self.world.size):
            if other == rank or (life := self._life(store, other)) == "left":
                continue
            if life is not None and (other < rank or not life.endswith("late")):
                return None  # it will judge, or it moves
        return int(store.compare_set("alarm", "", str(rank)))

    def _life(self, store: dist.Store, rank: int) -> str | None:
        """What a rank last wrote of itself; None when it has been silent for too long."""
        life = store.get(f"life/{rank}").decode()
        before, since = self._lives.get(rank, ("", 0.0))
        if life != before:
            self._lives[rank] = life, time.monotonic()
            return life
        return life if life == "left" or time.monotonic() - since < self.patience else None

    def _abort(self, judge: int) -> None:
        """Answer the alarm, report what was found, and end this process."""
        self._alarmed.set()
        deadline = threading.Timer(3 * self.patience + 2 * LEAVE, os._exit, (1,))  # whatever hangs from here on
        deadline.daemon = True
        deadline.start()
        hidden = [threading.get_ident(), deadline.ident, *([self._store.thread.ident] if self._store else [])]
        own = take_snapshot(self.world.rank, self._doing, self._pause(), hidden)
        if self._store is not None:
            file = self.out / FOLDER / f"rank{self.world.rank}.json"
            own.flight = take_flight_record(file, self.patience / 3)
        try:
            self._report(judge, own)
        finally:
            logging.shutdown()
            os._exit(1)

    def _report(self, judge: int, own: RankSnapshot) -> None:
        rank = self.world.rank
        if judge != rank:
            log.info("rank %d raised an alarm; this one:\n%s", judge, format_stacks({rank: own}, []))
        snapshots, silent, reason, cut_off = {rank: own}, list[int](), "", False
        try:
            if judge == rank:
                snapshots, silent = self._collect(own)
            else:
                reason = self._await_verdict(judge, own)
        except _Silent:
            cut_off = True
            silent = [] if rank == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else [0]
        reason = reason or headline(snapshots, silent, own.seconds)
        reason += "; the ranks' store, which rank 0 or its launcher keeps, does not answer" if cut_off else ""
        text = f"{reason}\n{format_stacks(snapshots, silent)}"
        reports = rank == min(1, self.world.size - 1) if cut_off else judge == rank
        if cut_off or reports:
            log.error("%s", text)
        report_to_launcher(StuckError(reason))
        with contextlib.suppress(_Silent):
            if reports and self._store is not None and not cut_off:
                verdict = Verdict(reason=reason, answered=len(snapshots)).model_dump_json()
                self._store.ask(lambda store: store.set("verdict", verdict))
        if self.closing is not None:
            self.closing(reason)
        elif reports:
            self._report_for_rank_zero(reason, text, 0 in silent)
        with contextlib.suppress(_Silent):
            if self._store is not None and not cut_off:
                self._wait_for_closed_records()

    def _collect(self, own: RankSnapshot) -> tuple[dict[int, RankSnapshot], list[int]]:
        """The snapshots of the ranks, and the ranks that do not answer; those that have left the run are neither."""
        snapshots = {self.world.rank: own}
        if self._store is None:
            return snapshots, []
        asked = [r for r in range(self.world.size) if r != self.world.rank and not self._has_left(r)]
        until = time.monotonic() + self.patience
        while (missing := [r for r in asked if r not in snapshots]) and time.monotonic() < until:
            for rank in missing:
                text = self._read(f"snapshot/{rank}")
                if text is not None:
                    snapshots[rank] = RankSnapshot.model_validate_json(text)
            time.sleep(0.1)
        return dict(sorted(snapshots.items())), missing

    def _await_verdict(self, judge: int, own: RankSnapshot) -> str:
        """Answer the rank that raised the alarm, and wait for the reason that it finds."""
        assert self._store is not None
        self._store.ask(lambda store: store.set(f"snapshot/{self.world.rank}", own.model_dump_json()))
        until = time.monotonic() + 2 * self.patience
        while time.monotonic() < until:
            verdict = self._verdict()
            if verdict is not None:
                return verdict.reason
            time.sleep(0.1)
        return headline({self.world.rank: own}, [judge], own.seconds)

    def _report_for_rank_zero(self, reason: str, text: str, absent: bool) -> None:
        """Write what rank 0 would: the run's log, and its record where rank 0 cannot."""
        with (self.out / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"rank {self.world.rank}, in place of rank 0: {text}\n")
        if absent:
            self._record_failure(f"{StuckError.__name__}: {reason}")

    def _wait_for_closed_records(self) -> None:
        """Wait until all that answered have closed their records: a rank that ends closes the others' connections too."""
        assert self._store is not None
        verdict = self._verdict()
        count = 0 if verdict is None else verdict.answered
        closed = self._store.ask(lambda store: store.add("closed", 1))
        until = time.monotonic() + LEAVE
        while closed < count and time.monotonic() < until:
            time.sleep(0.1)
            closed = self._store.ask(lambda store: store.add("closed", 0))

    def _verdict(self) -> Verdict | None:
        text = self._read("verdict")
        return None if text is None else Verdict.model_validate_json(text)

    def _has_left(self, rank: int) -> bool:
        return self._read(f"life/{rank}") == "left"

    def _read(self, key: str) -> str | None:
        assert self._store is not None
        return self._store.ask(lambda store: store.get(key).decode() if store.check([key]) else None)


class _Store:
    """The ranks' store, asked through a connection and a thread of its own: a frozen server never answers."""

    def __init__(self, prefix: str, patience: float) -> None:
        self._patience = patience
        self._asked: queue.SimpleQueue[tuple[Callable[[dist.Store], Any], Future[Any]]] = queue.SimpleQueue()
        self._last: Future[Any] | None = None
        self.thread = threading.Thread(target=self._serve, args=(prefix,), name="watch's store", daemon=True)
        self.thread.start()

    def ask(self, work: Callable[[dist.Store], T]) -> T:
        """What `work` returns for the store.

        Raises:
            _Silent: no answer in time; or the connection is gone.
        """
        if self._last is not None and not self._last.done():  # still asked: wait for that
            try:
                self._last.exception(timeout=self._patience)
            except NoAnswer as error:
                raise _Silent from error
        asked: Future[T] = Future()
        self._last = asked
        self._asked.put((work, asked))
        try:
            return asked.result(timeout=self._patience)
        except (NoAnswer, RuntimeError) as error:
            raise _Silent from error

    def _serve(self, prefix: str) -> None:
        store: dist.Store | None = None
        while True:
            work, answer = self._asked.get()
            try:
                store = store or dist.PrefixStore(prefix, _connect(self._patience))
                answer.set_result(work(store))
            except Exception as error:  # noqa: BLE001
                answer.set_exception(error)


def _connect(patience: float) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=max(patience, PATIENCE))
    return dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)


@contextlib.contextmanager
def _native_stacks(out: Path, rank: int) -> Iterator[TextIO | None]:
    """The file for stacks that the interpreter writes without Python's lock; None where it cannot be opened."""
    try:
        file = (out / ("log.txt" if rank == 0 else f"log.rank{rank}.txt")).open("a", encoding="utf-8")
    except OSError as error:
        log.warning("stacks of a stuck run cannot be written: %s", error)
        yield None
        return
    try:
        yield file
    finally:
        faulthandler.cancel_dump_traceback_later()
        file.close()
