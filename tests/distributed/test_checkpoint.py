"""Checkpoints of a real engine on two processes: damaged, incomplete, hostile, and with nowhere to be written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.checkpoint_worker import DAMAGES
from tests.distributed.processes import ROOT, egmf, environment, run, run_ranks
from tests.toy import prepare_toy

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    prepare_toy("meld", folder)
    return folder


@pytest.fixture(scope="module")
def result(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks")
    mark = str(out / "mark")
    run_ranks("tests.distributed.checkpoint_worker", str(data), str(out), timeout=600, EGMF_TEST_MARK=mark)
    return dict(json.loads((out / "results.json").read_text()))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_newest_and_the_best_are_kept(result: dict[str, Any]) -> None:
    assert result["kept"] == ["step-00000001", "step-00000003", "step-00000004"]
    assert result["best"].endswith("step-00000001")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_seen_and_the_one_before_is_used(result: dict[str, Any], damage: str) -> None:
    seen = result[damage]
    assert seen["newest"] == "step-00000001"
    assert seen["repaired"]
    assert seen["names"] == ["step-00000001", "step-00000002"]  # looking changes nothing
    assert seen["after"] == ["step-00000001"]
    assert seen["aside"] == ["damaged-step-00000002"]
    assert any("step-00000002 is damaged" in line and "step-00000001 is used" in line for line in seen["logged"])
    assert "no checkpoint in" in seen["none left"]
    assert "train.resume=never" in seen["none left"]


def test_a_checkpoint_of_another_format_is_refused_and_not_taken_for_damaged(result: dict[str, Any]) -> None:
    assert result["newer"].startswith("CheckpointError")
    assert "step-00000002 has checkpoint format 2" in result["newer"]
    assert "use the version that wrote it, or start anew with another --out or train.resume=never" in result["newer"]
    assert result["newer stays"] == ["step-00000001", "step-00000002"]


def test_weights_come_back(result: dict[str, Any]) -> None:
    assert result["weights"]


def test_code_in_a_checkpoint_is_refused_and_does_not_run(result: dict[str, Any]) -> None:
    assert result["code"].startswith("CheckpointError")
    assert "holds more than tensors" in result["code"]
    assert not result["code ran"]


def test_a_removed_folder_is_an_error(result: dict[str, Any]) -> None:
    assert "is gone: it was removed while the run was going on" in result["gone"]
    assert "CheckpointError" in result["gone"]
    assert result["gone stays gone"]


def test_a_full_disk_leaves_the_last_good_checkpoint(data: Path, small_disk: Path, capfd: Any) -> None:
    done = run(
        [sys.executable, "-m", "tests.distributed.checkpoint_worker", str(data), str(small_disk), "full"],
        env=environment(), cwd=ROOT, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    refused = next(line for line in done.stdout.splitlines() if line.startswith("REFUSED"))
    assert "the checkpoint of step 2 could not be written" in refused
    assert "step-00000001 stays" in refused
    assert "MiB free there" in refused
    assert "SAVED once there was room" in done.stdout


def test_a_folder_that_cannot_be_written_is_refused_at_once(data: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = egmf(
        "train", "configs/tiny.yaml", "task=meld", f"data.path={data}/{{task}}", "--out", str(small_disk / "run")
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "the run folder" in done.stderr
    assert "cannot be written: Read-only file system" in done.stderr


@pytest.mark.slow
def test_a_disk_that_fills_up_under_a_run_ends_it_in_words_and_it_goes_on(data: Path, small_disk: Path) -> None:
    out = small_disk / "run"
    words = ("launch", "local", "--procs", "2", "configs/tiny.yaml", "--out", str(out), "task=meld", f"data.path={data}/{{task}}",
             "train.steps=4", "train.global_batch=8", "train.save_every=1", "train.keep=9", "model.backbone.tiny.vocab_size=400",
             "track.system_metrics=false")  # fmt: skip
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (31 << 20))
    full = egmf(*words)
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    last = full.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error on rank 0: CheckpointError: the checkpoint of step")
    assert "MiB free there" in last
    assert json.loads((out / "run.json").read_text())["state"] == "failed"
    ballast.unlink()
    good = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    again = egmf(*words)
    assert again.returncode == 0, again.stderr
    assert not good or f"continuing from {out}/checkpoints/{good[-1]}" in again.stderr
