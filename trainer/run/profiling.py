"""A profile of some steps of a training by torch's profiler: a trace for Perfetto or chrome://tracing, and a table of operations."""

from __future__ import annotations

import logging

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.files import write_text
from trainer.run.callbacks import Callback, FinishedStep
from trainer.run.run import Run
from trainer.tracking.tracker import Tracker

log = logging.getLogger(__name__)

FOLDER = "profile"
ROWS = 60  # of the table


class ProfileCallback(Callback):
    """Profiles steps `first` to `last` (from 1, both included) on rank 0, and what lies between them, validations too.

    ``profile/trace-steps-A-B.json.gz`` and ``profile/table-steps-A-B.txt`` (the operations that took most, by their own time on the
    device, or on the CPU without one) go into the run folder and to MLflow. A part of the steps that is done when a run stops is written.
    """

    def __init__(self, first: int, last: int, tracker: Tracker) -> None:
        self.first, self.last, self.tracker = first, last, tracker
        self._profile: profile | None = None
        self._begun, self._done = 0, 0

    def on_train_start(self, run: Run, step: int) -> None:
        self._begin_if_due(run, step)

    def on_step_end(self, run: Run, finished: FinishedStep) -> None:
        if self._profile is not None:
            self._done = finished.step
            if finished.step >= self.last:
                self._write(run)
        self._begin_if_due(run, finished.step)

    def on_train_end(self, run: Run) -> None:
        if self._profile is not None:
            self._write(run)

    def _begin_if_due(self, run: Run, steps_done: int) -> None:
        """The next step is the first of those that are left to be profiled."""
        if not run.world.is_rank_zero or self._profile is not None or not self.first <= steps_done + 1 <= self.last:
            return
        devices = [ProfilerActivity.CUDA] if run.world.device.type == "cuda" else []
        self._profile, self._begun, self._done = profile(activities=[ProfilerActivity.CPU, *devices]), steps_done + 1, 0
        self._profile.start()

    def _write(self, run: Run) -> None:
        assert self._profile is not None
        found, self._profile = self._profile, None
        if run.world.device.type == "cuda":
            torch.cuda.synchronize()
        found.stop()
        if not self._done:
            return
        steps = f"steps-{self._begun}-{self._done}"
        folder = run.out / FOLDER
        trace, table = folder / f"trace-{steps}.json.gz", folder / f"table-{steps}.txt"
        key = "self_device_time_total" if run.world.device.type == "cuda" else "self_cpu_time_total"
        try:
            folder.mkdir(exist_ok=True)
            writing = folder / f".writing-{trace.name}"
            found.export_chrome_trace(str(writing))
            writing.replace(trace)
            write_text(table, found.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=80) + "\n")
        except (OSError, RuntimeError) as error:  # a full disk costs the profile, not the run
            log.warning("the profile of %s could not be written to %s: %s", steps, folder, error)
            return
        log.info("profile of %s: %s, %s", steps, trace, table)
        for path in (trace, table):
            self.tracker.artifact(path, FOLDER)
