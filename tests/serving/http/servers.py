"""Servers for tests: in a thread around a model that is open already, or as a process of their own; and a client that adds nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.processes import ROOT, environment
from trainer.serving.http.limits import Limits
from trainer.serving.http.model import ServedModel
from trainer.serving.http.server import listen
from trainer.serving.http.settings import ClipProcesses, ModelChoice, ServerSettings
from trainer.serving.http.worker import Server, make_server
from trainer.serving.predictor import Predictor

JSON = {"Content-Type": "application/json"}


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


@dataclass
class Client:
    port: int

    def ask(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers=headers)

    def predict(self, samples: Any, headers: Mapping[str, str] | None = None, **options: bool) -> Reply:
        value = {"samples": samples, **({"options": options} if options else {})}
        return self.post(json.dumps(value).encode(), headers)

    def post(self, body: bytes, headers: Mapping[str, str] | None = None) -> Reply:
        return self.ask("POST", "/v1/predict", body, {**JSON, **(headers or {})})

    def until_ready(self, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                if self.get("/readyz").status == 200:
                    return
            assert time.monotonic() < end, "the server did not become ready"
            time.sleep(0.05)


def form(fields: Mapping[str, str | bytes], files: Mapping[str, bytes]) -> tuple[bytes, dict[str, str]]:
    """A multipart body, and its headers."""
    mark = "b0undary"
    parts = []
    for name, value in fields.items():
        content = value if isinstance(value, bytes) else value.encode()
        parts.append(f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + content + b"\r\n")
    for name, content in files.items():
        head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="../../etc/{name}"\r\n\r\n'
        parts.append(head.encode() + content + b"\r\n")
    return b"".join(parts) + f"--{mark}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={mark}"}


@dataclass
class InThread(Client):
    """A server in this process."""

    server: Server
    thread: threading.Thread

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(
    predictor: Predictor,
    limits: Limits | None = None,
    *,
    token_file: Path | None = None,
    hosts: tuple[str, ...] = (),
    clips: int = 0,
    unbatched: bool = False,
) -> Iterator[InThread]:
    """A server around a predictor, on a port of its own."""
    limits = limits or Limits()
    settings = ServerSettings(
        ModelChoice(""),
        port=0,
        limits=limits,
        token_file=token_file,
        hosts=hosts,
        clips=ClipProcesses(clips, "cpu"),
        unbatched=unbatched,
    )
    listening = listen("127.0.0.1", 0)
    server = make_server(settings, lambda: ServedModel(predictor, limits, settings.clips))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    running = InThread(listening.getsockname()[1], server, thread)
    try:
        running.until_ready()
        yield running
    finally:
        running.stop()


@dataclass
class OfProcess(Client):
    """A server as a process."""

    process: subprocess.Popen[str]

    def end(self, seconds: float = 60.0) -> tuple[int, str]:
        """Its exit code and what it wrote, once it has ended."""
        _, log = self.process.communicate(timeout=seconds)
        return self.process.returncode, log


@contextlib.contextmanager
def started(port: int, *arguments: str, **more: str) -> Iterator[OfProcess]:
    """`egmf serve` with these arguments; it is ended where the test did not do so."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "serve", *arguments, "--port", str(port)],
        cwd=ROOT,
        env=environment(**more),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield OfProcess(port, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
