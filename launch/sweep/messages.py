"""What a pool and its workers say to each other: one line of JSON each way for every run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class RunRequest:
    """A run to be made: its config file and its folder."""

    config: str
    out: str
    debug: bool = False

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> RunRequest:
        return cls(**json.loads(line))


@dataclass(frozen=True)
class RunResult:
    """How a run ended: exit code (negative: a signal), why it failed where that is known, and whether its process ends too."""

    code: int
    failure: str | None = None
    leaves: bool = False

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> RunResult:
        return cls(**json.loads(line))
