"""This process among the processes of a run, and the collectives of objects and small tensors that they use."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
BROKEN = re.compile(r"Connection (closed|reset) by peer")  # in the bare RuntimeErrors of gloo


class PeerFault(RuntimeError):
    """Another rank failed; its own message says why."""


class ConnectionLost(PeerFault):
    """Another rank has ended, and its connections with it."""


def as_peer_fault(error: BaseException) -> PeerFault | None:
    """The fault of another rank that `error` reports, if it does; gloo reports one by its message alone."""
    if isinstance(error, PeerFault):
        return error
    broken = BROKEN.search(str(error)) if isinstance(error, RuntimeError) else None
    if broken is None:
        return None
    return ConnectionLost(f"another rank has ended, which closed the connection to it ({broken[0]})")


@contextlib.contextmanager
def lost_connections_typed() -> Iterator[None]:
    """Around collectives: a bare RuntimeError about a broken connection becomes :class:`ConnectionLost`."""
    try:
        yield
    except RuntimeError as error:
        fault = as_peer_fault(error)
        if fault is None or fault is error:
            raise
        raise fault from error


@dataclass(frozen=True)
class World:
    """This process among the run's processes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @lost_connections_typed()
    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    @lost_connections_typed()
    def sum(self, values: Tensor) -> None:
        """Replace `values` by their sum over ranks."""
        if self.size > 1:
            dist.all_reduce(values)

    @lost_connections_typed()
    def max(self, values: Tensor) -> None:
        """Replace `values` by their largest over ranks."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)

    @lost_connections_typed()
    def broadcast(self, values: Tensor) -> None:
        """Replace `values` by those of rank 0."""
        if self.size > 1:
            dist.broadcast(values, 0)

    @lost_connections_typed()
    def gather(self, value: T) -> list[T] | None:
        """Every rank's picklable `value`, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        values = [value] * self.size if self.is_rank_zero else None
        dist.gather_object(value, values)
        return values

    @lost_connections_typed()
    def broadcast_object(self, value: T) -> T:
        """Rank 0's picklable `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    @lost_connections_typed()
    def gather_all(self, value: T) -> list[T]:
        """Every rank's picklable `value`, on every rank."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """Every rank does the block's work, without collectives in it; where one fails, all of them do."""
        fault: Exception | None = None
        try:
            yield
        except Exception as error:
            fault = error
            raise
        finally:
            errors = self.gather_all(None if fault is None else f"{type(fault).__name__}: {fault}")
            failed = next((rank for rank, error in enumerate(errors) if error is not None), None)
            if fault is None and failed is not None:
                raise PeerFault(f"stopped, since rank {failed} failed: {errors[failed]}")

    @contextlib.contextmanager
    def on_rank_zero(self) -> Iterator[bool]:
        """Rank 0 runs the block's work while the others wait behind it; its failure fails all of them.

        The block gets whether this is rank 0 and must do nothing elsewhere.
        """
        fault: BaseException | None = None
        try:
            yield self.is_rank_zero
        except Exception as error:
            fault = error
            raise
        finally:
            message = self.broadcast_object(None if fault is None else f"{type(fault).__name__}: {fault}")
            if fault is None and message is not None:
                raise PeerFault(f"stopped, since rank 0 failed: {message}")
