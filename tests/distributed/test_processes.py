"""The environment that tests start processes in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed import processes


@pytest.mark.parametrize("driver", [False, True])
def test_tests_on_the_cpu_see_no_gpu_and_carried_packages_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: bool
) -> None:
    monkeypatch.setattr(processes, "GPU_DRIVER", tmp_path if driver else tmp_path / "none")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("PYTHONPATH", "/carried")
    assert processes.environment()["CUDA_VISIBLE_DEVICES"] == ("" if driver else "3")
    assert processes.environment(DS_ACCELERATOR="cuda")["CUDA_VISIBLE_DEVICES"] == "3"
    assert processes.environment()["PYTHONPATH"].split(os.pathsep) == [str(processes.ROOT), "/carried"]
    monkeypatch.delenv("PYTHONPATH")
    assert processes.environment()["PYTHONPATH"] == str(processes.ROOT)
    assert processes.environment(PYTHONPATH="x")["PYTHONPATH"] == "x"
