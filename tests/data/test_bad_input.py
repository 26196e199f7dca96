"""`egmf prepare` stopped from outside: by a signal, a full disk, a place that cannot be written."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.processes import environment, restore_interrupts
from trainer.tasks import get_task


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MELD-like pickles of some MB."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    for split, n in (("train", 3000), ("valid", 50), ("test", 50)):
        rows = [
            {
                "features": {"text": f"t{i}", "audio": rng.random((6, 64), dtype="f4")},
                "label": get_task("meld").labels[i % 7],
            }
            for i in range(n)
        ]
        (folder / f"meld_{split}.pkl").write_bytes(pickle.dumps(rows, 4))
    return folder


def prepare(features: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "trainer", "prepare", "meld", "--source", str(features), "--out", str(out)]


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped by a signal")]
)
def test_a_signal_is_told_and_leaves_nothing(
    number: signal.Signals, message: str, features: Path, tmp_path: Path
) -> None:
    command = prepare(features, tmp_path / "d")
    worker = subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_interrupts,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".d.preparing-*/train")) and worker.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    worker.send_signal(number)
    shown, result = worker.communicate(timeout=60)
    assert (worker.returncode, shown, result) == (128 + number, "", f"{message}\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"), [("size=1m", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_place_that_cannot_be_written(options: str, message: str, features: Path, tmp_path: Path) -> None:
    unshare = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=False).returncode:
        pytest.skip("no mounts in a namespace here (unshare --mount --map-root-user)")
    place = str(tmp_path)
    script = (
        f'place="$1"; shift; mount -t tmpfs -o {options} none "$place" && "$@"; code=$?; ls -A "$place"; exit $code'
    )
    command = [*unshare, "sh", "-c", script, "sh", place, *prepare(features, tmp_path / "d")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""  # the place is empty
