"""Figures of the server in the form that Prometheus reads, in an own registry; of several workers together, where there are several."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from trainer.serving.http.server import SHARED

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The figures of one process. No label has words of a client."""

    def __init__(self) -> None:
        self._own = own = CollectorRegistry()
        self._shared = SHARED in os.environ
        if not self._shared:
            ProcessCollector(registry=own)
        self.requests = Counter("egmf_requests", "requests answered", ["path", "status"], registry=own)
        self.seconds = Histogram(
            "egmf_request_seconds", "seconds of a request", ["path"], buckets=_SECONDS, registry=own
        )
        self.refused = Counter("egmf_refused", "requests refused, by the code of the error", ["code"], registry=own)
        self.predictions = Counter("egmf_predictions", "answers given", ["task"], registry=own)
        self.cancelled = Counter("egmf_cancelled", "requests whose client left before the answer", registry=own)
        self.batch_samples = Histogram("egmf_batch_samples", "samples of a batch", buckets=_SAMPLES, registry=own)
        self.batch_seconds = Histogram(
            "egmf_batch_seconds", "seconds that a batch spends in the model", buckets=_SECONDS, registry=own
        )
        self.waiting = self._gauge("egmf_queue_samples", "samples that are taken and not yet answered")
        self.held = self._gauge("egmf_held_bytes", "bytes of bodies and arrays that are held")
        self.ready = self._gauge("egmf_ready", "processes that take requests")

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._own, multiprocess_mode="livesum")

    def watch(self, waiting: Callable[[], int], held: Callable[[], int]) -> None:
        """Set what is read when it is asked for."""
        self._now = (waiting, held)

    def refresh(self) -> None:
        if hasattr(self, "_now"):
            waiting, held = self._now
            self.waiting.set(waiting())
            self.held.set(held())

    def text(self) -> bytes:
        """All figures as Prometheus reads them."""
        self.refresh()
        if not self._shared:
            return generate_latest(self._own)
        everyone = CollectorRegistry()
        collect: Any = MultiProcessCollector  # which has no types
        collect(everyone)
        return generate_latest(everyone)
