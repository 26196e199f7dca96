"""What a model asks of the processes that run it together. Imports nothing above the models' floor."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Ranks(Protocol):
    """The collectives that loading, scoring and generation use; :class:`trainer.distributed.world.World` has them.

    Every rank makes the same calls in the same order.
    """

    @property
    def size(self) -> int: ...
    @property
    def is_rank_zero(self) -> bool: ...
    def max(self, values: Tensor) -> None:
        """Replace `values` by their largest over ranks."""

    def broadcast(self, values: Tensor) -> None:
        """Replace `values` by those of rank 0."""

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable `value`."""

    def gather_all(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`."""


class SingleProcess:
    """:class:`Ranks` of a model that one process runs."""

    size, is_rank_zero = 1, True

    def max(self, values: Tensor) -> None: ...

    def broadcast(self, values: Tensor) -> None: ...

    def broadcast_object(self, value: Any) -> Any:
        return value

    def gather_all(self, value: Any) -> list[Any]:
        return [value]
