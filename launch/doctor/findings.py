"""What the checks of ``egmf doctor`` found: one entry each, so that one fault does not hide the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import BaseModel

State = Literal["ok", "warning", "fault", "skipped"]


class Check(BaseModel):
    """What was looked at, what was found, and what to do about it; `values` holds the numbers for scripts."""

    part: str
    name: str
    state: State
    found: str
    advice: str = ""
    values: dict[str, Any] = {}


class Findings:
    """The checks so far. A check that raises is a fault of that check, not the end of the others."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def add(self, part: str, name: str, state: State, found: str, advice: str = "", **values: Any) -> None:
        self.checks.append(Check(part=part, name=name, state=state, found=found, advice=advice, values=values))

    @contextmanager
    def explained(self, part: str, name: str) -> Iterator[None]:
        """A ValueError inside the block, which says what is wrong and what to do, is a fault; other errors too."""
        try:
            yield
        except ValueError as error:
            self.add(part, name, "fault", str(error))
        except Exception as error:  # noqa: BLE001
            self.add(part, name, "fault", f"{type(error).__name__}: {error}", "tell the authors: egmf doctor --debug")


def worst_state(checks: Iterable[Check]) -> State:
    """fault, warning or ok."""
    states = {check.state for check in checks}
    return "fault" if "fault" in states else "warning" if "warning" in states else "ok"
