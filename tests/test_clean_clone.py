"""The README's first command from a clean clone: set-up, generated data, training, the table; then once more."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from tests.distributed.processes import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]


def make_demo(clone: Path) -> subprocess.CompletedProcess[str]:
    # what make exports around these tests must not reach the clone; the environment variables of a user may
    private = (
        "MAKEFLAGS",
        "MAKELEVEL",
        "MFLAGS",
        "TORCH_EXTENSIONS_DIR",
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "OMP_NUM_THREADS",
        "DS_ACCELERATOR",
    )
    env = {key: value for key, value in environment().items() if key not in private}
    env["PIP_NO_COMPILE"] = "1"  # two thirds of the modules are never imported
    return subprocess.run(["make", "demo"], cwd=clone, env=env, capture_output=True, text=True, timeout=1500)


def test_the_demo_from_a_clean_clone_and_once_more(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    done = make_demo(clone)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    row = re.search(r"full model\s*│\s*([\d.]+)", done.stdout)
    text = re.search(r"text only\s*│\s*([\d.]+)", done.stdout)
    assert row, done.stdout
    assert text, done.stdout
    assert float(row[1]) > 0.9
    assert float(text[1]) < 0.32
    assert "mlflow ui" in done.stderr
    table = pd.read_parquet(clone / "runs" / "demo" / "predictions" / "test.parquet")
    assert (table["prediction"] == table["label"]).mean() == pytest.approx(float(row[1]), abs=6e-4)
    again = make_demo(clone)
    assert again.returncode == 0, again.stderr[-3000:]
    assert re.search(r"full model\s*│\s*([\d.]+)", again.stdout)[1] == row[1]  # type: ignore[index]
    assert not os.path.exists(clone / "runs" / "demo" / "checkpoints" / ".writing-step-00001000")
