"""Every way to ask Slurm for GPUs, on a real Slurm whose GPUs are null devices: which one each task takes, and on how many cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import ROOT
from tests.slurm.lab import Lab
from tests.slurm.test_slurm import ended, output, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
TASK = f'train=("$python" {ROOT}/tests/slurm/gpu_task.py "$run")'  # in place of the training


def tasks_of(lab: Lab, work: Path, name: str, *asked: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What each task of a job saw, by its place, and Slurm's own words about the job."""
    out = work / name
    job = submit(lab, work / "toy.yaml", out, "--partition", "gpu", "--setup", TASK, *asked)
    fields = ended(lab, job, out)
    assert fields["JobState"] == "COMPLETED", output(out)
    seen = [json.loads(path.read_text()) for path in out.glob("rank*.json")]
    return sorted(seen, key=lambda one: one["place"]), fields


@pytest.mark.parametrize(
    ("asked", "visible"),
    [
        (("--gpus-per-node", "2"), ["01", "01"]),
        (("--procs-per-node", "4", "--sbatch=--gpus-per-task=1"), ["0", "1", "2", "3"]),
        (("--gpus-per-node", "2", "--srun=--gpu-bind=map_gpu:1,0"), ["1", "0"]),
    ],
    ids=["per-node", "per-task", "bound"],
)
def test_each_task_takes_a_gpu_of_its_own(
    lab: Lab, work: Path, asked: tuple[str, ...], visible: list[str], request: pytest.FixtureRequest
) -> None:
    tasks, job = tasks_of(lab, work, f"gpus-{request.node.callspec.id}", *asked)
    assert [one["place"] for one in tasks] == list(range(len(visible)))
    assert ["".join(one["visible"]) for one in tasks] == visible
    for one in tasks:
        index = one["place"] if len(one["visible"]) > 1 else 0  # its own GPU alone is the first that it sees
        assert (one["device"], one["chosen"], one["local_rank"]) == (f"cuda:{index}", [index], str(index))
    taken = [one["visible"][int(one["local_rank"])] for one in tasks]
    assert sorted(taken) == [str(gpu) for gpu in range(len(visible))]
    assert {one["cores"] for one in tasks} == {"5"}  # the training, two workers, NCCL's proxy, the run's threads
    assert job["CPUs/Task"] == "5"


def test_the_cores_of_a_task_can_be_named_or_left_to_the_cluster(lab: Lab, work: Path) -> None:
    for asked, cores in (("3", "3"), ("0", None)):
        tasks, _ = tasks_of(lab, work, f"cores-{asked}", "--gpus-per-node", "1", "--cpus-per-task", asked)
        assert [one["cores"] for one in tasks] == [cores]
