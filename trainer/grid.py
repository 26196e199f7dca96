"""The numbers that a regression task can answer, and how they are written."""

from __future__ import annotations

import math
from decimal import Decimal
from functools import cached_property

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

MOST_DECIMALS = 6
_FLOAT_NOISE = 12  # decimals beyond which a float differs from what was written: 0.1 + 0.2 is meant to be 0.3
_FLOAT32_DIGITS = 7  # significant digits that a float32 has kept of a label


class Grid(BaseModel):
    """The numbers low, low + step, ..., high. All arithmetic is exact, on whole multiples of the last decimal.

    An answer is written with the fewest decimals that `low` and `step` need, at least one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    low: float
    high: float
    step: float = 0.1

    @field_validator("low", "high", "step", mode="before")
    @classmethod
    def _decimal(cls, value: object) -> object:
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"must be a finite decimal number such as 0.25, not {value!r}")
        return number

    @model_validator(mode="after")
    def _steps(self) -> Grid:
        if self.step <= 0 or self.high <= self.low:
            raise ValueError(f"a grid needs low < high and step > 0, not {self.low}..{self.high} by {self.step}")
        endless = [name for name in ("low", "high", "step") if _decimals(getattr(self, name)) > MOST_DECIMALS]
        if endless:
            numbers = ", ".join(f"{name}={getattr(self, name)!r}" for name in endless)
            raise ValueError(
                f"grid {numbers} needs more than {MOST_DECIMALS} decimals, and answers are written exactly: take a step such as "
                "0.05, 0.25 or 0.5, or scale the numbers (thirds of 0 to 1 are steps of 1 from 0 to 3)"
            )
        low, high, step = self._units
        if (high - low) % step:
            raise ValueError(f"grid {self.low}..{self.high} is not a whole number of steps of {self.step}")
        return self

    @property
    def decimals(self) -> int:
        """Decimals of every answer."""
        return max(1, _decimals(self.low), _decimals(self.step))

    @property
    def size(self) -> int:
        """How many numbers there are."""
        low, high, step = self._units
        return (high - low) // step + 1

    @cached_property
    def values(self) -> tuple[float, ...]:
        low, high, step = self._units
        return tuple(unit / 10**self.decimals for unit in range(low, high + 1, step))

    def text(self, value: float) -> str:
        """A number of the grid as an answer: :attr:`decimals` decimals, a sign only for negatives, no ``-0.0``."""
        return f"{value or 0.0:.{self.decimals}f}"

    def index(self, value: float) -> int:
        """The index of the number nearest to `value`, ties away from 0 (0 itself between two numbers: the greater).

        The tie is judged on `value` as a float32 label would have been written, so 0.25 is a tie and the 0.25000001 of an
        upcast label is the tie it was meant to be.
        """
        low, _, step = self._units
        digits = _FLOAT32_DIGITS - max(1, math.floor(math.log10(max(abs(value), 1.0))) + 1)
        digits = max(digits, self.decimals + 2)
        unit: int = 10 ** (digits - self.decimals)  # of `value`, in one of the grid's
        offset = int(Decimal(repr(float(value))).scaleb(digits).to_integral_value()) - low * unit
        below, rest = divmod(offset, step * unit)
        number_below = low + below * step
        greater: bool = 2 * rest > step * unit or (2 * rest == step * unit and 2 * number_below + step >= 0)
        return min(max(below + greater, 0), self.size - 1)

    @cached_property
    def _units(self) -> tuple[int, int, int]:
        """low, high and step in units of the last decimal."""
        decimals = max(self.decimals, _decimals(self.high))
        low, high, step = (
            int(Decimal(repr(round(value, _FLOAT_NOISE))).scaleb(decimals))
            for value in (self.low, self.high, self.step)
        )
        return low, high, step


def _decimals(value: float) -> int:
    exponent = Decimal(repr(round(value, _FLOAT_NOISE))).normalize().as_tuple().exponent
    assert isinstance(exponent, int)  # finite
    return max(0, -exponent)
