"""The order of samples: global, resumable, length-bucketed, independent of the number of processes.

The order is a function of ``(seed, epoch)`` alone. A *global batch* belongs to one task; it is cut into micro-batches
in an order that does not know the world size, and these are dealt to the ranks in turn.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BUCKET = 16  # global batches that are sorted by length together
WIDTH = 0.25  # of a class of lengths that count as equal, in octaves: sorting finer saves little and sorts contents


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step: `indices` into the task's training split."""

    task: str
    epoch: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank passes through the model at once. A filler has weight 0: it keeps the ranks' steps in number."""

    indices: tuple[int, ...]
    weight: float


class Order:
    """The training order of one or several tasks.

    An epoch has as many steps as the tasks' global batches together. With `weights`, a task's share of these steps is
    proportional to its weight; a task that runs out begins its next pass, one that does not continues where it stopped.

    Args:
        lengths: task -> a length per sample (any unit), used to put samples of like length together.
        global_batch: samples of a step; the last batch of a pass may be smaller.
        seed: with the epoch, fixes everything.
        weights: task -> share of the steps; empty: every task once per epoch.
    """

    def __init__(
        self,
        lengths: Mapping[str, np.ndarray],
        *,
        global_batch: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        empty = [task for task, n in lengths.items() if len(n) == 0]
        unknown = sorted(set(weights or {}) - set(lengths))
        if empty or unknown or not lengths:
            faults = [f"task {t} has no training samples" for t in empty] + [
                f"data.weights names {t}, no task of this run" for t in unknown
            ]
            raise ValueError("; ".join(faults) or "no task to train on")
        self._lengths = {task: np.asarray(n) for task, n in lengths.items()}
        self._global_batch = global_batch
        self._seed = seed
        self._passes = {task: -(-len(n) // global_batch) for task, n in self._lengths.items()}
        total = sum(self._passes.values())
        if weights:
            scale = total / sum(weights.get(task, 1.0) for task in self._lengths)
            self._shares = {task: max(1, round(weights.get(task, 1.0) * scale)) for task in self._lengths}
        else:
            self._shares = dict(self._passes)
        self.steps_per_epoch = sum(self._shares.values())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._pass = lru_cache(maxsize=2 * len(self._lengths))(self._make_pass)

    def step(self, step: int) -> GlobalBatch:
        """The global batch of optimizer step `step` (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[place]

    def _make_epoch(self, epoch: int) -> list[GlobalBatch]:
        tasks = [task for task, share in self._shares.items() for _ in range(share)]
        rng = np.random.default_rng([self._seed, 1, epoch])
        if len(self._shares) > 1:
            tasks = [tasks[i] for i in rng.permutation(len(tasks))]
        taken = dict.fromkeys(self._shares, 0)
        batches = []
        for task in tasks:
            turn, place = divmod(epoch * self._shares[task] + taken[task], self._passes[task])
            batches.append(GlobalBatch(task, epoch, self._pass(task, turn)[place]))
            taken[task] += 1
        return batches

    def _make_pass(self, task: str, turn: int) -> list[tuple[int, ...]]:
        rng = np.random.default_rng([self._seed, 2, turn, zlib.crc32(task.encode())])
        size = self._global_batch
        classes = np.round(np.log2(np.maximum(self._lengths[task], 1)) / WIDTH)
        order = rng.permutation(len(classes))
        batches = []
        for start in range(0, len(order), BUCKET * size):
            bucket = order[start : start + BUCKET * size]
            bucket = bucket[np.argsort(-classes[bucket], kind="stable")]
            batches += [tuple(int(i) for i in bucket[i : i + size]) for i in range(0, len(bucket), size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(batch: GlobalBatch, micro_batch: int, rank: int, world: int) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch; their number is the same on all ranks."""
    cuts = [batch.indices[i : i + micro_batch] for i in range(0, len(batch.indices), micro_batch)]
    rounds = -(-len(cuts) // world)
    mine = [MicroBatch(cut, 1.0) for cut in cuts[rank::world]]
    return mine + [MicroBatch(batch.indices[:1], 0.0)] * (rounds - len(mine))


def hidden_modalities(rate: float, seed: int, epoch: int, sample: str) -> set[str]:
    """The modalities hidden from a training sample: a function of (seed, epoch, sample) alone."""
    if rate == 0.0:
        return set()
    draw = np.random.default_rng([seed, 3, epoch, zlib.crc32(sample.encode())]).random(2)
    return {name for name, u in zip(("audio", "video"), draw, strict=True) if u < rate}
