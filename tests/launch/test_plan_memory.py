"""The plan's memory against real runs of real processes; `benchmarks/plan_memory.py` has all cases."""

from __future__ import annotations

import pytest

from benchmarks.plan_memory import LIMIT, Case, make_model, measure, predict
from tests.toy import prepare_toy

CASES = [
    Case(2, "nf4", "lora", False, "fp32", 2),
    Case(3, "none", "lora", True, "fp32", 2),
    Case(1, "none", "full", True, "bf16", 2),
]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_foretells_measured_memory(tmp_path):
    model, data = make_model(tmp_path / "model"), tmp_path / "data"
    prepare_toy("meld", data, train=4)
    measured = measure(CASES, model, data, tmp_path)
    off = {
        (case.name, rank): predict(case, model, data)["bytes"] / told["peak"] - 1
        for case in CASES
        for rank, told in enumerate(measured[case.name])
    }
    assert {name: value for name, value in off.items() if abs(value) > LIMIT} == {}
