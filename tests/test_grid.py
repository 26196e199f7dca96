"""The numbers a regression task answers: exact decimals of any step, the nearest number against brute force in fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.grid import Grid

GRIDS = [
    *((-3.0, 3.0, 0.1), (-1.0, 1.0, 0.1), (1.0, 5.0, 0.5), (1.0, 5.0, 1.0), (0.0, 1.0, 0.05), (0.0, 1.0, 0.25)),
    *((0.0, 100.0, 5.0), (0.0, 100.0, 1.0), (0.5, 4.5, 1.0), (-0.5, 0.5, 1.0), (-1.0, 0.5, 0.3), (1.0, 1.1, 0.001)),
    *((0.125, 0.875, 0.125), (-7.0, -1.0, 0.2), (19.0, 20.0, 0.01)),
]


def nearest(grid: Grid, text: str) -> int:
    """Brute force: the distances to all numbers as exact fractions; of two equal ones that which is farther from 0."""
    value, numbers = Fraction(text), [Fraction(repr(v)) for v in grid.values]
    return min(range(len(numbers)), key=lambda i: (abs(numbers[i] - value), -abs(numbers[i]), -numbers[i]))


@pytest.mark.parametrize(("low", "high", "step"), GRIDS)
def test_every_number_tie_and_neighbour_goes_to_the_nearest(low: float, high: float, step: float) -> None:
    grid = Grid(low=low, high=high, step=step)
    first, width = Fraction(repr(low)), Fraction(repr(step))
    assert [Fraction(repr(v)) for v in grid.values] == [first + i * width for i in range(grid.size)]
    assert grid.values[-1] == high
    for i in range(-2, 4 * grid.size + 4):
        value = first + i * width / 4
        texts = [f"{float(value):.{grid.decimals + 2}f}"]
        if len(str(value.denominator)) < 4:
            texts += [f"{float(value) + side:.{grid.decimals + 3}f}" for side in (-(10.0**-5), 10.0**-5)]
        for text in texts:
            assert grid.index(float(text)) == nearest(grid, text), text
        if Fraction(texts[0]) == value:  # exact: the label as float32 has the same answer
            assert grid.index(float(np.float32(texts[0]))) == nearest(grid, texts[0])


@settings(max_examples=200, deadline=None)
@given(st.integers(-300, 300), st.integers(1, 60), st.integers(1, 40), st.integers(0, 3), st.integers(-9999, 9999))
def test_any_grid_rounds_to_the_nearest_and_reads_back(
    low: int, steps: int, step: int, digits: int, value: int
) -> None:
    scale = 10**digits
    grid = Grid(low=low / scale, high=(low + steps * step) / scale, step=step / scale)
    assert grid.size == len(grid.values) == steps + 1
    assert grid.index(value / 1000) == nearest(grid, f"{value / 1000:.3f}")
    for i, number in enumerate(grid.values):
        assert grid.index(number) == i
        assert float(grid.text(number)) == number
    texts = [grid.text(number) for number in grid.values]
    assert len(set(texts)) == grid.size
    assert "-0.0" not in texts


@pytest.mark.parametrize(
    ("low", "high", "step", "texts"),
    [
        (0, 0.2, 0.05, ["0.00", "0.05", "0.10", "0.15", "0.20"]),
        (0, 1, 0.25, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        (0, 10, 5, ["0.0", "5.0", "10.0"]),  # one decimal at least, as ever
        (1, 2, 0.5, ["1.0", "1.5", "2.0"]),
        (-0.2, 0.1, 0.1, ["-0.2", "-0.1", "0.0", "0.1"]),
        (0.25, 2.25, 1, ["0.25", "1.25", "2.25"]),
        (0.1 + 0.2, 0.5, 0.1, ["0.3", "0.4", "0.5"]),
    ],
)
def test_answers_have_as_many_decimals_as_the_grid_needs(
    low: float, high: float, step: float, texts: list[str]
) -> None:
    grid = Grid(low=low, high=high, step=step)
    assert [grid.text(number) for number in grid.values] == texts


def test_targets_on_a_fine_grid_are_hit_exactly() -> None:
    grid = Grid(low=0, high=1, step=0.05)
    assert [grid.values[grid.index(v)] for v in (0.0, 0.25, 0.5, 0.75, 0.35, float(np.float32(0.35)))] == [
        *(0.0, 0.25, 0.5, 0.75, 0.35, 0.35)
    ]
    assert grid.values[grid.index(0.125)] == 0.15  # a tie
    wide = Grid(low=0, high=20, step=0.01)
    assert wide.values[wide.index(float(np.float32(13.335)))] == 13.34  # 13.33500003815 and 13.3350 are one label


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 0, "high": 1, "step": 1 / 3}, "needs more than 6 decimals.*steps of 1 from 0 to 3"),
        ({"low": 0, "high": 1, "step": "1/3"}, "must be a finite decimal number such as 0.25, not '1/3'"),
        ({"low": 0, "high": 1, "step": 0.3}, "not a whole number of steps of 0.3"),
        ({"low": 0, "high": 1, "step": 0}, "step > 0"),
        ({"low": 1, "high": 1}, "low < high"),
        ({"low": 0, "high": float("inf")}, "must be a finite decimal number"),
        ({"low": True, "high": 2}, "must be a finite decimal number"),
        ({"low": 0, "high": 0.15}, "not a whole number of steps"),
    ],
)
def test_what_is_no_grid_is_refused_with_the_reason(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Grid.model_validate(values)


def test_a_grid_of_an_older_dataset_is_the_same() -> None:
    """Its record is part of the fingerprint, and its numbers are those of tenths."""
    grid = Grid(low=-3.0, high=3.0)
    assert grid.model_dump() == {"low": -3.0, "high": 3.0, "step": 0.1}
    assert grid.values == tuple(tenth / 10 for tenth in range(-30, 31))
    assert grid == Grid(low=-3, high=3)
