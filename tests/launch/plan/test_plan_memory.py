"""The plan's memory against real runs of real processes; `benchmarks/plan_memory.py` has all cases."""

from __future__ import annotations

import pytest

from benchmarks.plan_memory import LIMIT, SAMPLES, Case, make_model, measure, predict
from launch.plan.plan import Throughput, make_plan
from tests.distributed.processes import egmf
from tests.toy import prepare_toy
from trainer.config import load_config

CASES = [
    Case(2, "nf4", "lora", False, "fp32", 2),
    Case(3, "none", "lora", True, "fp32", 2),
    Case(1, "none", "full", True, "bf16", 2),
    Case(2, "nf4", "lora", False, "fp32", 2, "padded"),
]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_foretells_measured_memory(tmp_path):
    model, data = make_model(tmp_path / "model"), tmp_path / "data"
    prepare_toy("meld", data, train=SAMPLES)
    measured = measure(CASES, model, data, tmp_path)
    off = {
        (case.name, rank): predict(case, model, data)["bytes"] / result["peak"] - 1
        for case in CASES
        for rank, result in enumerate(measured[case.name])
    }
    assert {name: value for name, value in off.items() if abs(value) > LIMIT} == {}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_foretells_a_checkpoints_size(tmp_path, stage):
    data = prepare_toy("meld", tmp_path / "data")
    overrides = [
        "task=meld", f"data.path={data}", f"train.zero={stage}", "train.steps=1", "track.mlflow=false", "train.global_batch=4",
        "model.backbone.quantization=nf4", "eval.splits=[valid]", "track.report=false", "model.adapter.rank=64",
    ]  # fmt: skip
    result = egmf("train", "configs/tiny.yaml", "--out", str(tmp_path / "run"), *overrides, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    written = sum(
        f.stat().st_size for f in next((tmp_path / "run/checkpoints").glob("step-*")).rglob("*") if f.is_file()
    )
    planned = make_plan(load_config("configs/tiny.yaml", overrides), 1, 1, 80, Throughput()).checkpoint
    assert sum(planned.values()) == pytest.approx(written, rel=0.1)
