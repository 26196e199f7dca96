"""A step, a batch that is scored, a generation, as a GPU would see them: devices, host waits, kernel launches.

The first step on a real GPU is not the place to find that a mask is on the CPU, or that the host waits for a loss eight times.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import ROOT, environment
from tests.fake_gpu.cases import CASES, Case

CUDA_BUILD = (Path(importlib.util.find_spec("torch").origin).parent / "lib" / "libtorch_cuda.so").exists()  # type: ignore
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the fake device is compiled by g++"),
    pytest.mark.skipif(CUDA_BUILD, reason="a torch for GPUs: the fake device is for a build without one"),
]

LAUNCHES_7B = (
    11_500  # of a step of 64 samples, 28 layers in NF4 with LoRA and checkpointing; 86,640 when it was first counted
)
DETECTIONS = {  # waits, and launches or the error
    "add": [0, 1], "view": [0, 0], "item": [1, 0], "bool": [1, 1], "nonzero": [1, "DynamicOutputShapeException"],
    "mask": [1, "DynamicOutputShapeException"], "index of the host": [1, 1], "list": [1, 2], "new_tensor": [1, 1],
    "blocking copy": [1, 1], "copy": [0, 1], "to the host": [1, 1], "repeat": [1, "DynamicOutputShapeException"],
    "repeat to a length": [0, 2], "foreach": [0, 2], "mixed": [0, "FakeTensorDeviceMismatchError"],
}  # fmt: skip


NOT_DETERMINISTIC = {  # on CUDA, by the documentation of torch.use_deterministic_algorithms
    "bincount", "histc", "kthvalue", "median", "put_", "put", "scatter_reduce", "embedding_bag", "_embedding_bag", "ctc_loss", "_ctc_loss",
    "nll_loss2d_forward", "nll_loss2d_backward", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "max_unpool2d",
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward",
    "max_pool3d_with_indices_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "replication_pad1d_backward",
    "replication_pad2d_backward", "replication_pad3d_backward",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Case -> what was seen; all of them in one process, which loads the device before torch."""
    folder = tmp_path_factory.mktemp("fake")
    command = [sys.executable, "-m", "tests.fake_gpu.worker", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


def test_what_must_be_seen_is_seen(found: Any) -> None:
    """A wait that goes unnoticed would make every budget below worthless."""
    assert found["detections"] == DETECTIONS


@pytest.mark.parametrize("case", [case for case in CASES if case.what == "train"], ids=lambda case: case.name)
def test_a_step_waits_for_the_device_once(found: Any, case: Case) -> None:
    seen = found[case.name]
    assert "fault" not in seen, seen
    assert seen["without_gradient"] == seen["misplaced"] == []
    assert not seen["skipped"]
    assert [waits for _, _, waits in seen["micro_steps"]] == [0] * len(seen["micro_steps"])
    assert list(seen["waits"].values()) == [1], seen["waits"]  # the numbers of the step, reduced over ranks
    boundary = seen["launches"] - sum(launches for launches, _, _ in seen["micro_steps"])
    assert boundary < 100  # the guard, the numbers, the optimizer: not one for each parameter


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_operator_lacks_a_deterministic_algorithm(found: Any, case: Case) -> None:
    """train.deterministic would end in an error on a GPU; torch looks for these inside its CUDA kernels alone."""
    seen = found[case.name]
    assert set(seen["by_operator"]) & NOT_DETERMINISTIC == set()
    assert seen["sums_of_floats"] == 0


@pytest.mark.parametrize("case", [case for case in CASES if case.what != "train"], ids=lambda case: case.name)
def test_answers_meet_no_tensor_of_another_device(found: Any, case: Case) -> None:
    seen = found[case.name]
    assert "fault" not in seen, seen
    own = {where: n for where, n in seen["waits"].items() if "super().update(" not in where}
    if case.what == "score":  # a cache of transformers that begins empty: once for the prefix of a whole evaluation
        assert seen["shape"] == seen["expected"]
        assert own == {}
    else:  # a token is looked at to see whether all samples have ended
        assert all("generation.py" in where or "get_decoder()(" in where for where in own), own


def test_a_step_of_a_7b_model_has_few_launches(found: Any) -> None:
    seen = found["7B"]
    assert seen["groups"] == [[64]]  # one row, read by the fusion network at once
    assert seen["launches"] <= LAUNCHES_7B
    assert [waits for _, _, waits in seen["micro_steps"]] == [0]
    assert sum(seen["waits"].values()) == 1
    assert seen["without_gradient"] == seen["misplaced"] == []
