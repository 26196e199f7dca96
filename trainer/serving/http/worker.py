"""One serving process: uvicorn with our application, from its start to a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from trainer.serving.http.app import make_app
from trainer.serving.http.connections import KEEP_ALIVE, protocol_class, sweep_for_ever
from trainer.serving.http.metrics import Metrics
from trainer.serving.http.security import Gate, is_loopback, read_token
from trainer.serving.http.service import Service
from trainer.serving.http.settings import ServerSettings

if TYPE_CHECKING:  # it imports torch
    from trainer.serving.http.model import ServedModel

log = logging.getLogger(__name__)

CLOSING = 5  # seconds that connections have, once everything is answered
STOPPED_LATE = 1  # exit code where something that was taken could not be answered


def run_worker(
    settings: ServerSettings,
    listening: socket.socket,
    *,
    parent: int | None = None,
    ready: Callable[[], None] = lambda: None,
) -> int:
    """Answer requests on a socket until a signal comes; 0 where everything that was taken is answered.

    Args:
        parent: the process that started this one for a part of the requests: it alone is stopped by hand, and when it is gone, this ends too.
        ready: called once the model is loaded.

    Raises:
        ValueError: the model cannot be opened.
    """

    def load() -> ServedModel:
        from trainer.serving.http.model import ServedModel

        return ServedModel.load(settings.model, settings.limits, settings.clips)

    server = make_server(settings, load, parent=parent, ready=ready)
    server.run([listening])
    if server.service.fault is not None:
        raise server.service.fault
    return STOPPED_LATE if server.late else 0


def make_server(
    settings: ServerSettings,
    load: Callable[[], ServedModel],
    *,
    parent: int | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Server:
    """A server that is not yet running; `load` gives it its model."""
    token = None if settings.token_file is None else read_token(settings.token_file)[0]
    metrics = Metrics()
    service = Service(load, settings.limits, metrics, unbatched=settings.unbatched)
    gate = Gate(token, settings.hosts if is_loopback(settings.host) or settings.hosts else None)
    for name in ("uvicorn.error", "python_multipart"):  # they quote what clients send
        logging.getLogger(name).setLevel(logging.ERROR)
    config = uvicorn.Config(
        make_app(service, gate),
        http=protocol_class(settings.limits, lambda code: metrics.refused.labels(code).inc()),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=CLOSING,
    )
    return Server(config, service, parent, ready)


class Server(uvicorn.Server):
    """uvicorn's server, which on a signal answers what it has taken while it refuses what is new, and then ends."""

    def __init__(self, config: uvicorn.Config, service: Service, parent: int | None, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self._parent = service, parent
        self._told: Callable[[], None] | None = ready
        self._until: float | None = None  # when a stop is over
        self._signalled = False
        self._sweep: asyncio.Task[None] | None = None
        self.late = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._sweep = asyncio.create_task(sweep_for_ever(self.server_state.connections))
        self.service.start()

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter) or self.service.state == "failed":
            return True
        if self._told is not None and self.service.state == "ready":
            self._told()
            self._told = None
        if self._signalled or (self._parent is not None and os.getppid() != self._parent):
            self.stop()
        if self._until is None:
            return False
        self.late = self.service.busy and time.monotonic() > self._until
        if self.late:
            log.warning("not everything that was taken could be answered in time (--stop-seconds)")
        return self.late or not self.service.busy

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        await super().shutdown(sockets)
        self.service.close()

    def stop(self) -> None:
        """Take no more requests, answer what was taken, and end."""
        if self._until is None:
            log.info("stopping: what was taken is answered")
            self.service.stop()
            self._until = time.monotonic() + self.service.limits.stop_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Have the event loop stop the server: the code that a signal interrupts may hold the locks that stopping needs."""
        if self._signalled and self._parent is None:  # the second one: at once
            self.service.remove_files()
            os._exit(128 + sig)
        self._signalled = True  # which on_tick sees where no loop runs yet
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().call_soon_threadsafe(self.stop)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which raises the signal anew at the end, so that the process would not end with 0."""
        if threading.current_thread() is not threading.main_thread():  # where no signals arrive
            yield
            return
        ours = {
            signal.SIGTERM: self.handle_exit,
            signal.SIGINT: self.handle_exit if self._parent is None else signal.SIG_IGN,
        }
        before = {number: signal.signal(number, handler) for number, handler in ours.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
