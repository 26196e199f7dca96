"""The short form of benchmarks/killtest.py: runs that are killed and continued end as if nothing had happened."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, environment, run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(("case", "procs", "kills"), [("zero3-nf4", 2, 4), ("zero2-nf4", 1, 2)])
def test_a_run_that_is_killed_again_and_again_is_the_same_run(
    tmp_path: Path, case: str, procs: int, kills: int
) -> None:
    out = tmp_path / "result.json"
    done = run(
        [sys.executable, "benchmarks/killtest.py", "--work", str(tmp_path / "work"), "--out", str(out), "--steps=24",
         f"--cases={case}", f"--procs={procs}", f"--kills={kills}"],
        cwd=ROOT, env=environment(), timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["kills"] == kills
    assert result["cases"][case]["equal"] == result["cases"][case]["chains"] >= 1
