"""What answers requests: the model once it is loaded, the threads that prepare samples, the queue, and what all requests hold."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainer.serving.http.batching import Batcher
from trainer.serving.http.body import ClientGoneError, Receive, read_body, wait_for_answer
from trainer.serving.http.budget import Budget, Share
from trainer.serving.http.faults import RefusedError, busy, too_large, unavailable
from trainer.serving.http.form import is_multipart
from trainer.serving.http.limits import Limits
from trainer.serving.http.metrics import Metrics

if TYPE_CHECKING:  # they import torch
    from trainer.serving.http.model import ServedModel, Work
    from trainer.serving.prediction import Prediction

log = logging.getLogger(__name__)

State = Literal["loading", "ready", "stopping", "failed"]
THREADS = 4  # that read and check samples, and as many for forms: whoever waits for a clip keeps no JSON waiting


@dataclass
class _Open:
    """What there is once the model is loaded."""

    model: ServedModel
    batcher: Batcher


class Service:
    """Answers requests until it is stopped.

    Args:
        load: opens the model; called once, in a thread.
        unbatched: pass every sample through the model alone, to compare with.
    """

    def __init__(
        self, load: Callable[[], ServedModel], limits: Limits, metrics: Metrics, *, unbatched: bool = False
    ) -> None:
        self.limits, self.metrics = limits, metrics
        self.state: State = "loading"
        self.fault: BaseException | None = None
        self._load, self._unbatched = load, unbatched
        self._open: _Open | None = None
        self._pace = 0.0  # seconds of the model for one sample, lately
        self.held = Budget(
            limits.held_bytes,
            lambda: busy("too_much_held", "the server holds too many bytes: ask again", self._wait()),
            lambda: too_large(f"the arrays of the request take more than {limits.max_held_mib:g} MiB"),
        )
        self.places = Budget(
            limits.max_queue,
            lambda: busy("queue_full", "too many samples wait: ask again", self._wait()),
            lambda: too_large(f"the request has more samples than {limits.max_queue} that may wait"),
        )
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prepare")
        self._form_threads = ThreadPoolExecutor(THREADS, thread_name_prefix="form")
        self._lock = threading.Lock()  # of the state
        self._requests = 0
        metrics.watch(lambda: self.places.held, lambda: self.held.held)

    # ── its life ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Load the model in a thread; where that fails, :attr:`state` is `failed` and :attr:`fault` says why."""
        threading.Thread(target=self._open_model, name="load", daemon=True).start()

    def _open_model(self) -> None:
        try:
            model = self._load()
        except BaseException as error:  # noqa: BLE001 - the main thread reports it
            self.fault, self.state = error, "failed"
            return
        most = 1 if self._unbatched else model.batch or self.limits.max_queue
        wait = 0.0 if self._unbatched else self.limits.max_wait_ms / 1000
        self._open = _Open(model, Batcher(model.answer, model.tokens, most, wait, self._observe))
        with self._lock:
            if self.state != "loading":
                return
            self.state = "ready"
            self.metrics.ready.set(1)
            log.info("ready: answers %s", ", ".join(model.tasks["tasks"]))

    def stop(self) -> None:
        """Take no more requests; those that were taken are answered, and :attr:`busy` is false once they are."""
        with self._lock:
            if self.state != "failed":
                self.state = "stopping"
            self.metrics.ready.set(0)

    @property
    def busy(self) -> bool:
        """Whether requests are not yet answered."""
        return self._requests > 0

    def close(self) -> None:
        """End threads and processes."""
        for threads in (self._threads, self._form_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._open is not None:
            self._open.model.close()
            self._open.batcher.stop(wait=not self.busy)

    def remove_files(self) -> None:
        """Remove what clients sent, where the process ends without :meth:`close`; no lock is taken."""
        if self._open is not None:
            self._open.model.remove_files()

    def ready(self) -> ServedModel:
        """The model; raises RefusedError (503) where it is not there."""
        return self._ready().model

    def _ready(self) -> _Open:
        if self.state == "ready" and self._open is not None:
            return self._open
        if self.state == "stopping":
            raise unavailable("stopping", "the server is being stopped")
        raise unavailable("loading", "the model is being loaded")

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def predict(self, headers: Mapping[str, str], receive: Receive) -> dict[str, Any]:
        """The answer to a request for predictions.

        Raises:
            RefusedError: it is refused.
            ClientGoneError: its client has left.
        """
        there = self._ready()
        content_type = headers.get("content-type", "")
        form = is_multipart(content_type)
        _check_type(form, content_type, headers.get("content-encoding", "identity"))
        places, held = self.places.share(), self.held.share()
        self._requests += 1
        preparing: Future[Work] | None = None
        try:
            places.take(1)
            most = self.limits.clip_bytes if form else self.limits.body_bytes
            body = await read_body(receive, headers, most, self.limits.body_seconds, held.take)
            until = time.monotonic() + self.limits.answer_seconds
            preparing = (self._form_threads if form else self._threads).submit(
                there.model.read, body, content_type if form else None, held.take, lambda n: places.take(n - 1)
            )
            del body
            work = await wait_for_answer(asyncio.wrap_future(preparing), receive, until - time.monotonic())
            predictions = await self._answered(there.batcher, work, receive, until)
        except ClientGoneError:
            self.metrics.cancelled.inc()
            raise
        finally:
            self._requests -= 1
            _give_back(preparing, places, held)
        for one in predictions:
            self.metrics.predictions.labels(one.task).inc()
        return work.answer(predictions)

    async def _answered(self, batcher: Batcher, work: Work, receive: Receive, until: float) -> list[Prediction]:
        ticket = batcher.submit(work.prepared)
        try:
            return await wait_for_answer(asyncio.wrap_future(ticket.done), receive, until - time.monotonic())
        finally:
            ticket.cancel()  # of no effect where it is answered

    def _observe(self, samples: int, seconds: float) -> None:
        self.metrics.batch_samples.observe(samples)
        self.metrics.batch_seconds.observe(seconds)
        now = seconds / samples
        self._pace = now if not self._pace else 0.8 * self._pace + 0.2 * now

    def _wait(self) -> int:
        """Seconds until about half of what waits is answered."""
        return min(60, max(1, math.ceil(self._pace * self.limits.max_queue / 2)))


def _check_type(form: bool, content_type: str, encoding: str) -> None:
    """Raises RefusedError (415) for what is neither JSON nor a form, or is compressed."""
    if not form and content_type.partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(
            415, "wrong_type", "the Content-Type must be application/json, or multipart/form-data for files"
        )
    if encoding.strip().lower() != "identity":
        raise RefusedError(415, "wrong_encoding", "compressed bodies are not read: leave Content-Encoding out")


def _give_back(preparing: Future[Work] | None, *shares: Share) -> None:
    """What a request held, once its preparation, which cannot be broken off, is at its end."""

    def close(_: object = None) -> None:
        for share in shares:
            share.close()

    if preparing is None or preparing.cancel() or preparing.done():
        close()
    else:
        preparing.add_done_callback(close)
