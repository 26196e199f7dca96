"""The raw Triton kernels, run by Triton's interpreter on the CPU, against the reference in float64."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.gate_cases import TRIALS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def interpret(*arguments: str) -> dict:
    """What interpreted.py prints."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "interpreted.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return interpret()


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_kernels_equal_the_reference(trial, interpreted):
    assert interpreted[trial.name] == []
