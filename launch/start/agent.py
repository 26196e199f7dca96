"""One node's part of a run that :mod:`launch.start.hosts` started over ssh: ``python -m launch.start.agent`` on that node.

stdin is the leash. Its first line says what to start: ``{"part": ..., "env": {...}}`` (so that no variable stands in a
command line). After it: an empty line every few seconds, the name of a signal to pass on, or END. When it closes, or
nothing comes for `SILENCE` seconds, the launcher is gone: the workers are asked to stop, which saves a checkpoint, and are
ended after `LIMIT`. The last line on stderr is the verdict.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.start.local import STOPPED, Outcome, Part, Workers, passing_signals, told
from trainer.distributed.launcher import LIMIT

BEAT = 5.0  # seconds between the launcher's signs of life
SILENCE = 60.0
MARK = "egmf agent: "


def verdict_of(line: str) -> dict[str, Any] | None:
    """The verdict in a line of an agent's stderr; None in others."""
    _, mark, text = line.partition(MARK)
    if not mark:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class ControlChannel:
    """What the launcher says; lines, without a buffer that hides them from `select`."""

    def __init__(self) -> None:
        self._held = b""

    def line(self, seconds: float | None) -> str | None:
        """The next line; None when the launcher is gone or silent for so long."""
        while b"\n" not in self._held:
            if not select.select([0], [], [], seconds)[0]:
                return None
            more = os.read(0, 1 << 16)
            if not more:
                return None
            self._held += more
        line, _, self._held = self._held.partition(b"\n")
        return line.decode()


def _handle_commands(leash: ControlChannel, workers: Workers) -> None:
    while (word := leash.line(SILENCE)) is not None:
        if word == "END":
            workers.end()
        elif word:
            workers.signal(signal.Signals[word])
    workers.signal(signal.SIGTERM)
    threading.Event().wait(LIMIT)
    workers.end()


def main() -> int:
    """Start this node's part and see it to its end."""
    leash = ControlChannel()
    first = leash.line(SILENCE)
    if first is None:
        return 1
    asked = json.loads(first)
    os.environ.update(asked["env"])
    part = Part(**{**asked["part"], "line": tuple(asked["part"]["line"])})
    with Workers(part, "agent") as workers, passing_signals(workers.signal):
        threading.Thread(target=_handle_commands, args=(leash, workers), daemon=True).start()
        outcome = workers.wait()
    _say(outcome, Path(asked["out"]))
    return outcome.exit_code


def _say(outcome: Outcome, out: Path) -> None:
    verdict = {**asdict(outcome), "code": outcome.exit_code}
    verdict["told"] = told(outcome, out).rstrip() if outcome.code not in (0, STOPPED) else None
    try:
        sys.stderr.write(f"{MARK}{json.dumps(verdict)}\n")
        sys.stderr.flush()
    except OSError:  # the launcher is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    sys.exit(main())
