"""How many bytes, and how many samples, all requests hold together. Thread-safe: requests are prepared in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from trainer.serving.http.faults import RefusedError


class Budget:
    """What there is at most, and how much of it is held; `refusal` makes the error where it does not suffice now, `never` where one
    request asks for more than there is."""

    def __init__(self, most: int, refusal: Callable[[], RefusedError], never: Callable[[], RefusedError]) -> None:
        self.most, self._refusal, self._never = most, refusal, never
        self._held, self._lock = 0, threading.Lock()

    @property
    def held(self) -> int:
        return self._held

    def _take(self, n: int, mine: int) -> None:
        if mine + n > self.most:
            raise self._never()
        with self._lock:
            if self._held + n > self.most:
                raise self._refusal()
            self._held += n

    def _give(self, n: int) -> None:
        with self._lock:
            self._held -= n

    def share(self) -> Share:
        return Share(self)


class Share:
    """What one request holds of a budget, until it is closed."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._mine, self._lock = budget, 0, threading.Lock()

    @property
    def mine(self) -> int:
        return self._mine

    def take(self, n: int) -> None:
        """Hold `n` more, never fewer; raises RefusedError where they are not there."""
        if n < 0:
            raise ValueError(f"{n} cannot be held")
        with self._lock:
            self._budget._take(n, self._mine)
            self._mine += n

    def close(self) -> None:
        """Give everything back; may be called again."""
        with self._lock:
            self._budget._give(self._mine)
            self._mine = 0
