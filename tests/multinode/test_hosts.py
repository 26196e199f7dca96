"""Runs over two nodes: `egmf launch hosts`, DeepSpeed's own launcher over pdsh, torchrun; and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.distributed.processes import ROOT
from tests.multinode.conftest import STEPS
from tests.multinode.lab import Node, environment, inner

pytestmark = [pytest.mark.multinode, pytest.mark.distributed, pytest.mark.slow]

Pair = tuple[Node, Node]
PLANTING = f"{ROOT}/tests/multinode/planting{os.pathsep}{ROOT}"
BIN = Path(sys.executable).parent
MOMENTS = {
    "before the rendezvous": "trainer.distributed.rendezvous:rendezvous:1",
    "in a step": "trainer.run.loop:train_step:3",
    "in a save": "trainer.checkpoint.random_state:random_state:1",
    "in an evaluation": "trainer.answers.predictions:predict:1",
}


def hosts(work: Path, out: Path, *more: str) -> list[str]:
    """`egmf launch hosts` on all nodes."""
    head = [sys.executable, "-m", "trainer", "launch", "hosts", "--hostfile", str(work / "hostfile")]
    return [*head, str(work / "toy.yaml"), "--out", str(out), *more]


def deepspeed(work: Path, out: Path) -> list[str]:
    """DeepSpeed's own launcher, over pdsh."""
    head = [
        str(BIN / "deepspeed"),
        "--hostfile",
        str(work / "hostfile"),
        "--master_port",
        "29610",
        "--module",
        "trainer",
    ]
    return [*head, "train", str(work / "toy.yaml"), "--out", str(out)]


def output(started: subprocess.Popen[str], timeout: float = 300) -> str:
    return started.communicate(timeout=timeout)[0]


def state(out: Path) -> str | None:
    path = out / "run.json"
    return json.loads(path.read_text())["state"] if path.is_file() else None


def until(what: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.05)


def in_step(out: Path) -> Callable[[], bool]:
    log = out / "log.txt"
    return lambda: log.is_file() and "step 1/" in log.read_text()


def nothing_is_left(pair: Pair, seconds: float = 60) -> None:
    """Neither processes nor shared memory nor ports, on both nodes, within some seconds of the launcher's end."""
    end = time.monotonic() + seconds
    while left := {node.name: node.left_behind() for node in pair if node.left_behind()}:
        assert time.monotonic() < end, left
        time.sleep(0.2)


@pytest.fixture(autouse=True)
def _clean(pair: Pair) -> Iterator[None]:
    """Processes of a failed test must not reach the next one."""
    yield
    for node in pair:
        for pid in node.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(pair: Pair, lab: Path, work: Path) -> Path:
    """An undisturbed run by `egmf launch hosts`."""
    out = work / "whole"
    started = pair[0].start(hosts(work, out), environment(lab))
    text = output(started)
    assert started.returncode == 0, text
    assert state(out) == "done"
    assert "Traceback" not in text
    nothing_is_left(pair, seconds=5)
    return out


def same_results(a: Path, b: Path) -> None:
    assert json.loads((a / "metrics.json").read_text()) == json.loads((b / "metrics.json").read_text())
    one, two = (pd.read_parquet(run / "predictions" / "test.parquet") for run in (a, b))
    pd.testing.assert_frame_equal(one, two)
    last = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    assert (a / last).read_bytes() == (b / last).read_bytes()


def test_deepspeed_over_pdsh_gives_the_same_run_bit_by_bit(pair: Pair, lab: Path, work: Path, whole: Path) -> None:
    """No network interface is configured; pdsh would not forward OMP_NUM_THREADS, on which the last bits depend."""
    out = work / "deepspeed"
    (lab / "deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    started = pair[0].start(deepspeed(work, out), environment(lab, DS_ENV_FILE=str(lab / "deepspeed_env")))
    text = output(started)
    assert started.returncode == 0, text[-3000:]
    assert "pdsh -S" in text
    assert state(out) == "done"
    same_results(out, whole)
    nothing_is_left(pair)


def test_torchrun_gives_the_same_run_bit_by_bit(pair: Pair, lab: Path, work: Path, whole: Path) -> None:
    out = work / "torchrun"
    head = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-port=29611"]
    started = [
        node.start(
            [*head, f"--node-rank={rank}", "--master-addr=10.81.0.1", "--module", "trainer", "train",
             str(work / "toy.yaml"), "--out", str(out)],
            environment(lab),
        )
        for rank, node in enumerate(pair)
    ]  # fmt: skip
    for process in started:
        text = output(process)
        assert process.returncode == 0, text[-3000:]
    assert state(out) == "done"
    same_results(out, whole)
    nothing_is_left(pair)


def test_a_start_on_each_node_without_ssh_gives_the_same_run(pair: Pair, lab: Path, work: Path, whole: Path) -> None:
    out = work / "no-ssh"
    more = ["--no-ssh", "--master-addr", "node1", "--master-port", "29612"]
    started = [
        node.start(hosts(work, out, *more, "--node-rank", str(rank)), environment(lab))
        for rank, node in enumerate(pair)
    ]
    for process in started:
        text = output(process)
        assert process.returncode == 0, text[-3000:]
    same_results(out, whole)
    nothing_is_left(pair)


def test_a_stop_signal_stops_every_node_and_the_same_command_continues(
    pair: Pair, lab: Path, work: Path, whole: Path
) -> None:
    """Another process of the same interpreter, whose command names DeepSpeed's launcher, is left alone."""
    out = work / "stopped"
    stranger = pair[1].start(
        [sys.executable, "-c", "import time; time.sleep(600)", "deepspeed.launcher.launch"], environment(lab)
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        step = len(list((out / "checkpoints").glob("step-*")))
        started = pair[0].start(hosts(work, out), environment(lab))
        until(lambda step=step: len(list((out / "checkpoints").glob("step-*"))) > step)  # type: ignore[misc]
        os.kill(inner(started), number)
        text = output(started)
        if number == signal.SIGTERM:
            assert started.returncode == 85, text
            assert state(out) == "stopped"
        if started.returncode == 0:  # it had finished
            break
        assert len(pair[1].processes()) == 1
    assert stranger.poll() is None
    os.kill(inner(stranger), signal.SIGKILL)
    stranger.wait()
    if state(out) != "done":
        last = pair[0].start(hosts(work, out), environment(lab))
        text = output(last)
        assert last.returncode == 0, text
    same_results(out, whole)
    nothing_is_left(pair)


def test_all_nodes_that_are_not_ready_are_in_one_message_within_seconds(pair: Pair, lab: Path, work: Path) -> None:
    import importlib.metadata

    version = importlib.metadata.version("peft")
    metadata = Path(str(next(p for p in importlib.metadata.files("peft") or () if p.name == "METADATA").locate()))
    other = metadata.read_text().replace(f"\nVersion: {version}\n", "\nVersion: 0.0.7\n")
    out = work / "never"
    hostfile = work / "three"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\nnode9 slots=1\n")
    command = hosts(work, out)
    command[command.index("--hostfile") + 1] = str(hostfile)
    out.mkdir()
    with pair[1].hide(work / "meld"), pair[1].hide(out), pair[1].replace(metadata, other):
        began = time.monotonic()
        started = pair[0].start(command, environment(lab))
        text = output(started)
        assert time.monotonic() - began < 60
    assert started.returncode == 1
    assert "the nodes are not ready: 4 faults" in text
    assert f"{work}/meld is not a prepared dataset" in text
    assert "egmf prepare TASK" in text
    assert "(on node2)" in text
    assert "cannot be reached over ssh: ssh: connect to host 10.81.0.9 port 22" in text
    assert f"peft differs: {version} on node1; 0.0.7 on node2" in text
    assert "is not shared: node2 sees another" in text
    assert "Traceback" not in text
    assert state(out) is None
    nothing_is_left(pair, seconds=5)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_worker_ends_the_run_and_leaves_nothing(pair: Pair, lab: Path, work: Path, moment: str) -> None:
    out = work / moment.replace(" ", "-")
    env = environment(lab, PYTHONPATH=PLANTING, EGMF_TEST_KILL=f"1:{MOMENTS[moment]}")
    started = pair[0].start(hosts(work, out), env)
    text = output(started)
    assert started.returncode == 137, text
    assert "node node2: the run failed: rank 1 failed first, with signal SIGKILL" in text
    assert text.rstrip().splitlines()[-1].startswith("error on rank 1: killed from outside")
    assert state(out) == (None if moment == "before the rendezvous" else "failed")
    nothing_is_left(pair, seconds=5)


@pytest.mark.parametrize("what", ["launcher", "agent", "connection"])
def test_a_run_that_lost_its_launcher_saves_and_leaves_nothing(pair: Pair, lab: Path, work: Path, what: str) -> None:
    out = work / f"lost-{what}"
    started = pair[0].start(
        hosts(work, out, "train.steps=400", "train.eval_every=400", "train.save_every=400"), environment(lab)
    )
    until(in_step(out))
    if what == "launcher":
        os.kill(inner(started), signal.SIGKILL)
    else:
        word = "-m launch.start.agent" if what == "agent" else "sshd: root@notty"
        found = [pid for pid, line in pair[1].processes().items() if word in line and "bash" not in line]
        assert found
        for pid in found:
            os.kill(pid, signal.SIGKILL)
    text = output(started)
    until(lambda: state(out) == "stopped", 60)
    nothing_is_left(pair)
    if what != "launcher":
        assert started.returncode == 85, text
    assert list((out / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("what", ["launch.py", "connection", "worker"])
def test_what_deepspeed_loses_leaves_nothing(pair: Pair, lab: Path, work: Path, what: str) -> None:
    """DeepSpeed's own launcher: its helper on the second node killed, its ssh connection cut, a worker killed."""
    out = work / f"deepspeed-{what}"
    more = ["train.steps=400", "train.eval_every=400", "train.save_every=400"]
    started = pair[0].start([*deepspeed(work, out), *more], environment(lab))
    until(in_step(out))
    words = {"launch.py": "-m deepspeed.launcher.launch", "connection": "sshd: root@notty", "worker": "-m trainer"}
    found = [pid for pid, line in pair[1].processes().items() if words[what] in line and "bash" not in line]
    if what == "worker":
        found = list(pair[1].workers())
    assert found
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    output(started)
    nothing_is_left(pair)
    assert state(out) == ("failed" if what == "worker" else "stopped")
    shutil.rmtree(out)
