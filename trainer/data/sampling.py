"""The order of samples: global, resumable, length-bucketed, independent of the number of processes.

The order is a function of ``(seed, epoch)`` alone. A *global batch* belongs to one task; it is cut into micro-batches, and these
are dealt to the ranks in turn. How it is cut changes no result beyond rounding (and no draw of dropout but that of modules).

Shapes: N samples of a split.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from trainer.config import RunConfig

BUCKET = 16  # global batches that are sorted by length together
# Of one more call of the fusion network, in frames of padding: about what computes as long. On a CPU that was measured. On a GPU a
# call is some 1,200 kernels (tests/fake_gpu), milliseconds of the host, in which tens of thousands of frames are computed.
GROUP_COST = {"cpu": 256, "cuda": 32_768}
MOST_GROUPS = 4  # calls of the fusion network in a micro-batch
WIDTH = 0.25  # of a class of lengths that count as equal, in octaves: sorting finer saves little and sorts contents


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step: `indices` into the task's training split."""

    task: str
    epoch: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank passes through the model at once. A filler has weight 0: it keeps the ranks' steps in number.

    The samples stand in groups of like length, of `groups` samples each, that the fusion network reads one by one; a group
    of 0 samples is a call without use that another rank's micro-batch needs. `most_samples`: of the micro-batches that all ranks
    pass through the model at once; 0: not known.
    """

    indices: tuple[int, ...]
    weight: float
    groups: tuple[int, ...] = ()
    most_samples: int = 0


@dataclass(frozen=True)
class Sizes:
    """What the samples of a split need: positions of their own in the backbone, and what the fusion network reads.

    Attributes: `prefix`, positions that every row (padded) or every micro-batch (packed) needs beside; `tokens_N`; and
    `read_N3`, the sample's own text tokens, audio frames and video frames.
    """

    prefix: int
    tokens_N: np.ndarray
    read_N3: np.ndarray

    def positions(self, indices: Sequence[int], packed: bool) -> int:
        """That a micro-batch of these samples passes through the backbone, padding included."""
        tokens_n = self.tokens_N[list(indices)]
        if packed:
            return self.prefix + int(tokens_n.sum())
        return len(tokens_n) * (self.prefix + int(tokens_n.max()))


@dataclass(frozen=True)
class Limits:
    """The largest micro-batch: positions, padding included, and samples. A sample alone may exceed them.

    `even`: every rank gets as much of a global batch as the others, in as few micro-batches as these limits allow. Else they are
    filled one after the other, whatever the number of ranks. `group_cost`: see `GROUP_COST`.
    """

    tokens: int
    samples: int | None = None
    packed: bool = True
    even: bool = False
    group_cost: int = GROUP_COST["cpu"]

    @classmethod
    def of_training(cls, config: RunConfig, device: str) -> Limits:
        """Those of a run on a type of device."""
        train = config.train
        packed = config.data.layout == "packed"
        return cls(train.micro_tokens, train.micro_batch, packed, train.micro_batch is None, GROUP_COST[device])


class GlobalBatchSampler:
    """The training order of one or several tasks.

    An epoch has as many steps as the tasks' global batches together. With `weights`, a task's share of these steps is
    proportional to its weight; without, to its number of samples to the power of 1 / `temperature` (Arivazhagan et al.
    2019, section 4.2): 1 takes every sample once, infinity gives every task the same share. A task that runs out begins
    its next pass, one that does not continues where it stopped.

    Args:
        lengths: task -> a length per sample (any unit), used to put samples of like length together.
        global_batch: samples of a step; the last batch of a pass may be smaller.
        seed: with the epoch, fixes everything.
        weights: task -> share of the steps; empty: by size, and `temperature`.
        draws: task -> probability of each sample: a pass then draws as many as there are, with replacement. A task
            without them has every sample once in a pass.
    """

    def __init__(
        self,
        lengths: Mapping[str, np.ndarray],
        *,
        global_batch: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        draws: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        empty = [task for task, n in lengths.items() if len(n) == 0]
        unknown = sorted(set(weights or {}) - set(lengths))
        if empty or unknown or not lengths:
            faults = [f"task {t} has no training samples" for t in empty] + [
                f"data.weights names {t}, no task of this run" for t in unknown
            ]
            raise ValueError("; ".join(faults) or "no task to train on")
        self._lengths = {task: np.asarray(n) for task, n in lengths.items()}
        self._draws = dict(draws or {})
        self._global_batch = global_batch
        self._seed = seed
        self._passes = {task: -(-len(n) // global_batch) for task, n in self._lengths.items()}
        total = sum(self._passes.values())
        if not weights and temperature != 1.0:
            weights = {task: len(n) ** (1.0 / temperature) for task, n in self._lengths.items()}
        if weights:
            scale = total / sum(weights.get(task, 1.0) for task in self._lengths)
            self._shares = {task: max(1, round(weights.get(task, 1.0) * scale)) for task in self._lengths}
        else:
            self._shares = dict(self._passes)
        self.steps_per_epoch = sum(self._shares.values())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._pass = lru_cache(maxsize=2 * len(self._lengths))(self._make_pass)

    @classmethod
    def of_training(
        cls,
        config: RunConfig,
        lengths: Mapping[str, np.ndarray],
        draws: Mapping[str, np.ndarray] | None = None,
    ) -> GlobalBatchSampler:
        """The order in which a run of this config sees samples of these lengths."""
        train, data = config.train, config.data
        return cls(
            lengths,
            global_batch=train.global_batch,
            seed=train.seed,
            weights=data.weights,
            temperature=data.mixing_temperature,
            draws=draws,
        )

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
        drawn = self._draws.get(task)
        order = rng.permutation(len(classes)) if drawn is None else rng.choice(len(classes), len(classes), p=drawn)
        batches = []
        for start in range(0, len(order), BUCKET * size):
            bucket = order[start : start + BUCKET * size]
            bucket = bucket[np.argsort(-classes[bucket], kind="stable")]
            batches += [tuple(int(i) for i in bucket[i : i + size]) for i in range(0, len(bucket), size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(indices: Sequence[int], sizes: Sizes, limits: Limits, rank: int, world: int) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch; their number, and that of their groups, is the same on all ranks.

    How the samples are put together depends on their order and sizes, and with `limits.even` on the number of ranks. Micro-batches
    are dealt to the ranks in turn.
    """
    grouped = _grouped(indices, sizes, limits, world)
    out = []
    for start in range(0, len(grouped), world):
        together = grouped[start : start + world]
        most = max(len(groups) for _, groups in together)
        chosen, groups = together[rank] if rank < len(together) else ((indices[0],), (1,))
        groups += (0,) * (most - len(groups))
        samples = max(len(chosen) for chosen, _ in together)
        out.append(MicroBatch(chosen, float(rank < len(together)), groups, samples))
    return out


def all_micro_batches(indices: Sequence[int], sizes: Sizes, limits: Limits, world: int) -> list[MicroBatch]:
    """The micro-batches of all ranks, without fillers."""
    return [MicroBatch(chosen, 1.0, groups) for chosen, groups in _grouped(indices, sizes, limits, world)]


def largest_micro_batch(order: Sequence[int], sizes: Sizes, limits: Limits, world: int) -> MicroBatch:
    """A micro-batch of the first of `order`, all samples of a global batch, that no other exceeds."""
    if not limits.packed:
        first = _cut(order, sizes, limits, _even_samples(len(order), limits, world))[0]
        return MicroBatch(tuple(first), 1.0, (len(first),))
    tokens = limits.tokens
    if limits.even:
        longest = np.sort(sizes.tokens_N)[::-1][: len(order)]
        rows = _even(range(len(longest)), replace(sizes, tokens_N=longest), limits, world)
        if len(rows) <= world:  # no row is full: none has more than the fullest of those of the longest samples
            tokens = min(tokens, sizes.prefix + max(int(longest[row].sum()) for row in rows))
    first = _fill(order, sizes, replace(limits, tokens=tokens))[0]
    chosen, groups = group(first, sizes.read_N3, limits.group_cost)
    return MicroBatch(chosen, 1.0, groups)


def _grouped(
    indices: Sequence[int], sizes: Sizes, limits: Limits, world: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The samples of every micro-batch and the sizes of their groups."""
    if not limits.packed:
        cuts = _cut(indices, sizes, limits, _even_samples(len(indices), limits, world))
        return [(tuple(cut), (len(cut),)) for cut in cuts]
    rows = _even(indices, sizes, limits, world) if limits.even else _fill(indices, sizes, limits)
    return [group(row, sizes.read_N3, limits.group_cost) for row in rows]


def _even(indices: Sequence[int], sizes: Sizes, limits: Limits, world: int) -> list[list[int]]:
    """As few rows for each rank as have room, filled evenly: the samples with most tokens first, each into the row with least."""
    order = sorted(indices, key=lambda i: -int(sizes.tokens_N[i]))
    room = limits.tokens - sizes.prefix
    total = int(sizes.tokens_N[list(indices)].sum())
    count = world * max(1, -(-total // (world * room)) if room > 0 else 1)
    while True:
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, r) for r in range(count)]
        for i in order:
            least, r = filled[0]
            need = least + int(sizes.tokens_N[i])
            if rows[r] and need > room:
                break
            rows[r].append(i)
            heapq.heapreplace(filled, (need, r))
        else:
            return [row for row in rows if row]
        count += world


def _even_samples(samples: int, limits: Limits, world: int) -> int | None:
    """Samples of a padded micro-batch, at most."""
    return -(-samples // world) if limits.even else limits.samples


def _fill(indices: Sequence[int], sizes: Sizes, limits: Limits) -> list[list[int]]:
    """First fit: every sample goes into the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in indices:
        need = int(sizes.tokens_N[i])
        for r, left in enumerate(room):
            if need <= left and (limits.samples is None or len(rows[r]) < limits.samples):
                break
        else:
            r = len(rows)
            rows.append([])
            room.append(limits.tokens - sizes.prefix)
        rows[r].append(i)
        room[r] -= need
    return rows


def _cut(indices: Sequence[int], sizes: Sizes, limits: Limits, samples: int | None) -> list[list[int]]:
    """Neighbours together, as many as fit when all are padded to the longest."""
    cuts: list[list[int]] = []
    longest = 0
    for i in indices:
        longest = max(longest, sizes.prefix + int(sizes.tokens_N[i]))
        full = not cuts or len(cuts[-1]) == samples or (len(cuts[-1]) + 1) * longest > limits.tokens
        if full:
            cuts.append([])
            longest = sizes.prefix + int(sizes.tokens_N[i])
        cuts[-1].append(i)
    return cuts


def group(
    indices: Sequence[int], read_N3: np.ndarray, price: int = GROUP_COST["cpu"]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The samples, longest first, and the sizes of groups of neighbours that waste least.

    A group costs its samples times the sum of the longest text, audio and video among them, and `price`; at most
    MOST_GROUPS. Exact, by dynamic programming over the sorted samples.
    """
    chosen = np.asarray(indices)
    chosen = chosen[np.argsort(-read_N3[chosen].sum(1), kind="stable")]
    read_n3 = np.maximum(read_N3[chosen], 1)
    n = len(chosen)
    cost_nn = np.full((n, n), np.inf)  # of the group from i to j
    for j in range(n):
        longest = np.maximum.accumulate(read_n3[j::-1], axis=0)[::-1].sum(1)
        cost_nn[: j + 1, j] = longest * np.arange(j + 1, 0, -1) + price
    best = cost_nn[0]  # of the samples to j, in as many groups as rounds of the loop
    starts: list[np.ndarray] = []
    found = [float(best[-1])]
    for _ in range(1, min(MOST_GROUPS, n)):
        through = np.concatenate([[np.inf], best[:-1]])[:, None] + cost_nn
        starts.append(through.argmin(0))
        best = through.min(0)
        found.append(float(best[-1]))
    groups: list[int] = []
    stop = n
    for place in range(int(np.argmin(found)) - 1, -1, -1):
        start = int(starts[place][stop - 1])
        groups.insert(0, stop - start)
        stop = start
    return tuple(int(i) for i in chosen), (stop, *groups)


def dropped_modalities(rate: float, seed: int, epoch: int, sample: str) -> set[str]:
    """The modalities that modality dropout removes from a training sample: a function of (seed, epoch, sample) alone."""
    if rate == 0.0:
        return set()
    draw = np.random.default_rng([seed, 3, epoch, zlib.crc32(sample.encode())]).random(2)
    return {name for name, u in zip(("audio", "video"), draw, strict=True) if u < rate}
