"""What runs on a bare GPU machine, as far as it can be run here: stages, limits, what is missing, wheels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.ready import MISSING, NEEDED, card, gpu_fault
from tests.distributed.processes import ROOT, environment

FOLDER = ROOT / "benchmarks" / "gpu"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def run_all(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = environment(PYTHON=sys.executable, **more)
    command = ["bash", str(FOLDER / "run_all.sh"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["run_all.sh", "wheels.sh"])
def test_the_scripts_are_sound(name: str) -> None:
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC2086", str(FOLDER / name)], check=True)


def test_stages_are_listed_with_their_limits_and_each_fits_into_a_call() -> None:
    listed = run_all("--list")
    assert listed.returncode == 0
    stages = dict(re.findall(r"^(\S+) +at most +(\d+) s$", listed.stdout, re.MULTILINE))
    assert next(iter(stages)) == "first"
    assert list(stages)[-2:] == ["flex", "gate-speed"]  # what compiles for minutes is last
    assert all(int(seconds) <= 590 - 60 for seconds in stages.values())
    tail = run_all("--list", "--from", "deterministic").stdout
    assert re.findall(r"^\S+", tail, re.MULTILINE) == ["deterministic", "flex", "gate-speed"]
    script = (FOLDER / "run_all.sh").read_text(encoding="utf-8")
    assert re.findall(r"^        ([a-z-]+)\) run_stage", script, re.MULTILINE) == list(stages)
    for path in re.findall(r"tests/gpu/\w+\.py", script):
        assert (ROOT / path).is_file()
    named = {Path(path).name for path in re.findall(r"tests/gpu/\w+\.py", script)}
    assert named == {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")}  # none is forgotten


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("large", "frist"), "no stage frist: there are first packed"),
        (("--from", "larg"), "no stage larg"),
        (("large", "--from", "flex"), "--from flex: goes with no names"),
        (("--device", "tpu"), "usage: "),
        (("--budget", "long"), "usage: "),
        (("--device", "cpu"), "name a folder with --out"),
        (("--colour",), "usage: "),
    ],
)
def test_what_is_asked_wrongly_is_said(arguments: tuple[str, ...], words: str) -> None:
    refused = run_all(*arguments)
    assert refused.returncode == 64
    assert words in refused.stderr


@no_gpu
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    refused = run_all("--out", str(tmp_path / "out"))
    assert refused.returncode == MISSING
    assert "1 missing here:\n  no GPU: torch " in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    for name in ("hjson", "omegaconf"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name}')\n", encoding="utf-8")
    refused = run_all("--device", "cpu", "--out", str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert refused.returncode == MISSING
    assert "hjson: ImportError: no hjson" in refused.stderr
    assert "omegaconf: ImportError: no omegaconf" in refused.stderr
    assert "wheels.sh" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_stages_run_are_interrupted_and_left_for_another_call(tmp_path: Path) -> None:
    done = run_all("first", "--device", "cpu", "--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "first.json").read_text(encoding="utf-8"))
    assert [row["cudnn"] for row in found["attention"]] == [True, False]
    assert {row["what"] for row in found["bits"]} == {"attention", "depthwise convolution"}
    assert all(row["same"] or row["refused"] for row in found["bits"])
    assert found["adam"]["right"] is True
    assert "first: passed in" in done.stdout
    assert "same bits" in done.stdout.partition("== summary")[2]
    stopped = run_all("gate-speed", "--device", "cpu", "--limit", "1", "--out", str(tmp_path))
    assert stopped.returncode == 1
    assert "gate-speed: FAILED: stopped after 1 s" in stopped.stdout
    left = run_all("first", "large", "--device", "cpu", "--tiny", "--budget", "1", "--out", str(tmp_path / "none"))
    assert left.returncode == 75
    assert "left for another call: bash benchmarks/gpu/run_all.sh first large" in left.stdout


def test_a_cards_name_becomes_a_folders() -> None:
    assert card("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@no_gpu
def test_what_is_needed_is_here_and_no_gpu_is_a_fault_in_words() -> None:
    assert {name.lower() for name in ("torch", "bitsandbytes", "deepspeed")} <= set(NEEDED)
    assert str(gpu_fault(torch)).startswith("no GPU: torch")


@pytest.mark.slow  # fetches packages
def test_what_a_bare_machine_lacks_is_gathered_small(tmp_path: Path) -> None:
    def wheels(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(FOLDER / "wheels.sh"), *arguments]
        env = {**os.environ, "PYTHON": sys.executable}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)

    folder = tmp_path / "wheels"
    done = wheels(str(folder), "--python", "3.12", "--cuda", "13.0")
    assert done.returncode == 0, done.stderr
    files = list(folder.glob("*.whl"))
    assert sum(path.stat().st_size for path in files) < 20e6
    (bitsandbytes,) = folder.glob("bitsandbytes-*.whl")
    with zipfile.ZipFile(bitsandbytes) as archive:
        names = archive.namelist()
        record = archive.read(next(name for name in names if name.endswith("/RECORD"))).decode()
    kept = {name for name in names if "libbitsandbytes" in name}
    assert kept == {"bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so"}
    assert {line.partition(",")[0] for line in record.splitlines()} == set(names)
    assert {"cp312"} == {path.name.split("-")[2] for path in files if "-cp3" in path.name}
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(tmp_path / "site"),
         *map(str, [bitsandbytes, *folder.glob("deepspeed-*.whl")])], capture_output=True, text=True,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    assert (tmp_path / "site" / "deepspeed" / "__init__.py").is_file()
    again = wheels(str(folder))
    assert again.returncode == 73
    assert "is there already" in again.stderr
    other = wheels(str(tmp_path / "other"), "--cuda", "9.9")
    assert other.returncode == 1
    assert "has no library for cuda99: it has cpu, cuda118" in other.stderr
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "other.part").exists()
