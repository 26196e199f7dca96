"""The server as a whole: checks before anything heavy is loaded, the port, and one or several processes behind it."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.serving.check import check_source
from trainer.serving.http.security import check_host, read_token
from trainer.serving.http.settings import ServerSettings

log = logging.getLogger(__name__)

BACKLOG = 2048  # connections that wait to be accepted
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # where workers share their figures; prometheus_client reads it when it is imported
TICK = 0.1  # seconds between two looks at the workers
# how many kernels oneDNN keeps, one for each shape of a batch; of its 1024 memory grows by a hundred MiB over thousands of requests
KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
PACKAGES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}


def serve(settings: ServerSettings) -> int:
    """Serve until a signal comes; the exit code.

    Raises:
        ValueError: packages that are missing, a host that others reach without a token, a port that cannot be had, no model.
    """
    if missing := [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise ValueError(f"egmf serve needs {', '.join(missing)}: pip install 'egmf-trainer[serve]'")
    token = None
    if settings.token_file is not None:
        token, warnings = read_token(settings.token_file)
        for warning in warnings:
            log.warning("%s", warning)
    check_host(settings.host, token)
    check_source(Path(settings.model.source))
    os.environ.setdefault(*KERNELS)
    listening = listen(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info("listening on http://%s:%d", host, listening.getsockname()[1])
    with listening:
        if settings.workers > 1:
            return _Workers(settings, listening).run()
        os.environ.pop(SHARED, None)  # that of another service, in whose environment this one was started
        from trainer.serving.http.worker import run_worker

        return run_worker(settings, listening)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any that is free.

    Raises:
        ValueError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host}, --port {port}: {getattr(error, 'strerror', None) or error}") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except (OSError, OverflowError) as error:
        listening.close()
        raise ValueError(
            f"--host {host}, --port {port}: {getattr(error, 'strerror', None) or error}; choose another with --port"
        ) from error
    return listening


@dataclass
class _Worker:
    process: BaseProcess
    ready: Any  # an event


class _Workers:
    """Several processes that accept from one socket; one that dies is replaced, unless it never was ready."""

    def __init__(self, settings: ServerSettings, listening: socket.socket) -> None:
        self._settings, self._listening = settings, listening
        self._context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
        self._signals = 0
        self._workers: list[_Worker] = []
        self._shared = ""  # where workers have their figures, and clips while they read them

    def run(self) -> int:
        """Until a signal comes; 0 where every worker ended well."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        threads = max(1, len(os.sched_getaffinity(0)) // self._settings.workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # each worker has its share of the cores
        with tempfile.TemporaryDirectory(prefix="egmf-serve-") as self._shared:
            os.environ[SHARED] = self._shared
            self._workers = [self._start() for _ in range(self._settings.workers)]
            while not self._signals:
                time.sleep(TICK)
                for worker in [one for one in self._workers if not one.process.is_alive()]:
                    if not worker.ready.is_set():
                        log.error("a worker ended with code %s before it was ready", worker.process.exitcode)
                        self._end()
                        return 1
                    log.error("a worker ended with code %s: another one takes its place", worker.process.exitcode)
                    self._forget(worker)
                    self._workers[self._workers.index(worker)] = self._start()
            return self._end()

    def _start(self) -> _Worker:
        ready = self._context.Event()
        process = self._context.Process(
            target=_work, args=(self._settings, self._listening, os.getpid(), ready), name="egmf-serve"
        )
        process.start()
        return _Worker(process, ready)

    def _forget(self, worker: _Worker) -> None:
        from prometheus_client import multiprocess

        forget: Any = multiprocess.mark_process_dead  # which has no types
        forget(worker.process.pid)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            for worker in self._workers:
                worker.process.kill()
            if self._shared:
                shutil.rmtree(self._shared, ignore_errors=True)
            os._exit(128 + number)

    def _end(self) -> int:
        self._signals = max(1, self._signals)
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        # a worker that was not ready, and so had taken nothing, may be ended by the signal itself
        well = [one.process.exitcode == 0 or not one.ready.is_set() for one in self._workers]
        return 0 if all(well) else 1


def _work(settings: ServerSettings, listening: socket.socket, parent: int, ready: Any) -> None:
    """A worker process."""
    import sys

    from trainer.logs import set_up_logging
    from trainer.serving.http.worker import run_worker

    set_up_logging(None, 0, debug=settings.debug)
    tempfile.tempdir = os.environ[SHARED]  # which the first process removes, however this one ends
    try:
        code = run_worker(settings, listening, parent=parent, ready=ready.set)
    except ValueError as error:
        if settings.debug:
            raise
        log.error("%s", error)
        code = 1
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)
