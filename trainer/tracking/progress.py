"""Progress of a training on rank 0: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from trainer.terminal import literal_console

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)
SMOOTHING = 0.9


class Progress:
    """Loss, learning rate, samples per second and the time left."""

    def __init__(self, steps: int, *, enabled: bool, console: Console | None = None) -> None:
        self.steps, self.enabled = steps, enabled
        self.console = console or literal_console(stderr=True)
        self._values: dict[str, float] = {}
        self._seconds: float | None = None
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "loss {task.fields[loss]:.4f}  lr {task.fields[rate]:.1e}  {task.fields[speed]:.0f} samples/s  left"
            ),
            TimeRemainingColumn(),
            console=self.console,
            transient=False,
            disable=not (enabled and self.console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps, loss=float("nan"), rate=0.0, speed=0.0)

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        """Leave the terminal as it was; safe to call more than once."""
        self._bar.stop()

    def step(self, step: int, loss: float, rate: float, samples: int, seconds: float) -> None:
        """Note a finished step (the first is 1)."""
        self._seconds = seconds if self._seconds is None else SMOOTHING * self._seconds + (1 - SMOOTHING) * seconds
        self._values = {"loss": loss, "rate": rate, "speed": samples / self._seconds}
        self._bar.update(self._task, completed=step, **self._values)  # type: ignore[arg-type]

    def line(self, step: int) -> None:
        """A line of the log, where no bar is shown."""
        if not self.enabled or self.console.is_terminal or self._seconds is None:
            return
        left = int((self.steps - step) * self._seconds)
        log.info(
            "step %d/%d  loss %.4f  lr %.1e  %.0f samples/s  left %d:%02d",
            step,
            self.steps,
            self._values["loss"],
            self._values["rate"],
            self._values["speed"],
            *divmod(left, 60),
        )
