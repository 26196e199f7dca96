"""Lists in messages: the first few of many names, and who has which value."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Value = TypeVar("Value", bound=Hashable)
Item = TypeVar("Item")

LISTED = 4  # names in a message before "and N more"


def join_truncated(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def group_by_value(pairs: Iterable[tuple[Value, Item]]) -> dict[Value, list[Item]]:
    """value -> the items that have it, both in order of appearance."""
    groups: dict[Value, list[Item]] = {}
    for value, item in pairs:
        groups.setdefault(value, []).append(item)
    return groups
