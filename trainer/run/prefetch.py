"""The micro-batches of a rank, collated ahead of the step that needs them by processes of their own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.batch import Batch, PackedBatch
from trainer.config import STOP_SIGNALS
from trainer.data.collate import Collator
from trainer.data.dataset import SplitView
from trainer.data.sampling import GlobalBatch, MicroBatch

AHEAD = 2  # micro-batches that each worker keeps ready


Wanted = tuple[GlobalBatch, MicroBatch]
PlannedSteps = Callable[[int], tuple[GlobalBatch, list[MicroBatch]]]


class Samples(Dataset[Any]):
    """Collates micro-batches of a global batch; travels to worker processes by its datasets' paths."""

    def __init__(self, views: dict[str, SplitView], collators: dict[str, Collator]) -> None:
        self.views, self.collators = views, collators

    def __getitem__(self, wanted: Wanted) -> Batch | PackedBatch:
        batch, micro = wanted
        view = self.views[batch.task]
        return self.collators[batch.task].training([view[i] for i in micro.indices], micro, batch.epoch)


class BatchPrefetcher:
    """Batches of one step after the other.

    Without workers a batch is collated when it is asked for. With them, processes collate the next ones meanwhile; they are
    restarted when the steps are not consecutive. The batches are the same with and without workers.
    """

    def __init__(self, samples: Samples, *, pin: bool = False) -> None:
        self.samples, self.pin = samples, pin
        self.workers, self.stop = 0, 0
        self._ahead: Iterator[Any] | None = None
        self._next = -1

    def work_ahead(self, workers: int, plan: PlannedSteps, stop: int) -> None:
        """Let `workers` processes collate the batches; 0: none.

        Args:
            plan: step -> its global batch and this rank's micro-batches, as :meth:`step` will be given them.
            stop: no step from this one on is prepared.
        """
        self.workers, self.plan, self.stop = workers, plan, stop

    def step(self, step: int, batch: GlobalBatch, micros: Sequence[MicroBatch]) -> Iterator[Batch | PackedBatch]:
        """The batches of `step`; consume fully before the next call."""
        if not self.workers:
            for micro in micros:
                collated = self.samples[batch, micro]
                yield collated.pin_memory() if self.pin else collated
            return
        if self._ahead is None or self._next != step:
            self.close()
            self._ahead = iter(self._loader(step))
        self._next = step + 1
        for _ in micros:
            yield next(self._ahead)

    def close(self) -> None:
        """End the workers."""
        self._ahead = None

    def _loader(self, first: int) -> DataLoader[Any]:
        return DataLoader(
            self.samples,
            sampler=_PlannedMicroBatches(self, first),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=AHEAD,
            pin_memory=self.pin,
            worker_init_fn=_ignore_stop_signals,
            multiprocessing_context="spawn",  # a fork would copy the locks of our threads
        )


class _PlannedMicroBatches:
    """The micro-batches of all steps from `first` on, as the data loader's workers get them."""

    def __init__(self, prefetcher: BatchPrefetcher, first: int) -> None:
        self.prefetcher, self.first = prefetcher, first

    def __iter__(self) -> Iterator[Wanted]:
        for step in range(self.first, self.prefetcher.stop):
            batch, micros = self.prefetcher.plan(step)
            yield from ((batch, micro) for micro in micros)


def _ignore_stop_signals(worker: int) -> None:
    """A stop is the training process's to handle; workers end with it."""
    for name in (*STOP_SIGNALS, "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
