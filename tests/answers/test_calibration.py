"""Temperature scaling against a dense search, and what it must never touch."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from trainer.answers.calibration import LIMITS, Scored, calibrate, fit_temperature, tempered
from trainer.answers.metrics import compute
from trainer.tasks import get_task

MELD, SIMS = get_task("meld"), get_task("simsv2")


def drawn(n: int, sharpness: float, seed: int, task=MELD) -> Scored:  # type: ignore[no-untyped-def]
    """Truths drawn from calibrated probabilities; the model tells these to the power of `sharpness`."""
    rng = np.random.default_rng(seed)
    answers = len(task.answers())
    score_NC = rng.normal(0, 1.5, (n, answers))
    p_NC = softmax(score_NC, axis=1)
    truth_N = np.array([rng.choice(answers, p=p) for p in p_NC])
    told_NC = softmax(sharpness * score_NC, axis=1)
    if task.grid is None:
        return Scored(truth_N.astype(float), told_NC.argmax(1).astype(float), told_NC)
    grid_C = np.array(task.grid.values)
    return Scored(grid_C[truth_N], told_NC @ grid_C, told_NC)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_best_of_a_dense_search(sharpness: float) -> None:
    held = drawn(3000, sharpness, 0)
    answer_N = held.target_N.astype(int)
    found, at_limit = fit_temperature(answer_N, held.p_NC)

    def nll(t: float) -> float:
        return float(-np.log(tempered(held.p_NC, t)[np.arange(3000), answer_N]).mean())

    searched = np.exp(np.linspace(np.log(0.1), np.log(10), 2001))
    assert found == pytest.approx(searched[np.argmin([nll(t) for t in searched])], rel=5e-3)
    assert found == pytest.approx(sharpness, rel=0.1)
    assert not at_limit


def test_fitted_on_validation_and_told_of_test() -> None:
    valid, test = drawn(2000, 3.0, 1), drawn(2000, 3.0, 2)
    result = calibrate(MELD, {"test": test, "valid": valid})
    assert result is not None
    assert (result.fitted_on, result.n) == ("valid", 2000)
    assert result.edges == pytest.approx(np.linspace(0, 1, 16))
    before = compute(MELD, test.target_N, test.value_N, test.p_NC)
    after = compute(MELD, test.target_N, test.value_N, tempered(test.p_NC, result.temperature))
    values = result.splits["test"]
    assert [values[k] for k in ("nll", "ece")] == [before[k] for k in ("nll", "ece")]
    assert [values[f"{k}_calibrated"] for k in ("nll", "ece")] == [after[k] for k in ("nll", "ece")]
    assert values["ece_calibrated"] < 0.3 * values["ece"]
    assert [bin["n"] for bin in result.bins["test"]] != [0] * 15
    other = calibrate(MELD, {"test": drawn(2000, 0.5, 3), "valid": valid})
    assert other is not None
    assert other.temperature == result.temperature  # test has no say
    assert (tempered(test.p_NC, result.temperature).argmax(1) == test.value_N).all()


def test_nothing_stands_for_validation() -> None:
    held = drawn(50, 1.0, 4)
    assert calibrate(MELD, {"test": held}) is None
    invalid = Scored(held.target_N, np.full(50, np.nan), held.p_NC)
    assert calibrate(MELD, {"test": held, "valid": invalid}) is None


def test_numbers_have_nll_alone() -> None:
    result = calibrate(SIMS, {"valid": drawn(800, 2.0, 5, SIMS), "test": drawn(800, 2.0, 6, SIMS)})
    assert result is not None
    assert set(result.splits["test"]) == {"n", "nll", "nll_calibrated"}
    assert result.splits["test"]["nll_calibrated"] < result.splits["test"]["nll"]
    assert (result.edges, result.bins) == ([], {})


def test_a_model_that_is_always_right_ends_at_the_limit() -> None:
    held = drawn(200, 1.0, 7)
    right = Scored(held.value_N, held.value_N, held.p_NC)
    result = calibrate(MELD, {"valid": right})
    assert result is not None
    assert result.at_limit
    assert result.temperature == pytest.approx(LIMITS[0], rel=1e-2)
    certain = np.eye(7)[right.value_N.astype(int)]  # probabilities of exactly 0 and 1
    assert np.isfinite(fit_temperature(right.value_N.astype(int), certain)[0])
