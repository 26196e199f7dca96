"""Conversations in a dataset: which utterances came before which."""

from __future__ import annotations

import bisect


class Conversations:
    """Which samples came before which, by dialogue and turn.

    A dialogue without any turn is in the order of its rows. Where only some rows have a turn, those without one have no
    history and are in nobody's. Of rows with the same turn none is before the other.
    """

    def __init__(self, dialogues: list[str | None], turns: list[int | None]) -> None:
        numbered = {name for name, turn in zip(dialogues, turns, strict=True) if turn is not None}
        self._members: dict[str, list[tuple[int, int]]] = {}
        self._place: dict[int, tuple[str, int]] = {}
        for i, (name, turn) in enumerate(zip(dialogues, turns, strict=True)):
            if name is not None and (turn is not None or name not in numbered):
                self._place[i] = (name, i if turn is None else turn)
                self._members.setdefault(name, []).append((i if turn is None else turn, i))
        for members in self._members.values():
            members.sort()

    def before(self, i: int, limit: int) -> list[int]:
        """The at most `limit` samples just before sample `i`, oldest first."""
        if i not in self._place:
            return []
        name, turn = self._place[i]
        members = self._members[name]
        end = bisect.bisect_left(members, (turn, -1))
        return [k for _, k in members[max(0, end - limit) : end]]
