"""The best checkpoint: the better value of one task, the smaller mean rank of several."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from trainer.answers.metrics import compute
from trainer.checkpoint.selection import Selection
from trainer.tasks import BUILT_IN


def chosen(selection: Selection, validations: list[dict[str, float | None]]) -> list[str | None]:
    out = []
    for step, values in enumerate(validations):
        selection.add(f"step-{step}", values)
        out.append(selection.best)
    return out


def test_one_task_takes_the_better_value_and_the_earlier_of_equal_ones() -> None:
    values = [0.2, 0.5, 0.5, 0.1, None, 0.6]
    assert chosen(Selection({"meld": True}), [{"meld": v} for v in values]) == [
        "step-0", "step-1", "step-1", "step-1", "step-1", "step-5",
    ]  # fmt: skip
    assert chosen(Selection({"d": False}), [{"d": v} for v in [0.9, 0.4, 0.5]]) == ["step-0", "step-1", "step-1"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_selecting_metric_of_a_task_takes_right_predictions_over_wrong_ones(name: str) -> None:
    task = BUILT_IN[name]
    truth, guess = (
        ([0, 1, 1, 0], [0, 1, 0, 0]) if task.grid is None else ([0.3, -1.0, 0.5, -0.2], [0.3, -1.0, -0.5, 0.0])
    )
    high, low = compute(task, truth, truth)[task.select], compute(task, truth, guess)[task.select]
    assert high < low if name == "diagnostic-regression" else high > low
    for validations, best in (
        ([low, high], "step-1"),
        ([high, low], "step-0"),
        ([high, high], "step-0"),
        ([None, low], "step-1"),
        ([math.nan, low], "step-1"),
        ([low, None], "step-0"),
        ([low, math.nan], "step-0"),
        ([None, math.nan], None),
    ):
        selection = Selection({name: task.greater_is_better})
        assert chosen(selection, [{name: value} for value in validations])[-1] == best


def test_of_equal_values_the_smaller_nll_is_taken() -> None:
    selection = Selection({"a": True, "b": False})
    for step, (a, b, nll) in enumerate(
        [(1.0, 0.5, (0.9, 9.0)), (1.0, 0.5, (0.8, 7.0)), (0.9, 0.5, (0.1, 1.0)), (1.0, 0.5, (0.8, 7.0))]
    ):
        selection.add(f"step-{step}", {"a": a, "b": b}, {"a": nll[0], "b": nll[1]})
    assert selection.best == "step-1"
    restored = Selection({"a": True, "b": False})
    restored.restore(json.loads(json.dumps(selection.state())))
    assert restored.add("step-4", {"a": 1.0, "b": 0.5}, {"a": 0.7, "b": 6.0})
    assert not restored.add("step-5", {"a": 1.0, "b": 0.5}, {"a": None})  # not known: worse than any
    again = Selection({"a": True, "b": False})
    again.restore(json.loads(json.dumps(restored.state(), allow_nan=False)))  # as a checkpoint keeps it
    assert again.state() == restored.state()


def brute(validations: list[dict[str, float]], signs: dict[str, float], a: int, b: int) -> int:
    """The one of a < b with the smaller mean rank, ranks by counting."""

    def mean_rank(i: int) -> float:
        ranks = []
        for task, sign in signs.items():
            mine = sign * validations[i][task]
            others = [sign * v[task] for j, v in enumerate(validations) if j != i]
            ranks.append(1 + sum(o > mine for o in others) + sum(o == mine for o in others) / 2)
        return sum(ranks) / len(ranks)

    return b if mean_rank(b) < mean_rank(a) else a


@pytest.mark.parametrize("seed", range(20))
def test_several_tasks_take_the_smaller_mean_rank_over_all_validations_so_far(seed: int) -> None:
    rng = np.random.default_rng(seed)
    signs = {"meld": 1.0, "mosei": 1.0, "size": -1.0}
    validations = [{t: float(rng.integers(0, 5)) for t in signs} for _ in range(12)]
    best, expected = 0, ["step-0"]
    for i in range(1, len(validations)):
        best = brute(validations[: i + 1], signs, best, i)
        expected.append(f"step-{best}")
    selection = Selection({t: s > 0 for t, s in signs.items()})
    assert chosen(selection, list(validations)) == expected


def test_a_task_of_another_unit_does_not_outweigh_the_others() -> None:
    """Better in two tasks by little, worse in one by much: a mean of the values would refuse it."""
    selection = Selection({"a": True, "b": True, "c": True})
    assert chosen(selection, [{"a": 0.50, "b": 0.50, "c": 90.0}, {"a": 0.51, "b": 0.51, "c": 10.0}])[-1] == "step-1"


def test_a_validation_with_an_undefined_value_is_never_chosen() -> None:
    assert chosen(Selection({"a": True, "b": True}), [{"a": 1.0, "b": None}, {"a": 0.0, "b": 0.0}]) == [None, "step-1"]


def test_its_state_continues_it_through_json() -> None:
    rng = np.random.default_rng(1)
    validations: list[dict[str, float | None]] = [{t: float(rng.normal()) for t in "ab"} for _ in range(9)]
    whole = Selection({"a": True, "b": False})
    expected = chosen(whole, validations)
    for cut in (1, 4):
        first = Selection({"a": True, "b": False})
        chosen(first, validations[:cut])
        again = Selection({"a": True, "b": False})
        again.restore(json.loads(json.dumps(first.state())))
        for step, values in itertools.islice(enumerate(validations), cut, None):
            again.add(f"step-{step}", values)
            assert again.best == expected[step]
