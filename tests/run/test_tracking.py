"""The record in MLflow, against a real tracking server and a plain SQLite file."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from tests.distributed.processes import environment, free_port
from trainer.config import RunConfig, check_config, flatten
from trainer.run.tracking import Tracker


def config(**track: object) -> RunConfig:
    return check_config({"task": "meld", "track": {"experiment": "e", "system_metrics": False, **track}})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/store.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    log = (folder / "log.txt").open("w")
    process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=2):
                    break
            except OSError:
                assert process.poll() is None, (folder / "log.txt").read_text()
                time.sleep(0.5)
        else:
            pytest.fail("the tracking server did not start:\n" + (folder / "log.txt").read_text())
        yield uri
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


@pytest.mark.parametrize("kind", ["server", "sqlite"])
def test_a_run_is_recorded_and_continued(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    uri = request.getfixturevalue("server") if kind == "server" else None
    chosen = config(uri=uri, tags={"mine": "yes"})
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("task: meld\n")
    tracker = Tracker(chosen, out, enabled=True)
    tracker.start(chosen, {"world_size": 2, "zero_stage": 3})
    tracker.metrics({"train/loss": 2.0, "undefined": None}, 1)
    tracker.artifact(out / "config.yaml")
    run_id = tracker.run_id
    tracker.finish("stopped")
    again = Tracker(chosen, out, enabled=True, run_id=run_id)
    again.start(chosen, {"world_size": 2})
    again.metrics({"train/loss": 1.0}, 2)
    again.finish("done")
    assert again.run_id == run_id
    if kind == "sqlite":
        assert (tmp_path / "mlflow.db").is_file()
    client = mlflow.MlflowClient(tracker.uri)
    run = client.get_run(str(run_id))
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params == {key: str(value) for key, value in flatten(chosen).items()}
    assert run.data.tags["mine"] == "yes"
    assert run.data.tags["world_size"] == "2"
    assert "undefined" not in run.data.metrics
    assert [(m.step, m.value) for m in client.get_metric_history(str(run_id), "train/loss")] == [(1, 2.0), (2, 1.0)]
    assert [a.path for a in client.list_artifacts(str(run_id))] == ["config.yaml"]


def test_long_parameters_are_cut_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = config()
    chosen.deepspeed = {"note": "x" * 9000}
    tracker = Tracker(chosen, tmp_path / "run", enabled=True)
    with caplog.at_level(logging.WARNING):
        tracker.start(chosen, {})
    tracker.finish("done")
    value = mlflow.MlflowClient(tracker.uri).get_run(str(tracker.run_id)).data.params["deepspeed.note"]
    assert len(value) == 6000
    assert value.endswith("x…")
    assert "deepspeed.note is cut" in caplog.text


def test_a_server_that_is_not_there_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ValueError, match=r"track\.uri\) does not answer.*track\.mlflow=false"):
        Tracker(config(uri=uri), tmp_path / "run", enabled=True)


def test_other_ranks_and_switched_off_runs_record_nothing(tmp_path: Path) -> None:
    for tracker in (
        Tracker(config(), tmp_path / "r", enabled=False),
        Tracker(config(mlflow=False), tmp_path / "r", enabled=True),
    ):
        tracker.start(config(), {})
        tracker.metrics({"a": 1.0}, 1)
        tracker.artifact(tmp_path)
        tracker.finish("done")
    assert not list(tmp_path.iterdir())
