"""A stop signal on one rank alone, at every moment of a run: all ranks stop together, and the run goes on as if nothing was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.distributed.processes import ROOT, egmf, environment, start
from tests.toy import prepare_toy
from trainer.distributed.signals import StopRequest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]
STEPS = 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    prepare_toy("meld", folder)
    (folder / "toy.yaml").write_text(
        f"""
extends: {ROOT}/configs/tiny.yaml
task: meld
data: {{path: "{folder}/{{task}}"}}
model:
  backbone: {{tiny: {{vocab_size: 400}}}}
  adapter: {{dropout: 0.1}}
train: {{steps: {STEPS}, global_batch: 12, micro_batch: 6, eval_every: 4, save_every: 2, keep: 9, log_every: 1, probe: false}}
eval: {{batch: 3}}
track: {{system_metrics: false, report: false}}
"""
    )
    return folder


def arguments(work: Path, out: Path) -> list[str]:
    return ["launch", "local", "--procs", "2", str(work / "toy.yaml"), "--out", str(out)]


def listening(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


def stop_at_the_start(work: Path, out: Path) -> str:
    """Start a run and send SIGUSR1 to one worker as soon as it listens; returns the output."""
    launcher = start(
        [sys.executable, "-m", "trainer", *arguments(work, out)],
        env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    workers: list[str] = []
    while not any(listening(int(pid), signal.SIGUSR1) for pid in workers[1:2]):
        assert launcher.poll() is None
        workers = children.read_text().split()
        time.sleep(0.02)
    os.kill(int(workers[1]), signal.SIGUSR1)
    output = launcher.communicate(timeout=900)[1]
    assert launcher.returncode == 85, output
    return output


@pytest.mark.slow
def test_a_signal_on_one_rank_at_any_moment_stops_all_and_loses_nothing(work: Path) -> None:
    whole, out = work / "whole", work / "stopped"
    done = egmf(*arguments(work, whole), timeout=900)
    assert done.returncode == 0, done.stderr
    output = stop_at_the_start(work, out)
    assert "stopped at step 0 of 8" in output
    assert json.loads((out / "run.json").read_text())["state"] == "stopped"
    assert not list((out / "checkpoints").glob("step-*"))
    plants = {"PYTHONPATH": f"{ROOT}/tests/distributed/failing{os.pathsep}{ROOT}"}
    for when, step in (("save", 2), ("evaluation", 4), ("step", 7), ("evaluation", 8)):
        stopped = egmf(*arguments(work, out), timeout=900, EGMF_TEST_STOP=f"1:{when}", **plants)
        assert stopped.returncode == 85, stopped.stderr
        assert "SIGUSR1: stopping" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert f"stopped at step {step} of 8" in stopped.stderr
        assert json.loads((out / "run.json").read_text())["state"] == "stopped"
        assert (out / f"checkpoints/step-{step:08d}").is_dir()
    last = egmf(*arguments(work, out), timeout=900)
    assert last.returncode == 0, last.stderr
    for name in ("metrics.json", "checkpoints/best", f"checkpoints/step-{STEPS:08d}/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for split in ("valid", "test"):
        one, two = (pd.read_parquet(run / "predictions" / f"{split}.parquet") for run in (out, whole))
        pd.testing.assert_frame_equal(one, two)
    assert result(out) == result(whole)


def result(run: Path) -> dict[tuple[int, str], float]:
    """(step, metric) -> value of a run's journal, but for what depends on time."""
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.get("metrics", {}).items()
        if "per_second" not in name
    }


def test_repeated_signals_change_nothing_and_a_second_interrupt_ends() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores interrupts
    try:
        with StopRequest(["SIGTERM", "SIGINT", "SIGUSR2"]) as stop:
            assert not stop.asked
            for name in ("SIGUSR2", "SIGTERM", "SIGUSR2"):
                os.kill(os.getpid(), signal.Signals[name])
                assert stop.asked
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
