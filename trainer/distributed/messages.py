"""How ranks, nodes, runs and their faults are listed in messages."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value", bound=Hashable)

LISTED = 4  # names in a message before "and N more"


def join_truncated(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def format_ranks(ranks: Iterable[int]) -> str:
    """``rank 3``, or ``ranks 0-2, 5``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    single = len(spans) == 1 and spans[0][0] == spans[0][1]
    return f"rank {listed}" if single else f"ranks {listed}"


def format_faults(faults: Sequence[str], head: str) -> str:
    """Several faults as one message."""
    count = f"{len(faults)} fault{'' if len(faults) == 1 else 's'}"
    return "\n".join([f"{head}: {count}", *(f"  {fault}" for fault in faults)])


def group_by_value(pairs: Iterable[tuple[Item, Value]]) -> dict[Value, list[Item]]:
    """(item, value) pairs as value -> the items that have it, in the order of their first appearance."""
    groups: dict[Value, list[Item]] = {}
    for item, value in pairs:
        groups.setdefault(value, []).append(item)
    return groups
