"""The command line on real processes: launchers, stop and continue, failures, a machine without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.processes import ROOT, assert_removed, egmf, environment, free_port, shared_memory, start
from tests.toy import prepare_toy
from trainer.distributed.compiled_ops import compile_cpu_adam, extensions_folder, missing_build_tools

pytestmark = pytest.mark.distributed
STEPS = 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy data and a config whose module dropout is on."""
    folder = tmp_path_factory.mktemp("launch")
    prepare_toy("meld", folder)
    (folder / "toy.yaml").write_text(
        f"""
extends: {ROOT}/configs/tiny.yaml
task: meld
data: {{path: "{folder}/{{task}}"}}
model:
  backbone: {{quantization: nf4, tiny: {{vocab_size: 400}}}}
  adapter: {{dropout: 0.1}}
  fusion: {{dropout: 0.1}}
train: {{steps: {STEPS}, global_batch: 12, micro_batch: 4, eval_every: 4, save_every: 2, keep: 9, log_every: 1}}
track: {{system_metrics: false, report: false}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def whole(work: Path) -> Path:
    """An undisturbed run of two processes, the only one here that draws its report unless it fails."""
    out = work / "whole"
    done = egmf("launch", "local", "--procs", "2", str(work / "toy.yaml"), "--out", str(out), "track.report=true")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return out


def record(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "run.json").read_text()))


def same_results(a: Path, b: Path) -> None:
    assert json.loads((a / "metrics.json").read_text()) == json.loads((b / "metrics.json").read_text())
    for split in ("valid", "test"):
        one, two = (pd.read_parquet(run / "predictions" / f"{split}.parquet") for run in (a, b))
        pd.testing.assert_frame_equal(one, two)
    last = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    assert (a / last).read_bytes() == (b / last).read_bytes()


def test_the_run_folder_holds_what_the_plan_says(whole: Path) -> None:
    run_record = record(whole)
    assert run_record["state"] == "done"
    assert run_record["world"] == 2
    assert run_record["zero"] == 2
    assert len(run_record["data"]["meld"]) == 64
    assert run_record["versions"]["torch"]
    for name in ("config.yaml", "log.txt", "metrics.json"):
        assert (whole / name).is_file()
    table = pd.read_parquet(whole / "predictions" / "test.parquet")
    assert {
        "task",
        "id",
        "label",
        "prediction",
        "valid",
        "answer",
        "probabilities",
        "gate_expert",
        "gate_modality",
    } <= set(table)
    assert list(table["id"]) == sorted(table["id"])
    assert len(table) == 11
    assert "ERROR" not in (whole / "log.txt").read_text()


@pytest.mark.slow
def test_torchrun_and_the_deepspeed_launcher_give_the_same_run_bit_by_bit(work: Path, whole: Path) -> None:
    bin_folder = Path(sys.executable).parent
    train = ["train", str(work / "toy.yaml")]
    starts = {
        "torchrun": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            f"--master-port={free_port()}",
            "--module",
            "trainer",
            *train,
        ],
        "deepspeed": [
            str(bin_folder / "deepspeed"),
            "--num_gpus=2",
            f"--master_port={free_port()}",
            "--module",
            "trainer",
            *train,
        ],
    }
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    for name, command in starts.items():
        out = work / name
        shared_memory_before = shared_memory()
        done = subprocess.run(
            [*command, "--out", str(out)],
            env=environment(PATH=path, TORCH_EXTENSIONS_DIR=str(work / "extensions")),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert_removed(shared_memory() - shared_memory_before)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert record(out)["state"] == "done"
        same_results(out, whole)
    assert not (work / "extensions").exists()  # nothing was compiled


def test_a_stopped_run_exits_85_and_continues_to_the_same_weights(work: Path, whole: Path) -> None:
    out = work / "stopped"
    arguments = ["launch", "local", "--procs", "2", str(work / "toy.yaml"), "--out", str(out)]
    line = [sys.executable, "-m", "trainer", *arguments]
    launcher = start(line, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert launcher.stderr is not None
    output = ""
    for line in launcher.stderr:
        output += line
        if "step 3/" in line:
            launcher.send_signal(signal.SIGTERM)
            break
    output += launcher.stderr.read()
    assert launcher.wait(timeout=200) == 85, output
    assert "Traceback" not in output
    assert record(out)["state"] == "stopped"
    run_id = record(out)["mlflow"]["run_id"]
    assert not (out / "metrics.json").exists()
    again = egmf(*arguments)
    assert again.returncode == 0, again.stderr
    assert "continuing from" in again.stderr
    assert record(out)["mlflow"]["run_id"] == run_id
    same_results(out, whole)
    # once more: nothing is left to train, the result stays
    finished = egmf(*arguments)
    assert finished.returncode == 0, finished.stderr
    same_results(out, whole)
    other = egmf("train", str(work / "toy.yaml"), "--out", str(out), "train.seed=5", "model.fusion.width=128")
    assert other.returncode == 1
    for words in ("seed", "model.fusion.width", "train.resume=never"):
        assert words in other.stderr


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(work: Path, whole: Path) -> None:
    out = work / "fewer"
    shutil.copytree(whole, out)
    for step in (6, 8):
        shutil.rmtree(out / f"checkpoints/step-{step:08d}")
    done = egmf("train", str(work / "toy.yaml"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "step-00000004 was written by 2 ranks: converting it for 1" in done.stderr
    assert record(out)["world"] == 1
    assert record(out)["state"] == "done"
    assert record(out)["mlflow"]["run_id"] == record(whole)["mlflow"]["run_id"]
    assert not list((out / "checkpoints").glob(".converting-*"))


@pytest.mark.parametrize(
    ("plant", "code", "what", "why"),
    [
        ("EGMF_TEST_FAIL_RANK", 1, "exit code 1", "planted on rank 1"),
        ("EGMF_TEST_KILL_RANK", 137, "signal SIGKILL", "by the kernel when memory runs out"),
    ],
)
def test_a_rank_that_fails_ends_the_run_and_its_cause_is_the_last_line(
    work: Path, plant: str, code: int, what: str, why: str
) -> None:
    out = work / plant
    shared_memory_before = shared_memory()
    launcher = start(
        [sys.executable, "-m", "trainer", "launch", "local", "--procs", "2", str(work / "toy.yaml"), "--out", str(out),
         "track.mlflow=false", "track.report=true"],
        env=environment(**{plant: "1", "PYTHONPATH": f"{ROOT}/tests/distributed/failing{os.pathsep}{ROOT}"}),
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    children: set[str] = set()
    while launcher.poll() is None and "steps 1 to" not in _text(out / "log.txt"):
        children |= set(Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split())
        time.sleep(0.05)
    assert len(children) >= 2
    began = time.monotonic()
    output = launcher.communicate(timeout=400)[1]
    assert time.monotonic() - began < 30
    assert launcher.returncode == code, output
    assert f"the run failed: rank 1 failed first, with {what}" in output
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("error on rank 1: ")
    assert why in last
    assert record(out)["state"] == "failed"
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert_removed(shared_memory() - shared_memory_before)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_without_a_compiler_training_goes_on_over_gloo(work: Path, tmp_path: Path) -> None:
    for program in ("python3", "git", "env", "sh", "uname"):  # what is left on PATH: no compiler, no ninja
        where = shutil.which(program)
        if where:
            (tmp_path / program).symlink_to(where)
    out = work / "no-compiler"
    (tmp_path / "ext").mkdir()
    done = egmf(
        "launch", "local", "--procs", "2", str(work / "toy.yaml"), "--out", str(out), "train.steps=2", "track.mlflow=false",
        PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path / "ext"), CC="", CXX="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "C++ compiler" not in done.stderr
    assert record(out)["state"] == "done"
    assert not list((tmp_path / "ext").rglob("*.so"))
    refused = egmf("train", str(work / "toy.yaml"), "--out", str(out), "train.offload=cpu", PATH=str(tmp_path), CXX="")
    assert refused.returncode == 1
    assert "train.offload=cpu compiles DeepSpeed's CPU Adam, and there is no C++ compiler on PATH" in refused.stderr


@pytest.mark.slow  # compiles DeepSpeed's CPU Adam: about a minute
def test_the_optimizer_in_host_memory_trains_to_the_same_weights(work: Path) -> None:
    weights = {}
    for stage, offload in (("2", "none"), ("2", "cpu"), ("3", "cpu")):
        out = work / f"offload-{stage}-{offload}"
        done = egmf(
            "launch", "local", "--procs", "2", str(work / "toy.yaml"), "--out", str(out), f"train.zero={stage}",
            f"train.offload={offload}", "train.steps=4", "model.adapter.dropout=0", "model.fusion.dropout=0",
            "track.mlflow=false",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        weights[stage, offload] = load_file(out / "checkpoints" / "step-00000004" / "model.safetensors")
    whole = weights.pop(("2", "none"))
    for other in weights.values():
        assert other.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow  # compiles DeepSpeed's CPU Adam: about a minute
def test_an_interrupted_build_of_the_op_does_not_hang_the_next(work: Path, whole: Path) -> None:
    if missing_build_tools():
        pytest.skip("the op is not built here: no C++ compiler")
    compile_cpu_adam()
    root = work / "interrupted"  # other tests use what is built already, at the same time
    shutil.copytree(extensions_folder() / "cpu_adam", root / "cpu_adam")
    (root / "cpu_adam" / "lock").touch()
    done = egmf(
        "train", str(work / "toy.yaml"), "--out", str(work / "after"), "train.steps=1", "track.mlflow=false", "train.zero=1",
        "train.offload=cpu", timeout=400, TORCH_EXTENSIONS_DIR=str(root),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
