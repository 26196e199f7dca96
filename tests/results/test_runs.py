"""States of runs: what the record says, checked against the process that should be running."""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import egmf
from trainer.results.run_folder import read_run
from trainer.results.runs import age, list_runs, selected_value, state_of


def put(folder: Path, name: str, **record: Any) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("task: meld\ntrain: {steps: 100}\n")
    (run / "run.json").write_text(json.dumps({"tasks": ["meld"], "started": now(), **record}))
    return run


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def test_a_running_run_is_believed_while_its_process_is_there(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        run = put(tmp_path, "r", state="running", pid=process.pid, host=socket.gethostname())
        assert state_of(read_run(run)).name == "running"
        process.kill()
        time.sleep(0.2)  # not waited for: a zombie still has its number
        assert state_of(read_run(run)).name == "lost"
    finally:
        process.kill()
        process.wait()
    lost = state_of(read_run(run))
    assert lost.name == "lost"
    assert f"process {process.pid} is gone" in str(lost)


def test_another_process_with_the_same_id_is_not_the_run(tmp_path: Path) -> None:
    old = "2001-01-01T00:00:00+00:00"
    run = put(tmp_path, "r", state="running", pid=os.getpid(), host=socket.gethostname(), started=old)
    assert state_of(read_run(run)).name == "lost"


def test_a_process_on_another_host_is_believed(tmp_path: Path) -> None:
    run = put(tmp_path, "r", state="running", pid=1, host="another-node")
    state = state_of(read_run(run))
    assert state.name == "running"
    assert "another-node" in str(state)


def test_the_list_has_state_and_reason(tmp_path: Path, meld: Path) -> None:
    put(tmp_path, "broke", state="failed", failure="ValueError: no [red]disk\x1b[31m", ended=now())
    put(tmp_path, "halted", state="stopped", ended="2026-01-01T00:00:00+00:00")
    (put(tmp_path, "early", state="running") / "run.json").unlink()
    (tmp_path / "data").mkdir()
    (tmp_path / "done").symlink_to(meld)
    lines = {line.name: line for line in list_runs(tmp_path)}
    assert {name: line.state for name, line in lines.items()} == {
        "broke": "failed", "halted": "stopped", "early": "unknown", "done": "done",
    }  # fmt: skip
    assert lines["broke"].why == "ValueError: no [red]disk\x1b[31m"
    assert (lines["done"].step, lines["done"].steps) == (40, 40)
    assert (lines["halted"].step, lines["halted"].steps) == (None, 100)
    metrics = json.loads((meld / "metrics.json").read_text())
    assert lines["done"].value == metrics["valid"]["meld"]["wf1"]
    done = egmf("runs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "no [red]disk" in done.stdout
    assert "\x1b" not in done.stdout
    listed = json.loads(egmf("runs", str(tmp_path), "--json").stdout)
    assert {run["name"] for run in listed["runs"]} == set(lines)


def test_the_selected_value_is_that_of_the_chosen_step_and_else_the_newest(
    unified: Path, copy: Callable[[Path], Path]
) -> None:
    run = copy(unified)
    metrics = json.loads((run / "metrics.json").read_text())["valid"]
    keys = {"meld": "wf1", "cherma": "wf1", "simsv2": "acc2"}
    expected = sum(metrics[task][key] for task, key in keys.items()) / 3
    assert selected_value(read_run(run)).value == pytest.approx(expected)
    (run / "metrics.json").unlink()
    assert selected_value(read_run(run)).step == 20
    assert selected_value(read_run(run)).value == pytest.approx(expected)  # the journal's own, at the chosen step
    (run / "checkpoints" / "best").unlink()
    newest = selected_value(read_run(run))
    assert newest.step == 40
    assert newest.value == pytest.approx(expected - 0.02)


def test_a_missing_folder_is_an_error_and_one_without_runs_an_empty_list(tmp_path: Path) -> None:
    assert list_runs(tmp_path) == []
    with pytest.raises(ValueError, match="no folder"):
        list_runs(tmp_path / "none")


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (65, "1 min"), (7300, "2 h"), (200000, "2 d")])
def test_ages_have_the_largest_unit_that_fits(seconds: float, text: str) -> None:
    assert age(seconds) == text
