"""fp16 under ZeRO 0 to 3, DeepSpeed's own engine on a CPU: overflows are counted, the schedule waits for them, a continued run has the scale."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from tests.distributed.fp16_worker import KEPT, STEPS, halved
from tests.distributed.processes import run_ranks
from tests.toy import prepare_toy
from trainer.tracking.journal import read_journal

STAGES = ("0", "1", "2", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    prepare_toy("meld", folder)
    return folder


@pytest.fixture(scope="module")
def found(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What every run of one rank was, and their folder."""
    out = tmp_path_factory.mktemp("fp16")
    run_ranks("tests.distributed.fp16_worker", str(data), str(out), *STAGES, procs=1, timeout=500)
    return json.loads((out / "results.json").read_text())[0], out


def factors() -> list[float]:
    """The schedule of a training without overflows, by transformers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.25 * STEPS), STEPS)
    return [schedule.lr_lambdas[0](step) for step in range(STEPS)]


def same(one: list[dict[str, Any]], other: list[dict[str, Any]], key: str, **tolerance: float) -> None:
    np.testing.assert_allclose([step[key] for step in one], [step[key] for step in other], **tolerance)


def overflows(steps: list[dict[str, Any]]) -> list[bool]:
    return [step["overflowed"] for step in steps]


pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_is_lost_at_the_scale_that_runs_begin_with(found: Any, stage: str) -> None:
    """And the losses are those of fp32, so that gradients are divided by what they were multiplied by."""
    run = found[0][f"{stage}-default"]
    assert run["code"] == 0
    assert not any(overflows(run["steps"]))
    assert {step["scale"] for step in run["steps"]} == {256.0}
    exact = found[0]["fp32"]["steps"]
    same(run["steps"], exact, "loss", rtol=1e-2)
    moved = abs(exact[-1]["loss"] - exact[0]["loss"])
    assert abs(run["steps"][-1]["loss"] - exact[-1]["loss"]) < 0.02 * moved


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_moves_nothing_and_the_schedule_waits(found: Any, stage: str) -> None:
    results, out = found
    run = results[f"{stage}-high"]
    steps, lost = run["steps"], overflows(run["steps"])
    assert run["code"] == 0
    assert lost[0]
    assert not all(lost)
    before = None
    for place, step in enumerate(steps):
        if before is not None:
            still = step["lr"] == 0.0 or step["overflowed"]
            assert (step["weights"] == before["weights"]) == still, place
            halved = step["scale"] == before["scale"] / 2
            assert halved == before["overflowed"], place
        assert step["lr"] == pytest.approx(2e-4 * factors()[place - sum(lost[:place])], rel=1e-12)
        before = step
    record = json.loads((out / f"{stage}-high" / "run.json").read_text())
    assert record["steps_skipped"] == {"not_finite": 0, "loss_scale": sum(lost)}
    journal = read_journal(out / f"{stage}-high" / "journal.jsonl")
    assert [step for step, _ in journal["train/overflow"]] == [i + 1 for i, gone in enumerate(lost) if gone]
    assert [value for _, value in journal["train/loss_scale"]] == [step["scale"] for step in steps]
    assert "the schedule waits" in (out / f"{stage}-high" / "log.txt").read_text()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_the_stages_take_the_same_steps(found: Any, stage: str) -> None:
    zero, other = (found[0][f"{s}-high"]["steps"] for s in ("0", stage))
    assert overflows(zero) == overflows(other)
    assert [step["scale"] for step in zero] == [step["scale"] for step in other]
    same(zero, other, "loss", rtol=5e-3)
    same(zero, other, "norm", rtol=5e-3)


def test_an_overflow_on_either_of_two_ranks_is_one_on_both(data: Path, tmp_path: Path) -> None:
    """At which steps it is another question than with one rank: a rank's own gradient is made at the scale, then averaged."""
    stages = ("0", "2")
    run_ranks("tests.distributed.fp16_worker", str(data), str(tmp_path), *stages, procs=2, timeout=500)
    ranks = json.loads((tmp_path / "results.json").read_text())
    for stage in stages:
        one, other = (rank[f"{stage}-high"]["steps"] for rank in ranks)
        lost = overflows(one)
        assert any(lost)
        assert not all(lost)
        for key in ("overflowed", "scale", "lr", "usage"):
            assert [step[key] for step in one] == [step[key] for step in other], key
        waited = [2e-4 * factors()[place - sum(lost[:place])] for place in range(STEPS)]
        assert [step["lr"] for step in one] == pytest.approx(waited, rel=1e-12)
        moved = [step["weights"] != before["weights"] for before, step in itertools.pairwise(one)]
        assert moved == [step["lr"] > 0 and not step["overflowed"] for step in one[1:]]


def test_the_scale_and_its_counters_go_with_a_run_to_another_number_of_ranks(
    found: Any, data: Path, tmp_path: Path
) -> None:
    results, out = found
    stages = ("0", "2", "3")
    for stage in stages:
        halved(out / f"{stage}-high", tmp_path / f"{stage}-others")
    run_ranks("tests.distributed.fp16_worker", str(data), str(tmp_path), *stages, procs=2, timeout=500)
    continued = json.loads((tmp_path / "results.json").read_text())[0]
    for stage in stages:
        steps, alone = continued[f"{stage}-others"]["steps"], results[f"{stage}-high"]["steps"]
        assert [step["scale"] for step in steps][:2] == [step["scale"] for step in alone][KEPT : KEPT + 2], stage
        assert steps[0]["loss"] == pytest.approx(alone[KEPT]["loss"], rel=1e-3)
        assert steps[0]["lr"] == alone[KEPT]["lr"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_continued_run_has_the_scale_and_its_counters(found: Any, stage: str) -> None:
    through, again = (found[0][f"{stage}-{name}"] for name in ("high", "again"))
    assert again["code"] == 0
    assert again["steps"] == through["steps"][KEPT:]
    name = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    assert (found[1] / f"{stage}-again" / name).read_bytes() == (found[1] / f"{stage}-high" / name).read_bytes()


def test_an_overflow_that_no_smaller_scale_cures_ends_the_run(found: Any) -> None:
    run = found[0]["fixed"]
    assert run["code"].startswith("NonFiniteError: the loss or a gradient was not finite in 3 steps in a row")
    assert [step["skipped"] for step in run["steps"]][:2] == [True, True]
    assert not any(overflows(run["steps"]))


def test_the_schedule_of_the_reference_is_what_is_expected() -> None:
    assert factors()[0] == 0.0
    assert max(factors()) == 1.0
    assert math.isclose(factors()[-1], 0.5 * (1 + math.cos(math.pi * 8 / 9)))
