"""A real `mlflow server` in processes of its own, to be stopped, frozen and started again on the same port and store."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from mlflow import MlflowClient

from tests.distributed.processes import environment, free_port
from trainer.run.journal import read_journal


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
