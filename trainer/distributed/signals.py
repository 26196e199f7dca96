"""Stop signals: a run that gets one finishes its step, writes a checkpoint and exits as resumable."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from types import FrameType

import torch

from trainer.config import STOP_SIGNALS
from trainer.distributed.world import World

log = logging.getLogger(__name__)


class StopRequested(Exception):
    """All ranks agreed to stop here; nothing is lost by it."""


class StopRequest:
    """Remembers that this rank was asked to stop; :meth:`agreed` shares it, so that all ranks stop at the same place.

    Signals that are repeated change nothing (schedulers and launchers often send several), but for Ctrl-C, which ends the
    process at once when a stop was asked for before.
    """

    def __init__(self, names: Sequence[str] = STOP_SIGNALS) -> None:
        self.asked = False
        self._signals = [signal.Signals[name] for name in names]
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for name in self._signals:
            self._before[name] = signal.signal(name, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)  # type: ignore[arg-type]
        self._before.clear()

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. A collective: all ranks call it."""
        asked = torch.tensor(float(self.asked), device=world.device)
        world.sum(asked)
        return bool(asked.item() > 0)

    def raise_if_stop_requested(self, world: World) -> None:
        """Stop here when any rank was asked to; called by all ranks.

        Raises:
            StopRequested: on every rank at the same place.
        """
        if self.agreed(world):
            raise StopRequested

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            return
        self.asked = True
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT] or signal.SIG_DFL)  # type: ignore[arg-type]
        log.warning("%s: stopping with a checkpoint; Ctrl-C ends at once", signal.Signals(number).name)
