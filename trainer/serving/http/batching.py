"""Dynamic batching: samples of all requests wait in one queue, and one thread passes as many through the model as a token budget holds.

The first sample waits at most a few milliseconds for others; while the model works, more arrive, so that batches grow with the load.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # they import torch
    from trainer.serving.prediction import Prediction, Prepared

log = logging.getLogger(__name__)


class Answer(Protocol):
    """Passes samples through the model; predictions come in the order of the samples."""

    def __call__(self, prepared: Sequence[Prepared]) -> list[Prediction]: ...


class Observer(Protocol):
    """Is told of every batch: its samples, and the seconds that it took."""

    def __call__(self, samples: int, seconds: float) -> None: ...


@dataclass
class Ticket:
    """The samples of one request on their way through the model. `done` gets the predictions in order, or the error."""

    left: int
    answers: list[list[Prediction]]
    done: Future[list[Prediction]] = field(default_factory=Future)

    def cancel(self) -> None:
        """Its samples that still wait pass no model; the other requests are not touched."""
        self.done.cancel()

    def put(self, place: int, predictions: list[Prediction]) -> None:
        self.answers[place] = predictions
        self.left -= 1
        if self.left == 0 and self.done.set_running_or_notify_cancel():
            self.done.set_result([one for several in self.answers for one in several])

    def fail(self, error: BaseException) -> None:
        if not self.done.done() and self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)


@dataclass(frozen=True)
class _Waiting:
    ticket: Ticket
    place: int
    prepared: Prepared


class Batcher:
    """Answers samples in batches of at most `tokens` positions (one sample may have more), in the order in which they came.

    Args:
        answer: passes samples through the model; called in one thread alone.
        tokens: positions of a batch, by :attr:`Prepared.cost`; 0: as many as `most`.
        most: samples of a batch.
        wait: seconds that the first sample of a batch waits for others.
        observe: is told of every batch.
    """

    def __init__(
        self, answer: Answer, tokens: int, most: int, wait: float, observe: Observer = lambda samples, seconds: None
    ) -> None:
        self._answer, self._tokens, self._most, self._wait, self._observe = answer, tokens, most, wait, observe
        self._queue: deque[_Waiting] = deque()
        self._cost = 0  # of all that wait
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, prepared: Sequence[Prepared]) -> Ticket:
        """Queue the samples of one request, at least one."""
        ticket = Ticket(len(prepared), [[] for _ in prepared])
        with self._changed:
            if self._stopping:
                raise RuntimeError("the batcher is stopped")
            self._queue.extend(_Waiting(ticket, i, one) for i, one in enumerate(prepared))
            self._cost += sum(one.cost for one in prepared)
            self._changed.notify()
        return ticket

    def stop(self, *, wait: bool = True) -> None:
        """Answer what waits, then end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if wait:
            self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            started = time.monotonic()
            self._pass(batch)
            self._observe(len(batch), time.monotonic() - started)

    def _next(self) -> list[_Waiting]:
        """The next batch; an empty one at the end."""
        with self._changed:
            while True:
                while not self._queue and not self._stopping:
                    self._changed.wait()
                until = time.monotonic() + self._wait
                while not self._full() and not self._stopping and (rest := until - time.monotonic()) > 0:
                    self._changed.wait(rest)
                batch = self._take()
                if batch or self._stopping:
                    return batch

    def _full(self) -> bool:
        return len(self._queue) >= self._most or 0 < self._tokens <= self._cost

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        cost = 0
        while self._queue and len(batch) < self._most:
            one = self._queue[0]
            if one.ticket.done.done():  # cancelled, or failed with an earlier batch
                self._drop()
                continue
            if batch and 0 < self._tokens < cost + one.prepared.cost:
                break
            batch.append(one)
            cost += one.prepared.cost
            self._drop()
        return batch

    def _drop(self) -> None:
        self._cost -= self._queue.popleft().prepared.cost

    def _pass(self, batch: Sequence[_Waiting]) -> None:
        """Answer a batch. Where that fails, each request of it is tried alone, so that it costs none but the one that is at fault."""
        try:
            predictions = self._answer([one.prepared for one in batch])
            wanted = sum(len(one.prepared.tasks) for one in batch)
            if len(predictions) != wanted:
                raise RuntimeError(f"the model gave {len(predictions)} answers to {wanted} questions")
        except Exception as error:
            tickets = list({id(one.ticket): one.ticket for one in batch}.values())
            if len(tickets) == 1:
                log.exception("the model failed on a request")
                tickets[0].fail(error)
                return
            log.warning("the model failed on a batch of %d requests; each is tried alone", len(tickets))
            for ticket in tickets:
                self._pass([one for one in batch if one.ticket is ticket])
            return
        rest = iter(predictions)
        for one in batch:
            one.ticket.put(one.place, [next(rest) for _ in one.prepared.tasks])
