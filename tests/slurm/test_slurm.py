"""`egmf launch slurm` on a real Slurm: to the end, preempted, cancelled, with a rank or a node lost, refused."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.distributed.processes import ROOT, egmf
from tests.slurm.conftest import STEPS
from tests.slurm.lab import Lab, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}
SLOW = {"EGMF_TEST_SLOW": "1", "PYTHONPATH": f"{ROOT}/tests/distributed/failing{os.pathsep}{ROOT}"}
PATIENCE = 600.0  # seconds; a loaded machine takes a minute to start two processes


@pytest.fixture(scope="module")
def whole(work: Path) -> dict[int, Path]:
    """Seed -> an undisturbed run of two processes of this machine."""
    runs = {}
    for seed in (3, 4):
        runs[seed] = work / f"whole-s{seed}"
        line = ("launch", "local", "--procs", "2", str(work / "toy.yaml"), "--out", str(runs[seed]))
        done = egmf(*line, f"train.seed={seed}", timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
    return runs


def submit(lab: Lab, config: Path, out: Path, *arguments: str, **env: str) -> str:
    """The id of the submitted job."""
    done = egmf("launch", "slurm", str(config), "--out", str(out), *arguments, **lab.environment, **env)
    assert done.returncode == 0, done.stderr
    found = re.search(r"submitted as job (\d+)", done.stderr)
    assert found, done.stderr
    return found[1]


def output(run: Path) -> str:
    """The output of the jobs of a run."""
    return "\n".join(log.read_text() for log in sorted((run / "slurm").glob("*.log")))


def ended(lab: Lab, job: str, run: Path) -> dict[str, str]:
    wait_for(lambda: lab.job(job)["JobState"] in ENDED, PATIENCE, lambda: f"{lab.job(job)}\n{output(run)}")
    return lab.job(job)


def reaches(run: Path, words: str) -> None:
    wait_for(lambda: words in output(run), PATIENCE, lambda: output(run))


def record(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text()))


def same(a: Path, b: Path) -> None:
    """Weights, predictions and metrics are equal bit by bit."""
    for name in ("metrics.json", f"checkpoints/step-{STEPS:08d}/model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    for split in ("valid", "test"):
        one, two = (pd.read_parquet(run / "predictions" / f"{split}.parquet") for run in (a, b))
        pd.testing.assert_frame_equal(one, two)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return {line["step"]: line["metrics"]["train/loss"] for line in lines if "train/loss" in line.get("metrics", {})}


def starts(run: Path) -> list[str]:
    return re.findall(r"start \d of job \S+: \d processes on \S+", output(run))


def test_a_preempted_run_of_an_array_comes_back_and_ends_as_if_nothing_was(
    lab: Lab, work: Path, whole: dict[int, Path]
) -> None:
    arguments = (
        "--nodes",
        "2",
        "--procs-per-node",
        "1",
        "--array-seeds",
        "3,4",
        "--partition",
        "debug",
        "--time",
        "30",
    )
    job = submit(lab, work / "toy.yaml", work / "array", *arguments, **SLOW)
    runs = {seed: work / f"array-s{seed}" for seed in (3, 4)}
    own = {seed: f"{job}_{seed}" for seed in runs}
    seed = next(
        seed for seed in runs if lab.job(own[seed])["JobId"] == job
    )  # that number stands for the whole array, too
    reaches(runs[seed], "step 3/")
    lab.run("scancel", "--signal=USR1", "--batch", own[seed])
    for one, run in runs.items():
        assert ended(lab, own[one], run)["JobState"] == "COMPLETED", output(run)
        assert lab.job(own[one])["Restarts"] == ("1" if one == seed else "0"), output(run)
        assert record(run)["state"] == "done"
        same(run, whole[one])
    text = output(runs[seed])
    assert "back into the queue" in text
    assert "continuing from" in text
    assert [line.split()[1] for line in starts(runs[seed])] == ["1", "2"]
    with sqlite3.connect(work / "mlflow.db") as store:
        for run in runs.values():  # one MLflow run, however often the job was requeued
            ids = store.execute("select run_uuid, status from runs where name = ?", (run.name,)).fetchall()
            assert ids == [(record(run)["mlflow"]["run_id"], "FINISHED")]
    for run in runs.values():
        assert "Traceback" not in output(run)


def test_a_sweep_is_an_array_that_is_not_submitted_twice_and_goes_on_where_it_failed(lab: Lab, work: Path) -> None:
    out = work / "sweep"
    plan = ("sweep", str(work / "toy.yaml"), "--seeds", "3", "--set", "train.zero=1,2", "--out", str(out), "--slurm")
    words = (*plan, "--nodes", "1", "--procs-per-node", "1")
    runs = {1: out / "zero=1-s3", 2: out / "zero=2-s3"}
    (out / "zero=1-s3").mkdir(parents=True)
    (out / "zero=1-s3" / "checkpoints").write_text("in the way")

    def submitted() -> str:
        done = egmf(*words, **lab.environment, **SLOW)
        assert done.returncode == 0, done.stderr
        found = re.search(r"submitted as job (\d+)", done.stderr)
        assert found, done.stderr
        return found[1]

    def logs() -> str:
        return "\n".join(path.read_text() for path in sorted((out / "slurm").glob("*.log")))

    def state(job: str, index: int) -> str:
        wait_for(lambda: lab.job(f"{job}_{index}")["JobState"] in ENDED, PATIENCE, logs)
        return lab.job(f"{job}_{index}")["JobState"]

    job = submitted()
    again = egmf(*words, **lab.environment)
    assert again.returncode == 1
    assert f"in the queue as job {job}" in again.stderr
    assert [state(job, index) for index in runs] == ["FAILED", "COMPLETED"], logs()
    (out / "zero=1-s3" / "checkpoints").unlink()
    job = submitted()
    assert state(job, 1) == "COMPLETED", logs()
    assert "not found" in lab.run("scontrol", "show", "job", f"{job}_2")  # finished: not submitted again
    assert [record(run)["state"] for run in runs.values()] == ["done", "done"]
    done = egmf(*words, **lab.environment)
    assert "all 2 runs are done" in done.stderr
    with sqlite3.connect(work / "mlflow.db") as store:
        parents = store.execute("select run_uuid, status from runs where name = 'sweep'").fetchall()
        tags = store.execute("select value from tags where key = 'mlflow.parentRunId'").fetchall()
    assert [status for _, status in parents] == ["FINISHED"]
    assert set(tags) == {(parents[0][0],)}


def test_a_rank_that_fails_ends_the_job_in_seconds_and_for_good(lab: Lab, work: Path) -> None:
    for plant, cause in (("EGMF_TEST_FAIL_RANK", "planted on rank 1"), ("EGMF_TEST_KILL_RANK", "Killed")):
        out = work / plant
        job = submit(lab, work / "toy.yaml", out, "--nodes", "2", "--procs-per-node", "1", **{**SLOW, plant: "1"})
        reaches(out, "steps 1 to")
        began = time.monotonic()
        about = ended(lab, job, out)
        assert time.monotonic() - began < 90
        assert (about["JobState"], about["Restarts"]) == ("FAILED", "0"), output(out)
        assert about["ExitCode"] != "0:0"
        assert record(out)["state"] == "failed"
        assert cause in output(out)
        assert "the run failed (srun ended with" in output(out).splitlines()[-1]


def test_a_cancelled_run_writes_a_checkpoint_and_does_not_come_back(lab: Lab, work: Path) -> None:
    out = work / "cancelled"
    job = submit(
        lab, work / "toy.yaml", out, "--nodes", "2", "--procs-per-node", "1", **{**SLOW, "EGMF_TEST_SLOW": "4"}
    )
    reaches(out, "step 1/")
    lab.run("scancel", job)
    assert ended(lab, job, out)["JobState"] == "CANCELLED", output(out)
    wait_for(lambda: lab.idle() >= {"node1", "node2"}, PATIENCE)
    assert record(out)["state"] == "stopped", output(out)
    assert list((out / "checkpoints").glob("step-*"))
    assert lab.job(job)["JobState"] == "CANCELLED"
    assert lab.job(job)["Restarts"] == "0"


def test_a_run_that_loses_a_node_goes_on_with_another(lab: Lab, work: Path, whole: dict[int, Path]) -> None:
    out = work / "spare"
    job = submit(lab, work / "toy.yaml", out, "train.seed=3", "--nodes", "2", "--procs-per-node", "1", **SLOW)
    reaches(out, "step 3/")
    lab.lose("node2", silently=True)
    try:
        assert ended(lab, job, out)["JobState"] == "COMPLETED", output(out)
    finally:
        lab.bring_back("node2")
    assert [line.split(" on ")[1] for line in starts(out)] == ["node[1-2],", "node[1,3],"]
    assert "continuing from" in output(out)
    same(out, whole[3])


def test_a_run_that_loses_a_node_goes_on_with_fewer(lab: Lab, work: Path) -> None:
    whole = work / "still"
    done = egmf(
        "launch", "local", "--procs", "2", str(work / "still.yaml"), "--out", str(whole), timeout=PATIENCE
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = work / "fewer"
    job = submit(
        lab, work / "still.yaml", out, "--nodes", "1-2", "--procs-per-node", "1", "--sbatch=--exclude=node3", **SLOW
    )  # fmt: skip
    reaches(out, "step 3/")
    lab.lose("node2", silently=False)
    try:
        assert ended(lab, job, out)["JobState"] == "COMPLETED", output(out)
    finally:
        lab.bring_back("node2")
    assert [line.split(": ")[1] for line in starts(out)] == ["2 processes on node[1-2],", "1 processes on node1,"]
    assert "a node does not answer" in output(out)
    assert losses(out).keys() == losses(whole).keys()
    for step, loss in losses(whole).items():
        assert losses(out)[step] == pytest.approx(loss, abs=1e-5), step


def test_what_slurm_refuses_is_an_error_and_leaves_nothing(lab: Lab, work: Path) -> None:
    arguments = ("launch", "slurm", str(work / "toy.yaml"), "--out", str(work / "refused"), "--nodes")
    cases = {
        ("2", "--procs-per-node", "1", "--partition", "gpus"): ("partition", "partitions here: debug"),
        ("9", "--procs-per-node", "1"): ("node", "3 nodes of 4 CPUs"),
        ("2", "--gpus-per-node", "8"): ("node configuration", "3 nodes of 4 CPUs"),
    }
    for asked, words in cases.items():
        refused = egmf(*arguments, *asked, **lab.environment)
        assert refused.returncode == 1
        assert refused.stderr.startswith("error: Slurm refuses the job: ")
        for word in words:
            assert word in refused.stderr
    assert not (work / "refused").exists()
