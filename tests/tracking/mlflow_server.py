"""A real `mlflow server` in processes of its own, to be stopped, frozen and started again on the same port and store."""

from __future__ import annotations

import contextlib
import http.server
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import requests
from mlflow import MlflowClient

from tests.distributed.processes import environment, free_port
from trainer.tracking.journal import read_journal


class MlflowServer:
    """Not running until `start`; its store and artifacts are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = folder / "store.db"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self._process is None
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.store}", "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        quick = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "log.txt").open("a") as log:
            self._process = subprocess.Popen(
                command, env=environment(**quick), stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert self._process.poll() is None, (self.folder / "log.txt").read_text()
                time.sleep(0.1)
        raise AssertionError("the tracking server did not start:\n" + (self.folder / "log.txt").read_text())

    def stop(self) -> None:
        """End it at once, as when its machine is lost."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=30)
            self._process = None

    def freeze(self) -> None:
        """It takes connections, and answers nothing."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)

    def fill_disk(self, full: bool = True) -> None:
        """From now on it can write no file (or can again): every write to its store fails."""
        assert self._process is not None
        whole = psutil.Process(self._process.pid)
        limit = 1 if full else resource.RLIM_INFINITY
        for process in (whole, *whole.children(recursive=True)):
            process.rlimit(psutil.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def histories(uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric of an MLflow run as (step, value), as the store holds them: a step that was stored twice is twice there."""
    client = MlflowClient(uri)
    names = client.get_run(run_id).data.metrics
    return {name: sorted((m.step, m.value) for m in client.get_metric_history(run_id, name)) for name in names}


def assert_same_as_journal(uri: str, run_id: str | None, run: Path) -> None:
    """The server has every (metric, step) of the journal once, with its value, and nothing else."""
    assert run_id is not None
    expected = read_journal(run / "journal.jsonl")
    assert expected
    assert histories(uri, run_id) == expected


class Proxy:
    """Stands before a server and spoils what passes, as `fault(method, path)` says for each request.

    `fault` returns None (let it pass), "lose" (the server gets the request, the client no answer), "refuse" (HTTP 500,
    the server gets nothing), or a number of seconds by which the answer is late.
    """

    def __init__(self, upstream: str) -> None:
        self.fault: Callable[[str, str], str | float | None] = lambda method, path: None
        self.seen: list[str] = []  # method and path of every request
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy.fault(self.command, self.path)
                proxy.seen.append(f"{self.command} {self.path}")
                if fault == "refuse":
                    return self.answer(500, b'{"error_code": "INTERNAL_ERROR", "message": "the store is read-only"}')
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
                answer = requests.request(
                    self.command, upstream + self.path, data=body, headers=headers, timeout=60, allow_redirects=False
                )
                if fault == "lose":
                    self.close_connection = True
                    return None
                if fault is not None:
                    time.sleep(float(fault))
                return self.answer(answer.status_code, answer.content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
