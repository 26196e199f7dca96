"""Step scalars: named, each with its reduction, all in one all-reduce."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from trainer.distributed.world import World
from trainer.run.scalars import StepScalars


class Exchange:
    """An all-reduce between threads that stand for ranks."""

    def __init__(self, size: int) -> None:
        self.barrier, self.by_rank, self.calls = threading.Barrier(size), dict[int, Tensor](), 0

    def sum(self, rank: int, values: Tensor) -> None:
        self.by_rank[rank] = values.clone()
        self.barrier.wait(timeout=30)
        values.copy_(torch.stack([self.by_rank[r] for r in sorted(self.by_rank)]).sum(0))
        self.calls += rank == 0
        self.barrier.wait(timeout=30)


@dataclass(frozen=True)
class ThreadWorld(World):
    exchange: Exchange = field(default_factory=lambda: Exchange(1))

    def sum(self, values: Tensor) -> None:
        self.exchange.sum(self.rank, values)


def test_sums_and_means_over_ranks_come_back_by_name_from_one_all_reduce() -> None:
    exchange, results = Exchange(3), {}

    def work(rank: int) -> None:
        scalars = StepScalars(ThreadWorld(rank, 3, torch.device("cpu"), exchange))
        for micro in range(2):
            scalars.add("loss", torch.tensor(rank + 0.25 * micro, dtype=torch.float32, requires_grad=True))
        scalars.add("usage", torch.tensor([0.5, rank / 4]), "mean")
        scalars.add("stop", rank == 1)
        scalars.reduce()
        results[rank] = (
            scalars["loss"],
            scalars.vector("usage"),
            scalars["stop"],
            list(scalars),
            scalars.tensor("usage"),
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert exchange.calls == 1
    for loss, usage, stop, names, tensor in results.values():
        assert loss == (0 + 1 + 2) * 2 + 3 * 0.25
        assert usage == pytest.approx([0.5, 0.25], abs=1e-15)
        assert stop == 1.0
        assert names == ["loss", "usage", "stop"]
        assert tensor.dtype == torch.float64
        assert not tensor.requires_grad
    assert len(results) == 3


def test_a_name_has_one_reduction_and_what_is_added_is_not_changed() -> None:
    scalars = StepScalars(World(0, 1, torch.device("cpu")))
    values = torch.ones(2, dtype=torch.float64)
    scalars.add("a", values)
    scalars.add("a", values)
    assert values.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="'a' has reduction sum, not mean"):
        scalars.add("a", 1.0, "mean")
    scalars.reduce()
    assert scalars.vector("a") == [2.0, 2.0]
    assert scalars.vector("absent") == []
    with pytest.raises(KeyError):
        scalars["absent"]
