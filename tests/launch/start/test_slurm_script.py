"""The sbatch script, without a Slurm: what is asked, what is quoted, what is refused before anything is submitted."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from launch.start.slurm import Job, Resources, check, limit_seconds, one_run, render
from tests.distributed.processes import ROOT, egmf
from trainer.config import load_config

CONFIG = str(ROOT / "configs" / "tiny.yaml")


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return dict(line.split("=", 1) if "=" in line else (line, "") for line in lines)


def test_the_script_asks_for_what_was_given_and_is_bash(tmp_path: Path) -> None:
    out = tmp_path / "it's 100% mine"
    done = egmf(
        "launch", "slurm", CONFIG, "train.stop_signals=[SIGTERM,SIGUSR2]", "--out", str(out), "--nodes", "2-4",
        "--gpus-per-node", "8", "--partition", "gpu", "--time", "1-12", "--account", "lab", "--cpus-per-task", "12",
        "--setup", "module load cuda", "--sbatch=--exclusive", "--sbatch=--comment=hello 'big' world", "--sbatch=--mail-user='me@here'", "--srun=--cpu-bind=none", "--signal-seconds", "300",
        "--debug", "--dry-run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    asked = directives(done.stdout)
    expected = {
        "nodes": "2-4", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "12", "partition": "gpu",
        "time": "1-12", "account": "lab", "signal": "B:USR2@300", "requeue": "", "open-mode": "append", "exclusive": "",
        "mail-user": "'me@here'",
    }  # fmt: skip
    assert {key: asked.get(key) for key in expected} == expected
    assert shlex.split(asked["comment"]) == ["hello 'big' world"]
    assert "array" not in asked
    assert asked["output"].endswith("100%% mine/slurm/%j.log'")
    for words in ("module load cuda", "--cpu-bind=none", "--debug", "sbatch --test-only"):
        assert words in done.stdout + done.stderr
    assert "USR1" not in done.stdout
    checked = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("run="))
    printed = subprocess.run(["bash", "-c", f'{line}; printf %s "$run"'], capture_output=True, text=True)
    assert printed.stdout == str(out)


@pytest.mark.parametrize(
    ("asked", "words", "cores"),
    [
        (
            {"gpus_per_node": 2},
            ("train.offload=none",),
            5,
        ),  # the training, two workers, NCCL's proxy, the run's threads
        ({"gpus_per_node": 2}, ("data.workers=6",), 9),
        ({"gpus_per_node": 2}, ("train.offload=cpu", "train.zero=2"), 9),
        ({"gpus_per_node": 2, "cpus_per_task": 3}, (), 3),
        ({"gpus_per_node": 2, "cpus_per_task": 0}, (), None),
        ({}, (), None),  # on CPUs without workers: one core, which is Slurm's default
        ({}, ("data.workers=3",), 4),
    ],
)
def test_the_cores_follow_the_config_where_none_are_named(
    asked: dict[str, int], words: tuple[str, ...], cores: int | None
) -> None:
    layout = one_run(load_config(CONFIG, words), Path("runs/one"))
    job = Job(layout, Resources(nodes="1", procs_per_node=2, **asked))
    assert directives(render(job)).get("cpus-per-task") == (None if cores is None else str(cores))


@pytest.mark.parametrize("option", ["--gpus-per-task=1", "--gpus=8", "--gres=gpu:a100:4", "--gres=fs:1,gpu:2", "-G 8"])
def test_gpus_that_an_option_of_sbatch_asks_for_count_too(option: str) -> None:
    layout = one_run(load_config(CONFIG), Path("runs/one"))
    asked = Resources(nodes="1", procs_per_node=4)
    assert directives(render(Job(layout, asked, sbatch_options=(option,)))).get("cpus-per-task") == "5"
    for other in ("--cpus-per-gpu=4", "-c 8", "--cpus-per-task=7"):
        lines = [
            line for line in render(Job(layout, asked, sbatch_options=(option, other))).splitlines() if "SBATCH" in line
        ]
        assert sum("cpus-per-task" in line for line in lines) == (other == "--cpus-per-task=7")
    none = Job(layout, asked, sbatch_options=("--gres=fs:1", "--comment=--gpus=2"))
    assert "cpus-per-task" not in directives(render(none))


def test_without_requeue_nothing_is_put_back(tmp_path: Path) -> None:
    done = egmf("launch", "slurm", CONFIG, "--procs-per-node", "2", "--no-requeue", "--dry-run", "--array-seeds", "5,9")
    assert done.returncode == 0, done.stderr
    asked = directives(done.stdout)
    assert "no-requeue" in asked
    assert asked["array"] == "5,9"
    assert asked["output"].endswith("/runs/tiny-s%a/slurm/%A_%a.log")
    assert "scontrol requeue" not in done.stdout


def test_a_sweep_is_one_array_of_what_is_not_done(tmp_path: Path) -> None:
    out = tmp_path / "it's 5% so"
    words = (
        "sweep",
        CONFIG,
        "--seeds",
        "1,2",
        "--set",
        "model.fusion.experts=[local,global],[local]",
        "--out",
        str(out),
    )
    done = egmf(*words, "--slurm", "--gpus-per-node", "4", "--partition", "gpu", "--parallel", "3", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    asked = directives(done.stdout)
    assert (asked["array"], asked["gpus-per-node"], asked["partition"]) == ("1,2,3,4%3", "4", "gpu")
    assert asked["output"].endswith("5%% so/slurm/%A_%a.log'")
    checked = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    lines = done.stdout.splitlines()
    first = lines.index("declare -A runs=(")
    table = "\n".join(lines[first : lines.index("run=${runs[$SLURM_ARRAY_TASK_ID]}") + 1])
    printed = subprocess.run(
        ["bash", "-c", f'SLURM_ARRAY_TASK_ID=4; {table}; printf %s "$run"'], capture_output=True, text=True
    )
    assert printed.stdout == str(out / "experts=local-s2")
    refused = {
        ("--partition", "gpu"): "belong to --slurm",
        ("--slurm", "--procs", "2", "--procs-per-node", "2"): "not --procs",
        ("--slurm",): "--gpus-per-node G, or on CPUs",
        ("--slurm", "--procs-per-node", "1", "--time", "soon"): "must be minutes",
    }
    for arguments, message in refused.items():
        result = egmf(*words, *arguments, "--dry-run")
        assert result.returncode == 1, arguments
        assert message in result.stderr


def test_what_cannot_work_is_refused_all_at_once(tmp_path: Path) -> None:
    faults = {
        ("--nodes", "4-2", "--gpus-per-node", "8", "--procs-per-node", "4", "--time", "3", "--array-seeds", "1,1"): (
            "--nodes 4-2", "--procs-per-node 4", "--time 3: too short", "names a seed twice",
        ),
        ("--nodes", "2"): ("--gpus-per-node G, or on CPUs --procs-per-node P",),
        ("--procs-per-node", "1", "--time", "soon"): ("--time soon: must be minutes",),
        ("--procs-per-node", "1", "--array-seeds", "1-3"): ("with commas between them",),
        ("--procs-per-node", "1", "--array-seeds", "1", "train.seed=2"): ("name the seed twice",),
        ("--procs-per-node", "1", "train.zer=2"): ("train.zer: unknown key",),
    }  # fmt: skip
    for arguments, words in faults.items():
        refused = egmf("launch", "slurm", CONFIG, "--dry-run", *arguments)
        assert refused.returncode == 1, refused.stdout
        for word in words:
            assert word in refused.stderr
    absent = egmf(
        "launch", "slurm", CONFIG, "--procs-per-node", "1", "--out", str(tmp_path / "run"), PATH=str(tmp_path)
    )
    assert absent.returncode == 1
    assert "there is no sbatch on PATH" in absent.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option", ["--account", "--mem", "--partition", "--qos", "--constraint", "--time", "--setup", "--sbatch", "--srun"]
)
@pytest.mark.parametrize("sign", ["\n", "\r", "\x1b"])
def test_no_option_begins_a_line_of_its_own_in_the_script(option: str, sign: str) -> None:
    value = f"x{sign}rm -rf"
    resources = {
        name: value for name in ("account", "mem", "partition", "qos", "constraint", "time") if option == f"--{name}"
    }
    job = Job(
        one_run(load_config(CONFIG), Path("runs/one")), Resources(nodes="1", procs_per_node=2, **resources),
        setup=(value,) if option == "--setup" else (), sbatch_options=(value,) if option == "--sbatch" else (),
        srun_options=(value,) if option == "--srun" else (),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"(?s){option}.*(control character|must be minutes)"):
        check(job)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("10:30", 630), ("2:00:01", 7201), ("1-12", 129600), ("1-2:3", 93780), ("0-0:0:9", 9), ("UNLIMITED", float("inf"))],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: float) -> None:
    assert limit_seconds(text) == seconds
