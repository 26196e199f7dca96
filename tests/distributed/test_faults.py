"""A rank that is killed at one of four moments ends the whole run soon, with its cause in the output, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, environment, start
from tests.toy import prepare_toy

pytestmark = pytest.mark.distributed

MOMENTS = {  # the function in which a rank is killed, and the rank
    "before the ranks have met": ("trainer.distributed.process_group:rendezvous", 0),
    "in a step": ("trainer.run.loop:train_step", 1),
    "in a save": ("trainer.checkpoint.store:file_digest", 0),  # its files are written, and not yet hashed
    "in an evaluation": ("trainer.run.evaluate:sample_answers", 1),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    prepare_toy("meld", folder)
    return folder


def children(pid: int) -> set[int]:
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    "moment",
    [name if name.startswith("before") else pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS],
)
def test_a_killed_rank_ends_the_run_and_leaves_nothing(data: Path, tmp_path: Path, moment: str) -> None:
    function, victim = MOMENTS[moment]
    out, mark = tmp_path / "run", tmp_path / "killed"
    shared_memory_before = set(os.listdir("/dev/shm"))
    launcher = start(
        [
            sys.executable, "-m", "trainer", "launch", "local", "--procs", "2", f"{ROOT}/configs/tiny.yaml",
            "--out", str(out), "task=meld", f"data.path={data}/{{task}}", "model.backbone.tiny.vocab_size=400",
            "train.steps=2", "train.eval_every=1", "train.global_batch=8", "train.micro_batch=4", "train.probe=false",
            "track.mlflow=false", "track.report=false",
        ],
        env=environment(
            EGMF_TEST_KILL_IN=function, EGMF_TEST_KILL_RANK=str(victim), EGMF_TEST_KILL_MARK=str(mark),
            PYTHONPATH=f"{ROOT}/tests/distributed/killing{os.pathsep}{ROOT}",
        ),
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started: set[int] = set()
    while launcher.poll() is None and not mark.exists():
        ranks = children(launcher.pid)
        started |= ranks.union(*(children(rank) for rank in ranks))
        time.sleep(0.05)
    output = launcher.communicate(timeout=120)[1]
    killed, port = mark.read_text().split()
    assert time.time() - float(killed) < 30, output
    assert launcher.returncode == 137, output
    assert f"rank {victim} failed first, with signal SIGKILL" in output
    assert output.rstrip().splitlines()[-1].startswith(f"error on rank {victim}: killed from outside")
    if victim != 0:  # rank 0 keeps the record
        assert json.loads((out / "run.json").read_text())["state"] == "failed"
    assert len(started) >= 2
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert not listening(int(port))
    assert not {name for name in set(os.listdir("/dev/shm")) - shared_memory_before if port in name}
