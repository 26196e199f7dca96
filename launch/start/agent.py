"""One node's ranks of a run that :mod:`launch.start.hosts` started over ssh: ``python -m launch.start.agent`` on that node.

stdin carries the control protocol. Its first line is a :class:`StartRequest` (so that no variable stands in a command
line). After it: an empty line every few seconds as heartbeat, the name of a signal to pass on, or END. When stdin closes,
or nothing comes for `SILENCE` seconds, the launcher has ended: the workers are asked to stop, which saves a checkpoint, and
are ended after `LIMIT`. The last line on stderr is the :class:`Verdict`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.start.local import NodeRanks, Outcome, Workers, describe_failure, forward_signals
from trainer.distributed.launcher import LIMIT, STOPPED

HEARTBEAT = 5.0  # seconds between the launcher's signs of life
SILENCE = 60.0
MARK = "egmf agent: "


@dataclass(frozen=True)
class StartRequest:
    """What an agent is asked to start: the node's ranks, more environment variables, and the run folder."""

    ranks: NodeRanks
    env: dict[str, str]
    out: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StartRequest:
        request = json.loads(text)
        ranks = NodeRanks(**{**request["ranks"], "command": tuple(request["ranks"]["command"])})
        return cls(ranks, request["env"], request["out"])


@dataclass(frozen=True)
class Verdict:
    """How a node's ranks ended; `failure` is what the user reads where one failed."""

    code: int  # exit code: 0, 85, or that of the rank that failed first
    failure: str | None = None
    missed_peer: bool = False  # the node failed only because a rank of another one had ended

    @classmethod
    def of(cls, outcome: Outcome, out: Path) -> Verdict:
        failure = None if outcome.code in (0, STOPPED) else describe_failure(outcome, out).rstrip()
        return cls(outcome.exit_code, failure, outcome.missed_peer)

    def to_line(self) -> str:
        return f"{MARK}{json.dumps(asdict(self))}\n"

    @classmethod
    def from_line(cls, line: str) -> Verdict | None:
        """The verdict in a line of an agent's stderr; None in others."""
        _, mark, text = line.partition(MARK)
        if not mark:
            return None
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


class ControlChannel:
    """Lines of the launcher's, without a buffer that hides them from `select`."""

    def __init__(self) -> None:
        self._buffer = b""

    def line(self, seconds: float | None) -> str | None:
        """The next line; None when the launcher has ended, or sent nothing for this time."""
        while b"\n" not in self._buffer:
            if not select.select([0], [], [], seconds)[0]:
                return None
            more = os.read(0, 1 << 16)
            if not more:
                return None
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()


def _handle_commands(channel: ControlChannel, workers: Workers) -> None:
    while (word := channel.line(SILENCE)) is not None:
        if word == "END":
            workers.end()
        elif word:
            workers.signal(signal.Signals[word])
    workers.signal(signal.SIGTERM)
    threading.Event().wait(LIMIT)
    workers.end()


def main() -> int:
    """Start this node's ranks and see them to their end."""
    channel = ControlChannel()
    first = channel.line(SILENCE)
    if first is None:
        return 1
    request = StartRequest.from_json(first)
    os.environ.update(request.env)
    with Workers(request.ranks, "agent") as workers, forward_signals(workers.signal):
        threading.Thread(target=_handle_commands, args=(channel, workers), daemon=True).start()
        outcome = workers.wait()
    _report(Verdict.of(outcome, Path(request.out)))
    return outcome.exit_code


def _report(verdict: Verdict) -> None:
    try:
        sys.stderr.write(verdict.to_line())
        sys.stderr.flush()
    except OSError:  # the launcher has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    sys.exit(main())
