"""The numbers of a step: each has a name and a reduction over ranks, and all of them travel in one all-reduce."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from trainer.distributed.world import World

Reduction = Literal["sum", "mean"]


class StepScalars:
    """Scalars and short vectors of one optimizer step, by name, in float64.

    Every rank adds the same names, in the same order and sizes, and then calls :meth:`reduce` once; afterwards `scalars[name]` is
    the sum, or the mean, over ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._device = world.device if world.device.type == "cuda" else torch.device("cpu")
        self._local: dict[str, Tensor] = {}
        self._reduction: dict[str, Reduction] = {}
        self._reduced: dict[str, Tensor] = {}
        self._numbers: dict[str, list[float]] = {}

    def add(self, name: str, value: Tensor | float, reduction: Reduction = "sum") -> None:
        """Add `value` to what this rank has under `name`; the host does not wait for it.

        Raises:
            ValueError: the name was added before with another reduction.
        """
        if self._reduction.setdefault(name, reduction) != reduction:
            raise ValueError(f"step scalar {name!r} has reduction {self._reduction[name]}, not {reduction}")
        if isinstance(value, Tensor):
            tensor = value.detach().to(self._device, torch.float64).reshape(-1)
        else:  # stays on the host until it is reduced
            tensor = torch.tensor([float(value)], dtype=torch.float64)
        self._local[name] = self._local[name] + tensor if name in self._local else tensor.clone()

    def reduce(self) -> None:
        """Reduce over ranks: one all-reduce, and the only moment of a step at which the host waits for the device."""
        size = self._world.size
        parts = [part / size if self._reduction[name] == "mean" else part for name, part in self._local.items()]
        on_host = [part if part.device.type == "cpu" else torch.zeros(len(part), dtype=part.dtype) for part in parts]
        vector = torch.cat(on_host).to(self._device, non_blocking=True)  # one copy of what is on the host
        for place, part in zip(torch.split(vector, [len(part) for part in parts]), parts, strict=True):
            if part.device.type != "cpu":
                place.copy_(part)
        self._world.sum(vector)
        lengths = [len(part) for part in self._local.values()]
        numbers = iter(vector.tolist())
        for name, part in zip(self._local, torch.split(vector, lengths), strict=True):
            self._reduced[name] = part
            self._numbers[name] = [next(numbers) for _ in range(len(part))]

    def __getitem__(self, name: str) -> float:
        """A scalar, reduced."""
        (number,) = self._numbers[name]
        return number

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def vector(self, name: str) -> list[float]:
        """A vector, reduced; empty where no such name was added."""
        return self._numbers.get(name, [])

    def tensor(self, name: str) -> Tensor:
        """A scalar or vector, reduced, on the device."""
        return self._reduced[name]
