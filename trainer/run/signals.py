"""Stop signals: a run that is asked to stop finishes its step, writes a checkpoint and says that it can go on."""

from __future__ import annotations

import logging
import signal
from types import FrameType

log = logging.getLogger(__name__)

STOPPED = 85  # exit code: stopped and resumable


class StopRequest:
    """Remembers that a stop was asked for. The loop spreads it over the ranks, so that all stop at one step.

    A second signal ends the process at once, as it would have without us.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self.asked = False
        self._signals = signals
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for name in self._signals:
            self._before[name] = signal.signal(name, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        name = signal.Signals(number)
        signal.signal(name, self._before.get(name) or signal.SIG_DFL)  # type: ignore[arg-type]
        log.warning("%s: stopping after this step; once more to end at once", name.name)
