"""The micro-batches of a rank, collated ahead of the step that needs them by processes of their own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.batch import Batch, PackedBatch
from trainer.config import STOP_SIGNALS, RunConfig
from trainer.data.collate import Collator
from trainer.data.dataset import SplitView
from trainer.data.sampling import GlobalBatch, MicroBatch

AHEAD = 2  # micro-batches that each worker keeps ready
WORKERS_PER_GPU = 2


@dataclass(frozen=True)
class Wanted:
    """A micro-batch of step `step`."""

    step: int
    task: str
    epoch: int
    micro: MicroBatch


class Samples(Dataset[Any]):
    """Collates what is wanted; travels to worker processes by its datasets' paths."""

    def __init__(self, views: dict[str, SplitView], collators: dict[str, Collator]) -> None:
        self.views, self.collators = views, collators

    def __getitem__(self, wanted: Wanted) -> Batch | PackedBatch:
        view = self.views[wanted.task]
        samples = [view[i] for i in wanted.micro.indices]
        return self.collators[wanted.task].training(samples, wanted.micro, wanted.epoch)


Plan = Callable[[int], tuple[GlobalBatch, list[MicroBatch]]]


class Feed:
    """Batches of one step after the other.

    Without workers a batch is made when it is asked for. With them, processes make the next ones meanwhile; they are
    started anew when the steps do not follow each other. The batches are the same either way.

    Args:
        plan: step -> its global batch and this rank's micro-batches.
        stop: no step from this one on is prepared.
    """

    def __init__(self, samples: Samples, plan: Plan, workers: int, *, pin: bool, stop: int) -> None:
        self.samples, self.plan, self.workers, self.pin, self.stop = samples, plan, workers, pin, stop
        self._ahead: Iterator[Any] | None = None
        self._next = -1

    def step(self, step: int) -> Iterator[Batch | PackedBatch]:
        """The batches of `step`; all of them are to be taken."""
        if not self.workers:
            for wanted in self._wanted(step):
                batch = self.samples[wanted]
                yield batch.pin_memory() if self.pin else batch
            return
        if self._ahead is None or self._next != step:
            self.close()
            self._ahead = iter(self._loader(step))
        self._next = step + 1
        for _ in self._wanted(step):
            yield next(self._ahead)

    def close(self) -> None:
        """End the workers."""
        self._ahead = None

    def _wanted(self, step: int) -> list[Wanted]:
        batch, micros = self.plan(step)
        return [Wanted(step, batch.task, batch.epoch, micro) for micro in micros]

    def _loader(self, first: int) -> DataLoader[Any]:
        return DataLoader(
            self.samples,
            sampler=_Endless(self, first),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=AHEAD,
            pin_memory=self.pin,
            worker_init_fn=_deaf,
            multiprocessing_context="spawn",  # a fork would copy the locks of our threads
        )


class _Endless:
    def __init__(self, feed: Feed, first: int) -> None:
        self.feed, self.first = feed, first

    def __iter__(self) -> Iterator[Wanted]:
        for step in range(self.first, self.feed.stop):
            yield from self.feed._wanted(step)


def _deaf(worker: int) -> None:
    """A stop is the training process's to handle; workers end with it."""
    for name in (*STOP_SIGNALS, "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)


def workers(config: RunConfig, device: torch.device) -> int:
    """How many processes collate: as configured, or `WORKERS_PER_GPU` on a GPU and none elsewhere."""
    asked = config.data.workers
    return asked if asked is not None else WORKERS_PER_GPU if device.type == "cuda" else 0
